"""One request's stream of answers: what the engine produced becomes events; and the register of all open calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from service.detokenizing import Detokenizer
from service.errors import DuplicateRequestError, ServeError
from service.requests import ResolvedRequest
from worker.client import TokenBatch
from worker.messages import Finished, FinishReason

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StartedEvent:
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class DeltaEvent:
    text: str
    token_ids: list[int]
    output_tokens_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEvent:
    """`reason` is the engine's, or None for a stop string."""

    reason: FinishReason | None
    matched_token_id: int | None = None
    matched_stop: str | None = None
    preemptions: int = 0


Event = StartedEvent | DeltaEvent | FinishedEvent


class Reply:
    """Turns the engine's batches into events, in order; counts, and notes when things happened.

    All times are seconds of `clock`, which must be the one that the engine uses (`time.monotonic`).
    """

    def __init__(
        self, request: ResolvedRequest, detokenizer: Detokenizer | None, *, arrived: float, clock: Callable[[], float]
    ) -> None:
        self._request = request
        self._detokenizer = detokenizer
        self._clock = clock
        self.arrived = arrived
        self.scheduled = arrived
        self.first_token = arrived
        self.last_token = arrived
        self.cached_tokens = 0
        self.output_tokens = 0
        self.finished: FinishedEvent | None = None

    def feed(self, batch: TokenBatch) -> list[Event]:
        """The events that a batch makes: maybe the start, then at most one delta, then maybe the end."""
        events: list[Event] = []
        if batch.started is not None:
            self.scheduled = max(self.arrived, batch.started.scheduled_at)
            self.cached_tokens = batch.started.cached_tokens
            events.append(StartedEvent(batch.started.cached_tokens))
        if batch.tokens:
            self.last_token = self._clock()
            if self.output_tokens == 0:
                self.first_token = self.last_token
        tokens, text = self._take(batch)
        if self._detokenizer is not None and self._detokenizer.stopped is not None:
            stop = self._detokenizer.stopped
            self.finished = FinishedEvent(reason=None, matched_stop=stop, preemptions=batch.preemptions)
        elif batch.finished is not None:
            self.finished = _finished(batch.finished, batch.preemptions)
        first = bool(tokens) and self.output_tokens == len(tokens)
        if first or (text and self._request.text) or (tokens and self._request.token_ids):
            ids = tokens if self._request.token_ids else []
            events.append(DeltaEvent(text if self._request.text else "", ids, self.output_tokens))
        if self.finished is not None:
            events.append(self.finished)
        return events

    def _take(self, batch: TokenBatch) -> tuple[list[int], str]:
        """The batch's tokens, up to the one that completes a stop string, and the text that they decide."""
        detokenizer = self._detokenizer
        if detokenizer is None:
            self.output_tokens += len(batch.tokens)
            return batch.tokens, ""
        hidden = self._hidden_token(batch)
        parts: list[str] = []
        taken: list[int] = []
        for i, token in enumerate(batch.tokens):
            taken.append(token)
            if i == hidden:
                detokenizer.skip()
            else:
                parts.append(detokenizer.push(token))
            if detokenizer.stopped is not None:
                break
        if batch.finished is not None and detokenizer.stopped is None:
            parts.append(detokenizer.flush())
        self.output_tokens += len(taken)
        return taken, "".join(parts)

    def _hidden_token(self, batch: TokenBatch) -> int | None:
        """Where in the batch the token is that ended the sequence and has no place in its text, if there is one."""
        ended_by_token = batch.finished is not None and batch.finished.stop_id >= 0 and bool(batch.tokens)
        return len(batch.tokens) - 1 if ended_by_token and not self._request.stopping.include_stop else None


def _finished(finished: Finished, preemptions: int) -> FinishedEvent:
    matched = finished.stop_id if finished.stop_id >= 0 else None
    return FinishedEvent(reason=finished.reason, matched_token_id=matched, preemptions=preemptions)


class Call:
    """One open Generate call, as others can end it: an administrator, or a server that waited long enough."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.release: Callable[[], None] = lambda: None
        """Gives up what the engine does for this call. Set once there is something."""
        self._ended: ServeError | None = None
        self._waiting: asyncio.Timeout | None = None

    def end(self, error: ServeError) -> None:
        """End the call with this error, at its next wait or now if it is waiting; the engine lets go of it at once."""
        if self._ended is not None:
            return
        self._ended = error
        self.release()
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def wait(self, work: Callable[[], Awaitable[T]]) -> T:
        """Wait for something, or for `end`.

        Raises:
            ServeError: what `end` was told, if that came first.
        """
        if self._ended is not None:
            raise self._ended
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await work()
        except TimeoutError:
            if self._ended is None:
                raise
            raise self._ended from None
        finally:
            self._waiting = None


class OpenCalls:
    """Every Generate call that is open, by request id."""

    def __init__(self) -> None:
        self._calls: dict[str, Call] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._calls)

    @contextmanager
    def enter(self, request_id: str) -> Iterator[Call]:
        """Register a call while it is open.

        Raises:
            DuplicateRequestError: one with this id is open.
        """
        if request_id in self._calls:
            raise DuplicateRequestError(request_id)
        call = self._calls[request_id] = Call(request_id)
        self._idle.clear()
        try:
            yield call
        finally:
            del self._calls[request_id]
            if not self._calls:
                self._idle.set()

    def ids(self) -> list[str]:
        return list(self._calls)

    def end(self, request_id: str, error: ServeError) -> bool:
        """End the call with this id; False when there is none."""
        call = self._calls.get(request_id)
        if call is not None:
            call.end(error)
        return call is not None

    def end_all(self, error: ServeError) -> None:
        for call in self._calls.values():
            call.end(error)

    async def wait_idle(self, timeout_s: float | None) -> bool:
        """Wait until no call is open, or until the time is over; tells whether none is."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        return not self._calls
