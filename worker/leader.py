"""Rank 0's loop: hear the gateways, plan a step, start it everywhere, hand out what the oldest step produced.

`Leader.step` is one turn; `run` repeats it. Everything it depends on comes in as an argument (the runner, the channel,
the clock), so a test can turn it by hand with a fake for each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np

from worker.messages import (
    Abort,
    CacheFlushed,
    EngineInfo,
    Finished,
    FlushCache,
    Goodbye,
    Hello,
    Outputs,
    Ready,
    Started,
    Submit,
    ToGateway,
    ToLeader,
)
from worker.plan import StepPlan
from worker.scheduler import PlannedStep, RetiredStep, Scheduler

REPORT_S = 1.0
"""How often a gateway hears from the leader at least, and how long an idle leader sleeps at most."""

LINGER_S = 0.005
"""How long an idle leader of GPUs stays awake. A request that comes soon after another need not wait until a core and
its caches are warm again: a first token of 0.6B comes 0.3 ms sooner (of 3.7, on an H200's host)."""


class StepRunner(Protocol):
    """What `worker.runner.Runner` is to the leader."""

    def launch(self, plan: StepPlan) -> None:
        """Start a step."""

    def collect(self) -> np.ndarray:
        """Wait for the oldest step: [rows] int32 tokens."""


class Channel(Protocol):
    """What `worker.channel.GatewayChannel` is to the leader."""

    def wait(self, timeout_s: float) -> bool: ...

    def receive(self) -> Iterator[tuple[int, ToLeader]]: ...

    def send(self, gateway: int, message: ToGateway) -> bool: ...


@dataclass(slots=True)
class _Letter:
    """What there is for one gateway."""

    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    started: list[Started] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)


class Leader:
    """Owns the scheduler and the steps in flight.

    Args:
        broadcast: sends an encoded plan to the followers; called before the step starts here.
        heartbeat: told after every turn that the loop is alive, with the number of retired steps.
        linger_s: how long it stays awake after a step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        channel: Channel,
        info: EngineInfo,
        *,
        run_ahead: int,
        clock: Callable[[], float],
        broadcast: Callable[[bytes], None] | None = None,
        heartbeat: Callable[[int], None] = lambda steps: None,
        linger_s: float = 0.0,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._channel = channel
        self._info = info
        self._run_ahead = run_ahead
        self._clock = clock
        self._broadcast = broadcast
        self._heartbeat = heartbeat
        self._linger_s = linger_s
        self._in_flight: deque[PlannedStep] = deque()
        self._gateways: set[int] = set()
        self._steps = 0
        self._last_report = clock()
        self._last_retired = clock()

    def step(self) -> None:
        """One turn of the loop. Aborts are heard before a step's tokens are handed out."""
        self._hear()
        planned = self._scheduler.plan()
        if planned is not None:
            if self._broadcast is not None:
                self._broadcast(planned.plan.encode())
            if not self._in_flight:
                self._last_retired = self._clock()
            self._runner.launch(planned.plan)
            self._in_flight.append(planned)
        if self._in_flight and (planned is None or len(self._in_flight) >= self._run_ahead):
            self._retire_oldest()
        else:
            self._tell()
            if not self._in_flight:
                lingers = self._clock() - self._last_retired < self._linger_s
                self._channel.wait(0.0 if lingers else REPORT_S)
        self._heartbeat(self._steps)

    def _hear(self) -> None:
        for gateway, message in self._channel.receive():
            if isinstance(message, Submit):
                if message.epoch == self._info.epoch:  # else for a leader that died: its gateway sends it again
                    self._scheduler.submit(gateway, message)
            elif isinstance(message, Abort):
                for number in message.requests:
                    self._scheduler.abort(gateway, number)
            elif isinstance(message, FlushCache):
                blocks = self._scheduler.flush_cache()
                self._channel.send(gateway, CacheFlushed(message.ticket, blocks))
            elif isinstance(message, Hello):
                self._gateways.add(gateway)
                self._channel.send(gateway, Ready(self._info, self._scheduler.stats()))
            elif isinstance(message, Goodbye):
                self._forget(gateway)

    def _retire_oldest(self) -> None:
        planned = self._in_flight.popleft()
        tokens = self._runner.collect()
        retired = self._scheduler.retire(planned, tokens)
        self._steps += 1
        self._tell(retired, planned.plan)

    def _tell(self, retired: RetiredStep | None = None, plan: StepPlan | None = None) -> None:
        """Send each gateway what there is for it, in one message; idle gateways hear from time to time."""
        letters = self._sort(retired)
        now = self._clock()
        if now - self._last_report >= REPORT_S:
            self._last_report = now
            for gateway in self._gateways:
                letters.setdefault(gateway, _Letter())
        if not letters:
            return
        stats = now_only = self._scheduler.stats()
        if plan is not None:
            stats = msgspec.structs.replace(
                now_only, step_rows=plan.num_rows, step_tokens=plan.num_tokens, step_seconds=now - self._last_retired
            )
            self._last_retired = now
        for gateway, letter in letters.items():
            outputs = Outputs(
                requests=letter.numbers.tobytes(),
                tokens=letter.tokens.tobytes(),
                started=letter.started,
                finished=letter.finished,
                stats=stats,
            )
            if not self._channel.send(gateway, outputs):
                self._forget(gateway)
            stats = now_only  # what the step was is told once, so that what all gateways heard can be added up

    def _sort(self, retired: RetiredStep | None) -> dict[int, _Letter]:
        """What happened since the last time, by gateway."""
        letters: dict[int, _Letter] = {}
        notices = self._scheduler.take_notices()
        if retired is not None:
            owners = set(retired.owners.tolist())
            for gateway in owners:
                mine = retired.owners == gateway if len(owners) > 1 else slice(None)
                letters[gateway] = _Letter(retired.numbers[mine], retired.tokens[mine])
        for gateway, started in notices.started:
            letters.setdefault(gateway, _Letter()).started.append(started)
        for gateway, finished in notices.finished:
            letters.setdefault(gateway, _Letter()).finished.append(finished)
        return letters

    def _forget(self, gateway: int) -> None:
        """The gateway is gone, and with it everybody who waits for its tokens."""
        self._gateways.discard(gateway)
        self._scheduler.abort_owner(gateway)
