"""Who may wait: a bounded queue, counted at the first instant and before any work is done for a request.

What counts is requests, and prompt tokens, that the engine has not begun with. For text the tokens are estimated from
its bytes first and set right once it is tokenized.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from service.errors import DrainingError, OverloadedError

BYTES_PER_TOKEN = 3
"""A low guess for text in general (English is near 4.5, Chinese near 3.5 with Qwen's vocabulary), so that the estimate
is rather too high than too low."""

RETRY_AFTER_S = 1.0


def part_of(limit: int, number: int, gateways: int) -> int:
    """What gateway `number` may take of a limit of the whole server: parts differ by one at most and add up to it."""
    return len(range(number, limit, gateways))


class Admission:
    """Counts what waits and what is open. `on_reject` is told the reason of each refusal."""

    def __init__(
        self,
        *,
        max_requests: int,
        max_tokens: int,
        max_streams: int,
        on_reject: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_streams = max_streams
        self._on_reject = on_reject
        self.draining = False
        self.waiting_requests = 0
        self.waiting_tokens = 0
        self.streams = 0

    def drain(self) -> None:
        """Refuse everybody from now on."""
        self.draining = True

    def admit(self, tokens: int) -> Ticket:
        """Let a request with about so many prompt tokens in.

        Raises:
            ServeError: OverloadedError where it would have to wait and may not; DrainingError while draining.
        """
        if self.draining:
            self._on_reject("DRAINING")
            raise DrainingError("the server is draining")
        if self.streams >= self._max_streams:
            raise self._overloaded("STREAMS_FULL", f"{self.streams} requests are open")
        if self.waiting_requests >= self._max_requests:
            raise self._overloaded("QUEUE_FULL", f"{self.waiting_requests} requests wait")
        if self.waiting_tokens and self.waiting_tokens + tokens > self._max_tokens:
            raise self._overloaded("QUEUE_TOKENS_FULL", f"{self.waiting_tokens} prompt tokens wait")
        return Ticket(self, tokens)

    def _overloaded(self, reason: str, message: str) -> OverloadedError:
        self._on_reject(reason)
        return OverloadedError(f"{message}; try again later", reason=reason, retry_after_s=RETRY_AFTER_S)


class Ticket:
    """An admitted request's share of the queue; a context manager that gives back what it still holds."""

    def __init__(self, admission: Admission, tokens: int) -> None:
        self._admission = admission
        self._tokens = tokens
        self._waiting = True
        admission.streams += 1
        admission.waiting_requests += 1
        admission.waiting_tokens += tokens

    def correct(self, tokens: int) -> None:
        """The prompt's true length is known."""
        if self._waiting:
            self._admission.waiting_tokens += tokens - self._tokens
            self._tokens = tokens

    def started(self) -> None:
        """The engine has begun: the request waits no more. Harmless when said again."""
        if self._waiting:
            self._waiting = False
            self._admission.waiting_requests -= 1
            self._admission.waiting_tokens -= self._tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.started()
        self._admission.streams -= 1
