"""How a command reaches a server: address, TLS, token. Runs on the base installation."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from lightqwen.client import AsyncClient, Client
from service.terminal import CommandError


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """The options that `Access.read` reads."""
    parser.add_argument(
        "--target", default="127.0.0.1:50051", metavar="HOST:PORT", help="the server (default: %(default)s)"
    )
    tls = parser.add_argument_group("security (default: plain text, no token)")
    tls.add_argument("--tls", action="store_true", help="TLS, with the usual certificate authorities")
    tls.add_argument("--tls-ca", metavar="FILE", help="TLS, with these certificate authorities (PEM)")
    tls.add_argument("--tls-cert", metavar="FILE", help="a client certificate (PEM), for a server that wants one")
    tls.add_argument("--tls-key", metavar="FILE", help="its key (PEM)")
    tls.add_argument("--tls-server-name", metavar="NAME", help="the server's name, if not that in --target")
    tls.add_argument("--token-file", metavar="FILE", help="a file with the bearer token (default: $LIGHTQWEN_TOKEN)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What it takes to make a client. Plain values, so that other processes can make one too."""

    target: str
    tls: bool = False
    authorities: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None
    token: str = field(default="", repr=False)
    """Empty: none."""

    @classmethod
    def read(cls, arguments: argparse.Namespace) -> Access:
        """Take the options and read the files that they name.

        Raises:
            CommandError: options that do not go together, or a file that cannot be used.
        """
        if (arguments.tls_cert is None) != (arguments.tls_key is None):
            raise CommandError("--tls-cert and --tls-key go together")
        authorities, certificate, key = map(_read, (arguments.tls_ca, arguments.tls_cert, arguments.tls_key))
        return cls(
            target=arguments.target,
            tls=arguments.tls or authorities is not None or certificate is not None,
            authorities=authorities,
            certificate=certificate,
            key=key,
            server_name=arguments.tls_server_name,
            token=_token(arguments.token_file),
        )

    def client(self) -> Client:
        """A blocking client."""
        return Client(self.target, credentials=self._credentials(), metadata=self._metadata(), options=self._options())

    def async_client(self, options: Sequence[tuple[str, Any]] = ()) -> AsyncClient:
        """A client for asyncio; `options` go before those that it has anyway."""
        options = [*self._options(), *options]
        return AsyncClient(self.target, credentials=self._credentials(), metadata=self._metadata(), options=options)

    def _credentials(self) -> grpc.ChannelCredentials | None:
        return grpc.ssl_channel_credentials(self.authorities, self.key, self.certificate) if self.tls else None

    def _metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.token}")] if self.token else []

    def _options(self) -> list[tuple[str, str]]:
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name is not None else []


def _token(path: str | None) -> str:
    """The bearer token; empty: none."""
    data = _read(path)
    token = os.environ.get("LIGHTQWEN_TOKEN", "") if data is None else data.decode("utf-8", "replace")
    token = token.strip()
    if data is not None and not token:
        raise CommandError(f"{path} is empty")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise CommandError(f"{path or '$LIGHTQWEN_TOKEN'} is not one token")
    return token


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
