"""What a node tells of itself, whoever of it is stuck."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from worker.vitals import SUPERVISOR_STALLED_S, Pulse, Vitals


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def vitals(clock: Clock) -> Vitals:
    return Vitals(clock)


def test_before_the_supervisor_has_turned_it_lives_and_is_not_ready(vitals: Vitals, clock: Clock) -> None:
    clock.now += 1000
    assert vitals.problem is None
    assert not vitals.is_ready
    assert not vitals.was_ready


def test_ready_comes_and_goes_and_was_ready_stays(vitals: Vitals) -> None:
    vitals.turn(takes_requests=True, pulses=[])
    assert vitals.is_ready
    assert vitals.was_ready
    vitals.turn(takes_requests=False, pulses=[])
    assert not vitals.is_ready
    assert vitals.was_ready
    assert vitals.problem is None


def test_a_child_that_is_silent_for_too_long_is_a_problem_without_any_news(vitals: Vitals, clock: Clock) -> None:
    pulses = [Pulse("rank0", clock.now, 600.0), Pulse("gateway", clock.now, 10.0)]
    vitals.turn(takes_requests=True, pulses=pulses)
    clock.now += 10
    assert vitals.is_ready
    clock.now += 1
    assert vitals.problem == "gateway made no progress for 11 s"
    assert not vitals.is_ready
    vitals.turn(takes_requests=True, pulses=[Pulse("gateway", clock.now, 10.0)])
    assert vitals.problem is None
    assert vitals.is_ready


def test_a_child_that_has_promised_nothing_may_be_silent(vitals: Vitals, clock: Clock) -> None:
    vitals.turn(takes_requests=False, pulses=[Pulse("rank0", clock.now - 10_000, float("inf"))])
    assert vitals.problem is None


def test_a_supervisor_that_is_stuck_is_a_problem(vitals: Vitals, clock: Clock) -> None:
    vitals.turn(takes_requests=True, pulses=[])
    clock.now += SUPERVISOR_STALLED_S + 1
    assert vitals.problem == "the supervisor made no turn for 31 s"
    assert not vitals.is_ready
