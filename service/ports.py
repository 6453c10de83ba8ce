"""Listening on a port, or saying readably why not: gRPC itself tells only its own log."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from worker.config import ConfigError

if TYPE_CHECKING:
    import grpc


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


@contextmanager
def hold_port(host: str, port: int, option: str) -> Iterator[int]:
    """Keep a port for processes of ours that will listen on it by SO_REUSEPORT; gives its number (Linux).

    Nobody else may have it, not even one who shares it too: it is taken by a socket that shares with nobody, and only
    then opened to others of this user. That socket never listens, so no connection comes to it.

    Raises:
        ConfigError: it is in use, or not ours; names `option`.
    """
    try:
        family, kind, protocol, address = _resolve(host, port)
        holder = socket.socket(family, kind, protocol)
    except OSError as error:
        raise cannot_listen(error, host, port, option) from error
    with holder:
        # Connections of a server that ended a moment ago may linger on the port; a listener may not.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(address)
        except OSError as error:
            raise cannot_listen(error, host, port, option) from error
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield int(holder.getsockname()[1])


def cannot_listen(error: OSError | None, host: str, port: int, option: str) -> ConfigError:
    """`option` is the port's, such as --metrics-port; the host's, --metrics-host, is called after it."""
    if error is None or error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} on {host} is in use; choose another with {option}")
    host_option = f"{option.removesuffix('port')}host"
    return ConfigError(f"cannot listen on {host_port(host, port)}: {error.strerror}; see {host_option} and {option}")


def host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _why_not(host: str, port: int) -> OSError | None:
    """Try the same with a plain socket, for its error."""
    try:
        family, kind, protocol, address = _resolve(host, port)
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _resolve(host: str, port: int) -> tuple[int, int, int, Any]:
    """Family, kind, protocol and address of the first that the name stands for.

    Raises:
        OSError: for none.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    return family, kind, protocol, address
