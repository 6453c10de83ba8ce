"""The rule files: Prometheus takes them, every alert fires when it should and only then, and has its runbook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.observability.conftest import Promtool
from tests.observability.expressions import OTHER_EXPORTERS, RULES, load_rules, rule_expressions

CASES = sorted((Path(__file__).parent / "rules").glob("*.test.yaml"))
ALERTS = {rule["alert"]: rule for rule in load_rules() if "alert" in rule}


def test_prometheus_takes_the_rules(promtool: Promtool) -> None:
    done = promtool("check", "rules", "--lint-fatal", *RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(number) for number in re.findall(r"SUCCESS: (\d+) rules found", done.stdout)]
    assert sum(counts) == len(load_rules())


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_alerts_fire_when_they_should_and_only_then(promtool: Promtool, path: Path) -> None:
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_firing_and_a_silent_case() -> None:
    firing, silent = set(), set()
    for path in CASES:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for check in case["alert_rule_test"]:
                (firing if check["exp_alerts"] else silent).add(check["alertname"])
    assert firing == silent == set(ALERTS)


def test_a_broken_threshold_is_noticed(promtool: Promtool, tmp_path: Path) -> None:
    """The cases above would be worth nothing if they held for any rule."""
    (path,) = (path for path in CASES if path.name == "kubernetes.test.yaml")
    (rules,) = (path for path in RULES if path.name == "kubernetes.yaml")
    case = yaml.safe_load(path.read_text())
    (tmp_path / "rules.yaml").write_text(rules.read_text().replace("[30m]) >= 2", "[30m]) >= 4"))
    (tmp_path / "case.yaml").write_text(yaml.safe_dump({**case, "rule_files": ["rules.yaml"]}))
    done = promtool("test", "rules", tmp_path / "case.yaml")
    assert done.returncode != 0
    assert "LightqwenContainerRestartLoop" in done.stdout + done.stderr


@pytest.mark.parametrize("rule", ALERTS.values(), ids=lambda rule: rule["alert"])
def test_alert_says_what_is_wrong_and_how_much_it_matters(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{rule['alert'].lower()}"


def test_every_alert_has_a_runbook_and_every_runbook_an_alert(root: Path) -> None:
    text = (root / "docs" / "runbooks.md").read_text()
    sections = dict(re.findall(r"^## (Lightqwen\w+)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S))
    assert set(sections) == set(ALERTS)
    for name, body in sections.items():
        for part in ("**Meaning.**", "**Look.**", "**Act.**"):
            assert part in body, (name, part)
        assert f"*{ALERTS[name]['labels']['severity']}*" in body, name


def test_rules_ask_for_what_there_is(root: Path) -> None:
    """Metrics that are documented (a test holds that page against the code), recorded here, or named as another's."""
    page = (root / "docs" / "metrics.md").read_text()
    ours = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    ours |= {f"{name}_{part}" for name in ours for part in ("bucket", "sum", "count")}
    recorded = {rule["record"] for rule in load_rules() if "record" in rule}
    assert len(recorded) == len([rule for rule in load_rules() if "record" in rule])
    for expression in rule_expressions("alert") + rule_expressions("record"):
        unknown = expression.metrics() - ours - recorded - set(OTHER_EXPORTERS) - {"up"}
        assert not unknown, expression.where


def test_only_one_file_needs_another_exporter() -> None:
    for path in RULES:
        text = path.read_text()
        assert any(name in text for name in OTHER_EXPORTERS) == (path.name == "kubernetes.yaml"), path.name
