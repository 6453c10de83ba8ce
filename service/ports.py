"""Listening on a port, or saying readably why not: gRPC itself tells only its own log."""

from __future__ import annotations

import errno
import socket
from typing import Protocol

import grpc

from worker.config import ConfigError


class Listener(Protocol):
    """What `grpc.Server` and `grpc.aio.Server` have in common here."""

    def add_insecure_port(self, address: str) -> int: ...

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int: ...


def bind(server: Listener, host: str, port: int, option: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Let the server listen, with TLS where there are credentials; returns the port.

    Raises:
        ConfigError: it cannot; names `option`.
    """
    address = host_port(host, port)
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise cannot_listen(_why_not(host, port), host, port, option) from error


def cannot_listen(error: OSError | None, host: str, port: int, option: str) -> ConfigError:
    if error is None or error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} on {host} is in use; choose another with {option}")
    return ConfigError(f"cannot listen on {host_port(host, port)}: {error.strerror}; see {option}")


def host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _why_not(host: str, port: int) -> OSError | None:
    """Try the same with a plain socket, for its error."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError as error:
        return error
    return None
