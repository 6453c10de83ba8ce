"""A run's result as one HTML file that needs nothing else: tables, and charts drawn by matplotlib as inline SVG."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.load.errors import LoadError
from bench.load.metrics import Floats, Latencies
from bench.load.report import COLUMNS, Result, figures, headline, latencies, warnings
from bench.load.sender import COMPLETED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HISTOGRAM_BINS = 60
BLUE, ORANGE, GREY = "#1f5fa8", "#d9731a", "#8a8f98"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; text-align: left; vertical-align: top; }
tr + tr { border-top: 1px solid #e3e6eb; } table.numbers td, table.numbers th { text-align: right; }
table.numbers th:first-child { text-align: left; } .warning { color: #a33; } svg { width: 100%; height: auto; }
pre { background: #f5f6f8; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
"""


def require_matplotlib() -> None:
    """See that a page could be drawn.

    Raises:
        LoadError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise LoadError(f"{error.name} is not installed; --html needs: pip install 'lightqwen[bench]'") from error


def page(result: Result) -> str:
    """The whole file. Whatever came from elsewhere is escaped."""
    title, workload = headline(result)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>lightqwen bench {html.escape(result.target)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(workload)}; {html.escape(result.date)}</p>",
        *(f'<p class="warning">{html.escape(text)}</p>' for text in warnings(result)),
        _table(figures(result)),
        "<h2>Latency, ms</h2>",
        _latency_table(result),
        "<h2>Distributions and course</h2>",
        _charts(result),
        "<h2>How it was made</h2>",
        f"<pre>{html.escape(result.command)}</pre>",
    ]
    for name in ("options", "client", "server", "model"):
        parts += [f"<h2>{name.capitalize()}</h2>", _table(_flat(getattr(result, name)))]
    return "\n".join([*parts, "</body></html>\n"])


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _flat(values: Any) -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if value is not None:
            yield name, value if isinstance(value, str) else json.dumps(value)


def _latency_table(result: Result) -> str:
    rows = ["<tr><th></th>" + "".join(f"<th>{column}</th>" for column in COLUMNS) + "</tr>"]
    for name, cells in latencies(result.summary):
        rows.append(f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<table class="numbers">{"".join(rows)}</table>'


# ---- charts ----------------------------------------------------------------------------------------------------------


def _charts(result: Result) -> str:
    """One SVG with all charts: throughput and TTFT over time, and the distributions."""
    import matplotlib
    from matplotlib.figure import Figure

    measured = Latencies.of(result.records)
    # Text stays text, and ids do not depend on chance: the same result gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightqwen", "font.size": 9}):
        figure = Figure(figsize=(11, 10), layout="constrained")
        axes = figure.subplots(3, 2)
        _draw_throughput(axes[0, 0], result)
        _draw_course(axes[0, 1], result)
        _draw_distribution(axes[1, 0], measured.ttft, "TTFT")
        _draw_distribution(axes[1, 1], measured.itl, "ITL", crowded=True)
        _draw_distribution(axes[2, 0], measured.tpot, "TPOT")
        _draw_distribution(axes[2, 1], measured.e2el, "E2EL")
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = drawn.getvalue()
    return text[text.index("<svg") :]  # inside HTML, the XML declaration and the document type have no place


def _draw_throughput(axes: Axes, result: Result) -> None:
    timeline = result.summary.timeline
    edges = np.arange(len(timeline.output_tokens_per_s) + 1) * timeline.width_s
    axes.stairs(timeline.output_tokens_per_s, edges, color=BLUE, fill=True, alpha=0.35)
    axes.set(title="throughput and open requests", xlabel="s", ylabel="output tokens/s", ylim=(0, None))
    right = axes.twinx()
    right.stairs(timeline.running, edges, color=ORANGE)
    right.set_ylabel("open requests", color=ORANGE)
    right.set_ylim(0, None)


def _draw_course(axes: Axes, result: Result) -> None:
    completed = [record for record in result.records if record.status == COMPLETED]
    began = [record.began_s for record in completed]
    axes.plot(
        began, [(r.arrivals_s[0] - r.began_s) * 1e3 for r in completed], ".", color=BLUE, markersize=4, label="TTFT"
    )
    failed = [record.began_s for record in result.records if record.status != COMPLETED]
    if failed:
        axes.plot(failed, np.zeros(len(failed)), "x", color=ORANGE, label="failed or interrupted")
        axes.legend()
    axes.set(title="TTFT of each request, by when it was sent", xlabel="s", ylabel="ms", ylim=(0, None))


def _draw_distribution(axes: Axes, seconds: Floats, title: str, *, crowded: bool = False) -> None:
    """A histogram with the median (dotted) and p99 (dashed), and the share that is not slower, as a line.

    `crowded`: counts on a logarithmic axis, so that rare long gaps can be seen beside many short ones.
    """
    if len(seconds) == 0:
        axes.set(title=title, xlabel="ms")
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", color=GREY)
        return
    ms = seconds * 1e3
    axes.hist(ms, HISTOGRAM_BINS, color=BLUE, alpha=0.35, log=crowded)
    axes.set_ylabel("count")
    median, p99 = np.percentile(ms, (50, 99))
    axes.axvline(median, color=GREY, linewidth=1, linestyle=":")
    axes.axvline(p99, color=GREY, linewidth=1, linestyle="--")
    axes.set(title=f"{title} (p50 {median:,.1f}, p99 {p99:,.1f})", xlabel="ms")
    right = axes.twinx()
    quantiles = np.linspace(0, 100, 201)
    right.plot(np.percentile(ms, quantiles), quantiles, color=ORANGE, linewidth=1)
    right.set_ylabel("% not slower", color=ORANGE)
    right.set_ylim(0, 101)
