"""Writes the Grafana dashboards: `python helm/dashboards.py` makes helm/lightqwen/dashboards/*.json again.

A dashboard is a list of rows, a row a list of panels, a panel a title, a sentence, a unit and its queries. Everything
else (variables, places, colours, links) is decided here once for all of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).parent / "lightqwen" / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SCOPE = 'model=~"$model", namespace=~"$namespace", pod=~"$pod"'
SERVICE_SCOPE = 'model=~"$model", namespace=~"$namespace"'  # of recording rules, which have no pod
TARGET_SCOPE = 'namespace=~"$namespace", pod=~"$pod"'  # of what knows no model
GPU_SCOPE = f'{TARGET_SCOPE}, container="lightqwen"'
RANGE = "[$__rate_interval]"
WIDTH = 24

FAILED = "UNKNOWN|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|UNAVAILABLE|INTERNAL|DATA_LOSS"
"""Codes that the service answers for; as in rules/recording.yaml."""

COLOURS = {"mean": "blue", "p50": "green", "p95": "orange", "p99": "red"}

Kind = Literal["timeseries", "stat", "heatmap", "table", "state-timeline"]


@dataclass(frozen=True, slots=True)
class Query:
    """An expression, and how its series are called."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """`limits` are (value, colour) from which a colour holds; below the first it is green, or red if `low_is_bad`."""

    title: str
    text: str
    unit: str
    queries: list[Query]
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    limits: list[tuple[float, str]] = field(default_factory=list)
    low_is_bad: bool = False
    top: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: list[Panel]


@dataclass(frozen=True, slots=True)
class Dashboard:
    name: str
    title: str
    text: str
    rows: list[Row]


# ---- expressions -----------------------------------------------------------------------------------------------------


def series(metric: str, more: str = "") -> str:
    return f"lightqwen_{metric}{{{SCOPE}{', ' + more if more else ''}}}"


def total(metric: str, by: str = "", more: str = "") -> str:
    """Sum of a gauge."""
    return f"sum{f' by ({by})' if by else ''} ({series(metric, more)})"


def rate(metric: str, by: str = "", more: str = "") -> str:
    """Per second, summed."""
    return f"sum{f' by ({by})' if by else ''} (rate({series(metric, more)}{RANGE}))"


def mean(histogram: str, more: str = "") -> str:
    """Of what was observed in the interval; nothing, rather than NaN, when there was nothing."""
    return f"{rate(f'{histogram}_sum', more=more)} / ({rate(f'{histogram}_count', more=more)} > 0)"


def quantile(q: float, histogram: str, more: str = "", by: str = "") -> str:
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', f'le, {by}' if by else 'le', more)})"


def share(part: str, whole: str) -> str:
    return f"{part} / ({whole} > 0)"


def over_range(metric: str, more: str) -> str:
    """How many in the dashboard's whole time range."""
    return f"sum (increase({series(metric, more)}[$__range]))"


# ---- panels that come up often ---------------------------------------------------------------------------------------


def distribution(title: str, text: str, histogram: str, unit: str = "s", more: str = "", width: int = 8) -> Panel:
    """Mean, p50, p95 and p99."""
    queries = [Query(mean(histogram, more), "mean")]
    queries += [Query(quantile(q, histogram, more), f"p{round(q * 100)}") for q in (0.5, 0.95, 0.99)]
    return Panel(title=title, text=f"{text} (lightqwen_{histogram})", unit=unit, queries=queries, width=width)


def heatmap(title: str, text: str, histogram: str, unit: str = "s", more: str = "", width: int = 8) -> Panel:
    expr = f"sum by (le) (increase({series(f'{histogram}_bucket', more)}{RANGE}))"
    text = f"{text} Brighter: more of them. (lightqwen_{histogram})"
    return Panel(
        title=f"{title}, spread", text=text, unit=unit, queries=[Query(expr, "{{le}}")], kind="heatmap", width=width
    )


# ---- the dashboards --------------------------------------------------------------------------------------------------

GENERATE = 'method="Generate"'
COUNTED = f'{GENERATE}, code=~"OK|{FAILED}"'
DECODE = 'phase="decode"'
BAD = f'{GENERATE}, code=~"{FAILED}"'


def burn(title: str, text: str, record: str, budget: float) -> Panel:
    queries = [
        Query(f"service:lightqwen_{record}:ratio_rate{window}{{{SERVICE_SCOPE}}} / {budget}", f"{window} {{{{model}}}}")
        for window in ("5m", "1h", "6h")
    ]
    return Panel(
        title=title,
        text=f"{text} At 1 it lasts for 30 days; alerts begin at 6 and at 14.4. From the recording rules.",
        unit="none",
        queries=queries,
        width=12,
        limits=[(6, "orange"), (14.4, "red")],
    )


def overview() -> Dashboard:
    objectives = [
        Panel(
            title="Servers ready",
            text="Servers whose engine takes requests, of those that Prometheus reaches. (lightqwen_engine_ready)",
            unit="none",
            kind="stat",
            width=4,
            height=5,
            queries=[Query(total("engine_ready"), "ready"), Query(f"count ({series('engine_ready')})", "reached")],
        ),
        Panel(
            title="Servers unreachable",
            text="Servers that Prometheus knows and cannot scrape. (up)",
            unit="none",
            kind="stat",
            width=4,
            height=5,
            queries=[Query(f'sum (up{{job="lightqwen", {TARGET_SCOPE}}} == bool 0)', "unreachable")],
            limits=[(1, "red")],
        ),
        Panel(
            title="Calls that ended well",
            text=(
                "In the chosen time: share of the Generate calls that count. What clients cancelled or got wrong does "
                "not count. Objective: 99.9 %. (lightqwen_grpc_requests_total)"
            ),
            unit="percentunit",
            kind="stat",
            width=4,
            height=5,
            queries=[
                Query(
                    f"1 - {share(over_range('grpc_requests_total', BAD), over_range('grpc_requests_total', COUNTED))}",
                    "",
                )
            ],
            limits=[(0.99, "orange"), (0.999, "green")],
            low_is_bad=True,
        ),
        Panel(
            title="First tokens within 2.5 s",
            text="In the chosen time: share of the first tokens. Objective: 95 %. (lightqwen_ttft_seconds)",
            unit="percentunit",
            kind="stat",
            width=4,
            height=5,
            queries=[
                Query(share(over_range("ttft_seconds_bucket", 'le="2.5"'), over_range("ttft_seconds_count", "")), "")
            ],
            limits=[(0.9, "orange"), (0.95, "green")],
            low_is_bad=True,
        ),
        Panel(
            title="Output tokens per second",
            text="Tokens that the engine makes, all servers together. (lightqwen_generation_tokens_total)",
            unit="suffix: tok/s",
            kind="stat",
            width=4,
            height=5,
            queries=[Query(rate("generation_tokens_total"), "")],
        ),
        Panel(
            title="Up for",
            text="Time since the youngest server's process started. (lightqwen_start_time_seconds)",
            unit="s",
            kind="stat",
            width=4,
            height=5,
            queries=[Query(f"time() - max ({series('start_time_seconds')})", "")],
        ),
        burn("Error budget burn", "How fast failing calls spend the error budget (0.1 %).", "generate_errors", 0.001),
        burn("TTFT budget burn", "How fast late first tokens spend their budget (5 %).", "ttft_slow", 0.05),
    ]
    traffic = [
        Panel(
            title="Generate calls by status",
            text="Calls that ended, per second. (lightqwen_grpc_requests_total)",
            unit="reqps",
            stacked=True,
            queries=[Query(f"{rate('grpc_requests_total', 'code', GENERATE)} > 0", "{{code}}")],
        ),
        Panel(
            title="Requests by state",
            text="Waiting for their first step, or computed. (lightqwen_requests_waiting, lightqwen_requests_running)",
            unit="none",
            stacked=True,
            queries=[Query(total("requests_running"), "running"), Query(total("requests_waiting"), "waiting")],
        ),
        Panel(
            title="Tokens",
            text=(
                "Per second: made, computed of prompts, and taken from the prefix cache instead. "
                "(lightqwen_generation_tokens_total, lightqwen_computed_prompt_tokens_total, "
                "lightqwen_prefix_cache_hit_tokens_total)"
            ),
            unit="suffix: tok/s",
            queries=[
                Query(rate("generation_tokens_total"), "output"),
                Query(rate("computed_prompt_tokens_total"), "prompt, computed"),
                Query(rate("prefix_cache_hit_tokens_total"), "prompt, cached"),
            ],
        ),
        Panel(
            title="Refused",
            text="Requests refused before any work, by reason. (lightqwen_admission_rejections_total)",
            unit="reqps",
            stacked=True,
            queries=[Query(rate("admission_rejections_total", "reason"), "{{reason}}")],
        ),
        Panel(
            title="Given up",
            text="Requests that a client or its deadline ended, by where they were. (lightqwen_cancelled_total)",
            unit="reqps",
            stacked=True,
            queries=[Query(rate("cancelled_total", "stage"), "{{stage}}")],
        ),
        Panel(
            title="Finished",
            text="Requests that came to their own end, by reason. (lightqwen_requests_finished_total)",
            unit="reqps",
            stacked=True,
            queries=[Query(rate("requests_finished_total", "reason"), "{{reason}}")],
        ),
    ]
    latency = [
        distribution("Time to first token", "From a call's arrival.", "ttft_seconds"),
        distribution("Between tokens", "Of one request.", "itl_seconds"),
        distribution("Whole request", "From a call's arrival until its last token.", "e2e_seconds"),
        heatmap("Time to first token", "How first tokens spread.", "ttft_seconds"),
        heatmap("Between tokens", "How the gaps between tokens spread.", "itl_seconds"),
        Panel(
            title="Where the time goes",
            text=(
                "Means: waiting, prefill, decode. Together about the mean whole request. "
                "(lightqwen_queue_seconds, lightqwen_prefill_seconds, lightqwen_decode_seconds)"
            ),
            unit="s",
            stacked=True,
            queries=[Query(mean(f"{phase}_seconds"), phase) for phase in ("queue", "prefill", "decode")],
        ),
    ]
    return Dashboard(
        "overview",
        "Overview and objectives",
        "Does the service keep its promises, and what does its traffic look like?",
        [Row("Objectives", objectives), Row("Traffic", traffic), Row("Latency", latency)],
    )


def engine() -> Dashboard:
    cache = [
        Panel(
            title="KV cache in use",
            text="Share of the KV blocks that running requests hold. (lightqwen_kv_cache_usage_ratio)",
            unit="percentunit",
            queries=[Query(total("kv_cache_usage_ratio", "pod"), "{{pod}}")],
            limits=[(0.9, "red")],
            top=1,
        ),
        Panel(
            title="KV blocks",
            text=(
                "What the blocks of every server hold. Cached ones are free too: they go when others are needed. "
                "(lightqwen_kv_blocks_used, lightqwen_kv_blocks_cached, lightqwen_kv_blocks_capacity)"
            ),
            unit="none",
            stacked=True,
            queries=[
                Query(total("kv_blocks_used"), "used"),
                Query(total("kv_blocks_cached"), "cached"),
                Query(
                    f"{total('kv_blocks_capacity')} - {total('kv_blocks_used')} - {total('kv_blocks_cached')}", "empty"
                ),
            ],
        ),
        Panel(
            title="Preemptions",
            text="Requests put back into the queue to make room, and recomputed. (lightqwen_preemptions_total)",
            unit="ops",
            queries=[Query(rate("preemptions_total", "pod"), "{{pod}}")],
        ),
        Panel(
            title="Prefix cache hits",
            text=(
                "Share of the prompt tokens that were looked up and found. "
                "(lightqwen_prefix_cache_hit_tokens_total, lightqwen_prefix_cache_queried_tokens_total)"
            ),
            unit="percentunit",
            queries=[
                Query(
                    share(
                        rate("prefix_cache_hit_tokens_total", "pod"), rate("prefix_cache_queried_tokens_total", "pod")
                    ),
                    "{{pod}}",
                )
            ],
            top=1,
        ),
        Panel(
            title="Cached share of started prompts",
            text=(
                "Of the prompt tokens of requests that began: found in the cache. "
                "(lightqwen_cached_prompt_tokens_total, lightqwen_prompt_tokens_total)"
            ),
            unit="percentunit",
            queries=[
                Query(share(rate("cached_prompt_tokens_total", "pod"), rate("prompt_tokens_total", "pod")), "{{pod}}")
            ],
            top=1,
        ),
        distribution(
            "Cancel until free", "From giving a request up until its blocks are free.", "cancel_to_free_seconds"
        ),
    ]
    queue = [
        Panel(
            title="Waiting requests",
            text="They wait for their first step, or to be taken up again. (lightqwen_requests_waiting)",
            unit="none",
            queries=[Query(total("requests_waiting", "pod"), "{{pod}}")],
        ),
        Panel(
            title="Waiting prompt tokens",
            text="Tokens of the waiting requests' prompts. (lightqwen_waiting_prompt_tokens)",
            unit="none",
            queries=[Query(total("waiting_prompt_tokens", "pod"), "{{pod}}")],
        ),
        distribution("Queue", "From a call's arrival until its first step.", "queue_seconds"),
        distribution("Prefill", "From the first step until the first token.", "prefill_seconds"),
        distribution("Decode", "From the first token until the last.", "decode_seconds"),
        heatmap("Queue", "How waiting times spread.", "queue_seconds"),
    ]
    steps = [
        Panel(
            title="Steps per second",
            text="Forward passes, by phase: only decode, or prefill with it. (lightqwen_step_seconds_count)",
            unit="ops",
            stacked=True,
            queries=[Query(rate("step_seconds_count", "phase"), "{{phase}}")],
        ),
        distribution("Decode steps", "Time of one step without prefill.", "step_seconds", more=DECODE),
        distribution("Mixed steps", "Time of one step with prefill in it.", "step_seconds", more='phase="mixed"'),
        distribution("Batch size", "Requests in one step.", "batch_size", unit="none"),
        distribution("Tokens per step", "Prompt tokens and decoded ones together.", "iteration_tokens", unit="none"),
        heatmap("Step time", "How steps of both phases spread.", "step_seconds"),
    ]
    facts = [
        Panel(
            title="What each engine runs with",
            text="Device, dtype, attention and limits. (lightqwen_engine_info)",
            unit="none",
            kind="table",
            width=16,
            queries=[Query(series("engine_info"), "")],
        ),
        Panel(
            title="Shape of the KV cache",
            text="Tokens of a block, and blocks of each rank. (lightqwen_cache_config_info)",
            unit="none",
            kind="table",
            queries=[Query(series("cache_config_info"), "")],
        ),
    ]
    return Dashboard(
        "engine",
        "Engine and KV cache",
        "How full is the KV cache, what waits, and what do steps cost?",
        [Row("KV cache", cache), Row("Queue and phases", queue), Row("Steps", steps), Row("Configuration", facts)],
    )


def ranks() -> Dashboard:
    lives = [
        Panel(
            title="Ranks up",
            text="Ranks that take part. They live and die together. (lightqwen_worker_up)",
            unit="none",
            kind="stat",
            width=4,
            height=5,
            queries=[Query(total("worker_up"), "up"), Query(f"count ({series('worker_up')})", "known")],
        ),
        Panel(
            title="Restarts of ranks",
            text="In the chosen time: times that the ranks were lost. (lightqwen_engine_restarts_total)",
            unit="none",
            kind="stat",
            width=4,
            height=5,
            queries=[Query(f"sum (increase({series('engine_restarts_total')}[$__range]))", "")],
            limits=[(0.5, "red")],
        ),
        Panel(
            title="Restarts of servers",
            text="In the chosen time: times that a server's process began anew. (lightqwen_start_time_seconds)",
            unit="none",
            kind="stat",
            width=4,
            height=5,
            queries=[Query(f"sum (changes({series('start_time_seconds')}[$__range]))", "")],
            limits=[(0.5, "red")],
        ),
        Panel(
            title="Ranks",
            text="1 while the rank takes part. (lightqwen_worker_up)",
            unit="none",
            kind="state-timeline",
            width=12,
            height=5,
            queries=[Query(f"max by (pod, rank) ({series('worker_up')})", "{{pod}} rank {{rank}}")],
            limits=[(1, "green")],
            low_is_bad=True,
        ),
        Panel(
            title="Versions",
            text="What each server was built from. (lightqwen_build_info)",
            unit="none",
            kind="table",
            queries=[Query(series("build_info"), "")],
        ),
        Panel(
            title="Engines",
            text="Tensor parallel size, device and dtype of each server. (lightqwen_engine_info)",
            unit="none",
            kind="table",
            width=16,
            queries=[Query(series("engine_info"), "")],
        ),
    ]
    pace = [
        distribution(
            "Decode steps",
            "All ranks step together: this is the pace of the slowest, collectives included.",
            "step_seconds",
            more=DECODE,
        ),
        Panel(
            title="Decode steps by server",
            text="p95. A server slower than its like has a slow GPU or link. (lightqwen_step_seconds)",
            unit="s",
            queries=[Query(quantile(0.95, "step_seconds", DECODE, by="pod"), "{{pod}}")],
        ),
        heatmap("Decode steps", "A second band is a rank that stutters.", "step_seconds", more=DECODE),
    ]
    note = "From dcgm-exporter, scraped with honorLabels so that namespace and pod are the server's."
    legend = "{{pod}} GPU {{gpu}}"

    def gpu(title: str, text: str, field: str, unit: str, factor: str = "", top: float | None = None) -> Panel:
        metric = f"DCGM_FI_DEV_{field}"
        expr = f"max by (pod, gpu) ({metric}{{{GPU_SCOPE}}}){factor}"
        return Panel(title=title, text=f"{text} {note} ({metric})", unit=unit, queries=[Query(expr, legend)], top=top)

    gpus = [
        gpu("GPU busy", "Time with any kernel on it, waiting in a collective too.", "GPU_UTIL", "percent", top=100),
        gpu("GPU memory in use", "Weights, KV cache, workspace; constant.", "FB_USED", "bytes", " * 1048576"),
        gpu("GPU power", "Equal work draws about equal power.", "POWER_USAGE", "watt"),
        gpu("GPU temperature", "A hot GPU is clocked down, and every rank waits for it.", "GPU_TEMP", "celsius"),
        gpu("SM clock", "One that is below its like is throttled.", "SM_CLOCK", "hertz", " * 1000000"),
        gpu("Last XID error", "Number of the driver's last error; 0 is none.", "XID_ERRORS", "none"),
    ]
    return Dashboard(
        "ranks",
        "Tensor-parallel ranks",
        "Do all ranks take part, and does one of them slow the others down?",
        [Row("Lives", lives), Row("Pace", pace), Row("GPUs (dcgm-exporter)", gpus)],
    )


def grpc() -> Dashboard:
    calls = [
        Panel(
            title="Calls by method",
            text="Calls that ended, per second. (lightqwen_grpc_requests_total)",
            unit="reqps",
            stacked=True,
            queries=[Query(f"{rate('grpc_requests_total', 'method')} > 0", "{{method}}")],
        ),
        Panel(
            title="Calls by status",
            text="All methods. (lightqwen_grpc_requests_total)",
            unit="reqps",
            stacked=True,
            queries=[Query(f"{rate('grpc_requests_total', 'code')} > 0", "{{code}}")],
        ),
        Panel(
            title="Share of calls by the service's fault",
            text=f"Status {FAILED.replace('|', ', ')}. (lightqwen_grpc_requests_total)",
            unit="percentunit",
            queries=[
                Query(
                    share(
                        rate("grpc_requests_total", "method", f'code=~"{FAILED}"'),
                        rate("grpc_requests_total", "method"),
                    ),
                    "{{method}}",
                )
            ],
        ),
        distribution("Generate", "From a call's arrival until its status.", "grpc_seconds", more=GENERATE),
        distribution(
            "Other methods", "From a call's arrival until its status.", "grpc_seconds", more='method!="Generate"'
        ),
        heatmap("Generate", "How long streams are open.", "grpc_seconds", more=GENERATE),
    ]
    streams = [
        Panel(
            title="Streams in flight",
            text="Generate calls that the engine works for. (lightqwen_streams_in_flight)",
            unit="none",
            queries=[Query(total("streams_in_flight", "pod"), "{{pod}}")],
        ),
        Panel(
            title="Messages to clients",
            text="Deltas per second. (lightqwen_chunk_tokens_count)",
            unit="ops",
            queries=[Query(rate("chunk_tokens_count", "pod"), "{{pod}}")],
        ),
        distribution("Tokens per message", "1 while gateway and readers keep up.", "chunk_tokens", unit="none"),
        Panel(
            title="Refused",
            text="Requests refused before any work, by reason. (lightqwen_admission_rejections_total)",
            unit="reqps",
            stacked=True,
            queries=[Query(rate("admission_rejections_total", "reason"), "{{reason}}")],
        ),
        Panel(
            title="Given up",
            text="Requests that a client or its deadline ended, by where they were. (lightqwen_cancelled_total)",
            unit="reqps",
            stacked=True,
            queries=[Query(rate("cancelled_total", "stage"), "{{stage}}")],
        ),
        heatmap("Cancel until free", "From giving a request up until its blocks are free.", "cancel_to_free_seconds"),
    ]
    loop = [
        distribution(
            "Event loop lag", "How late the gateway is. Beyond some ms it is the limit.", "event_loop_lag_seconds"
        ),
        Panel(
            title="Event loop lag by server",
            text="p99 of each server. (lightqwen_event_loop_lag_seconds)",
            unit="s",
            queries=[Query(quantile(0.99, "event_loop_lag_seconds", by="pod"), "{{pod}}")],
            limits=[(0.25, "red")],
        ),
        heatmap("Event loop lag", "How it spreads.", "event_loop_lag_seconds"),
    ]
    return Dashboard(
        "grpc",
        "gRPC",
        "Which calls come, how do they end, and does the gateway keep up?",
        [Row("Calls", calls), Row("Streams", streams), Row("Event loop", loop)],
    )


# ---- as Grafana wants it ---------------------------------------------------------------------------------------------


def render(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "uid": f"lightqwen-{dashboard.name}",
        "title": f"lightqwen / {dashboard.title}",
        "description": dashboard.text,
        "tags": ["lightqwen"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards",
                "title": "lightqwen",
                "tags": ["lightqwen"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
            }
        ],
        "annotations": {"list": [_restarts()]},
        "templating": {"list": _variables()},
        "panels": _panels(dashboard.rows),
    }


def _variables() -> list[dict[str, Any]]:
    datasource = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    known = "lightqwen_build_info"
    within = {
        "model": known,
        "namespace": f'{known}{{model=~"$model"}}',
        "pod": f'{known}{{model=~"$model", namespace=~"$namespace"}}',
    }
    return [datasource, *(_variable(name, f"label_values({expr}, {name})") for name, expr in within.items())]


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",  # matches a label that is not there, too
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _restarts() -> dict[str, Any]:
    began = f"changes({series('start_time_seconds')}{RANGE})"
    lost = f"increase({series('engine_restarts_total')}{RANGE})"
    return {
        "name": "Restarts",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": f"{began} > 0 or {lost} > 0",
        "titleFormat": "{{pod}} restarted",
    }


def _panels(rows: list[Row]) -> list[dict[str, Any]]:
    """Lay rows out from left to right, and number everything."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        y += 1
        x = tallest = 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            panels.append({"id": len(panels) + 1, "gridPos": place, **_panel(panel)})
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return panels


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "targets": [_target(panel, query, chr(ord("A") + n)) for n, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": _overrides(panel)},
        "options": _options(panel),
        **_transformations(panel),
    }


def _target(panel: Panel, query: Query, ref: str) -> dict[str, Any]:
    instant = panel.kind in ("stat", "table")
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend,
        "instant": instant,
        "range": not instant,
        "format": {"heatmap": "heatmap", "table": "table"}.get(panel.kind, "time_series"),
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "noValue": "no data"}
    if panel.top is not None:
        defaults["max"] = panel.top
    steps: list[dict[str, Any]] = [{"color": "red" if panel.low_is_bad else "green", "value": None}]
    steps += [{"color": colour, "value": value} for value, colour in panel.limits]
    defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    if panel.kind == "timeseries":
        defaults["color"] = {"mode": "palette-classic"}
        defaults["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 0,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.limits else "off"},
        }
    else:
        defaults["color"] = {"mode": "thresholds"}
    return defaults


def _overrides(panel: Panel) -> list[dict[str, Any]]:
    """Means and quantiles have the same colour everywhere; the mean is dashed."""
    overrides = []
    for query in panel.queries:
        if panel.kind == "timeseries" and query.legend in COLOURS:
            colour = {"id": "color", "value": {"mode": "fixed", "fixedColor": COLOURS[query.legend]}}
            dashes = {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 8]}}
            overrides.append(
                {
                    "matcher": {"id": "byName", "options": query.legend},
                    "properties": [colour, dashes] if query.legend == "mean" else [colour],
                }
            )
    return overrides


def _options(panel: Panel) -> dict[str, Any]:
    reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    options: dict[Kind, dict[str, Any]] = {
        "timeseries": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "stat": {"reduceOptions": reduce, "colorMode": "value", "graphMode": "none", "textMode": "auto"},
        "heatmap": {
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Viridis", "exponent": 0.5, "steps": 64},
            "yAxis": {"axisPlacement": "left", "unit": panel.unit},
            "legend": {"show": True},
            "tooltip": {"mode": "single", "yHistogram": False},
        },
        "table": {"showHeader": True, "cellHeight": "sm"},
        "state-timeline": {
            "mergeValues": True,
            "showValue": "never",
            "rowHeight": 0.9,
            "legend": {"showLegend": False},
        },
    }
    return options[panel.kind]


def _transformations(panel: Panel) -> dict[str, Any]:
    if panel.kind != "table":
        return {}
    hidden = ("Time", "Value", "__name__", "container", "endpoint", "instance", "job")
    return {"transformations": [{"id": "organize", "options": {"excludeByName": dict.fromkeys(hidden, True)}}]}


def texts() -> dict[str, str]:
    """File name and content of every dashboard."""
    return {
        f"{dashboard.name}.json": json.dumps(render(dashboard), indent=1) + "\n"
        for dashboard in (overview(), engine(), ranks(), grpc())
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
