"""A run's result: as a table for people, as JSON for programs. Both say what made it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from bench.load.metrics import Distribution, Summary
from bench.load.sender import Record

FORMAT = "lightqwen-bench/1"
BUSY_CLIENT = 0.8  # of a core: above it, the client's own work shows in what it measures
LATE_MS = 20.0

COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Everything that is known of a run."""

    command: str
    date: str
    """ISO 8601, when the first request was sent."""
    target: str
    workload: str
    """For people; `options` has it for programs."""
    left_out: int
    options: Mapping[str, Any]
    client: Mapping[str, Any]
    server: Mapping[str, Any]
    """What GetServerInfo told: version, device, dtype, parallelism, KV cache, limits."""
    model: Mapping[str, Any]
    """What GetModel told."""
    interrupted: bool
    planned: int
    cpu_shares: Sequence[float]
    summary: Summary
    records: Sequence[Record]


def facts(message: Message) -> dict[str, Any]:
    """A message of the contract as plain values; fields that are zero are there too."""
    return dict(MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))


def client_facts(processes: int, connections: int) -> dict[str, Any]:
    """Where the client ran."""
    try:
        version = importlib.metadata.version("lightqwen")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"  # run from a checkout
    return {
        "version": version,
        "python": platform.python_version(),
        "grpcio": importlib.metadata.version("grpcio"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "processes": processes,
        "connections": connections,
    }


def as_json(result: Result, *, details: bool) -> dict[str, Any]:
    """`details`: with the times of every request."""
    values: dict[str, Any] = {"format": FORMAT}
    for name in ("command", "date", "target", "workload", "options", "client", "server", "model"):
        values[name] = getattr(result, name)
    values |= {"interrupted": result.interrupted, "planned": result.planned, "left_out": result.left_out}
    values |= {"client_cpu_shares": list(result.cpu_shares), "warnings": list(warnings(result))}
    values |= asdict(result.summary)
    if details:
        values["records"] = [asdict(record) for record in result.records]
    return values


def table(result: Result) -> str:
    """What the terminal shows."""
    summary = result.summary
    lines = [*headline(result), ""]
    lines += [f"{name:<12}{value}" for name, value in figures(result)]
    lines += ["", f"{'ms':<12}" + "".join(f"{column:>12}" for column in COLUMNS)]
    for name, cells in latencies(summary):
        lines.append(f"{name:<12}" + "".join(f"{cell:>12}" for cell in cells))
    lines += [f"warning: {text}" for text in warnings(result)]
    return "\n".join(lines)


def headline(result: Result) -> list[str]:
    """Who was asked, and for what."""
    server = result.server
    return [
        f"{result.target}: {result.model['name']} on {server['device']}, {server['dtype']}, "
        f"tensor parallel {server['tensor_parallel_size']}, lightqwen {server['version']}",
        result.workload,
    ]


def latencies(summary: Summary) -> Iterator[tuple[str, list[str]]]:
    """A name, and a readable value (ms) for each of `COLUMNS`."""
    for name in ("ttft", "tpot", "itl", "e2el"):
        distribution: Distribution | None = getattr(summary, name)
        yield name.upper(), [f"{getattr(distribution, column):,.2f}" if distribution else "-" for column in COLUMNS]


def figures(result: Result) -> Iterator[tuple[str, str]]:
    """Everything but latencies: a name and a readable value."""
    summary = result.summary
    ended = [f"{summary.completed:,} completed"]
    if summary.failed:
        ended.append(f"{sum(summary.failed.values()):,} failed")
    if result.interrupted:
        ended.append(f"{summary.interrupted_requests:,} interrupted, {result.planned - summary.sent:,} not sent")
    if result.left_out:
        ended.append(f"{result.left_out:,} left out as too long")
    yield "requests", f"{', '.join(ended)}; {summary.duration_s:,.2f} s; {summary.peak_running:,} in flight at most"
    for status, count in summary.failed.items():
        yield "", f"{count:,} x {status}: {summary.failure_examples[status] or 'no output'}"
    yield (
        "tokens",
        f"{summary.prompt_tokens:,} in ({summary.cached_tokens:,} cached), {summary.output_tokens:,} out "
        f"in {summary.arrivals:,} chunks",
    )
    peak = summary.peak_output_tokens_per_s
    yield (
        "throughput",
        f"{summary.requests_per_s:,.2f} requests/s, {summary.output_tokens_per_s:,.1f} output tokens/s"
        + (f" (best second {peak:,.0f})" if peak is not None else "")
        + f", {summary.total_tokens_per_s:,.1f} tokens/s in and out",
    )
    if (goodput := summary.goodput) is not None:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in goodput.limits.items())
        yield "goodput", f"{goodput.requests_per_s:,.2f} requests/s, {goodput.share:.1%} of all, within {limits}"


def warnings(result: Result) -> Iterator[str]:
    """What a reader should know before they believe the figures."""
    busiest = max(result.cpu_shares, default=0.0)
    if busiest > BUSY_CLIENT:
        yield (
            f"a client process used {busiest:.0%} of a core: the client may be what was measured; "
            "use more --processes, or run it on another machine"
        )
    late = result.summary.lateness
    if result.options["concurrency"] is None and late is not None and late.p99 > LATE_MS:
        yield (
            f"requests were sent up to {late.p99:,.0f} ms after they were due (p99): the client does not keep up; "
            "use more --processes, or run it on another machine"
        )
    if full := result.summary.finish_reasons.get("CONTEXT_FULL"):
        yield f"{full:,} outputs ended early, as the model's context was full"
