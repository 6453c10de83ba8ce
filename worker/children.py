"""The processes that a supervisor starts: how they begin, what is known of them, how they end.

A supervisor knows three ways to lose a rank: its process ended (sentinel), its loop stopped turning (heartbeat), or it
said that it cannot go on (`Fatal`). The ranks of a node come and go together, since none can work without the others.
"""

from __future__ import annotations

import gc
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess

from worker.config import EngineConfig
from worker.control import ChildEnd, Fatal, FromChild, Heartbeat, Progress, Serving, SupervisorEnd, Up
from worker.driver import begin_context
from worker.endpoint import EngineEndpoint, private_endpoint
from worker.parent import end_with
from worker.vitals import Pulse

Facts = dict[str, str | int | float]
Gateway = Callable[[EngineEndpoint, Connection], None]
OnProgress = Callable[[str, Progress], None]
OnReady = Callable[[Facts, float], None]
SetUpLogging = Callable[[], object]

POLL_S = 0.5


class StopError(Exception):
    """The server ends now, with this exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass(slots=True)
class Child:
    name: str
    process: SpawnProcess
    control: SupervisorEnd
    facts: Facts | None = None
    """What it said when it was up."""
    serving: bool = False
    fatal: str | None = None
    last_beat: float = field(default_factory=time.monotonic)
    patience_s: float = float("inf")

    @property
    def up(self) -> bool:
        return self.facts is not None

    @property
    def how_it_ended(self) -> str:
        code = self.process.exitcode
        if self.fatal is not None:
            return f"{self.name}: {self.fatal}"
        if code is not None and code < 0:
            return f"{self.name} was ended by {signal.Signals(-code).name}"
        return f"{self.name} ended with exit code {code}"

    @property
    def pulse(self) -> Pulse:
        return Pulse(self.name, self.last_beat, self.patience_s)

    def note(self, message: FromChild) -> None:
        """Remember what it said."""
        if isinstance(message, Heartbeat):
            self.last_beat = time.monotonic()
            if message.patience_s is not None:
                self.patience_s = message.patience_s
        elif isinstance(message, Up):
            self.facts = message.facts
        elif isinstance(message, Fatal):
            self.fatal = message.reason
        elif isinstance(message, Serving):
            self.serving = message.now


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """Which rank this is, and where the others are."""

    rank: int
    epoch: int
    config: EngineConfig
    gateways: EngineEndpoint | None  # the leader listens there
    plans: EngineEndpoint  # followers on this node listen there to the leader
    rendezvous: str | None  # URL of a file that all ranks can open; None: they are on several nodes and meet at node 0


class Children:
    """Starts processes and listens to them."""

    def __init__(self, on_progress: OnProgress, set_up_logging: SetUpLogging) -> None:
        self._on_progress = on_progress
        self._set_up_logging = set_up_logging

    def start_gateways(self, gateways: Sequence[Gateway], endpoint: EngineEndpoint) -> list[Child]:
        context = multiprocessing.get_context("spawn")
        names = [f"gateway{number}" for number in range(len(gateways))] if len(gateways) > 1 else ["gateway"]
        return [
            self._start(name, context, _gateway_main, (gateway, endpoint))
            for name, gateway in zip(names, gateways, strict=True)
        ]

    def start_ranks(
        self,
        config: EngineConfig,
        epoch: int,
        gateways: EngineEndpoint | None = None,
        rendezvous: str | None = None,
    ) -> Ranks:
        """Start this node's ranks.

        Args:
            gateways: where the leader listens for them; None on nodes that have no leader.
            rendezvous: see `RankSpec`.
        """
        # Python's own: torch.multiprocessing adds ways to hand tensors over, which nobody wants here, and for which the
        # supervisor would have to wait for torch and hold it in memory.
        context = multiprocessing.get_context("spawn")
        plans = private_endpoint("plans")
        ranks = []
        for rank in config.local_ranks:
            spec = RankSpec(
                rank=rank, epoch=epoch, config=config, gateways=gateways, plans=plans, rendezvous=rendezvous
            )
            ranks.append(self._start(f"rank{rank}", context, _rank_main, (spec,)))
        return Ranks(ranks)

    def hear(self, child: Child) -> list[FromChild]:
        """Take what it has said since the last time; returns all of it."""
        messages = child.control.receive()
        for message in messages:
            if isinstance(message, Progress):
                self._on_progress(child.name, message)
            child.note(message)
        return messages

    def _start(
        self, name: str, context: SpawnContext, main: Callable[..., None], arguments: tuple[object, ...]
    ) -> Child:
        ours, theirs = context.Pipe(duplex=True)
        process = context.Process(
            target=main, args=(os.getpid(), self._set_up_logging, theirs, *arguments), name=name, daemon=True
        )
        with _signals_held():
            process.start()
        theirs.close()
        return Child(name, process, SupervisorEnd(ours))


class Ranks:
    """The ranks of this node."""

    def __init__(self, children: list[Child]) -> None:
        self.children = children

    @property
    def all_up(self) -> bool:
        return bool(self.children) and all(rank.up for rank in self.children)

    @property
    def fatal(self) -> str | None:
        """Why one of them gave up. That takes the others along, which may be seen first; its own words say why."""
        return next((rank.fatal for rank in self.children if rank.fatal is not None), None)

    def find_loss(self) -> str | None:
        """How one was lost; None while all take part."""
        now = time.monotonic()
        for rank in self.children:
            if not rank.process.is_alive():
                return rank.how_it_ended
            if now - rank.last_beat > rank.patience_s:
                return f"{rank.name} made no progress for {rank.patience_s:g} s"
        return None

    def kill(self) -> None:
        """End them; they own nothing that would outlive them."""
        for rank in self.children:
            rank.process.kill()
        for rank in self.children:
            rank.process.join()
            rank.control.close()
        self.children = []


def wait(wakeup: socket.socket, children: list[Child]) -> None:
    """Return when a child spoke or ended, when a signal came, or after a while."""
    handles: list[object] = [wakeup]
    for child in children:
        handles.append(child.process.sentinel)
        if child.process.is_alive():
            handles.append(child.control.connection)
    multiprocessing.connection.wait(handles, timeout=POLL_S)  # type: ignore[arg-type]
    try:
        while wakeup.recv(64):
            pass
    except BlockingIOError:
        return


@contextmanager
def signals() -> Iterator[tuple[socket.socket, deque[int]]]:
    """SIGTERM and SIGINT as numbers in a queue, with a socket that turns readable; earlier handlers come back after."""
    received: deque[int] = deque()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    earlier = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    earlier_wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield ours, received
    finally:
        signal.set_wakeup_fd(earlier_wakeup)
        for number, handler in earlier.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let SIGTERM and SIGINT wait. A process that is started meanwhile inherits that: it must not die of what is meant
    for the supervisor before it can `_settle`."""
    resource_tracker.ensure_running()  # else Python starts it with the next process, and lets signals in after
    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


# ---- in the children -------------------------------------------------------------------------------------------------


def _gateway_main(
    parent: int, set_up_logging: SetUpLogging, connection: Connection, gateway: Gateway, endpoint: EngineEndpoint
) -> None:
    _settle(parent)
    set_up_logging()
    gateway(endpoint, connection)


def _rank_main(parent: int, set_up_logging: SetUpLogging, connection: Connection, spec: RankSpec) -> None:
    _settle(parent)
    set_up_logging()
    if spec.config.device != "cpu":
        begin_context(spec.rank - spec.config.local_ranks.start)
    # What is imported stays: to look through it again and again meanwhile would take the collector a tenth of the time.
    gc.disable()
    from worker.rank import run_rank

    gc.freeze()
    gc.enable()
    try:
        code = run_rank(spec, ChildEnd(connection))
    finally:
        gc.unfreeze()  # else libraries that find their objects alive when the interpreter ends would complain of leaks
    sys.exit(code)


def _settle(parent: int) -> None:
    """Make a fresh process a good child: it dies with its supervisor, and leaves signals to it.

    A terminal sends Ctrl-C to every process, and some process managers SIGTERM too. What they mean is decided once, in
    the supervisor, which tells its children over the control pipe or kills them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with(parent)
