"""Starts the gateways and the ranks, watches them, brings the ranks back when one dies, and ends everything.

The supervisor computes nothing. Gateways outlive the ranks and send them again what was running. A gateway that dies
takes its connections along, so then everything ends and whoever started the server starts it anew. What gateways say to
each other is passed on, and never waited for.

With several nodes this is node 0's supervisor, and `worker/member.py` is that of the others. Ranks on other machines
are not this supervisor's to start again: when one is lost, running requests fail, the server ends, and whoever started
the nodes starts all of them anew.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NoReturn

from worker.children import (
    Child,
    Children,
    Facts,
    Gateway,
    OnProgress,
    OnReady,
    Ranks,
    SetUpLogging,
    StopError,
    signals,
    wait,
)
from worker.config import ConfigError, EngineConfig
from worker.control import Answer, Ask, Drain, EngineDead, EngineLost, Figures, FromChild, Stop, ToChild
from worker.endpoint import private_endpoint
from worker.vitals import Vitals

if TYPE_CHECKING:
    from worker.nodes import LeaderLine

__all__ = ["Facts", "Gateway", "serve"]

logger = logging.getLogger(__name__)

RESTART_WINDOW_S = 600.0
END_GRACE_S = 5.0


def serve(
    config: EngineConfig,
    gateways: Sequence[Gateway],
    *,
    drain_timeout_s: float,
    on_progress: OnProgress,
    on_ready: OnReady,
    set_up_logging: SetUpLogging = logging.basicConfig,
    vitals: Vitals | None = None,
) -> int:
    """Run the server, or a node's part of it, until a signal or a failure ends it; returns the exit code.

    Args:
        gateways: each runs a gateway in a process of its own; picklable.
        drain_timeout_s: how long gateways may take to drain before they are killed.
        on_progress: told about long work, with the name of the process that does it.
        on_ready: told once, with the first gateway's facts for the user and the seconds since the start.
        set_up_logging: called in every process that is started; picklable.
        vitals: told at every turn how things are.

    Raises:
        ConfigError: a process gave up for a reason that a user can mend.
    """
    _check_model(config)
    children, vitals = Children(on_progress, set_up_logging), vitals or Vitals()
    with signals() as (wakeup, received):
        if config.node_rank > 0:
            from worker.member import Member

            return Member(config, drain_timeout_s, children, on_ready, vitals).run(wakeup, received)
        supervisor = _Supervisor(config, gateways, drain_timeout_s, children, on_ready, vitals)
        return supervisor.run(wakeup, received)


def _check_model(config: EngineConfig) -> None:
    """Tell what config.json alone can tell before any process is started: starting one takes seconds."""
    from model.config import Qwen3Config  # not by importing this module, which a gateway does too
    from model.errors import ModelError

    try:
        Qwen3Config.from_folder(config.model).check_parallel(config.tensor_parallel_size)
    except ModelError as error:
        raise ConfigError(str(error)) from error


class _Supervisor:
    def __init__(
        self,
        config: EngineConfig,
        gateways: Sequence[Gateway],
        drain_timeout_s: float,
        children: Children,
        on_ready: OnReady,
        vitals: Vitals,
    ) -> None:
        self._config = config
        self._run_gateways = gateways
        self._drain_timeout_s = drain_timeout_s
        self._children = children
        self._on_ready = on_ready
        self._vitals = vitals
        self._began = time.monotonic()
        self._endpoint = private_endpoint("engine")
        self._gateways: list[Child] = []
        self._ready = False
        self._ranks = Ranks([])
        self._epoch = 0
        self._restarts: deque[float] = deque()
        self._kill_gateways_at = float("inf")  # set while they drain
        self._signalled = False
        self._rendezvous = ExitStack()
        self._line: LeaderLine | None = None  # to the other nodes
        self._failure = "node 0 ended early"  # what the other nodes are told; empty once it ends as asked

    def run(self, wakeup: socket.socket, received: deque[int]) -> int:
        try:
            self._gateways = self._children.start_gateways(self._run_gateways, self._endpoint)
            if self._config.nodes > 1:
                self._line = self._open_line()
            else:
                self._start_ranks()
            while True:
                self._tell_vitals()
                wait(wakeup, [*self._living_gateways, *self._ranks.children])
                while received:
                    self._on_signal(received.popleft())
                self._hear_all()
                self._look_after_gateways()
                if self._line is not None:
                    self._look_after_nodes(self._line)
                self._look_after_ranks()
        except StopError as stop:
            return stop.exit_code
        finally:
            self._end_all()

    def _open_line(self) -> LeaderLine:
        import torch.distributed  # noqa: F401  # before the time to join in runs, of which it would take seconds

        from worker.nodes import LeaderLine

        return LeaderLine(self._config)

    def _start_ranks(self) -> None:
        self._epoch += 1
        rendezvous = None if self._line is not None else self._rendezvous.enter_context(_shared_file())
        self._ranks = self._children.start_ranks(self._config, self._epoch, self._endpoint, rendezvous)

    # -- watching ------------------------------------------------------------------------------------------------------

    @property
    def _living_gateways(self) -> list[Child]:
        """All of them, but for those that have drained while others still do."""
        return [gateway for gateway in self._gateways if gateway.process.is_alive()]

    def _tell_vitals(self) -> None:
        living = self._living_gateways
        self._vitals.turn(
            takes_requests=len(living) == len(self._gateways) and all(gateway.serving for gateway in living),
            pulses=[child.pulse for child in (*living, *self._ranks.children)],
        )

    def _hear_all(self) -> None:
        for gateway in self._gateways:
            self._hear(gateway)
        if not self._ready and all(gateway.up for gateway in self._gateways):
            self._ready = True
            self._on_ready(self._gateways[0].facts or {}, time.monotonic() - self._began)
        for rank in self._ranks.children:
            self._children.hear(rank)
        if self._ranks.all_up:
            self._rendezvous.close()

    def _hear(self, gateway: Child) -> None:
        for message in self._children.hear(gateway):
            self._pass_on(message)

    def _pass_on(self, message: FromChild) -> None:
        """What a gateway said to others goes to them. One that has drained and ended has nothing more to say."""
        if isinstance(message, Ask):
            asker = self._gateways[message.asker]
            for gateway in self._gateways:
                if gateway.process.is_alive():
                    if gateway is not asker:
                        gateway.control.offer(message)
                else:
                    asker.control.offer(Answer(message.asker, message.ticket))
        elif isinstance(message, Answer):
            self._gateways[message.asker].control.offer(message)
        elif isinstance(message, Figures):
            self._gateways[0].control.offer(message)

    def _look_after_gateways(self) -> None:
        if time.monotonic() > self._kill_gateways_at:
            for gateway in self._living_gateways:
                logger.error("%s did not end in time; killing it", gateway.name)
                gateway.process.kill()
        ended = [gateway for gateway in self._gateways if not gateway.process.is_alive()]
        for gateway in ended:
            self._hear(gateway)
        failed = [gateway for gateway in ended if not self._draining or gateway.process.exitcode != 0]
        for gateway in failed:
            if gateway.fatal is not None:
                raise ConfigError(gateway.fatal)
        if failed:
            logger.error("%s", failed[0].how_it_ended)
            raise StopError(1)
        if len(ended) == len(self._gateways):
            self._failure = ""
            raise StopError(0)

    def _look_after_nodes(self, line: LeaderLine) -> None:
        line.turn()
        if line.loss is not None:
            self._ranks_lost(line.loss.reason, line.loss.reason if line.loss.fatal else None)
        elif not line.started and not line.missing:
            line.start()
            self._start_ranks()
        elif line.leaving and not self._draining:
            logger.warning("another node is asked to end: draining")
            self._drain(signal.SIGTERM)

    def _look_after_ranks(self) -> None:
        reason = self._ranks.find_loss()
        if reason is not None:
            for rank in self._ranks.children:
                self._children.hear(rank)
            self._ranks_lost(reason, self._ranks.fatal)

    def _ranks_lost(self, reason: str, fatal: str | None) -> None:
        """Start them again, if that can help. `fatal`: why one gave up, if one did."""
        first_start = self._epoch == 1 and not self._ranks.all_up
        self._failure = reason = fatal or reason
        self._ranks.kill()
        if first_start:
            if fatal is not None:
                raise ConfigError(fatal)
            logger.error("%s while starting", reason)
            raise StopError(1)
        if self._line is not None:
            self._give_up(reason, "ranks on other nodes cannot be started again from here")
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > RESTART_WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._config.max_restarts:
            minutes = int(RESTART_WINDOW_S // 60)
            self._give_up(reason, f"after {len(self._restarts)} restarts in {minutes} minutes")
        logger.error("%s; every rank is started again", reason)
        self._restarts.append(now)
        self._tell_gateways(EngineLost(self._epoch, reason))
        self._start_ranks()

    def _give_up(self, reason: str, why: str) -> NoReturn:
        """Let the gateways fail what runs, then end."""
        logger.error("%s; giving up: %s", reason, why)
        self._tell_gateways(EngineDead(reason))
        self._wait_for_gateways()
        raise StopError(1)

    def _tell_gateways(self, message: ToChild) -> None:
        for gateway in self._gateways:
            gateway.control.send(message)

    def _wait_for_gateways(self) -> None:
        """Let those that are about to end do so."""
        give_up = time.monotonic() + END_GRACE_S
        for gateway in self._gateways:
            gateway.process.join(max(0.0, give_up - time.monotonic()))

    # -- ending --------------------------------------------------------------------------------------------------------

    @property
    def _draining(self) -> bool:
        return self._kill_gateways_at < float("inf")

    def _on_signal(self, number: int) -> None:
        """The first means drain, the second end now. That another node was asked before hurries nobody."""
        if self._signalled and self._draining:
            self._tell_gateways(Stop())
            self._kill_gateways_at = time.monotonic() + END_GRACE_S
        elif not self._draining:
            self._drain(number)
        self._signalled = True

    def _drain(self, number: int) -> None:
        """Let what runs finish, and end; where nobody is served yet, end now, by this signal."""
        if not any(gateway.up for gateway in self._living_gateways):
            raise StopError(128 + number)
        self._tell_gateways(Drain())
        self._kill_gateways_at = time.monotonic() + self._drain_timeout_s + END_GRACE_S

    def _end_all(self) -> None:
        if self._line is not None:
            self._line.end(self._failure)
        self._ranks.kill()
        for gateway in self._gateways:
            if not gateway.up:
                gateway.process.kill()
        self._tell_gateways(Stop())
        self._wait_for_gateways()
        for gateway in self._gateways:
            gateway.process.kill()
        for gateway in self._gateways:
            gateway.process.join()
            gateway.control.close()
        self._rendezvous.close()


@contextmanager
def _shared_file() -> Iterator[str]:
    """URL of an empty file that other processes of this user can open, and that vanishes with this process."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("lightqwen-rendezvous")
        try:
            yield f"file:///proc/{os.getpid()}/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory(prefix="lightqwen-") as folder:
            yield f"file://{os.path.join(folder, 'rendezvous')}"
