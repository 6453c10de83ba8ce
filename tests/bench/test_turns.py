"""What bench.turns reckons with: every request gets its tokens, at times that can be checked by hand."""

from __future__ import annotations

import pytest

from bench.turns import BURST_S, LIMITS, ORDERS, Device, burst, poisson, reckon
from bench.workloads import Job

DEVICE = Device(s_per_token=1e-3, weights_s=2.0, kv_bytes=0.0)


def test_lone_requests_wait_for_their_own_steps() -> None:
    """Each is alone: a step of 100 tokens reads the weights, one of 1,000 computes for longer than that would take."""
    outcome = reckon([(0.0, Job([1] * 100, 1)), (50.0, Job([1] * 2500, 1))], DEVICE, 0.0)
    assert outcome.short == [pytest.approx(2.0 + 100 * 12e-6 + 0.3e-3)]
    assert outcome.long == [pytest.approx(2.5 + 1.5e-3)]
    assert outcome.tokens_per_s == pytest.approx(2 / (50.0 + outcome.long[0]))


@pytest.mark.parametrize("yields", ORDERS.values(), ids=ORDERS)
def test_everybody_gets_all_tokens(yields: float) -> None:
    arrivals = poisson(100.0, one_in=20, long=(2000, 3000), output=3)[:200]
    outcome = reckon(arrivals, Device(19e-6, 3.4e-3, 147_456), yields)
    long = sum(len(job.prompt_ids) > 1000 for _, job in arrivals)
    assert (len(outcome.short), len(outcome.long)) == (200 - long, long)
    assert 0 < long < 30
    last, _ = arrivals[-1]
    assert outcome.tokens_per_s <= 200 * 3 / last


def test_by_turns_most_of_a_burst_wait_less_and_nobody_much_longer() -> None:
    arrivals = burst()
    assert arrivals[-1][0] < BURST_S
    device = Device(19e-6, 3.4e-3, 147_456)
    came, turns = (reckon(arrivals, device, yields).report() for yields in ORDERS.values())
    assert turns["p50_ms"] < 0.7 * came["p50_ms"]
    assert turns["mean_ms"] < 0.85 * came["mean_ms"]
    assert turns["p99_ms"] < 1.05 * came["p99_ms"]
    assert turns["tok_s"] > 0.99 * came["tok_s"]
    assert LIMITS.max_running == len(arrivals)
