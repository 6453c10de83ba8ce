"""AdminService: look at the load, end calls, drain, empty the prefix cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from service import convert
from service.admission import Admission
from service.gateways import Gateways, queue, total
from worker.client import EngineClient
from worker.control import AbortCalls, CloseDoor, Look

if TYPE_CHECKING:
    from lightqwen.v1 import admin_pb2

Context = grpc.aio.ServicerContext[Any, Any]


class TokenRate:
    """Tokens per second between two looks that are at least `min_window_s` apart."""

    def __init__(self, clock: Callable[[], float], min_window_s: float) -> None:
        self._clock = clock
        self._min_window_s = min_window_s
        self._tokens = 0
        self._time = clock()
        self._rate = 0.0

    def look(self, tokens: int) -> float:
        """`tokens` counts from the engine's start; when that begins anew, so does the rate."""
        now = self._clock()
        if tokens < self._tokens:
            self._tokens, self._time, self._rate = tokens, now, 0.0
        elif now - self._time >= self._min_window_s:
            self._rate = (tokens - self._tokens) / (now - self._time)
            self._tokens, self._time = tokens, now
        return self._rate


class AdminServicer:
    """What it is asked, it asks of every gateway of the server."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        admission: Admission,
        gateways: Gateways,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._gateways = gateways
        self._clock = clock
        self._rate = TokenRate(clock, min_window_s=1.0)

    async def GetLoad(self, message: admin_pb2.GetLoadRequest, context: Context) -> admin_pb2.GetLoadResponse:
        return convert.get_load_response(await self._load(self._rate))

    async def WatchLoad(self, message: admin_pb2.WatchLoadRequest, context: Context) -> None:
        interval_s = convert.watch_interval_s(message)
        rate = TokenRate(self._clock, min_window_s=interval_s / 2)
        rate.look(self._engine.stats.generated_tokens)
        while True:
            await context.write(convert.watch_load_response(await self._load(rate)))
            await asyncio.sleep(interval_s)

    async def Abort(self, message: admin_pb2.AbortRequest, context: Context) -> admin_pb2.AbortResponse:
        ids, everything = convert.abort_request(message)
        aborted: set[str] = set()
        question: AbortCalls | None = AbortCalls(ids, everything)
        while question is not None:
            answers = await self._gateways.ask(question)
            aborted.update(request_id for answer in answers for request_id in answer.aborted)
            unfinished = [answer.aborted[-1] for answer in answers if answer.more]
            question = AbortCalls([], everything, min(unfinished)) if unfinished else None
        outcomes = [(request_id, request_id in aborted) for request_id in dict.fromkeys([*ids, *sorted(aborted)])]
        return convert.abort_response(outcomes)

    async def Drain(self, message: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        answers = await self._gateways.ask(CloseDoor(convert.drain_wait_s(message)))
        return convert.drain_response(sum(answer.standing.streams for answer in answers))

    async def FlushCache(self, message: admin_pb2.FlushCacheRequest, context: Context) -> admin_pb2.FlushCacheResponse:
        return convert.flush_response(await self._engine.flush_cache())

    async def _load(self, rate: TokenRate) -> admin_pb2.Load:
        standing = total(answer.standing for answer in await self._gateways.ask(Look()))
        stats = self._engine.stats
        waiting, waiting_tokens = queue(standing, stats)
        return convert.load(
            stats,
            self._engine.state,
            draining=self._admission.draining,
            streams=standing.streams,
            waiting=waiting,
            waiting_tokens=waiting_tokens,
            output_tokens_per_second=rate.look(stats.generated_tokens),
        )
