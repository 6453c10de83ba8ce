"""What the figures mean, on times that are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.metrics import Latencies, summarise
from bench.load.sender import COMPLETED, INTERRUPTED, Record


def record(
    began_s: float, *arrivals: tuple[float, int], status: str = COMPLETED, ended_s: float | None = None
) -> Record:
    """`arrivals`: when, and how many tokens came with it."""
    times = [time for time, _ in arrivals]
    return Record(
        number=0,
        due_s=began_s,
        began_s=began_s,
        ended_s=(times or [began_s])[-1] if ended_s is None else ended_s,
        status=status,
        finish_reason="MAX_TOKENS",
        prompt_tokens=10,
        cached_tokens=4,
        arrivals_s=times,
        tokens=list(itertools.accumulate(count for _, count in arrivals)),
    )


def test_latencies_of_one_request() -> None:
    latencies = Latencies.of([record(1.0, (1.1, 1), (1.15, 1), (1.3, 3))])
    assert latencies.ttft == pytest.approx([0.1])
    assert latencies.itl == pytest.approx([0.05, 0.15]), "one for each gap, whatever it brings"
    assert latencies.tpot == pytest.approx([0.2 / 4]), "five tokens: four after the first"
    assert latencies.e2el == pytest.approx([0.3])


def test_single_token_has_no_time_per_output_token() -> None:
    latencies = Latencies.of([record(0.0, (0.1, 1))])
    assert len(latencies.ttft) == len(latencies.e2el) == 1
    assert len(latencies.tpot) == len(latencies.itl) == 0
    summary = summarise([record(0.0, (0.1, 1))], {})
    assert summary.tpot is None
    assert summary.itl is None


def test_two_tokens_in_one_chunk_take_no_time_each() -> None:
    assert Latencies.of([record(0.0, (0.1, 2))]).tpot == pytest.approx([0.0])


def test_percentiles_are_interpolated_milliseconds() -> None:
    ttft = summarise([record(0.0, (i / 1000, 1)) for i in range(1, 101)], {}).ttft
    assert ttft is not None
    assert (ttft.count, ttft.min, ttft.max) == (100, pytest.approx(1), pytest.approx(100))
    assert (ttft.mean, ttft.p50) == (pytest.approx(50.5), pytest.approx(50.5))
    assert (ttft.p90, ttft.p95, ttft.p99) == (pytest.approx(90.1), pytest.approx(95.05), pytest.approx(99.01))


def test_rates_and_counts() -> None:
    records = [
        record(0.0, (0.5, 1), (2.0, 9)),
        record(1.0, (1.5, 1), (4.0, 5)),
        record(1.5, (1.6, 2), status="UNAVAILABLE", ended_s=2.0),
        record(1.5, status="RESOURCE_EXHAUSTED"),
        record(2.0, (3.0, 3), status=INTERRUPTED, ended_s=4.0),
    ]
    summary = summarise(records, {})
    assert summary.duration_s == 4.0
    assert (summary.sent, summary.completed, summary.interrupted_requests) == (5, 2, 1)
    assert summary.failed == {"UNAVAILABLE": 1, "RESOURCE_EXHAUSTED": 1}
    assert summary.requests_per_s == 2 / 4
    assert summary.output_tokens == 21, "what arrived counts, whatever became of its request"
    assert summary.output_tokens_per_s == 21 / 4
    assert (summary.prompt_tokens, summary.cached_tokens) == (50, 20)
    assert summary.total_tokens_per_s == 71 / 4
    assert summary.peak_output_tokens_per_s == 9, "from second 2 to second 3"
    assert summary.peak_running == 3
    assert summary.ttft is not None
    assert summary.ttft.count == 3, "failed ones have none; interrupted ones had a first output"
    assert summary.e2el is not None
    assert summary.e2el.count == 2


def test_nothing_sent_is_no_division_by_zero() -> None:
    summary = summarise([], {"ttft": 1.0})
    assert summary.requests_per_s == summary.output_tokens_per_s == summary.duration_s == 0
    assert summary.ttft is None
    assert summary.goodput is not None
    assert summary.goodput.share == 0
    assert summary.timeline.output_tokens_per_s == []


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 100}, 2),
        ({"ttft": 99}, 1),
        ({"tpot": 25}, 2),
        ({"tpot": 24}, 1),
        ({"e2el": 299}, 1),
        ({"e2el": 300}, 2),
        ({"ttft": 100, "tpot": 50, "e2el": 40}, 1),
        ({"ttft": 1, "e2el": 1000}, 0),
    ],
)
def test_goodput_keeps_every_limit(limits: dict[str, float], good: int) -> None:
    records = [
        record(0.0, (0.1, 1), (0.2, 3), (0.3 - 1e-9, 5), ended_s=2.0),  # TTFT 100, TPOT 25, E2EL 300
        record(0.0, (0.04, 1)),  # one token: no TPOT that could be too long
        record(0.0, (0.01, 1), status="UNAVAILABLE"),
    ]
    goodput = summarise(records, limits).goodput
    assert goodput is not None
    assert goodput.requests == good
    assert goodput.share == pytest.approx(good / 3), "a failed request is not good"
    assert goodput.requests_per_s == pytest.approx(good / 2.0)


times = st.floats(0.001, 5.0)


@st.composite
def records(draw: st.DrawFn) -> list[Record]:
    def one() -> Record:
        began = draw(times)
        gaps = draw(st.lists(st.tuples(times, st.integers(1, 5)), min_size=1, max_size=8))
        arrivals = [
            (began + total, count) for (_, count), total in zip(gaps, np.cumsum([g for g, _ in gaps]), strict=True)
        ]
        return record(began, *((float(time), count) for time, count in arrivals))

    return [one() for _ in range(draw(st.integers(1, 6)))]


@given(records())
def test_latencies_fit_together(run: list[Record]) -> None:
    for one in run:
        latencies = Latencies.of([one])
        (ttft,), (e2el,) = latencies.ttft, latencies.e2el
        assert ttft + latencies.itl.sum() == pytest.approx(e2el)
        if one.output_tokens > 1:
            assert ttft + latencies.tpot[0] * (one.output_tokens - 1) == pytest.approx(e2el)


@given(records())
def test_timeline_has_every_token_and_every_open_second(run: list[Record]) -> None:
    summary = summarise(run, {})
    timeline = summary.timeline
    assert sum(timeline.output_tokens_per_s) * timeline.width_s == pytest.approx(summary.output_tokens)
    assert sum(timeline.running) * timeline.width_s == pytest.approx(sum(r.ended_s - r.began_s for r in run))


@given(records())
def test_peak_is_the_most_that_are_open_at_one_time(run: list[Record]) -> None:
    moments = [one.began_s for one in run]
    most = max(sum(one.began_s <= moment < one.ended_s for one in run) for moment in moments)
    assert summarise(run, {}).peak_running == most
