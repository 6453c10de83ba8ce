"""What is in the chart: its table of values, the rules and dashboards as they stand in their files, and its version."""

from __future__ import annotations

import importlib.util
import json
import re
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART, ROOT, SCENARIOS, Rendered, helm, render, scenario
from tests.helm.test_semantics import metric_names

DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
RULES = sorted((CHART / "rules").glob("*.yaml"))
WITH_RULES = SCENARIOS["autoscaled"]
LARGEST_CONFIG_MAP = 250_000  # kubectl's annotation of the last applied object holds 262 144 bytes
LARGEST_ARCHIVE = 500_000  # Helm keeps it, as base64 twice over, in a Secret of at most 1 MiB


@pytest.fixture(scope="module")
def values_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("values_table", ROOT / "helm" / "values_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_in_the_readme_is_current(values_table: ModuleType) -> None:
    readme = (CHART / "README.md").read_text()
    table = values_table.table((CHART / "values.yaml").read_text())
    assert values_table.with_table(readme, table) == readme, "run: make chart-readme"


def test_the_table_has_every_value(values_table: ModuleType) -> None:
    text = "# -- One.\na: 1\nb:\n  # -- Two,\n  # in two lines.\n  c: [x]\n  d:\n    # -- Three | four.\n    e: {}\n"
    assert values_table.table(text).splitlines()[2:] == [
        "| `a` | `1` | One. |",
        '| `b.c` | `["x"]` | Two, in two lines. |',
        "| `b.d.e` | `{}` | Three \\| four. |",
    ]
    with pytest.raises(values_table.TableError, match=r"b\.d has no"):
        values_table.table("b:\n  # -- Two.\n  c: 1\n  d: 2\n")


def test_the_readme_names_every_example() -> None:
    readme = (CHART / "README.md").read_text()
    for path in SCENARIOS.values():
        assert f"(ci/{path.name})" in readme


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]


def test_the_image_is_what_the_chart_expects() -> None:
    """User, ports, folders and names of the Dockerfile, where the chart takes them for granted."""
    text = (ROOT / "Dockerfile").read_text()
    rendered = scenario("one-gpu")
    context = rendered.template["spec"]["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in text
    ports = " ".join(str(port["containerPort"]) for port in rendered.server["ports"])
    assert f"EXPOSE {ports}" in text
    told = dict(re.findall(r"([A-Z_]+)=(/\S+)", text))
    for variable in rendered.server["env"]:
        if variable["name"] in told:
            assert variable["value"] == told[variable["name"]], variable["name"]
    for name in ("one-gpu", "cpu-demo"):
        image = scenario(name).server["image"]
        assert f"--tag {image} " in text, (
            "the tag that the chart asks for is the one that the Dockerfile tells to build"
        )


def test_the_page_on_kubernetes_names_metrics_that_exist() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    named = set(re.findall(r"lightqwen_[a-z_]+", page))
    assert len(named) >= 4
    assert named <= metric_names()


def test_the_archive_has_what_is_loaded_and_no_more(tmp_path: Path) -> None:
    helm("package", CHART, "--destination", tmp_path, home=tmp_path)
    (archive,) = tmp_path.glob("*.tgz")
    assert archive.stat().st_size < LARGEST_ARCHIVE
    with tarfile.open(archive) as file:
        names = {name.removeprefix("lightqwen/") for name in file.getnames()}
    loaded = {str(path.relative_to(CHART)) for path in [*DASHBOARDS, *RULES]}
    assert names >= loaded | {"values.schema.json", "README.md", "templates/NOTES.txt"}
    assert not {name for name in names if name.startswith("ci/")}


def test_there_are_dashboards_and_rules() -> None:
    assert len(DASHBOARDS) >= 4
    assert len(RULES) >= 2


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_packaged_as_it_is(path: Path) -> None:
    """Grafana's own braces are left alone, and every dashboard has a ConfigMap of its own."""
    (item,) = (item for item in scenario("autoscaled").of("ConfigMap") if path.name in item["data"])
    assert item["data"][path.name] == path.read_text().strip()
    assert json.loads(item["data"][path.name])["title"]
    assert len(json.dumps(item)) < LARGEST_CONFIG_MAP
    assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert item["metadata"]["annotations"] == {"grafana_folder": "lightqwen"}


def test_dashboards_can_be_left_out() -> None:
    without = render(SCENARIOS["one-gpu"], values={"dashboards.enabled": False})
    assert [item["metadata"]["name"] for item in without.of("ConfigMap")] == ["qwen-lightqwen"]


def packaged(rendered: Rendered, path: Path) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = rendered.one("PrometheusRule", f"qwen-lightqwen-{path.stem}")["spec"]["groups"]
    return groups


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_rules_are_packaged_as_they_are(path: Path) -> None:
    groups = yaml.safe_load(path.read_text())["groups"]
    for group in groups:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["labels"] = {"team": "inference"} | rule.get("labels", {})
    assert packaged(scenario("autoscaled"), path) == groups


def test_rules_take_labels_addresses_and_omissions() -> None:
    url = "https://example.com/lightqwen/docs/runbooks.md"
    files = {path: yaml.safe_load(path.read_text()) for path in RULES}
    alerts = [
        rule["alert"]
        for file in files.values()
        for group in file["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    gone = alerts[0]
    values = {"prometheusRule.disabledAlerts": [gone], "prometheusRule.runbookUrl": url}
    rendered = render(WITH_RULES, values=values)
    seen = [rule for path in RULES for group in packaged(rendered, path) for rule in group["rules"] if "alert" in rule]
    assert [rule["alert"] for rule in seen] == alerts[1:]
    for rule in seen:
        assert rule["annotations"]["runbook_url"] == f"{url}#{rule['alert'].lower()}"
        assert rule["labels"]["team"] == "inference"
        assert rule["labels"]["severity"] in {"critical", "warning"}
    assert {item["metadata"]["labels"]["release"] for item in rendered.of("PrometheusRule")} == {
        "kube-prometheus-stack"
    }


def test_a_file_whose_alerts_are_all_left_out_is_no_empty_group() -> None:
    names = [
        rule["alert"]
        for rule in yaml.safe_load((CHART / "rules" / "kubernetes.yaml").read_text())["groups"][0]["rules"]
    ]
    rendered = render(WITH_RULES, values={"prometheusRule.disabledAlerts": names})
    assert packaged(rendered, CHART / "rules" / "kubernetes.yaml") == []
