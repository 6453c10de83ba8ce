"""One client process: sends its share of the requests when they are due, and notes when what comes back arrives.

While it measures it does nothing else: what it noted goes to the parent only when all is done. Times are
`time.perf_counter`'s, which is one clock for all processes of a Linux machine.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import signal
import time
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection
from typing import Any, Protocol

from bench.load.requests import LoadRequest
from lightqwen.client import AsyncClient, Client, Delta, Finished, FinishReason, LightqwenError, Started

CONNECT_TIMEOUT_S = 10.0
TICK_S = 0.2
WARMUP_TOKENS = 16

COMPLETED = "OK"
INTERRUPTED = "INTERRUPTED"
NO_OUTPUT = "NO_OUTPUT"

CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 0),  # a refusal is a result here: gRPC must not try again behind our back
    ("grpc.use_local_subchannel_pool", 1),  # else channels to one server share a connection
)


class Access(Protocol):
    """How the server is reached. Goes to other processes, so it is plain values."""

    @property
    def target(self) -> str: ...
    def client(self) -> Client: ...
    def async_client(self, options: Sequence[tuple[str, Any]]) -> AsyncClient: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process sends."""

    requests: list[tuple[int, LoadRequest]]
    """With their numbers in the whole workload."""
    concurrency: int | None
    connections: int
    warmup: list[LoadRequest]
    settings: dict[str, Any]
    """What every request is made with (`lightqwen.client.GenerateOptions`)."""
    seed: int
    timeout_s: float | None


@dataclass(slots=True, kw_only=True)
class Record:
    """What became of one request. All times are seconds from the beginning of the run."""

    number: int
    due_s: float
    began_s: float
    ended_s: float = 0.0
    status: str = INTERRUPTED
    """`COMPLETED`, `INTERRUPTED` by us, `NO_OUTPUT` (ended well, with nothing), or the gRPC status."""
    detail: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    arrivals_s: list[float] = field(default_factory=list)
    """When output came."""
    tokens: list[int] = field(default_factory=list)
    """Output tokens that had come by then, for each of `arrivals_s`."""

    @property
    def output_tokens(self) -> int:
        return self.tokens[-1] if self.tokens else 0


def run_sender(connection: Connection, access: Access, share: Share) -> None:
    """What a client process runs. Speaks JSON over `connection`; see `fleet`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent says what it means
    parent = _Parent(connection)
    try:
        asyncio.run(_Sender(access, share, parent).run())
    except LightqwenError as error:
        parent.send("failed", reason=str(error))
    except TimeoutError:
        parent.send("failed", reason=f"no connection within {CONNECT_TIMEOUT_S:.0f} s")


class _Parent:
    """The other end of the pipe. When it breaks, the parent is gone, which is told as a wish to stop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, kind: str, **values: Any) -> None:
        try:
            self._connection.send_bytes(json.dumps({"kind": kind, **values}).encode())
        except BrokenPipeError:
            return

    def receive(self) -> dict[str, Any]:
        try:
            message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return {"kind": "stop"}
        return message

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[asyncio.Queue[dict[str, Any]]]:
        """Its messages, as they come."""
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_readable() -> None:
            message = self.receive()
            messages.put_nowait(message)
            if message["kind"] == "stop":
                loop.remove_reader(self._connection.fileno())

        loop.add_reader(self._connection.fileno(), on_readable)
        try:
            yield messages
        finally:
            loop.remove_reader(self._connection.fileno())


class _Sender:
    def __init__(self, access: Access, share: Share, parent: _Parent) -> None:
        self._access = access
        self._share = share
        self._parent = parent
        self._clients: Iterator[AsyncClient] = iter(())
        """One connection after the other, round and round."""
        self._start = 0.0
        self._records: list[Record] = []
        self._fresh: list[Record] = []  # had their first output since the last tick
        self._tokens = 0
        self._ended = 0
        self._failed = 0

    async def run(self) -> None:
        async with AsyncExitStack() as stack:
            messages = await stack.enter_async_context(self._parent.listen())
            clients = [self._access.async_client(CHANNEL_OPTIONS) for _ in range(self._share.connections)]
            for client in clients:
                await stack.enter_async_context(client)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.gather(*(client.channel.channel_ready() for client in clients))
            self._clients = itertools.cycle(clients)
            await asyncio.gather(*(self._warm_up(request) for request in self._share.warmup))
            # Requests and protobuf's tables are here to stay: the collector need not look at them while we measure.
            gc.collect()
            gc.freeze()
            self._parent.send("ready")
            message = await messages.get()
            if message["kind"] == "start":
                await self._measure(messages, float(message["at"]))

    async def _measure(self, messages: asyncio.Queue[dict[str, Any]], start: float) -> None:
        self._start = start
        cpu_before = time.process_time()
        sending = asyncio.create_task(self._send_all())
        ticking = asyncio.create_task(self._tick())
        stopping = asyncio.create_task(messages.get())
        await asyncio.wait((sending, stopping), return_when=asyncio.FIRST_COMPLETED)
        for task in (sending, ticking, stopping):
            task.cancel()
        results = await asyncio.gather(sending, return_exceptions=True)
        cpu_s = time.process_time() - cpu_before
        if isinstance(results[0], Exception):
            raise results[0]
        for record in self._records:
            self._parent.send("record", **{field.name: getattr(record, field.name) for field in fields(record)})
        self._parent.send("end", cpu_s=cpu_s)

    async def _warm_up(self, request: LoadRequest) -> None:
        """Take the way of a request once, shorter, and leave nothing in the prefix cache."""
        options = self._share.settings | {"bypass_prefix_cache": True}
        max_tokens = min(request.max_tokens, WARMUP_TOKENS)
        async for _ in next(self._clients).generate(
            request.prompt, max_tokens=max_tokens, ignore_eos=request.ignore_eos, **options
        ):
            pass

    async def _send_all(self) -> None:
        slots = asyncio.Semaphore(self._share.concurrency or len(self._share.requests))
        async with asyncio.TaskGroup() as group:
            for number, request in self._share.requests:
                await asyncio.sleep(max(0.0, self._start + request.due_s - time.perf_counter()))
                await slots.acquire()
                group.create_task(self._send(number, request, slots))

    async def _send(self, number: int, request: LoadRequest, slots: asyncio.Semaphore) -> None:
        # Ids as a list: what protobuf takes fastest. Made before the clock starts.
        prompt = request.prompt.tolist() if isinstance(request.prompt, array) else request.prompt
        record = Record(number=number, due_s=request.due_s, began_s=time.perf_counter() - self._start)
        self._records.append(record)
        generation = next(self._clients).generate(
            prompt,
            timeout=self._share.timeout_s,
            max_tokens=request.max_tokens,
            ignore_eos=request.ignore_eos,
            seed=self._share.seed + number,
            **self._share.settings,
        )
        try:
            async for event in generation:
                self._note(record, event, time.perf_counter() - self._start)
            record.status = COMPLETED if record.tokens else NO_OUTPUT
        except LightqwenError as error:
            record.status, record.detail = error.code.name, error.message
        finally:
            record.ended_s = time.perf_counter() - self._start
            generation.cancel()
            slots.release()
            self._ended += 1
            self._failed += record.status not in (COMPLETED, INTERRUPTED)

    def _note(self, record: Record, event: Started | Delta | Finished, now: float) -> None:
        if isinstance(event, Delta):
            if not record.tokens:
                self._fresh.append(record)
            self._tokens += event.output_tokens_total - record.output_tokens
            record.arrivals_s.append(now)
            record.tokens.append(event.output_tokens_total)
        elif isinstance(event, Started):
            record.prompt_tokens, record.cached_tokens = event.prompt_tokens, event.cached_tokens
        else:
            record.finish_reason = FinishReason.Name(event.finish_reason).removeprefix("FINISH_REASON_")

    async def _tick(self) -> None:
        """Tell the parent now and then how it goes."""
        while True:
            await asyncio.sleep(TICK_S)
            fresh, self._fresh = self._fresh, []
            self._parent.send(
                "tick",
                running=len(self._records) - self._ended,
                ended=self._ended,
                failed=self._failed,
                tokens=self._tokens,
                ttft_ms=[(record.arrivals_s[0] - record.began_s) * 1e3 for record in fresh],
            )
