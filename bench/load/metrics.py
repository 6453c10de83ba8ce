"""What the figures are: from the times of each request to distributions, rates and goodput.

The definitions are those of `vllm bench serve`, so that figures can be put side by side:

- TTFT: from the call to the first arrival of output.
- TPOT: (last arrival - first arrival) / (output tokens - 1), of requests with more than one output token.
- ITL: the gap between two arrivals of one request; an arrival may bring several tokens.
- E2EL: from the call to the last arrival.
- Latencies and requests per second count completed requests; a failed one has no latency. (Of requests that Ctrl-C cut
  off, TTFT and ITL count as far as they came.)
- Rates divide by the run's time, from the first call to the end of the last.

One thing differs: tokens per second count whatever arrived, also of requests that failed or were interrupted later.
Without failures it is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.load.sender import COMPLETED, INTERRUPTED, Record

Floats = npt.NDArray[np.float64]

TIMELINE_BINS = 120
BIN_WIDTHS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Milliseconds."""

    count: int
    mean: float
    std: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float] | Floats) -> Distribution | None:
        """Summarise; None where there is nothing."""
        if len(seconds) == 0:
            return None
        ms = np.asarray(seconds, np.float64) * 1e3
        p50, p90, p95, p99 = (float(value) for value in np.percentile(ms, (50, 90, 95, 99)))
        return cls(
            count=len(ms),
            mean=float(ms.mean()),
            std=float(ms.std()),
            min=float(ms.min()),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            max=float(ms.max()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """In seconds: a number for each request, for ITL one for each gap. Failed requests have none."""

    ttft: Floats
    tpot: Floats
    itl: Floats
    e2el: Floats

    @classmethod
    def of(cls, records: Sequence[Record]) -> Latencies:
        completed = [record for record in records if record.status == COMPLETED]
        # What Ctrl-C cut off had a first output, and gaps, as true as any.
        begun = [record for record in records if record.status in (COMPLETED, INTERRUPTED) and record.arrivals_s]
        gaps = [np.diff(record.arrivals_s) for record in begun]
        return cls(
            ttft=np.array([record.arrivals_s[0] - record.began_s for record in begun]),
            tpot=np.array([tpot_s(record) for record in completed if record.output_tokens > 1]),
            itl=np.concatenate(gaps) if gaps else np.array([]),
            e2el=np.array([record.arrivals_s[-1] - record.began_s for record in completed]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Requests that completed and kept every limit (ms)."""

    limits: Mapping[str, float]
    requests: int
    share: float
    """Of all that were sent."""
    requests_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What went on in each stretch of `width_s` seconds, from the beginning of the run."""

    width_s: float
    output_tokens_per_s: list[float]
    running: list[float]
    """Open requests, averaged over the stretch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    duration_s: float
    sent: int
    completed: int
    interrupted_requests: int
    failed: dict[str, int]
    """By status."""
    failure_examples: dict[str, str]
    """What the server said, once for each status."""
    finish_reasons: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    arrivals: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    peak_output_tokens_per_s: float | None
    """In the best whole second of the run; None if it did not last one."""
    peak_running: int
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2el: Distribution | None
    lateness: Distribution | None
    """From when a request was due to its call: large where the client does not keep up, or --concurrency holds back."""
    goodput: Goodput | None
    timeline: Timeline


def tpot_s(record: Record) -> float:
    """Seconds per output token after the first; the record has more than one."""
    return (record.arrivals_s[-1] - record.arrivals_s[0]) / (record.output_tokens - 1)


def summarise(records: Sequence[Record], limits: Mapping[str, float]) -> Summary:
    """Make all figures of a run. `limits`: milliseconds by name, for the goodput; empty: none is asked for."""
    began = min((record.began_s for record in records), default=0.0)
    duration = max((record.ended_s for record in records), default=0.0) - began
    completed = [record for record in records if record.status == COMPLETED]
    failed = [record for record in records if record.status not in (COMPLETED, INTERRUPTED)]
    prompt_tokens = sum(record.prompt_tokens for record in records)
    output_tokens = sum(record.output_tokens for record in records)
    latencies = Latencies.of(records)
    return Summary(
        duration_s=duration,
        sent=len(records),
        completed=len(completed),
        interrupted_requests=len(records) - len(completed) - len(failed),
        failed=dict(Counter(record.status for record in failed)),
        failure_examples={record.status: record.detail for record in reversed(failed)},
        finish_reasons=dict(Counter(record.finish_reason for record in completed)),
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(record.cached_tokens for record in records),
        output_tokens=output_tokens,
        arrivals=sum(len(record.arrivals_s) for record in records),
        requests_per_s=_per_second(len(completed), duration),
        output_tokens_per_s=_per_second(output_tokens, duration),
        total_tokens_per_s=_per_second(prompt_tokens + output_tokens, duration),
        peak_output_tokens_per_s=max(_tokens_per_bin(records, began, 1.0, int(duration)), default=None),
        peak_running=_peak_running(records),
        ttft=Distribution.of(latencies.ttft),
        tpot=Distribution.of(latencies.tpot),
        itl=Distribution.of(latencies.itl),
        e2el=Distribution.of(latencies.e2el),
        lateness=Distribution.of([record.began_s - record.due_s for record in records]),
        goodput=_goodput(records, completed, limits, duration) if limits else None,
        timeline=_timeline(records, began, duration),
    )


def _per_second(count: int, duration: float) -> float:
    return count / duration if duration > 0 else 0.0


def _goodput(
    records: Sequence[Record], completed: Sequence[Record], limits: Mapping[str, float], duration: float
) -> Goodput:
    good = sum(_keeps(record, limits) for record in completed)
    return Goodput(
        limits=limits,
        requests=good,
        share=good / len(records) if records else 0.0,
        requests_per_s=_per_second(good, duration),
    )


def _keeps(record: Record, limits: Mapping[str, float]) -> bool:
    reached_s = {
        "ttft": record.arrivals_s[0] - record.began_s,
        "tpot": tpot_s(record) if record.output_tokens > 1 else 0.0,
        "e2el": record.arrivals_s[-1] - record.began_s,
    }
    return all(reached_s[name] * 1e3 <= limit for name, limit in limits.items())


def _peak_running(records: Sequence[Record]) -> int:
    """The most requests that were open at one time; one that ends as another begins is not counted with it."""
    steps = sorted([(record.began_s, 1) for record in records] + [(record.ended_s, -1) for record in records])
    return int(np.cumsum([step for _, step in steps]).max(initial=0))


def _tokens_per_bin(records: Sequence[Record], began: float, width: float, bins: int) -> list[float]:
    """Output tokens that arrived in each of `bins` stretches of `width` seconds, from `began` on."""
    if not bins:
        return []
    times = np.concatenate([record.arrivals_s for record in records]) - began
    tokens = np.concatenate([np.diff(record.tokens, prepend=0) for record in records])
    counts: list[float] = np.histogram(times, bins, (0.0, bins * width), weights=tokens)[0].tolist()
    return counts


def _timeline(records: Sequence[Record], began: float, duration: float) -> Timeline:
    width = next((width for width in BIN_WIDTHS_S if duration / width <= TIMELINE_BINS), BIN_WIDTHS_S[-1])
    tokens = _tokens_per_bin(records, began, width, int(np.ceil(duration / width)))
    starts = np.arange(len(tokens)) * width
    open_s = np.zeros(len(tokens))
    for record in records:
        from_s, to_s = record.began_s - began, record.ended_s - began
        open_s += np.clip(np.minimum(to_s, starts + width) - np.maximum(from_s, starts), 0.0, None)
    return Timeline(
        width_s=width,
        output_tokens_per_s=[count / width for count in tokens],
        running=(open_s / width).tolist(),
    )
