"""GenerationService: the way of one request, from its arrival to its last message."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

import grpc

from lightqwen.v1 import generation_pb2
from service import convert
from service.admission import BYTES_PER_TOKEN, Admission, Ticket
from service.config import ServeConfig
from service.detokenizing import Detokenizer
from service.errors import (
    DeadlineError,
    InvalidRequestError,
    PreconditionError,
    ServeError,
    UnavailableError,
    Violation,
    WorkerFailedError,
)
from service.metrics import Metrics
from service.requests import ChatPrompt, GenerationRequest, Prompt, ResolvedRequest, TextPrompt, TokenPrompt
from service.streams import Call, DeltaEvent, FinishedEvent, OpenCalls, Reply, StartedEvent
from service.tokenizing import Encoded, TextCodec
from service.validation import Rules
from worker.client import EngineClient, EngineFailedError, EngineState, EngineUnavailableError, TokenBatch
from worker.messages import EngineInfo, FinishReason

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer:
    """Generate, Tokenize, Detokenize.

    Args:
        codec: None for a checkpoint without a tokenizer.
        identify: names the caller, to keep apart what callers leave in the prefix cache.
    """

    def __init__(
        self,
        *,
        config: ServeConfig,
        engine: EngineClient,
        rules: Rules,
        codec: TextCodec | None,
        admission: Admission,
        calls: OpenCalls,
        metrics: Metrics,
        identify: Callable[[Context], str] = lambda context: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._engine = engine
        self._rules = rules
        self._codec = codec
        self._admission = admission
        self._calls = calls
        self._metrics = metrics
        self._identify = identify
        self._clock = clock

    async def Generate(self, message: generation_pb2.GenerateRequest, context: Context) -> None:
        arrived = self._clock()
        request = convert.generation_request(message, self._config, tenant=self._identify(context))
        self._rules.check(request)
        _refuse_expired(context)
        request_id = request.request_id or secrets.token_hex(12)
        with (
            self._calls.enter(request_id) as call,
            self._admit(request.prompt) as ticket,
            _Stage(self._metrics) as stage,
        ):
            resolved = await self._prepare(request, request_id, call, ticket)
            stage.name = "queued"
            await self._stream(resolved, call, ticket, stage, arrived, context)

    async def Tokenize(
        self, message: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        model, prompt, add_special_tokens = convert.tokenize_request(message, self._config)
        self._rules.check_model(model)
        self._rules.check_prompt(prompt)
        return convert.tokenize_response(await self._encode(prompt, add_special_tokens=add_special_tokens))

    async def Detokenize(
        self, message: generation_pb2.DetokenizeRequest, context: Context
    ) -> generation_pb2.DetokenizeResponse:
        model, ids, skip_special = convert.detokenize_request(message)
        self._rules.check_model(model)
        self._rules.check_ids(ids, "token_ids")
        self._rules.require_tokenizer("token_ids", "nothing here can turn ids into text")
        return convert.detokenize_response(await self._the_codec().decode(ids, skip_special=skip_special))

    # -- before the engine ---------------------------------------------------------------------------------------------

    def _admit(self, prompt: Prompt) -> Ticket:
        """Refuse now what could not run anyway; else a place in the queue."""
        ticket = self._admission.admit(_estimated_tokens(prompt))
        try:
            self._engine_info()
        except UnavailableError as error:
            with ticket:  # give the place back
                self._metrics.rejected(error.reason)
                raise
        return ticket

    def _engine_info(self) -> EngineInfo:
        if self._engine.state is not EngineState.READY or self._engine.info is None:
            raise UnavailableError.of(EngineUnavailableError(self._engine.state, ""))
        return self._engine.info

    async def _prepare(
        self, request: GenerationRequest, request_id: str, call: Call, ticket: Ticket
    ) -> ResolvedRequest:
        encoded = await call.wait(lambda: self._encode(request.prompt))
        ticket.correct(len(encoded.ids))
        return self._rules.resolve(request, request_id, encoded.ids, self._engine_info().max_model_len)

    async def _encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> Encoded:
        if isinstance(prompt, TokenPrompt):
            return Encoded(prompt.ids, "")
        return await self._the_codec().encode(prompt, add_special_tokens=add_special_tokens)

    def _the_codec(self) -> TextCodec:
        if self._codec is None:
            raise PreconditionError("the checkpoint has no tokenizer", reason="TOKENIZER_MISSING", field="prompt")
        return self._codec

    # -- with the engine -----------------------------------------------------------------------------------------------

    async def _stream(
        self, request: ResolvedRequest, call: Call, ticket: Ticket, stage: _Stage, arrived: float, context: Context
    ) -> None:
        reply = Reply(request, self._detokenizer(request), arrived=arrived, clock=self._clock)
        stream = self._engine.submit(request.engine)
        call.release = lambda: self._engine.abort(stream)
        self._metrics.stream_opened()
        try:
            while reply.finished is None:
                batch = await call.wait(stream.next)
                events = self._take(reply, batch, request, ticket, stage)
                for event in events:
                    await context.write(convert.event(event, request, reply))
        except EngineFailedError as error:
            raise self._engine_failure() from error
        finally:
            # Without a wait, so that nothing can come between: whatever ended the call, the engine hears of it.
            self._engine.abort(stream)
            self._metrics.stream_closed()
        self._log_finished(request, reply)

    def _take(
        self, reply: Reply, batch: TokenBatch, request: ResolvedRequest, ticket: Ticket, stage: _Stage
    ) -> list[StartedEvent | DeltaEvent | FinishedEvent]:
        """Turn a batch into events, and tell the metrics."""
        if batch.finished is not None:
            _refuse_failure(batch.finished.reason, batch.finished.detail)
        tokens_before, last_token = reply.output_tokens, reply.last_token
        events = reply.feed(batch)
        if batch.started is not None:
            ticket.started()
            stage.name = "prefill"
            self._metrics.request_started(len(request.engine.prompt_ids), reply)
        count = reply.output_tokens - tokens_before
        if count and tokens_before == 0:
            stage.name = "decode"
            self._metrics.first_token(reply)
        elif count:
            self._metrics.more_tokens(count, reply.last_token - last_token)
        if reply.finished is not None:
            stage.name = "finished"
            self._metrics.request_finished(reply.finished.reason, reply)
        return events

    def _detokenizer(self, request: ResolvedRequest) -> Detokenizer | None:
        if not request.needs_text:
            return None
        stopping = request.stopping
        return Detokenizer(
            self._the_codec().table,
            skip_special=request.skip_special_tokens,
            stop=stopping.stop,
            include_stop=stopping.include_stop,
            min_tokens=stopping.min_tokens,
        )

    def _engine_failure(self) -> ServeError:
        if self._engine.state is EngineState.DEAD:
            return UnavailableError("the engine is gone", reason="ENGINE_DEAD")
        return WorkerFailedError("the engine died too often while it ran this request")

    def _log_finished(self, request: ResolvedRequest, reply: Reply) -> None:
        reason = reply.finished.reason if reply.finished is not None else None
        logger.debug(
            "finished request_id=%s reason=%s prompt=%d cached=%d output=%d ttft_s=%.4f total_s=%.4f",
            request.request_id,
            "stop_string" if reason is None else reason.value,
            len(request.engine.prompt_ids),
            reply.cached_tokens,
            reply.output_tokens,
            reply.first_token - reply.arrived,
            reply.last_token - reply.arrived,
        )


class _Stage:
    """How far a request has come; tells the metrics when its client left it there."""

    def __init__(self, metrics: Metrics) -> None:
        self.name = "tokenizing"
        self._metrics = metrics

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, asyncio.CancelledError | grpc.aio.InternalError):
            self._metrics.cancelled(self.name)


def _estimated_tokens(prompt: Prompt) -> int:
    if isinstance(prompt, TokenPrompt):
        return len(prompt.ids)
    num_bytes = prompt.num_bytes if isinstance(prompt, ChatPrompt) else _num_bytes(prompt)
    return num_bytes // BYTES_PER_TOKEN + 1


def _num_bytes(prompt: TextPrompt) -> int:
    return len(prompt.text.encode())


def _refuse_expired(context: Context) -> None:
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        raise DeadlineError("queued")


def _refuse_failure(reason: FinishReason, detail: str) -> None:
    """An end that is a failure is the call's status, not a finish reason."""
    if reason is FinishReason.REJECTED:
        raise InvalidRequestError(
            [Violation("", f"the engine refused the request: {detail}")], reason="ENGINE_REJECTED"
        )
    if reason is FinishReason.BROKEN:
        raise WorkerFailedError(detail)
