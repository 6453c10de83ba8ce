"""The client processes: so many that the client is not what is measured, started, watched and stopped together.

Each process gets every n-th request and its part of the concurrency. Between parent and process there is one pipe with
JSON on it: `ready`, `failed`, `tick`, `record`, `end` come, `start` and `stop` go.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Protocol, Self

from bench.load.errors import LoadError
from bench.load.sender import Access, Record, Share, run_sender

STREAMS_PER_PROCESS = 32
START_DELAY_S = 0.1  # from "all are ready" to the first request
SHOW_S = 0.2
END_TIMEOUT_S = 5.0
RECENT = 512  # first outputs that the live TTFT is the median of


class Screen(Protocol):
    """Where progress goes."""

    def update(self, line: str) -> None:
        """Show a line in the place of the one before."""

    def say(self, line: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """Take the changing line away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came back."""

    records: list[Record]
    """In the order of their numbers. Requests that were never sent have none."""
    interrupted: bool
    cpu_shares: list[float]
    """Of each process: CPU time over the run's time."""


def choose_processes(streams: int) -> int:
    """One for each `STREAMS_PER_PROCESS`, and no more than there are cores."""
    return max(1, min(-(-streams // STREAMS_PER_PROCESS), os.cpu_count() or 1))


def run_fleet(access: Access, shares: list[Share], screen: Screen) -> Outcome:
    """Send everything and wait for the end. Ctrl-C cancels what runs and returns what there is; a second one raises.

    Raises:
        LoadError: a process could not begin, or was lost.
    """
    with _Fleet(access, shares) as fleet:
        screen.update("connecting and warming up")
        fleet.wait_ready()
        fleet.begin()
        try:
            fleet.collect(screen)
            interrupted = False
        except KeyboardInterrupt:
            screen.say("interrupted: cancelling what runs; Ctrl-C again quits at once")
            fleet.stop()
            fleet.collect(screen)
            interrupted = True
        screen.close()
        return fleet.outcome(interrupted=interrupted)


@dataclass(slots=True)
class _Member:
    number: int
    process: SpawnProcess
    connection: Connection
    tick: dict[str, Any] = field(default_factory=dict)
    cpu_s: float | None = None
    """Set once it has ended."""


class _Fleet:
    def __init__(self, access: Access, shares: list[Share]) -> None:
        self._access = access
        self._total = sum(len(share.requests) for share in shares)
        self._shares = shares
        self._members: list[_Member] = []
        self._records: list[Record] = []
        self._ttft_ms: deque[float] = deque(maxlen=RECENT)
        self._began = 0.0

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        with _no_interrupts():
            for number, share in enumerate(self._shares):
                ours, theirs = context.Pipe(duplex=True)
                process = context.Process(
                    target=run_sender, args=(theirs, self._access, share), name=f"client-{number}", daemon=True
                )
                process.start()
                theirs.close()
                self._members.append(_Member(number, process, ours))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for member in self._members:
            if kind is None:
                member.process.join(END_TIMEOUT_S)
            member.process.kill()
            member.process.join()
            member.connection.close()

    def wait_ready(self) -> None:
        for member in self._members:
            message = self._receive(member)
            if message["kind"] == "failed":
                raise LoadError(f"a request before the measurement (--warmup) failed: {message['reason']}")

    def begin(self) -> None:
        self._began = time.perf_counter() + START_DELAY_S
        self._tell("start", at=self._began)

    def stop(self) -> None:
        """Ask them to cancel what runs. They still tell what they have."""
        self._tell("stop")

    def collect(self, screen: Screen) -> None:
        """Return when all have ended."""
        due = 0.0
        while running := [member for member in self._members if member.cpu_s is None]:
            for connection in wait([member.connection for member in running], timeout=SHOW_S):
                self._take(next(member for member in running if member.connection is connection))
            if time.monotonic() >= due:
                due = time.monotonic() + SHOW_S
                screen.update(self._progress())

    def outcome(self, *, interrupted: bool) -> Outcome:
        seconds = max((record.ended_s for record in self._records), default=0.0) or 1.0
        return Outcome(
            records=sorted(self._records, key=lambda record: record.number),
            interrupted=interrupted,
            cpu_shares=[(member.cpu_s or 0.0) / seconds for member in self._members],
        )

    def _take(self, member: _Member) -> None:
        message = self._receive(member)
        kind = message.pop("kind")
        if kind == "tick":
            self._ttft_ms.extend(message.pop("ttft_ms"))
            member.tick = message
        elif kind == "record":
            self._records.append(Record(**message))
        elif kind == "end":
            member.cpu_s = message["cpu_s"]
        else:
            raise LoadError(f"a client process failed: {message['reason']}")

    def _receive(self, member: _Member) -> dict[str, Any]:
        try:
            message: dict[str, Any] = json.loads(member.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            member.process.join()
            raise LoadError(
                f"client process {member.number} ended with exit code {member.process.exitcode} before it was done"
            ) from None
        return message

    def _tell(self, kind: str, **values: Any) -> None:
        for member in self._members:
            try:
                member.connection.send_bytes(json.dumps({"kind": kind, **values}).encode())
            except BrokenPipeError:
                continue  # reading from it tells the rest

    def _progress(self) -> str:
        def total(name: str) -> int:
            return sum(member.tick.get(name, 0) for member in self._members)

        seconds = max(time.perf_counter() - self._began, 1e-9)
        line = f"{max(0.0, seconds):.0f} s: {total('ended')}/{self._total} done, {total('running')} running"
        if failed := total("failed"):
            line += f", {failed} failed"
        line += f"; {total('tokens') / seconds:,.0f} output tokens/s"
        if self._ttft_ms:
            line += f", TTFT p50 {statistics.median(self._ttft_ms):,.1f} ms"
        return line


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """What starts meanwhile ignores Ctrl-C from its first instruction on."""
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
