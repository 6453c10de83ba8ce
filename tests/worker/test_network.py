"""Addresses, and which way leads to them."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from worker.network import interface_of, listen, own_address, reach

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several nodes are for Linux")


def test_the_way_and_its_interface() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        way = reach("localhost", server.getsockname()[1], 5.0)
    assert (way.ours, way.theirs) == ("127.0.0.1", "127.0.0.1")
    assert interface_of(way.ours) == "lo"
    assert interface_of("192.0.2.1") is None


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
def test_the_interface_of_an_ipv6_address() -> None:
    assert interface_of("2001:db8::1") is None
    if "lo" in Path("/proc/net/if_inet6").read_text().split():
        assert interface_of("::1") == "lo"


def test_own_addresses_are_told_from_those_of_others() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("127.0.0.2") == "127.0.0.2"
    assert own_address("192.0.2.1") is None
    with pytest.raises(OSError, match=r"not known|failure in name resolution"):
        own_address("no-such-host.invalid")


def test_of_several_addresses_one_that_others_reach_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian calls a machine 127.0.1.1 in its own /etc/hosts, where nobody else would find it."""
    ours = "192.0.2.7"
    addresses = ["127.0.1.1", "192.0.2.8", ours]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr("worker.network._is_own", lambda *where: where[-1][0] in ("127.0.1.1", ours))
    assert own_address("node0") == ours
    addresses.remove(ours)
    found.pop()
    assert own_address("node0") == "127.0.1.1"


def test_listening_at_one_address_or_at_all() -> None:
    places: list[Any] = [("127.0.0.1", "127.0.0.1"), (None, "0.0.0.0")]
    for address, at in places:
        with listen(address, 0) as server:
            assert server.getsockname()[0] == at
