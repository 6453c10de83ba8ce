"""Which way leads to another machine: addresses and the interface, for what must be told a name or an address."""

from __future__ import annotations

import fcntl
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

import zmq

_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True)
class Way:
    """Both ends of a connection, as numbers."""

    ours: str
    theirs: str


def reach(host: str, port: int, timeout_s: float) -> Way:
    """Connect, and hang up again.

    Raises:
        OSError: nobody listens there, or the name is not known.
    """
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        return Way(connection.getsockname()[0], connection.getpeername()[0])


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address of this machine, or at all of them where `host` is somebody else's, such as a service's.

    Raises:
        OSError: the port is in use.
    """
    own = own_address(host)
    if own is None:
        return socket.create_server(("", port))
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    return socket.create_server((own, port), family=family)


def own_address(host: str) -> str | None:
    """The address under which `host` is this machine; None if it is not, or is not known yet."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return str(address[0])
    return None


def interface_of(address: str) -> str | None:
    """Name of the interface that has this address (Linux); None if none has, or it is not the interface's first."""
    names = [name for _, name in socket.if_nameindex()]
    if ":" in address:
        return _interface_of_ipv6(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in names:
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # has none
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _interface_of_ipv6(address: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        found, *_, name = line.split()
        if found == wanted:
            return name
    return None


def tcp(address: str, port: int | str) -> str:
    """As ZeroMQ writes it."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def bind_tcp(endpoint: zmq.Socket[bytes], host: str) -> int:
    """Let a socket listen at any free port of an address of this machine, or of all of them as `listen` does."""
    own = own_address(host)
    endpoint.setsockopt(zmq.IPV6, int(own is not None and ":" in own))
    endpoint.bind(tcp("*" if own is None else own, "*"))
    address: bytes = endpoint.getsockopt(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
    return int(address.decode().rstrip("\0").rpartition(":")[2])
