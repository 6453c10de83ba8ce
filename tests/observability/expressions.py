"""Every PromQL expression that the chart ships: where it stands, what it says, and which series it asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

CHART = Path(__file__).parents[2] / "helm" / "lightqwen"
RULES = sorted((CHART / "rules").glob("*.yaml"))
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))

# What other exporters offer and ours does not. Anything else comes from lightqwen, or from Prometheus itself.
OTHER_EXPORTERS = {
    "kube_pod_container_status_restarts_total": "kube-state-metrics",
    "kube_pod_container_status_last_terminated_reason": "kube-state-metrics",
    "kube_pod_status_unschedulable": "kube-state-metrics",
    "kube_pod_container_resource_requests": "kube-state-metrics",
    "DCGM_FI_DEV_GPU_UTIL": "dcgm-exporter",
    "DCGM_FI_DEV_FB_USED": "dcgm-exporter",
    "DCGM_FI_DEV_POWER_USAGE": "dcgm-exporter",
    "DCGM_FI_DEV_GPU_TEMP": "dcgm-exporter",
    "DCGM_FI_DEV_SM_CLOCK": "dcgm-exporter",
    "DCGM_FI_DEV_XID_ERRORS": "dcgm-exporter",
}
PROMETHEUS_ITSELF = {"up"}


@dataclass(frozen=True)
class Expression:
    where: str
    text: str  # as Prometheus takes it, Grafana's variables replaced

    def selectors(self) -> list[Any]:
        """The vector selectors in it."""
        return list(_selectors(promql_parser.parse(self.text)))

    def metrics(self) -> set[str]:
        return {selector.name for selector in self.selectors()}


def _selectors(node: Any) -> Iterator[Any]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            yield from _selectors(argument)
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from _selectors(node.lhs)
        yield from _selectors(node.rhs)
    elif isinstance(node, promql_parser.AggregateExpr | promql_parser.ParenExpr | promql_parser.UnaryExpr):
        yield from _selectors(node.expr)
    elif not isinstance(node, promql_parser.NumberLiteral | promql_parser.StringLiteral):
        raise TypeError(f"an expression of a kind that this test does not know: {type(node).__name__}")


def load_rules() -> list[dict[str, Any]]:
    """Every rule of every file."""
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def load_dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in DASHBOARDS}


def rule_expressions(kind: str) -> list[Expression]:
    """Of the rules that are an `alert`, or a `record`."""
    return [Expression(f"{kind} {rule[kind]}", rule["expr"]) for rule in load_rules() if kind in rule]


def panel_expressions(interval: str = "2m", time_range: str = "1h") -> list[Expression]:
    """Of every panel, for all models, namespaces and pods."""
    found = []
    for name, dashboard in load_dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                where = f"{name} / {panel['title']} / {target['refId']}"
                found.append(Expression(where, fill_in(target["expr"], interval, time_range)))
    return found


def annotation_expressions(interval: str = "2m", time_range: str = "1h") -> list[Expression]:
    return [
        Expression(f"{name} / annotation {annotation['name']}", fill_in(annotation["expr"], interval, time_range))
        for name, dashboard in load_dashboards().items()
        for annotation in dashboard["annotations"]["list"]
    ]


def fill_in(expr: str, interval: str, time_range: str) -> str:
    """Replace Grafana's variables as Grafana does when everything is chosen."""
    for name, value in {
        "$__rate_interval": interval,
        "$__range": time_range,
        "$model": ".*",
        "$namespace": ".*",
        "$pod": ".*",
    }.items():
        expr = expr.replace(name, value)
    if "$" in expr:
        raise ValueError(f"a variable that nothing fills in: {expr}")
    return expr
