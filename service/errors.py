"""What can go wrong with a call, and the one place where that becomes a gRPC status.

    ServeError
    ├── InvalidRequestError      INVALID_ARGUMENT     every wrong field, named
    ├── UnsupportedError         UNIMPLEMENTED        in the contract, not working here
    ├── UnauthenticatedError     UNAUTHENTICATED      no token, or an unknown one
    ├── PermissionDeniedError    PERMISSION_DENIED    a token that is not for this
    ├── PreconditionError        FAILED_PRECONDITION  this checkpoint cannot do that
    ├── ModelNotFoundError       NOT_FOUND
    ├── DuplicateRequestError    ALREADY_EXISTS
    ├── OverloadedError          RESOURCE_EXHAUSTED   with the time after which to try again
    ├── UnavailableError         UNAVAILABLE          starting, restarting, dead
    │   └── DrainingError
    ├── DeadlineError            DEADLINE_EXCEEDED
    ├── AdminAbortError          ABORTED
    └── WorkerFailedError        INTERNAL

Every status carries an ErrorInfo whose `reason` is a constant that programs may rely on; messages are for people.
Nothing of an unexpected exception reaches a client.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from worker.client import EngineState, EngineUnavailableError

logger = logging.getLogger(__name__)

DOMAIN = "lightqwen"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
SERVICE_PREFIX = f"/{DOMAIN}."
_TRANSIT_S = 0.1  # that a call may have been on its way


@dataclass(frozen=True, slots=True)
class Violation:
    """A wrong field: its path in the request, such as `sampling.top_p`, and what is wrong."""

    field: str
    description: str


class ServeError(Exception):
    """A call fails with this status. `reason` is the constant in its ErrorInfo."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: str = "INTERNAL"
    retry_after_s: float | None = None

    def __init__(self, message: str, *, metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.metadata = metadata or {}
        self.violations: tuple[Violation, ...] = ()


class InvalidRequestError(ServeError):
    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(
        self,
        violations: Sequence[Violation],
        *,
        reason: str = "INVALID_FIELD",
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            "; ".join(f"{v.field}: {v.description}" if v.field else v.description for v in violations),
            metadata=metadata,
        )
        self.violations = tuple(violations)
        self.reason = reason


class UnsupportedError(ServeError):
    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "UNSUPPORTED_FIELD"

    def __init__(self, field: str) -> None:
        super().__init__(f"{field} is not supported by this server", metadata={"field": field})
        self.violations = (Violation(field, "not supported by this server"),)


class UnauthenticatedError(ServeError):
    code = grpc.StatusCode.UNAUTHENTICATED

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class PermissionDeniedError(ServeError):
    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "ADMIN_ONLY"


class PreconditionError(ServeError):
    code = grpc.StatusCode.FAILED_PRECONDITION

    def __init__(self, message: str, *, reason: str, field: str) -> None:
        super().__init__(f"{field}: {message}", metadata={"field": field})
        self.reason = reason


class ModelNotFoundError(ServeError):
    code = grpc.StatusCode.NOT_FOUND
    reason = "MODEL_NOT_FOUND"

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(f"model: {asked!r} is not served here, {served!r} is", metadata={"served": served})


class DuplicateRequestError(ServeError):
    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "REQUEST_ID_IN_USE"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id: {request_id!r} is in flight already")


class OverloadedError(ServeError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, *, reason: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class UnavailableError(ServeError):
    code = grpc.StatusCode.UNAVAILABLE

    def __init__(self, message: str, *, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: EngineUnavailableError) -> UnavailableError:
        """What the engine's state means to a client."""
        reason, retry_after_s = {
            EngineState.STARTING: ("STARTING", 1.0),
            EngineState.RESTARTING: ("ENGINE_RESTARTING", 1.0),
        }.get(error.state, ("ENGINE_DEAD", None))
        message = {"STARTING": "the engine is starting", "ENGINE_RESTARTING": "the engine is being restarted"}
        return cls(message.get(reason, "the engine is gone"), reason=reason, retry_after_s=retry_after_s)


class DrainingError(UnavailableError):
    def __init__(self, message: str) -> None:
        super().__init__(message, reason="DRAINING", retry_after_s=1.0)


class DeadlineError(ServeError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED

    def __init__(self, stage: str) -> None:
        super().__init__(f"the deadline passed while the request was {stage}", metadata={"stage": stage.upper()})
        self.reason = "DEADLINE"


class AdminAbortError(ServeError):
    code = grpc.StatusCode.ABORTED
    reason = "ADMIN_ABORT"

    def __init__(self) -> None:
        super().__init__("an administrator ended this request")


class WorkerFailedError(ServeError):
    code = grpc.StatusCode.INTERNAL
    reason = "WORKER_FAILED"


def to_status(error: ServeError) -> status_pb2.Status:
    """The error as google.rpc wants it: ErrorInfo always, BadRequest and RetryInfo where they say something."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata),
    ]
    if error.violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
            for v in error.violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(retry)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code.name), message=str(error))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ServeError) -> None:
    """End the call with the error's status; gRPC clients that retry are told when."""
    rich = rpc_status.to_status(to_status(error))
    trailing = list(rich.trailing_metadata)
    if error.retry_after_s is not None:
        trailing.append((PUSHBACK_KEY, str(round(error.retry_after_s * 1000))))
    await context.abort(error.code, str(error), trailing_metadata=tuple(trailing))


Behaviour = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]
Observer = Callable[[str, grpc.StatusCode, float], None]


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for a request that is not a message of the contract (not protobuf, or a string that is not UTF-8)."""


class StatusInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in its type stubs
    """Turns what a servicer raises into a status, and tells `observe(method, code, seconds)` how each call ended.

    Servicers behind it are coroutines; those that stream use `context.write`. Other services (health, reflection) pass.
    """

    def __init__(self, observe: Observer) -> None:
        self._observe = observe

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(SERVICE_PREFIX):
            return handler
        make: Any = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        behaviour: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            self._guard(behaviour, method), _lenient(handler.request_deserializer), handler.response_serializer
        )
        return wrapped

    def _guard(self, behaviour: Behaviour, method: str) -> Behaviour:
        name = method.rpartition("/")[2]

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            began = time.monotonic()
            code = grpc.StatusCode.OK
            try:
                if isinstance(request, _Malformed):
                    raise InvalidRequestError([Violation("", "the request is not a valid message")], reason="MALFORMED")
                return await behaviour(request, context)
            except (asyncio.CancelledError, grpc.aio.InternalError) as error:
                # The client has gone, or its deadline has passed: gRPC cancels the handler, or fails its write.
                code = _code_of_loss(context)
                raise asyncio.CancelledError from error
            except Exception as error:
                served = _as_serve_error(error, method)
                code = served.code
                await abort(context, served)
            finally:
                self._observe(name, code, time.monotonic() - began)

        return guarded


def _as_serve_error(error: Exception, method: str) -> ServeError:
    if isinstance(error, ServeError):
        return error
    if isinstance(error, EngineUnavailableError):
        return UnavailableError.of(error)
    logger.error("unexpected error method=%s", method, exc_info=error)
    return ServeError("internal error")


def _code_of_loss(context: grpc.aio.ServicerContext[Any, Any]) -> grpc.StatusCode:
    """Why a client is gone. That it gives up at its deadline reaches the server as a cancellation, and somewhat early:
    the server counts the time from when the call arrived, the client from when it was made."""
    remaining = context.time_remaining()
    expired = remaining is not None and remaining <= _TRANSIT_S
    return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED


def _lenient(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """A deserializer that does not raise: gRPC would answer INTERNAL to what is the client's fault."""
    if deserialize is None:
        return None

    def lenient(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return lenient
