"""The leader's ends of its sockets: one for gateways, one for followers.

A ROUTER socket each, at an address that the supervisor made and only this machine can reach; that for followers has a
second address, on the network, when some of them are on other machines. A peer counts only after it has sent the
secret; whatever else arrives from it before is dropped. Nothing here blocks the engine's loop: a peer that does not
read only fills its own queue, and a peer that is gone is forgotten.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator

import msgspec
import zmq

from worker.endpoint import EngineEndpoint
from worker.messages import PROTOCOL_VERSION, Hello, ToGateway, ToLeader
from worker.network import bind_tcp

MAX_GREETING_BYTES, MAX_GREETINGS = 4096, 16
"""Nothing longer is taken from the network, and no more of them wait for each connection: followers only greet."""


class _Router:
    """A bound ROUTER socket and the peers on it that know the secret, numbered from 0 in the order of greeting."""

    def __init__(self, endpoint: EngineEndpoint) -> None:
        self._secret = endpoint.secret
        self._decode_hello = msgspec.msgpack.Decoder(Hello).decode
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(endpoint.address)
        self._identity_of: list[bytes] = []
        self._peer_of: dict[bytes, int] = {}

    def open_to(self, address: str | None) -> int:
        """Listen on the network too, at any free port of this address of ours, or of all; returns the port."""
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_GREETING_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, MAX_GREETINGS)
        return bind_tcp(self._socket, address)

    def wait(self, timeout_s: float) -> bool:
        """Whether something has arrived, waiting at most so long for it."""
        return bool(self._socket.poll(int(timeout_s * 1000)))

    def receive(self) -> Iterator[tuple[bytes, bytes]]:
        """(identity, payload) of every message that has arrived."""
        while True:
            try:
                identity, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield identity, parts[-1] if parts else b""

    @property
    def num_peers(self) -> int:
        return len(self._identity_of)

    def peer(self, identity: bytes) -> int | None:
        return self._peer_of.get(identity)

    def greet(self, identity: bytes, payload: bytes) -> int | None:
        """Take a stranger in if this is the greeting of one who knows the secret; returns its number.

        An empty message is the probe of one that has just connected: it is asked for its greeting.
        """
        if not payload:
            self._send_to(identity, b"")
            return None
        try:
            hello = self._decode_hello(payload)
        except (msgspec.MsgspecError, RecursionError):  # the latter: lists within lists within lists
            return None  # anybody can connect and say anything
        if not hmac.compare_digest(hello.secret, self._secret) or hello.version != PROTOCOL_VERSION:
            return None
        self._peer_of[identity] = len(self._identity_of)
        self._identity_of.append(identity)
        return self._peer_of[identity]

    def send(self, peer: int, payload: bytes) -> bool:
        """Whether the peer is still there to get it."""
        return self._send_to(self._identity_of[peer], payload)

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def _send_to(self, identity: bytes, payload: bytes) -> bool:
        try:
            self._socket.send_multipart([identity, payload], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True


class GatewayChannel:
    """What the leader hears from gateways and tells them."""

    def __init__(self, endpoint: EngineEndpoint) -> None:
        self._router = _Router(endpoint)
        self._decode = msgspec.msgpack.Decoder(ToLeader).decode
        self._encode = msgspec.msgpack.Encoder().encode

    def wait(self, timeout_s: float) -> bool:
        return self._router.wait(timeout_s)

    def receive(self) -> Iterator[tuple[int, ToLeader]]:
        """Every message that has arrived, with the number of its gateway. A `Hello` comes once per gateway."""
        for identity, payload in self._router.receive():
            gateway = self._router.peer(identity)
            if gateway is None:
                gateway = self._router.greet(identity, payload)
                if gateway is not None:
                    yield gateway, self._decode(payload)
            elif payload:
                message = self._decode(payload)
                if not isinstance(message, Hello):
                    yield gateway, message

    def send(self, gateway: int, message: ToGateway) -> bool:
        """Whether the gateway is still there to get it."""
        return self._router.send(gateway, self._encode(message))

    def close(self) -> None:
        self._router.close()


class PlanSender:
    """How the leader's plans reach the followers: frames, in order, none lost while both ends live."""

    def __init__(self, endpoint: EngineEndpoint, num_followers: int) -> None:
        self._router = _Router(endpoint)
        self._num_followers = num_followers
        self.secret = endpoint.secret

    def open_to(self, address: str | None) -> int:
        """Listen for followers on other machines too, as `_Router.open_to`. Those on this one keep to the private
        socket: a plan for them never passes through the network's stack."""
        return self._router.open_to(address)

    def gather(self) -> None:
        """Wait until every follower has greeted. The supervisor ends this process if one never does."""
        while self._router.num_peers < self._num_followers:
            self._router.wait(1.0)
            for identity, payload in self._router.receive():
                if self._router.peer(identity) is None:
                    self._router.greet(identity, payload)

    def send(self, frame: bytes) -> None:
        """Raises ConnectionError: a follower is gone, and with it the frames that it has not read."""
        for follower in range(self._num_followers):
            if not self._router.send(follower, frame):
                raise ConnectionError("a follower is gone")

    def close(self) -> None:
        self._router.close()


class PlanReceiver:
    """A follower's end."""

    def __init__(self, endpoint: EngineEndpoint) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint.address))
        self._socket.connect(endpoint.address)
        self._socket.send(msgspec.msgpack.encode(Hello(secret=endpoint.secret)))

    def receive(self, timeout_s: float) -> bytes | None:
        """The next frame, or None if none came in time."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        return self._socket.recv()

    def close(self) -> None:
        self._socket.close()
        self._context.term()
