"""Which way leads to another machine: addresses and the interface, for what must be told a name or an address."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def own_address(host: str) -> str | None:
    """The address under which `host` is this machine; None if it is somebody else's, such as a service's.

    A name may have several. One that other machines can reach goes before loopback.

    Raises:
        OSError: the name is not known, or not yet.
    """
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    own = [str(address[0]) for family, kind, protocol, _, address in found if _is_own(family, kind, protocol, address)]
    return min(own, key=is_loopback, default=None)


def _is_own(family: int, kind: int, protocol: int, address: Any) -> bool:
    with socket.socket(family, kind, protocol) as probe:
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches it there. `address`: a number, not a name."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def listen(address: str | None, port: int) -> socket.socket:
    """Listen at an address of this machine; None: at all that it has.

    Raises:
        OSError: the port is in use.
    """
    if address is None:
        return socket.create_server(("", port))
    return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)


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


def bind_tcp(endpoint: zmq.Socket[bytes], address: str | None) -> int:
    """Let a socket listen at any free port of an address of this machine, or of all of them; returns the port."""
    endpoint.setsockopt(zmq.IPV6, int(address is not None and ":" in address))
    endpoint.bind(tcp(address or "*", "*"))
    place: bytes = endpoint.getsockopt(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
    return int(place.decode().rstrip("\0").rpartition(":")[2])
