"""A real gRPC server that streams at known times, in threads of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import grpc

from lightqwen.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from lightqwen.v1.common_pb2 import FinishReason, Usage
from lightqwen.v1.generation_pb2 import Delta, Finished, GenerateRequest, GenerateResponse, Started

CONTEXT_LENGTH = 1024
VOCAB_SIZE = 500
MAX_STREAMS = 96


@dataclass
class ScriptedServer:
    """Use as a context manager. Attributes may be set before calls come."""

    chunks: tuple[tuple[float, int], ...] = ((0.02, 1), (0.01, 1))
    """What each call gets: after so many seconds, so many tokens."""
    refuse_every: int = 0
    """Refuse each n-th call as overloaded; 0: none."""
    refuse_all_with: grpc.StatusCode | None = None
    token: str = ""
    """Calls have to bring this bearer token."""
    with_tokenizer: bool = True
    credentials: grpc.ServerCredentials | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    """Where each call came from."""
    cancelled: int = 0
    most_running: int = 0

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        self._running = 0
        self._server = grpc.server(ThreadPoolExecutor(MAX_STREAMS))
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(_Generation(self), self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(_Model(self), self._server)
        if self.credentials is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            port = self._server.add_secure_port("127.0.0.1:0", self.credentials)
        self.target = f"127.0.0.1:{port}"
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop(0).wait(10)

    @property
    def running(self) -> int:
        return self._running

    def stream(self, request: GenerateRequest, context: grpc.ServicerContext) -> Iterator[GenerateResponse]:
        self.check_token(context)
        with self._lock:
            self.requests.append(request)
            self.arrived.append(time.perf_counter())
            self.peers.append(context.peer())
            number = len(self.requests)
            self._running += 1
            self.most_running = max(self.most_running, self._running)
        gone = threading.Event()
        context.add_callback(gone.set)
        try:
            if self.refuse_all_with is not None:
                context.abort(self.refuse_all_with, "because the test wants it")
            if self.refuse_every and number % self.refuse_every == 0:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests wait")
            yield from self._answer(request, gone)
        finally:
            with self._lock:
                self._running -= 1

    def _answer(self, request: GenerateRequest, gone: threading.Event) -> Iterator[GenerateResponse]:
        prompt_tokens = len(request.prompt.token_ids.ids) or 5
        yield GenerateResponse(started=Started(prompt_tokens=prompt_tokens, cached_tokens=2))
        total = 0
        for delay, tokens in self.chunks:
            if gone.wait(delay):
                with self._lock:
                    self.cancelled += 1
                return
            total += tokens
            yield GenerateResponse(delta=Delta(text="x" * tokens, output_tokens_total=total))
        usage = Usage(prompt_tokens=prompt_tokens, output_tokens=total)
        yield GenerateResponse(finished=Finished(finish_reason=FinishReason.FINISH_REASON_MAX_TOKENS, usage=usage))

    def check_token(self, context: grpc.ServicerContext) -> None:
        if self.token and dict(context.invocation_metadata()).get("authorization") != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no bearer token")


class _Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, script: ScriptedServer) -> None:
        self._script = script

    def Generate(self, request: GenerateRequest, context: grpc.ServicerContext) -> Iterator[GenerateResponse]:
        return self._script.stream(request, context)

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> generation_pb2.TokenizeResponse:
        raise NotImplementedError

    def Detokenize(self, request: Any, context: grpc.ServicerContext) -> generation_pb2.DetokenizeResponse:
        raise NotImplementedError


class _Model(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, script: ScriptedServer) -> None:
        self._script = script

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> model_pb2.GetModelResponse:
        self._script.check_token(context)
        capabilities = [model_pb2.CAPABILITY_TOKEN_INPUT]
        if self._script.with_tokenizer:
            capabilities.append(model_pb2.CAPABILITY_TEXT_OUTPUT)
        return model_pb2.GetModelResponse(
            name="scripted <b>", context_length=CONTEXT_LENGTH, vocab_size=VOCAB_SIZE, capabilities=capabilities
        )

    def GetServerInfo(self, request: Any, context: grpc.ServicerContext) -> model_pb2.GetServerInfoResponse:
        return model_pb2.GetServerInfoResponse(
            version="9.8.7", device="NVIDIA H200", dtype="bfloat16", tensor_parallel_size=2
        )
