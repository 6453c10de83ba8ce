"""Who may call what: bearer tokens, and the name under which a caller is known.

A tokens file has one `name:token` a line; a name may stand there more than once, so that a token can be replaced in two
steps. Tokens of the first file are for everything but AdminService when there is a second file, whose tokens are for
everything. `grpc.health.v1` needs none; whatever else the port serves, reflection included, does.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from service.errors import SERVICE_PREFIX, Observer, PermissionDeniedError, ServeError, UnauthenticatedError, abort
from service.reloading import Reloaded
from worker.config import ConfigError

ADMIN_PREFIX = "/lightqwen.v1.AdminService/"
HEALTH_PREFIX = "/grpc.health.v1.Health/"

Metadata = Iterable[tuple[str, str | bytes]]
Context = grpc.aio.ServicerContext[Any, Any]

_LINE = re.compile(r"(?P<name>[A-Za-z0-9._@-]{1,64}):(?P<token>[A-Za-z0-9._~+/-]+=*)")


@dataclass(frozen=True, slots=True)
class _Token:
    name: str
    digest: bytes  # so that comparing takes as long for every length


class TokenFile:
    """The tokens of one file, as of now.

    Raises:
        ConfigError: it is missing, empty or malformed at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokens = Reloaded([path], self._parse)

    def find(self, token: str) -> str | None:
        """The name that the token belongs to. Takes the same time whichever of them it is, or none."""
        digest = _digest(token)
        found = None
        for known in self._tokens.now():
            if hmac.compare_digest(known.digest, digest):
                found = known.name
        return found

    def _parse(self, contents: list[bytes]) -> tuple[_Token, ...]:
        lines = contents[0].decode("utf-8", "replace").splitlines()
        tokens: dict[bytes, _Token] = {}
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise ConfigError(f"{self._path}, line {number}: is not name:token")  # and never what it is
            token = _Token(match["name"], _digest(match["token"]))
            if tokens.setdefault(token.digest, token).name != token.name:
                raise ConfigError(f"{self._path}, line {number}: another name has the same token")
        if not tokens:
            raise ConfigError(f"{self._path} has no token")
        return tuple(tokens.values())


class Authenticator:
    """Decides about calls.

    Args:
        tokens: for everybody; None: everybody may call.
        admin_tokens: for AdminService; None: it takes what the other services take.

    Raises:
        ConfigError: a file is no good.
    """

    def __init__(self, tokens: Path | None, admin_tokens: Path | None) -> None:
        self._users = None if tokens is None else TokenFile(tokens)
        self._admins = None if admin_tokens is None else TokenFile(admin_tokens)

    @property
    def wants_tokens(self) -> bool:
        return self._users is not None or self._admins is not None

    def authorize(self, method: str, metadata: Metadata) -> None:
        """Let a call in.

        Raises:
            UnauthenticatedError: it needs a token, and has none that is known.
            PermissionDeniedError: its token is not an administrator's.
        """
        if method.startswith(HEALTH_PREFIX):
            return
        for_admins = method.startswith(ADMIN_PREFIX) and self._admins is not None
        if not for_admins and self._users is None:
            return
        token = _bearer(metadata)
        if token is None:
            raise UnauthenticatedError("a bearer token is needed", reason="TOKEN_MISSING")
        is_user, is_admin = self._find(self._users, token), self._find(self._admins, token)
        if is_admin is None and is_user is None:
            raise UnauthenticatedError("the bearer token is not known", reason="TOKEN_INVALID")
        if for_admins and is_admin is None:
            raise PermissionDeniedError("this token is not an administrator's")

    def identity(self, context: Context) -> str:
        """The caller's name: its token's, else its certificate's; empty for one that showed neither.

        Raises:
            UnauthenticatedError: its token was taken away a moment ago.
        """
        metadata: Metadata = context.invocation_metadata() or ()
        token = _bearer(metadata) if self.wants_tokens else None
        if token is not None:
            name = self._find(self._users, token) or self._find(self._admins, token)
            if name is not None:
                return f"token:{name}"
            if self._users is not None:
                raise UnauthenticatedError("the bearer token is not known", reason="TOKEN_INVALID")
        certified = sorted(context.peer_identities() or ())
        return "certificate:" + ",".join(name.decode("utf-8", "replace") for name in certified) if certified else ""

    @staticmethod
    def _find(file: TokenFile | None, token: str) -> str | None:
        return None if file is None else file.find(token)


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in its type stubs
    """Refuses calls before anything of their request is read; tells `observe` as `StatusInterceptor` does."""

    def __init__(self, authenticator: Authenticator, observe: Observer) -> None:
        self._authenticator = authenticator
        self._observe = observe

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC says so
            return handler
        method = handler_call_details.method
        try:
            self._authenticator.authorize(method, handler_call_details.invocation_metadata or ())
        except ServeError as error:
            return self._refusal(method, error)
        return handler

    def _refusal(self, method: str, error: ServeError) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(requests: Any, context: Context) -> None:
            if method.startswith(SERVICE_PREFIX):
                self._observe(method.rpartition("/")[2], error.code, 0.0)
            await abort(context, error)

        # Streaming on both sides, whatever the method is: so nothing is read.
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)
        return handler


def _bearer(metadata: Metadata) -> str | None:
    for key, value in metadata:
        if key.lower() == "authorization" and isinstance(value, str):
            scheme, _, token = value.strip().partition(" ")
            if scheme.lower() == "bearer" and token.strip():
                return token.strip()
    return None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
