"""The thin Python client of a lightqwen server. Needs grpcio and protobuf, nothing else.

    with Client("localhost:50051") as client:
        for piece in client.chat("Why is the sky blue?", max_tokens=200).pieces():
            print(piece, end="", flush=True)

`Client` blocks, `AsyncClient` is for asyncio; both make their requests here and raise `LightqwenError`. What an option
means, and what it is when it is not given, says the contract in `lightqwen/v1/common.proto`. For a field of the
contract that has no option here, use the stubs on `client.channel`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc
import grpc.aio
import grpc.experimental

from lightqwen.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from lightqwen.v1.common_pb2 import Chat, ChatMessage, FinishReason, Prompt, Role, TokenIds
from lightqwen.v1.generation_pb2 import Delta, Finished, GenerateRequest, GenerateResponse, Started

__all__ = [
    "BALANCED_OPTIONS",
    "CHANNEL_OPTIONS",
    "AsyncClient",
    "AsyncGeneration",
    "Chat",
    "ChatMessage",
    "Client",
    "Delta",
    "Event",
    "FinishReason",
    "Finished",
    "GenerateOptions",
    "Generation",
    "LightqwenError",
    "Started",
    "build_chat",
    "build_prompt",
    "build_request",
]

_ROLES = {
    "system": Role.ROLE_SYSTEM,
    "user": Role.ROLE_USER,
    "assistant": Role.ROLE_ASSISTANT,
    "tool": Role.ROLE_TOOL,
}

Event = Started | Delta | Finished
Message = ChatMessage | Mapping[str, Any]
PromptLike = str | Sequence[int] | Chat

RETRY_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            # Refusals come before the first message, so nothing is ever generated twice. A server that knows better
            # says how long to wait (grpc-retry-pushback-ms), and is obeyed.
            "name": [{"service": f"lightqwen.v1.{name}Service"} for name in ("Generation", "Model", "Admin")],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
}

CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", json.dumps(RETRY_SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    # A long prefill is silent: pings tell a dead connection from a busy server. Servers allow one every 10 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 32 * 1024 * 1024),
    # Without it a blocking stream whose server is gone by the time of a retry waits for ever, whatever its deadline.
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
)
"""Recommended options of a channel to a lightqwen server."""

BALANCED_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", json.dumps(RETRY_SERVICE_CONFIG | {"healthCheckConfig": {"serviceName": ""}})),
)
"""For a name of several servers (`dns:///...`, `ipv4:a:1,b:2`): calls go round among those whose health is SERVING.

Not for one server alone: while that starts or drains, the channel says UNAVAILABLE without asking it for its reason.
"""


class GenerateOptions(TypedDict, total=False):
    """What `generate` and `chat` take by name. Left out, or None: the checkpoint's default, then neutral."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool | None
    ignore_eos: bool | None
    text: bool | None
    token_ids: bool | None
    skip_special_tokens: bool | None
    cache_salt: str | None
    bypass_prefix_cache: bool | None
    request_id: str
    model: str


class LightqwenError(Exception):
    """A call failed. `str()` is one line.

    Attributes:
        code: the gRPC status.
        message: what the server said.
        reason: the constant that names the cause (`QUEUE_FULL`, ...); empty when the server gave none.
        retry_delay_s: wait so long before another try; None when the server did not say.
        fields: of an invalid request, what is wrong with which field.

    `reason` and `fields` need googleapis-common-protos to be installed; without it they are empty.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        retry_delay_s: float | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.reason = reason
        self.retry_delay_s = retry_delay_s
        self.fields = dict(fields or {})


def build_prompt(prompt: PromptLike) -> Prompt:
    """Turn text, token ids or a chat into the contract's prompt."""
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if isinstance(prompt, Chat):
        return Prompt(chat=prompt)
    return Prompt(token_ids=TokenIds(ids=prompt))


def build_chat(messages: str | Sequence[Message], *, enable_thinking: bool | None = None) -> Chat:
    """Turn one user message, or messages, into the contract's chat.

    A message may be a mapping: `role` is "system", "user", "assistant" or "tool", the other keys are ChatMessage's.

    Raises:
        ValueError: a message has a role that there is not.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return Chat(messages=[_chat_message(message) for message in messages], **_given(enable_thinking=enable_thinking))


def _chat_message(message: Message) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    fields: dict[str, Any] = dict(message)
    role = fields.pop("role", "")
    if role not in _ROLES:
        raise ValueError(f"role must be one of {', '.join(_ROLES)}, got {role!r}")
    return ChatMessage(role=_ROLES[role], **fields)


def build_request(prompt: PromptLike, **options: Unpack[GenerateOptions]) -> GenerateRequest:
    """Make the contract's request; an option that is None is left unset.

    Raises:
        TypeError: there is no such option.
        ValueError: the contract has no room for a value; names the option.
    """
    given = _given(**options)
    request = GenerateRequest(prompt=build_prompt(prompt))
    groups: tuple[Any, ...] = (request.sampling, request.stopping, request.output, request.cache, request)
    for group in groups:
        for name in given.keys() & group.DESCRIPTOR.fields_by_name.keys():
            try:
                group.MergeFrom(type(group)(**{name: given.pop(name)}))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    if given:
        raise TypeError(f"unknown option {', '.join(sorted(given))}")
    return request


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _event(response: GenerateResponse) -> Event | None:
    """Return the event of one message; None for a kind that a newer server sends."""
    kind = response.WhichOneof("event")
    return getattr(response, kind) if kind is not None else None


class _Progress:
    """What a stream has told so far."""

    started: Started | None = None
    finished: Finished | None = None

    def _note(self, event: Event) -> Event:
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, Finished):
            self.finished = event
        return event


class Generation(_Progress):
    """One running request: iterate over its events, or over its text by `pieces()`, or collect it by `text()`.

    `started` and `finished` keep those two events once they have come. Leaving the `with` block, or `cancel()`, ends
    the request on the server.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._cancelled = False

    def __iter__(self) -> Iterator[Event]:
        try:
            for response in self._call:
                if (event := _event(response)) is not None:
                    yield self._note(event)
        except grpc.RpcError as error:
            if not self._cancelled:
                raise _error(error) from None

    def pieces(self) -> Iterator[str]:
        """The text as it comes, in pieces that are not empty."""
        for event in self:
            if isinstance(event, Delta) and event.text:
                yield event.text

    def text(self) -> str:
        """Wait for the end; all of the text."""
        return "".join(self.pieces())

    def cancel(self) -> None:
        """Give the request up. Iterating ends without an error. Harmless when it has ended already."""
        self._cancelled = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()


class AsyncGeneration(_Progress):
    """`Generation` for asyncio."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._cancelled = False

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            async for response in self._call:
                if (event := _event(response)) is not None:
                    yield self._note(event)
        except grpc.RpcError as error:
            if not self._cancelled:
                raise _error(error) from None
        except asyncio.CancelledError:  # by `cancel()`, or because whoever iterates is cancelled
            task = asyncio.current_task()
            if not self._cancelled or (task is not None and task.cancelling()):
                raise

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes, in pieces that are not empty."""
        async for event in self:
            if isinstance(event, Delta) and event.text:
                yield event.text

    async def text(self) -> str:
        """Wait for the end; all of the text."""
        return "".join([piece async for piece in self.pieces()])

    def cancel(self) -> None:
        """Give the request up. Iterating ends without an error. Harmless when it has ended already."""
        self._cancelled = True
        self._call.cancel()


class _Calls:
    """The stubs on one channel, and what each call is sent with."""

    def __init__(self, channel: Any, metadata: Sequence[tuple[str, str]]) -> None:
        self.channel = channel
        self._metadata = tuple(metadata)
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        self._model: Any = model_pb2_grpc.ModelServiceStub(channel)
        self._admin: Any = admin_pb2_grpc.AdminServiceStub(channel)


def _channel_options(extra: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return list({**dict(CHANNEL_OPTIONS), **dict(extra)}.items())


class Client(_Calls):
    """A connection to a lightqwen server; safe to share between threads.

    Args:
        target: `host:port`, or any gRPC name.
        credentials: of TLS (`grpc.ssl_channel_credentials(...)`); None: plain text.
        metadata: sent with every call, such as `("authorization", "Bearer ...")`.
        options: channel options that replace or join `CHANNEL_OPTIONS`.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        merged = _channel_options(options)
        if credentials is None:
            channel = grpc.insecure_channel(target, options=merged)
        else:
            channel = grpc.secure_channel(target, credentials, options=merged)
        super().__init__(channel, metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and everything that runs on it."""
        self.channel.close()

    def generate(
        self, prompt: PromptLike, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Continue a prompt. Returns at once; failures are raised while iterating.

        Args:
            prompt: text, token ids, or a chat.
            timeout: seconds until the call fails with DEADLINE_EXCEEDED; None: never.
            options: see `GenerateOptions`.
        """
        request = build_request(prompt, **options)
        return Generation(self._generation.Generate(request, timeout=timeout, metadata=self._metadata))

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        enable_thinking: bool | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Answer a conversation, rendered with the checkpoint's chat template. Otherwise as `generate`."""
        return self.generate(build_chat(messages, enable_thinking=enable_thinking), timeout=timeout, **options)

    def tokenize(
        self, prompt: PromptLike, *, add_special_tokens: bool | None = None, timeout: float | None = None
    ) -> generation_pb2.TokenizeResponse:
        """Show what a prompt becomes: ids, and the text that was encoded."""
        request = generation_pb2.TokenizeRequest(
            prompt=build_prompt(prompt), **_given(add_special_tokens=add_special_tokens)
        )
        response: generation_pb2.TokenizeResponse = self._unary(self._generation.Tokenize, request, timeout)
        return response

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None, timeout: float | None = None
    ) -> str:
        """Turn token ids into text."""
        request = generation_pb2.DetokenizeRequest(
            token_ids=token_ids, **_given(skip_special_tokens=skip_special_tokens)
        )
        text: str = self._unary(self._generation.Detokenize, request, timeout).text
        return text

    def model(self, *, timeout: float | None = None) -> model_pb2.GetModelResponse:
        """Describe the model that is served."""
        response: model_pb2.GetModelResponse = self._unary(self._model.GetModel, model_pb2.GetModelRequest(), timeout)
        return response

    def server_info(self, *, timeout: float | None = None) -> model_pb2.GetServerInfoResponse:
        """Describe the server and its limits."""
        request = model_pb2.GetServerInfoRequest()
        response: model_pb2.GetServerInfoResponse = self._unary(self._model.GetServerInfo, request, timeout)
        return response

    def load(self, *, timeout: float | None = None) -> admin_pb2.Load:
        """Tell how busy the server is."""
        load: admin_pb2.Load = self._unary(self._admin.GetLoad, admin_pb2.GetLoadRequest(), timeout).load
        return load

    def _unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _error(error) from None


class AsyncClient(_Calls):
    """`Client` for asyncio. Create it on the event loop."""

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        merged = _channel_options(options)
        if credentials is None:
            channel = grpc.aio.insecure_channel(target, options=merged)
        else:
            channel = grpc.aio.secure_channel(target, credentials, options=merged)
        super().__init__(channel, metadata)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and everything that runs on it."""
        await self.channel.close()

    def generate(
        self, prompt: PromptLike, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGeneration:
        """Continue a prompt; see `Client.generate`."""
        request = build_request(prompt, **options)
        return AsyncGeneration(self._generation.Generate(request, timeout=timeout, metadata=self._metadata))

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        enable_thinking: bool | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGeneration:
        """Answer a conversation; see `Client.chat`."""
        return self.generate(build_chat(messages, enable_thinking=enable_thinking), timeout=timeout, **options)

    async def model(self, *, timeout: float | None = None) -> model_pb2.GetModelResponse:
        """Describe the model that is served."""
        response: model_pb2.GetModelResponse = await self._unary(
            self._model.GetModel, model_pb2.GetModelRequest(), timeout
        )
        return response

    async def server_info(self, *, timeout: float | None = None) -> model_pb2.GetServerInfoResponse:
        """Describe the server and its limits."""
        request = model_pb2.GetServerInfoRequest()
        response: model_pb2.GetServerInfoResponse = await self._unary(self._model.GetServerInfo, request, timeout)
        return response

    async def load(self, *, timeout: float | None = None) -> admin_pb2.Load:
        """Tell how busy the server is."""
        load: admin_pb2.Load = (await self._unary(self._admin.GetLoad, admin_pb2.GetLoadRequest(), timeout)).load
        return load

    async def _unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _error(error) from None


def _error(error: Any) -> LightqwenError:
    """Read code, message and details off a failed call (blocking or asyncio)."""
    trailers = dict(error.trailing_metadata() or ())
    details = _details(trailers.get("grpc-status-details-bin", b""))
    if "retry_delay_s" not in details and (pushback := str(trailers.get("grpc-retry-pushback-ms", ""))).isdigit():
        details["retry_delay_s"] = int(pushback) / 1000
    return LightqwenError(error.code(), error.details() or "", **details)


def _details(data: bytes) -> dict[str, Any]:
    """Read google.rpc details out of a serialized google.rpc.Status."""
    try:
        from google.rpc import error_details_pb2, status_pb2
    except ImportError:  # the base installation has no google.rpc
        return {}
    found: dict[str, Any] = {}
    for packed in status_pb2.Status.FromString(data).details:
        if packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            found["reason"] = error_details_pb2.ErrorInfo.FromString(packed.value).reason
        elif packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(packed.value).retry_delay
            found["retry_delay_s"] = delay.seconds + delay.nanos / 1e9
        elif packed.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            violations = error_details_pb2.BadRequest.FromString(packed.value).field_violations
            found["fields"] = {violation.field: violation.description for violation in violations}
    return found
