"""The dashboards as files: up to date, complete, and such that any Grafana can load them."""

from __future__ import annotations

import re
import runpy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.observability.expressions import (
    DASHBOARDS,
    OTHER_EXPORTERS,
    PROMETHEUS_ITSELF,
    annotation_expressions,
    load_dashboards,
    load_rules,
    panel_expressions,
)

NAMES = ["engine", "grpc", "overview", "ranks"]
UNITS = {"none", "suffix: tok/s", "s", "percent", "percentunit", "reqps", "ops", "bytes", "watt", "celsius", "hertz"}
CONFIG_MAP_LIMIT = 250_000  # an annotation of kubectl's has room for 262144 bytes


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.fixture(params=NAMES)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = load_dashboards()[request.param]
    return loaded


def test_committed_dashboards_are_what_the_builder_makes(root: Path) -> None:
    made = runpy.run_path(str(root / "helm" / "dashboards.py"))["texts"]()
    assert made == {path.name: path.read_text() for path in DASHBOARDS}, "run: python helm/dashboards.py"
    assert [path.stem for path in DASHBOARDS] == NAMES


def test_each_has_its_own_fixed_uid() -> None:
    for name, dashboard in load_dashboards().items():
        assert dashboard["uid"] == f"lightqwen-{name}"
        assert dashboard.get("id") is None
        assert dashboard["tags"] == ["lightqwen"]


def test_panels_are_numbered_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    every = dashboard["panels"]
    assert len({panel["id"] for panel in every}) == len({panel["title"] for panel in every}) == len(every)
    for panel in every:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for one, other in combinations(every, 2):
        a, b = one["gridPos"], other["gridPos"]
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart = apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart, (one["title"], other["title"])


def test_every_panel_explains_itself_and_has_a_unit(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        assert len(panel["description"]) > 15, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["targets"], panel["title"]


def test_every_panel_names_its_metrics() -> None:
    texts = {f"{n} / {p['title']}": p["description"] for n, d in load_dashboards().items() for p in panels(d)}
    for expression in panel_expressions():
        where = expression.where.rpartition(" / ")[0]
        for metric in expression.metrics():
            base = re.sub(r"_(bucket|sum|count)$", "", metric)
            assert base in texts[where] or metric.startswith("service:"), (where, metric)


def test_the_datasource_is_the_readers_choice(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        for holder in (panel, *panel["targets"]):
            assert holder["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for annotation in dashboard["annotations"]["list"]:
        assert annotation["datasource"]["uid"] == "${datasource}"


def test_variables_are_there_and_nobodys_machine_is_left_in_them(dashboard: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "model", "namespace", "pod"]
    assert "current" not in variables["datasource"]
    for name in ("model", "namespace", "pod"):
        assert variables[name]["current"]["value"] == ["$__all"]
        assert variables[name]["multi"]
        assert variables[name]["includeAll"]
        assert variables[name]["allValue"] == ".*"


def test_every_query_is_narrowed_by_the_variables(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        for target in panel["targets"]:
            for selector in re.findall(r"\{([^{}]*)\}", target["expr"]):
                ours = 'model=~"$model"' in selector and 'namespace=~"$namespace"' in selector
                assert ours or 'namespace=~"$namespace", pod=~"$pod"' in selector, (panel["title"], selector)


def test_rates_follow_the_scrape_interval(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        for target in panel["targets"]:
            for window in re.findall(r"\[([^\]]+)\]", target["expr"]):
                assert window in ("$__rate_interval", "$__range"), panel["title"]


def test_quantiles_stand_beside_their_mean_and_have_the_same_colours_everywhere(dashboard: dict[str, Any]) -> None:
    shown = 0
    for panel in panels(dashboard):
        legends = [target["legendFormat"] for target in panel["targets"]]
        if "p50" in legends:
            shown += 1
            assert legends == ["mean", "p50", "p95", "p99"], panel["title"]
            assert _colours(panel) == {"mean": "blue", "p50": "green", "p95": "orange", "p99": "red"}, panel["title"]
    assert shown
    assert any(panel["type"] == "heatmap" for panel in panels(dashboard))


def _colours(panel: dict[str, Any]) -> dict[str, str]:
    return {
        override["matcher"]["options"]: prop["value"]["fixedColor"]
        for override in panel["fieldConfig"]["overrides"]
        for prop in override["properties"]
        if prop["id"] == "color"
    }


def test_queries_ask_for_what_there_is(root: Path) -> None:
    page = (root / "docs" / "metrics.md").read_text()
    documented = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    known = documented | {f"{name}_{part}" for name in documented for part in ("bucket", "sum", "count")}
    known |= {rule["record"] for rule in load_rules() if "record" in rule}
    for expression in panel_expressions() + annotation_expressions():
        unknown = expression.metrics() - known - set(OTHER_EXPORTERS) - PROMETHEUS_ITSELF
        assert not unknown, (expression.where, unknown)


def test_every_metric_of_ours_is_on_a_dashboard(root: Path) -> None:
    page = (root / "docs" / "metrics.md").read_text()
    documented = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for e in panel_expressions() for name in e.metrics()}
    assert documented <= shown


def test_codes_that_count_are_the_same_in_rules_and_dashboards() -> None:
    lists = set(re.findall(r'"((?:OK\|)?UNKNOWN\|[A-Z_|]+)"', " ".join(rule["expr"] for rule in load_rules())))
    lists |= set(re.findall(r'"((?:OK\|)?UNKNOWN\|[A-Z_|]+)"', " ".join(e.text for e in panel_expressions())))
    assert len({codes.removeprefix("OK|") for codes in lists}) == 1


def test_a_config_map_can_hold_each() -> None:
    for path in DASHBOARDS:
        assert path.stat().st_size < CONFIG_MAP_LIMIT
