"""The supervisor of a node that only runs ranks: joins node 0, starts its share of the ranks, ends with the group.

It starts nothing again. When node 0 is gone, or one of its own ranks, it ends within seconds and says why, so that
whoever started the nodes can start all of them anew.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque

from worker.children import Children, Facts, OnReady, Ranks, StopError, wait
from worker.config import ConfigError, EngineConfig
from worker.nodes import Leaving, Lost, MemberLine
from worker.rendezvous import where
from worker.vitals import Vitals

logger = logging.getLogger(__name__)

END_GRACE_S = 10.0
"""Beyond the time to drain: how long node 0 may take to end after it was told that this node leaves."""


class Member:
    """One node of several, but not the first.

    Args:
        drain_timeout_s: how long node 0 may let running requests go on when this node is asked to end.
    """

    def __init__(
        self, config: EngineConfig, drain_timeout_s: float, children: Children, on_ready: OnReady, vitals: Vitals
    ) -> None:
        self._config = config
        self._drain_timeout_s = drain_timeout_s
        self._children = children
        self._on_ready = on_ready
        self._vitals = vitals
        self._began = time.monotonic()
        import worker.rank  # noqa: F401  # now: later it would make the line fall silent

        self._line = MemberLine(config)
        self._ranks = Ranks([])
        self._told_ready = False
        self._end_at = float("inf")  # set once it leaves

    def run(self, wakeup: socket.socket, received: deque[int]) -> int:
        """Run until node 0 ends, or until something is lost; returns the exit code.

        Raises:
            ConfigError: node 0 cannot be joined, or a rank gave up, for a reason that a user can mend.
        """
        try:
            while True:
                self._tell_vitals()
                wait(wakeup, self._ranks.children)
                while received:
                    self._on_signal(received.popleft())
                self._line.turn()
                self._follow_line()
                self._look_after_ranks()
        except StopError as stop:
            return stop.exit_code
        finally:
            self._ranks.kill()
            self._line.close()

    @property
    def _leaves(self) -> bool:
        return self._end_at < float("inf")

    def _tell_vitals(self) -> None:
        ready = self._ranks.all_up and not self._leaves
        self._vitals.turn(takes_requests=ready, pulses=[rank.pulse for rank in self._ranks.children])

    def _follow_line(self) -> None:
        end = self._line.end
        if end is not None:
            if end.reason:
                logger.error("node 0 at %s is gone: %s", where(self._config), end.reason)
            raise StopError(1 if end.reason else 0)
        if time.monotonic() > self._end_at:
            logger.error("node 0 did not end in time")
            raise StopError(1)
        if self._line.started and not self._ranks.children:
            self._ranks = self._children.start_ranks(self._config, 1)

    def _look_after_ranks(self) -> None:
        for rank in self._ranks.children:
            self._children.hear(rank)
        reason = self._ranks.find_loss()
        if reason is not None:
            self._ranks_lost(reason)
        if self._ranks.all_up and not self._told_ready:
            self._told_ready = True
            ranks = ",".join(map(str, self._config.local_ranks))
            facts: Facts = {"node": self._config.node_rank, "ranks": ranks, "leader": where(self._config)}
            self._on_ready(facts, time.monotonic() - self._began)

    def _ranks_lost(self, reason: str) -> None:
        for rank in self._ranks.children:
            self._children.hear(rank)
        fatal = self._ranks.fatal
        self._line.say(Lost(fatal or reason, fatal=fatal is not None))
        if fatal is not None:
            raise ConfigError(fatal)
        logger.error("%s", reason)
        raise StopError(1)

    def _on_signal(self, number: int) -> None:
        if not self._line.started:
            raise StopError(128 + number)
        if self._leaves:
            raise StopError(0)
        self._line.say(Leaving())  # its ranks are needed until what runs is done
        self._end_at = time.monotonic() + self._drain_timeout_s + END_GRACE_S
