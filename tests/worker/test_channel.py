"""The leader's sockets, for real: who is let in, and what anybody else can do, which is nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq

from worker.channel import MAX_GREETING_BYTES, GatewayChannel, PlanReceiver, PlanSender
from worker.endpoint import EngineEndpoint, private_endpoint
from worker.messages import Abort, CacheFlushed, Goodbye, Hello, ToLeader

encode = msgspec.msgpack.encode


@pytest.fixture
def endpoint() -> EngineEndpoint:
    return private_endpoint("test")


@pytest.fixture
def channel(endpoint: EngineEndpoint) -> Iterator[GatewayChannel]:
    channel = GatewayChannel(endpoint)
    yield channel
    channel.close()


@contextmanager
def connect(endpoint: EngineEndpoint, *, probe: bool = False) -> Iterator[zmq.Socket[bytes]]:
    """A socket as a gateway has one."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.PROBE_ROUTER, int(probe))
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.connect(endpoint.address)
        yield socket


def receive(channel: GatewayChannel, count: int = 1) -> list[tuple[int, ToLeader]]:
    """The next `count` messages, or fewer if they do not come soon."""
    messages: list[tuple[int, ToLeader]] = []
    give_up = time.monotonic() + 5.0
    while len(messages) < count and time.monotonic() < give_up:
        channel.wait(0.1)
        messages += channel.receive()
    return messages


def test_a_gateway_that_knows_the_secret_is_heard(channel: GatewayChannel, endpoint: EngineEndpoint) -> None:
    hello = Hello(secret=endpoint.secret)
    with connect(endpoint) as first, connect(endpoint) as second:
        first.send(encode(hello))
        assert receive(channel) == [(0, hello)]
        second.send(encode(hello))
        assert receive(channel) == [(1, hello)]
        second.send(encode(hello))  # the answer to a probe that crossed the first one
        second.send(encode(Abort([5])))
        assert receive(channel) == [(1, Abort([5]))]
        assert channel.send(0, CacheFlushed(1, 2))
        assert first.recv() == encode(CacheFlushed(1, 2))


def test_one_that_has_just_connected_is_asked_for_its_greeting(
    channel: GatewayChannel, endpoint: EngineEndpoint
) -> None:
    with connect(endpoint, probe=True) as gateway:
        assert channel.wait(5.0)
        assert list(channel.receive()) == []
        assert gateway.recv() == b""


@pytest.mark.parametrize(
    "greeting",
    [
        lambda secret: b"\xc1 is nothing in msgpack",
        lambda secret: b"",
        lambda secret: encode(Hello(secret=b"guess")),
        lambda secret: encode(Hello(secret=secret, version=99)),
        lambda secret: encode(Abort([1])),
        lambda secret: encode({"type": "hello"}),
        lambda secret: encode({"type": "hello", "x": 1})[:-1] + b"\x91" * 100_000,
    ],
    ids=["garbage", "nothing", "wrong secret", "another version", "no greeting", "no secret", "lists within lists"],
)
def test_a_stranger_is_not_heard_and_breaks_nothing(
    channel: GatewayChannel, endpoint: EngineEndpoint, greeting: Callable[[bytes], bytes]
) -> None:
    with connect(endpoint) as stranger, connect(endpoint) as gateway:
        stranger.send(greeting(endpoint.secret))
        stranger.send(encode(Goodbye()))
        time.sleep(0.05)
        gateway.send(encode(Hello(secret=endpoint.secret)))
        assert receive(channel) == [(0, Hello(secret=endpoint.secret))]


def test_telling_a_gateway_that_is_gone_says_so(channel: GatewayChannel, endpoint: EngineEndpoint) -> None:
    with connect(endpoint) as gateway:
        gateway.send(encode(Hello(secret=endpoint.secret)))
        assert len(receive(channel)) == 1
    give_up = time.monotonic() + 5.0
    while channel.send(0, CacheFlushed(1, 2)):
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_plans_reach_every_follower_in_order(endpoint: EngineEndpoint) -> None:
    sender = PlanSender(endpoint, 2)
    with connect(endpoint) as stranger:
        stranger.send(b"garbage")
        stranger.send(encode(Hello(secret=b"guess")))
        time.sleep(0.05)
        followers = [PlanReceiver(endpoint), PlanReceiver(endpoint)]
        sender.gather()
    for number in range(100):
        sender.send(b"%d" % number)
    for follower in followers:
        assert [follower.receive(5.0) for _ in range(100)] == [b"%d" % number for number in range(100)]
        assert follower.receive(0.0) is None
        follower.close()
    sender.close()


def test_on_the_network_only_a_greeting_is_taken(endpoint: EngineEndpoint) -> None:
    sender = PlanSender(endpoint, 1)
    place = EngineEndpoint(f"tcp://127.0.0.1:{sender.open_to('127.0.0.1')}", endpoint.secret)
    with connect(place) as stranger:
        stranger.send(encode(Hello(secret=endpoint.secret)) + b"\0" * MAX_GREETING_BYTES)
        follower = PlanReceiver(place)
        sender.gather()
        sender.send(b"plan")
        assert follower.receive(5.0) == b"plan"
        assert stranger.poll(0) == 0
        follower.close()
    sender.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is a file in a private folder")
def test_an_endpoint_is_no_file_and_never_the_same() -> None:
    first, second = private_endpoint("test"), private_endpoint("test")
    assert first.address.startswith("ipc://@")
    assert first.address != second.address
    assert first.secret != second.secret
    assert not Path(first.address.removeprefix("ipc://")).exists()
