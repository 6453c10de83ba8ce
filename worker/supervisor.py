"""Starts the gateway and the ranks, watches them, brings the ranks back when one dies, and ends everything.

The supervisor computes nothing and listens nowhere. It knows three ways to lose a rank: its process ended (sentinel),
its loop stopped turning (heartbeat), or it said that it cannot go on (`Fatal`). Ranks come and go together, since none
can work without the others; the gateway lives on and sends them again what was running. A gateway that dies takes its
connections along, so then everything ends and whoever started the server starts it anew.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess

from worker.channel import private_endpoint
from worker.client import EngineEndpoint
from worker.config import ConfigError, EngineConfig
from worker.control import ChildEnd, Drain, EngineDead, EngineLost, Fatal, Heartbeat, Progress, Stop, SupervisorEnd, Up

logger = logging.getLogger(__name__)

Facts = dict[str, str | int | float]
Gateway = Callable[[EngineEndpoint, Connection], None]

RESTART_WINDOW_S = 600.0
END_GRACE_S = 5.0
POLL_S = 0.5


def serve(
    config: EngineConfig,
    gateway: Gateway,
    *,
    drain_timeout_s: float,
    on_progress: Callable[[str, Progress], None],
    on_ready: Callable[[Facts, float], None],
    log_level: str = "WARNING",
) -> int:
    """Run the server until a signal or a failure ends it; returns the exit code.

    Args:
        gateway: runs a gateway in a process of its own; picklable.
        drain_timeout_s: how long the gateway may take to drain before it is killed.
        on_progress: told about long work, with the name of the process that does it.
        on_ready: told once, with the gateway's facts and the seconds since the start.

    Raises:
        ConfigError: a process gave up for a reason that a user can mend.
    """
    supervisor = _Supervisor(config, gateway, drain_timeout_s, on_progress, on_ready, log_level)
    with _signals() as (wakeup, received):
        return supervisor.run(wakeup, received)


class _StopError(Exception):
    """The server ends now, with this exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass(slots=True)
class _Child:
    name: str
    process: SpawnProcess
    control: SupervisorEnd
    up: bool = False
    fatal: str | None = None
    last_beat: float = field(default_factory=time.monotonic)
    hang_timeout_s: float = float("inf")

    @property
    def how_it_ended(self) -> str:
        code = self.process.exitcode
        if self.fatal is not None:
            return f"{self.name}: {self.fatal}"
        if code is not None and code < 0:
            return f"{self.name} was ended by {signal.Signals(-code).name}"
        return f"{self.name} ended with exit code {code}"


class _Supervisor:
    def __init__(
        self,
        config: EngineConfig,
        gateway: Gateway,
        drain_timeout_s: float,
        on_progress: Callable[[str, Progress], None],
        on_ready: Callable[[Facts, float], None],
        log_level: str,
    ) -> None:
        self._config = config
        self._run_gateway = gateway
        self._drain_timeout_s = drain_timeout_s
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._log_level = log_level
        self._began = time.monotonic()
        self._endpoint = private_endpoint("engine")
        self._gateway: _Child | None = None
        self._ranks: list[_Child] = []
        self._epoch = 0
        self._restarts: deque[float] = deque()
        self._kill_gateway_at = float("inf")  # set while it drains
        self._rendezvous = ExitStack()

    def run(self, wakeup: socket.socket, received: deque[int]) -> int:
        try:
            self._gateway = self._start(
                "gateway", multiprocessing.get_context("spawn"), _gateway_main, (self._run_gateway, self._endpoint)
            )
            self._start_ranks()
            while True:
                self._wait(wakeup)
                while received:
                    self._on_signal(received.popleft())
                self._hear(self._gateway)
                for rank in self._ranks:
                    self._hear(rank)
                self._look_after_gateway(self._gateway)
                self._look_after_ranks(self._gateway)
        except _StopError as stop:
            return stop.exit_code
        finally:
            self._end_all()

    # -- starting ------------------------------------------------------------------------------------------------------

    def _start_ranks(self) -> None:
        import torch.multiprocessing  # here, so that the gateway's process starts meanwhile

        from worker.rank import RankSpec

        self._epoch += 1
        context = torch.multiprocessing.get_context("spawn")
        plans = private_endpoint("plans")
        rendezvous = self._rendezvous.enter_context(_shared_file())
        for rank in range(self._config.tensor_parallel_size):
            spec = RankSpec(
                rank=rank,
                epoch=self._epoch,
                config=self._config,
                gateways=self._endpoint,
                plans=plans,
                rendezvous=rendezvous,
            )
            self._ranks.append(self._start(f"rank{rank}", context, _rank_main, (spec,)))

    def _start(
        self, name: str, context: SpawnContext, main: Callable[..., None], arguments: tuple[object, ...]
    ) -> _Child:
        ours, theirs = context.Pipe(duplex=True)
        process = context.Process(
            target=main, args=(name, os.getpid(), self._log_level, theirs, *arguments), name=name, daemon=True
        )
        process.start()
        theirs.close()
        return _Child(name, process, SupervisorEnd(ours))

    # -- watching ------------------------------------------------------------------------------------------------------

    def _wait(self, wakeup: socket.socket) -> None:
        children = [child for child in (self._gateway, *self._ranks) if child is not None]
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

    def _hear(self, child: _Child) -> None:
        for message in child.control.receive():
            if isinstance(message, Progress):
                self._on_progress(child.name, message)
            elif isinstance(message, Fatal):
                child.fatal = message.reason
            elif isinstance(message, Heartbeat):
                child.last_beat = time.monotonic()
            elif isinstance(message, Up):
                self._on_up(child, message)

    def _on_up(self, child: _Child, message: Up) -> None:
        child.up = True
        child.last_beat = time.monotonic()
        if child is self._gateway:
            self._on_ready(message.facts, time.monotonic() - self._began)
            return
        child.hang_timeout_s = float(message.facts["hang_timeout_s"])
        if all(rank.up for rank in self._ranks):
            self._rendezvous.close()

    def _look_after_gateway(self, gateway: _Child) -> None:
        if gateway.process.is_alive():
            if time.monotonic() > self._kill_gateway_at:
                logger.error("the gateway did not end in time; killing it")
                gateway.process.kill()
            return
        self._hear(gateway)
        if self._draining:
            raise _StopError(0 if gateway.process.exitcode == 0 else 1)
        if gateway.fatal is not None:
            raise ConfigError(gateway.fatal)
        logger.error("%s", gateway.how_it_ended)
        raise _StopError(1)

    def _look_after_ranks(self, gateway: _Child) -> None:
        now = time.monotonic()
        for rank in self._ranks:
            if not rank.process.is_alive():
                return self._ranks_lost(gateway, rank.how_it_ended)
            if now - rank.last_beat > rank.hang_timeout_s:
                return self._ranks_lost(gateway, f"{rank.name} made no progress for {rank.hang_timeout_s:g} s")
        return None

    def _ranks_lost(self, gateway: _Child, reason: str) -> None:
        first_start = self._epoch == 1 and not all(rank.up for rank in self._ranks)
        for rank in self._ranks:
            self._hear(rank)
        # One that gave up takes the others along, which may be seen first: its own words say why.
        fatal = next((rank.fatal for rank in self._ranks if rank.fatal is not None), None)
        self._kill_ranks()
        if first_start:
            if fatal is not None:
                raise ConfigError(fatal)
            logger.error("%s while starting", reason)
            raise _StopError(1)
        reason = fatal or reason
        logger.error("%s; every rank is started again", reason)
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > RESTART_WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._config.max_restarts:
            gateway.control.send(EngineDead(reason))
            gateway.process.join(END_GRACE_S)
            logger.error("giving up after %d restarts in %d minutes", len(self._restarts), RESTART_WINDOW_S // 60)
            raise _StopError(1)
        self._restarts.append(now)
        gateway.control.send(EngineLost(self._epoch, reason))
        self._start_ranks()

    # -- ending --------------------------------------------------------------------------------------------------------

    @property
    def _draining(self) -> bool:
        return self._kill_gateway_at < float("inf")

    def _on_signal(self, number: int) -> None:
        gateway = self._gateway
        if gateway is None or not gateway.up or not gateway.process.is_alive():
            raise _StopError(128 + number)  # nobody is served yet
        if self._draining:
            gateway.control.send(Stop())
            self._kill_gateway_at = time.monotonic() + END_GRACE_S
        else:
            gateway.control.send(Drain())
            self._kill_gateway_at = time.monotonic() + self._drain_timeout_s + END_GRACE_S

    def _kill_ranks(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.control.close()
        self._ranks.clear()

    def _end_all(self) -> None:
        self._kill_ranks()  # they own nothing that would outlive them
        if self._gateway is not None:
            if self._gateway.up:
                self._gateway.control.send(Stop())
                self._gateway.process.join(END_GRACE_S)
            self._gateway.process.kill()
            self._gateway.process.join()
            self._gateway.control.close()
        self._rendezvous.close()


# ---- in the children -------------------------------------------------------------------------------------------------


def _gateway_main(
    name: str, parent: int, log_level: str, connection: Connection, gateway: Gateway, endpoint: EngineEndpoint
) -> None:
    _settle(name, parent, log_level)
    gateway(endpoint, connection)


def _rank_main(name: str, parent: int, log_level: str, connection: Connection, spec: object) -> None:
    from worker.rank import RankSpec, run_rank

    _settle(name, parent, log_level)
    if not isinstance(spec, RankSpec):
        raise TypeError(f"a rank needs a RankSpec, got {type(spec).__name__}")
    sys.exit(run_rank(spec, ChildEnd(connection)))


def _settle(name: str, parent: int, log_level: str) -> None:
    """Make a fresh process a good child: it dies with its supervisor, and leaves signals to it.

    A terminal sends Ctrl-C to every process, and some process managers SIGTERM too. What they mean is decided once, in
    the supervisor, which tells its children over the control pipe or kills them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
    logging.basicConfig(level=log_level, format=f"%(asctime)s %(levelname)s {name} %(name)s %(message)s")


# ---- small things ----------------------------------------------------------------------------------------------------


@contextmanager
def _shared_file() -> Iterator[str]:
    """Path of an empty file that other processes of this user can open, and that vanishes with this process."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("lightqwen-rendezvous")
        try:
            yield f"/proc/{os.getpid()}/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory(prefix="lightqwen-") as folder:
            yield os.path.join(folder, "rendezvous")


@contextmanager
def _signals() -> Iterator[tuple[socket.socket, deque[int]]]:
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
