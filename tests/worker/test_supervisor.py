"""What the supervisor makes of several gateways, without processes: what it passes on, and what it tells the probes.

With processes: `test_processes.py`, and `tests/test_gateways.py` for several gateways.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from worker.children import Child, Children
from worker.config import EngineConfig
from worker.control import Answer, Ask, ChildEnd, Figures, Look, Serving, Standing, SupervisorEnd, Up
from worker.supervisor import _Supervisor
from worker.vitals import Vitals


@dataclass
class Process:
    """As much of one as the supervisor asks for."""

    living: bool = True
    exitcode: int | None = None

    def is_alive(self) -> bool:
        return self.living


class Bench:
    """A supervisor with three gateways, of which the test holds the other ends."""

    def __init__(self) -> None:
        self.vitals = Vitals()
        self.ready: list[dict[str, str | int | float]] = []
        self.processes = [Process() for _ in range(3)]
        pipes = [multiprocessing.Pipe() for _ in range(3)]
        self.ends = [ChildEnd(theirs) for _, theirs in pipes]
        self._connections = [end for pipe in pipes for end in pipe]
        self.supervisor = _Supervisor(
            EngineConfig(),
            [],
            1.0,
            Children(lambda name, progress: None, lambda: None),
            lambda facts, seconds: self.ready.append(facts),
            self.vitals,
        )
        self.supervisor._gateways = [
            Child(f"gateway{number}", process, SupervisorEnd(ours))  # type: ignore[arg-type]
            for number, (process, (ours, _)) in enumerate(zip(self.processes, pipes, strict=True))
        ]

    def turn(self) -> None:
        self.supervisor._hear_all()
        self.supervisor._tell_vitals()

    def hears(self, number: int) -> object:
        """The one message that has come to a gateway; None if there is none."""
        return self.ends[number].receive() if self._connections[2 * number + 1].poll() else None

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_it_is_ready_once_and_takes_requests_while_all_gateways_do(bench: Bench) -> None:
    for number, end in enumerate(bench.ends):
        assert not bench.ready
        assert not bench.vitals.is_ready
        end.send(Serving(True))
        end.send(Up({"number": number}))
        bench.turn()
    assert bench.ready == [{"number": 0}]
    assert bench.vitals.is_ready
    bench.ends[1].send(Serving(False))
    bench.turn()
    assert not bench.vitals.is_ready
    bench.ends[1].send(Serving(True))
    bench.turn()
    assert bench.vitals.is_ready
    bench.processes[2].living = False
    bench.turn()
    assert not bench.vitals.is_ready
    assert len(bench.ready) == 1


def test_a_question_goes_to_all_others_and_the_answer_to_the_asker(bench: Bench) -> None:
    asked = Ask(1, 7, Look())
    bench.ends[1].offer(asked)
    bench.turn()
    assert [bench.hears(number) for number in range(3)] == [asked, None, asked]
    answer = Answer(1, 7, Standing(3, 2, 1), ["a"])
    bench.ends[2].offer(answer)
    bench.turn()
    assert [bench.hears(number) for number in range(3)] == [None, answer, None]


def test_a_gateway_that_has_ended_is_answered_for(bench: Bench) -> None:
    bench.processes[0].living = False
    bench.ends[1].offer(Ask(1, 7, Look()))
    bench.turn()
    assert bench.hears(1) == Answer(1, 7)
    assert bench.hears(2) == Ask(1, 7, Look())


def test_figures_go_to_the_first(bench: Bench) -> None:
    figures = Figures(2, Standing(), b"\x00\xff")
    bench.ends[2].offer(figures)
    bench.turn()
    assert [bench.hears(number) for number in range(3)] == [figures, None, None]


def test_a_gateway_that_does_not_read_holds_nobody_up(bench: Bench) -> None:
    for ticket in range(2000):
        bench.ends[1].offer(Ask(1, ticket, Look()))
        bench.turn()
        assert bench.hears(2) == Ask(1, ticket, Look())
    assert bench.hears(0) == Ask(1, 0, Look())
