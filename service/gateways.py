"""All gateways of one server, as an administrator and Prometheus see them: one.

What an administrator asks of the server, each gateway does for itself: the one that was called, and the others, which
hear of it through the supervisor (`worker.control`). A lone gateway has no others, and is asked in the same way.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.admission import Admission
from service.errors import AdminAbortError, UnavailableError
from service.streams import OpenCalls
from worker.control import (
    MAX_NAMED_CALLS,
    AbortCalls,
    Answer,
    Ask,
    ChildEnd,
    CloseDoor,
    Figures,
    Question,
    Standing,
)
from worker.messages import EngineStats
from worker.vitals import STALLED_S

ANSWER_S = 3.0
"""How long another gateway may take to answer. The supervisor, too, may be busy for a moment: it starts the ranks."""


@dataclass(frozen=True, slots=True)
class _Heard:
    """What another gateway said last, unasked."""

    at: float  # infinite: nothing is to be heard, for it has not begun to speak, or has come to its end
    standing: Standing


class Gateways:
    """This gateway among those of its server. Use it on the event loop's thread, where nothing else is said.

    Args:
        number: this gateway's, from 0.
        count: of all.
        control: the line to the supervisor.
        close_door: makes this gateway refuse new requests and say NOT_SERVING.
    """

    def __init__(
        self,
        *,
        number: int,
        count: int,
        control: ChildEnd,
        calls: OpenCalls,
        admission: Admission,
        close_door: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._number = number
        self._control = control
        self._calls = calls
        self._admission = admission
        self._close_door = close_door
        self._clock = clock
        self._others = {other: _Heard(float("inf"), Standing()) for other in range(count) if other != number}
        self._tickets = itertools.count()
        self._answers: dict[int, asyncio.Queue[Answer]] = {}  # to what this gateway asked, by ticket
        self._asked: asyncio.Queue[Ask] = asyncio.Queue()

    # -- asking and answering ------------------------------------------------------------------------------------------

    async def ask(self, question: Question) -> list[Answer]:
        """Let every gateway do what is asked; returns the answers of all, this one's first.

        Raises:
            UnavailableError: one of the others did not answer in time. It may have done what was asked.
        """
        asked = Ask(self._number, next(self._tickets), question)
        answers = self._answers[asked.ticket] = asyncio.Queue()
        if self._others:
            self._control.offer(asked)
        patience_s = ANSWER_S + (question.wait_s if isinstance(question, CloseDoor) else 0.0)
        try:
            async with asyncio.timeout(patience_s):
                return [await self._do(asked), *[await answers.get() for _ in self._others]]
        except TimeoutError:
            raise UnavailableError(
                f"another gateway of this server did not answer within {patience_s:g} s",
                reason="GATEWAY_SILENT",
                retry_after_s=1.0,
            ) from None
        finally:
            del self._answers[asked.ticket]

    def hear(self, message: Ask | Answer | Figures) -> None:
        """Take what another gateway said."""
        if isinstance(message, Ask):
            self._asked.put_nowait(message)
        elif isinstance(message, Figures):
            at = float("inf") if message.last else self._clock()
            self._others[message.gateway] = _Heard(at, message.standing)
        elif message.ticket in self._answers:  # else it comes too late
            self._answers[message.ticket].put_nowait(message)

    async def answer_others(self) -> None:
        """Do what others ask, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                tasks.create_task(self._answer(await self._asked.get()))

    async def _answer(self, asked: Ask) -> None:
        self._control.offer(await self._do(asked))

    async def _do(self, asked: Ask) -> Answer:
        """This gateway's part."""
        question = asked.question
        aborted: list[str] = []
        more = False
        if isinstance(question, AbortCalls):
            wanted = question.request_ids
            if question.everything:
                wanted = sorted(request_id for request_id in self._calls.ids() if request_id > question.after)
                more = len(wanted) > MAX_NAMED_CALLS
            wanted = wanted[:MAX_NAMED_CALLS]
            aborted = [request_id for request_id in wanted if self._calls.end(request_id, AdminAbortError())]
        elif isinstance(question, CloseDoor):
            self._close_door()
            await self._calls.wait_idle(question.wait_s)
        return Answer(asked.asker, asked.ticket, self._standing, aborted, more)

    @property
    def _standing(self) -> Standing:
        return Standing(len(self._calls), self._admission.waiting_requests, self._admission.waiting_tokens)

    # -- figures, unasked ----------------------------------------------------------------------------------------------

    def tell_figures(self, counted: bytes, *, last: bool = False) -> None:
        """Tell gateway 0 what this one has counted and how it stands. To be called every second, and at the end."""
        self._control.offer(Figures(self._number, self._standing, counted, last))

    @property
    def last_known(self) -> Standing:
        """How all of them stand, as gateway 0 knows it: others as of a second ago. For any thread."""
        return total([self._standing, *(heard.standing for heard in self._others.values())])

    @property
    def problem(self) -> str | None:
        """Which of the others gateway 0 should have heard, and has not. For any thread."""
        now = self._clock()
        for other, heard in self._others.items():
            if now - heard.at > STALLED_S:
                return f"gateway{other} was not heard for {now - heard.at:.0f} s"
        return None


def total(standings: Iterable[Standing]) -> Standing:
    streams, waiting, waiting_tokens = 0, 0, 0
    for standing in standings:
        streams += standing.streams
        waiting += standing.waiting
        waiting_tokens += standing.waiting_tokens
    return Standing(streams, waiting, waiting_tokens)


def queue(standing: Standing, stats: EngineStats) -> tuple[int, int]:
    """Requests and prompt tokens that wait: the gateways' are known at once, the engine's include preempted ones."""
    return max(stats.waiting, standing.waiting), max(stats.waiting_tokens, standing.waiting_tokens)
