"""The gateway's end of the engine: submit, stream, abort, and go on after the ranks were restarted.

`EngineClient` owns everything that is needed to run a request again: its prompt, its parameters and the tokens it has
produced. Losing every rank therefore loses no request. asyncio; never blocks; never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import zmq

from worker.endpoint import EngineEndpoint
from worker.messages import (
    Abort,
    CacheFlushed,
    EngineInfo,
    EngineStats,
    Finished,
    FlushCache,
    Goodbye,
    Hello,
    Outputs,
    Ready,
    SamplingParams,
    Started,
    Submit,
    ToGateway,
    ToLeader,
    ids_from_bytes,
    ids_to_bytes,
)

logger = logging.getLogger(__name__)

MAX_RESUBMITS = 2
"""A request that was running at this many rank deaths is failed at the next: it may be their cause."""


class EngineState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DEAD = "dead"


class EngineUnavailableError(Exception):
    """No request can be taken now. `retryable` tells whether waiting helps."""

    def __init__(self, state: EngineState, reason: str) -> None:
        super().__init__(reason)
        self.state = state

    @property
    def retryable(self) -> bool:
        return self.state is not EngineState.DEAD


class EngineFailedError(Exception):
    """A running request was lost with the engine: it died for good, or too often under this request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """A request as the engine wants it: checked, defaults resolved, tokenized."""

    prompt_ids: Sequence[int] | np.ndarray
    sampling: SamplingParams
    max_tokens: int
    min_tokens: int = 0
    eos_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    cache_salt: bytes = b""
    use_prefix_cache: bool = True


@dataclass(slots=True)
class TokenBatch:
    """What came since the last look: maybe the start, then tokens in order, then maybe the end."""

    started: Started | None = None
    tokens: list[int] = field(default_factory=list)
    finished: Finished | None = None
    preemptions: int = 0  # how often the request has gone on after one, from its beginning


class TokenStream:
    """One running request. Tokens that nobody has fetched yet wait in one pending batch, however slow the reader is."""

    def __init__(self, number: int, request: EngineRequest) -> None:
        self.number = number
        self.request = request
        self.output: list[int] = []  # every token so far, fetched or not
        self.resubmits = 0
        self.preemptions = 0
        self._pending = TokenBatch()
        self._first_sent = False
        self._saw_start = False
        self._failure: EngineFailedError | None = None
        self._wakeup = asyncio.Event()

    async def next(self) -> TokenBatch:
        """Wait until there is something and return all of it; the first token always comes alone.

        After a batch with `finished` set there is nothing more to wait for.

        Raises:
            EngineFailedError: the engine is gone and the request with it.
        """
        await self._wakeup.wait()
        batch = self._pending
        if self._failure is not None and not batch.tokens:
            raise self._failure
        if not self._first_sent and batch.tokens:
            self._first_sent = True
            if len(batch.tokens) > 1:
                rest = TokenBatch(tokens=batch.tokens[1:], finished=batch.finished)
                self._pending = rest
                return TokenBatch(started=batch.started, tokens=batch.tokens[:1], preemptions=self.preemptions)
        self._pending = TokenBatch()
        if self._failure is None:
            self._wakeup.clear()
        batch.preemptions = self.preemptions
        return batch

    def _push_started(self, started: Started) -> None:
        self.preemptions += started.again
        if not self._saw_start:  # a resumed request starts again; its reader saw that once
            self._saw_start = True
            self._pending.started = started
            self._wakeup.set()

    def _push_token(self, token: int) -> None:
        self.output.append(token)
        self._pending.tokens.append(token)
        self._wakeup.set()

    def _push_finished(self, finished: Finished) -> None:
        self._pending.finished = finished
        self._wakeup.set()

    def _fail(self, failure: EngineFailedError) -> None:
        self._failure = failure
        self._wakeup.set()


class EngineClient:
    """Talks to the leader over one local socket. Create and use it on the event loop's thread.

    Args:
        endpoint: where the leader listens (it need not be there yet).
        on_stats: called for every `EngineStats` that arrives.
        on_state: called when `state` changes.
        on_abort_confirmed: called with the seconds from `abort` until the engine had freed the request's KV blocks.
    """

    def __init__(
        self,
        endpoint: EngineEndpoint,
        *,
        on_stats: Callable[[EngineStats], None] = lambda stats: None,
        on_state: Callable[[EngineState], None] = lambda state: None,
        on_abort_confirmed: Callable[[float], None] = lambda seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint
        self._on_stats = on_stats
        self._on_state = on_state
        self._on_abort_confirmed = on_abort_confirmed
        self._clock = clock
        self.state = EngineState.STARTING
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self._reason = "the engine is starting"
        self._streams: dict[int, TokenStream] = {}
        self._aborted_at: dict[int, float] = {}
        self._flushes: dict[int, asyncio.Future[int]] = {}
        self._next_number = 1
        self._ready = asyncio.Event()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToGateway).decode
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect, and keep trying until the leader is there. Needs a running event loop."""
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        # A leader that starts again must be greeted again: a probe tells it that this peer is there. ZeroMQ probes once
        # for each queue to a peer, and only with IMMEDIATE does the queue end with the connection.
        self._socket.setsockopt(zmq.PROBE_ROUTER, 1)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.connect(self._endpoint.address)
        asyncio.get_running_loop().add_reader(self._socket.FD, self._drain)

    def close(self) -> None:
        """Say goodbye; the leader aborts whatever still runs for this gateway."""
        if self._socket is None or self._context is None:
            return
        asyncio.get_running_loop().remove_reader(self._socket.FD)
        self._send(Goodbye())
        self._socket.close()
        self._context.term()
        self._socket = None

    async def wait_ready(self) -> EngineInfo:
        """Return when the engine can take requests."""
        await self._ready.wait()
        if self.info is None:
            raise EngineUnavailableError(self.state, self._reason)
        return self.info

    def engine_lost(self, epoch: int, reason: str) -> None:
        """The supervisor says that the ranks of an epoch died and come again. Running requests wait for them."""
        if self.info is not None and self.info.epoch > epoch:
            return  # they have come already: a busy loop may hear their `Ready` before this
        self._ready.clear()
        self._reason = reason
        self._set_state(EngineState.RESTARTING)
        self._forget_tickets()
        for stream in [s for s in self._streams.values() if s.resubmits == MAX_RESUBMITS]:
            stream._fail(EngineFailedError(f"the engine died {MAX_RESUBMITS + 1} times while it ran this request"))
            del self._streams[stream.number]

    def engine_dead(self, reason: str) -> None:
        """The supervisor says that the ranks will not come back."""
        self._reason = reason
        self._set_state(EngineState.DEAD)
        self._forget_tickets()
        for stream in self._streams.values():
            stream._fail(EngineFailedError(reason))
        self._streams.clear()
        self.info = None
        self._ready.set()  # whoever waits learns that waiting is over

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> TokenStream:
        """Hand a request to the leader.

        Raises:
            EngineUnavailableError: the engine is not ready.
        """
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(self.state, self._reason)
        stream = TokenStream(self._next_number, request)
        self._next_number += 1
        self._streams[stream.number] = stream
        self._send_submit(stream)
        return stream

    def abort(self, stream: TokenStream) -> None:
        """Give a request up: synchronous, and harmless when it has ended already. Its stream gets nothing more."""
        if self._streams.pop(stream.number, None) is None:
            return
        self._aborted_at[stream.number] = self._clock()
        self._send(Abort(requests=[stream.number]))

    async def flush_cache(self) -> int:
        """Drop the prefix cache; returns how many blocks it held.

        Raises:
            EngineUnavailableError: the engine is not ready, or it died before it answered.
        """
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(self.state, self._reason)
        ticket = self._next_number
        self._next_number += 1
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._flushes[ticket] = future
        self._send(FlushCache(ticket=ticket))
        try:
            return await future
        finally:
            self._flushes.pop(ticket, None)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    # -- the socket ----------------------------------------------------------------------------------------------------

    def _send_submit(self, stream: TokenStream) -> None:
        if self.info is None:
            raise EngineUnavailableError(self.state, self._reason)
        request = stream.request
        self._send(
            Submit(
                request=stream.number,
                epoch=self.info.epoch,
                prompt=ids_to_bytes(request.prompt_ids),
                output=ids_to_bytes(stream.output),
                sampling=request.sampling,
                max_tokens=request.max_tokens,
                min_tokens=request.min_tokens,
                eos_ids=request.eos_ids,
                stop_ids=request.stop_ids,
                cache_salt=request.cache_salt,
                use_prefix_cache=request.use_prefix_cache,
            )
        )

    def _send(self, message: ToLeader) -> None:
        if self._socket is None:
            return
        with contextlib.suppress(zmq.Again):  # nobody is there; whoever comes is told all that still matters
            self._socket.send(self._encode(message), zmq.NOBLOCK)
        # Sending may consume the edge that announces incoming messages (ZMQ_FD is edge-triggered): look again.
        asyncio.get_running_loop().call_soon(self._drain)

    def _drain(self) -> None:
        """Take every message that has arrived."""
        while self._socket is not None and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            data = self._socket.recv(zmq.NOBLOCK)
            if data:
                self._receive(self._decode(data))
            else:  # a leader's probe: it has just come up and has not heard our secret
                self._send(Hello(secret=self._endpoint.secret))

    def _receive(self, message: ToGateway) -> None:
        if isinstance(message, Outputs):
            self._receive_outputs(message)
        elif isinstance(message, Ready):
            self._receive_ready(message)
        elif isinstance(message, CacheFlushed):
            future = self._flushes.get(message.ticket)
            if future is not None and not future.done():
                future.set_result(message.blocks)

    def _receive_outputs(self, message: Outputs) -> None:
        streams = self._streams
        for started in message.started:
            if stream := streams.get(started.request):
                stream._push_started(started)
        numbers = np.frombuffer(message.requests, dtype="<i8").tolist()
        for number, token in zip(numbers, ids_from_bytes(message.tokens).tolist(), strict=True):
            if stream := streams.get(number):
                stream._push_token(token)
        for finished in message.finished:
            if stream := streams.pop(finished.request, None):
                stream._push_finished(finished)
            elif (since := self._aborted_at.pop(finished.request, None)) is not None:
                self._on_abort_confirmed(self._clock() - since)
        self._take_stats(message.stats)

    def _receive_ready(self, message: Ready) -> None:
        known = self.info.epoch if self.info is not None else 0
        if message.info.epoch <= known or self.state is EngineState.DEAD:
            return
        self.info = message.info
        self._reason = ""
        self._aborted_at.clear()  # they died with the ranks
        for stream in self._streams.values():
            stream.resubmits += 1
            self._send_submit(stream)
        if self._streams:
            logger.info("resubmitted streams=%d epoch=%d", len(self._streams), message.info.epoch)
        self._set_state(EngineState.READY)
        self._ready.set()
        self._take_stats(message.stats)

    def _take_stats(self, stats: EngineStats) -> None:
        self.stats = stats
        asyncio.get_running_loop().call_soon(self._on_stats, stats)  # behind those who wait for tokens

    def _set_state(self, state: EngineState) -> None:
        if state is not self.state:
            self.state = state
            self._on_state(state)

    def _forget_tickets(self) -> None:
        for future in self._flushes.values():
            if not future.done():
                future.set_exception(EngineUnavailableError(self.state, self._reason))
        self._flushes.clear()
