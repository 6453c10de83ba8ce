"""The lines between the supervisors of several machines: how they find each other, start together, and learn of a loss.

Each node keeps a line to node 0: a ZeroMQ connection with typed JSON on it, whose place and secret are in the store
where they meet (`worker/rendezvous.py`). Both ends say something every second; a line that breaks, or is silent for too
long, means that a node is gone, and with it the group.

Whoever reaches the store can join: like NCCL's ports it belongs into a network that only the nodes share.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from worker.config import ConfigError, EngineConfig
from worker.messages import PROTOCOL_VERSION
from worker.network import bind_tcp, reach, tcp
from worker.rendezvous import REACH_TIMEOUT_S, bind_address, connect_store, host_store, leader_of, warn_of, where

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

BEAT_S = 1.0
SILENCE_S = 15.0
"""A node that says nothing for so long is gone. One whose process ended is noticed at once."""
RETRY_S = 0.5
LINE_KEY = "line"

MAY_DIFFER = frozenset(
    {
        "model",
        "revision",
        "node_rank",
        "leader_address",
        "leader_port",
        "join_timeout_s",
        "gpu_memory_utilization",
        "cpu_kv_gib",
        "max_restarts",
        "hang_timeout_s",
        "admission_watermark",
    }
)
"""Options that need not be the same on all nodes. All others must be: ranks replay the same plans."""


# ---- messages --------------------------------------------------------------------------------------------------------
# What a node says comes with the secret, as a part of its own: what strangers say is not even decoded.


class Join(msgspec.Struct, frozen=True, tag="join"):
    """Node -> node 0, first of all. `checkpoint` is a digest of its config.json."""

    node: int
    version: int
    options: dict[str, Any]
    checkpoint: str


class Leaving(msgspec.Struct, frozen=True, tag="leaving"):
    """Node -> node 0: it was asked to end, and waits until what runs is done."""


class Lost(msgspec.Struct, frozen=True, tag="lost"):
    """Node -> node 0, last of all: a rank was lost. `fatal`: for a reason that a user can mend."""

    reason: str
    fatal: bool = False


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """Both ways, every second."""


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Node 0 -> node: all are there, start the ranks."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Node 0 -> node: it cannot join. `final`: not later either."""

    reason: str
    final: bool


class End(msgspec.Struct, frozen=True, tag="end"):
    """Node 0 -> node: it ends. An empty reason: as it was asked to."""

    reason: str = ""


FromNode = Join | Leaving | Lost | Alive
ToNode = Start | Refused | End | Alive

_from_node: msgspec.json.Decoder[FromNode] = msgspec.json.Decoder(FromNode)
_to_node: msgspec.json.Decoder[ToNode] = msgspec.json.Decoder(ToNode)
_encode = msgspec.json.Encoder().encode


# ---- node 0's end ----------------------------------------------------------------------------------------------------

_OTHER_VERSION = Refused("it runs another version of lightqwen", final=True)


class _Node:
    """Another node that has joined."""

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        self.heard = time.monotonic()


class LeaderLine:
    """Node 0's ends of the lines. `turn` it about once a second or oftener, and look at what it has learned."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._options, self._checkpoint = shared_options(config), checkpoint_digest(config)
        self._nodes: dict[int, _Node] = {}
        self._secret = secrets.token_bytes(16)
        self.store: Store | None = None  # open as long as node 0 lives
        self.problem = ""  # why it is not open yet
        self._not_before = 0.0
        self._beat_at = 0.0
        self._deadline = time.monotonic() + config.join_timeout_s
        self.started = False
        self.leaving = False
        self.loss: Lost | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 1 << 16)

    @property
    def missing(self) -> list[int]:
        return [node for node in range(1, self._config.nodes) if node not in self._nodes]

    def turn(self) -> None:
        """Open the place where all meet, hear the nodes, tell them that we live, notice who is gone.

        Raises:
            ConfigError: the port is in use, or not all nodes came in time.
        """
        now = time.monotonic()
        if self.store is None and now >= self._not_before:
            self.store = self._try_to_open()
        while True:
            try:
                identity, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(parts) == 2 and hmac.compare_digest(parts[0], self._secret):
                self._take(identity, parts[1])
        if now - self._beat_at >= BEAT_S:
            self._beat_at = now
            for number, node in list(self._nodes.items()):
                if not self._send(node.identity, Alive()):
                    self._gone(number, f"the line to node {number} broke")
                elif now - node.heard > SILENCE_S:
                    self._gone(number, f"node {number} said nothing for {SILENCE_S:g} s")
        if not self.started and self.missing and now > self._deadline:
            if self.store is None:
                raise ConfigError(f"cannot listen on {where(self._config)}: {self.problem}; see --leader-address")
            missing = ", ".join(map(str, self.missing))
            raise ConfigError(
                f"node {missing} of {self._config.nodes} did not join at {where(self._config)} within "
                f"{self._config.join_timeout_s:g} s; see --join-timeout-s"
            )

    def start(self) -> None:
        """All are there: let their ranks start."""
        self.started = True
        for node in self._nodes.values():
            self._send(node.identity, Start())

    def end(self, reason: str) -> None:
        """Tell the nodes that this one ends, and hang up."""
        for node in self._nodes.values():
            self._send(node.identity, End(reason))
        self._socket.close()
        self._context.term()

    def _try_to_open(self) -> Store | None:
        """None: not now. A pod's name, for one, is known some seconds after the pod runs."""
        try:
            address = bind_address(self._config)
            store = host_store(self._config, address)
        except OSError as error:
            first, self.problem = not self.problem, error.strerror or str(error)
            if first:
                logger.warning("cannot listen on %s yet: %s", where(self._config), self.problem)
            self._not_before = time.monotonic() + RETRY_S
            return None
        warn_of(self._config, address)
        store.set(LINE_KEY, json.dumps({"port": bind_tcp(self._socket, address), "secret": self._secret.hex()}))
        return store

    def _take(self, identity: bytes, payload: bytes) -> None:
        try:
            message = _from_node.decode(payload)
        except msgspec.MsgspecError:
            self._send(identity, _OTHER_VERSION)
            return
        if isinstance(message, Join):
            self._join(identity, message)
            return
        number = next((n for n, node in self._nodes.items() if node.identity == identity), None)
        if number is None:
            return
        self._nodes[number].heard = time.monotonic()
        if isinstance(message, Leaving):
            self.leaving = True
        elif isinstance(message, Lost) and self.loss is None:
            self.loss = Lost(f"node {number}: {message.reason}", message.fatal)

    def _join(self, identity: bytes, join: Join) -> None:
        refused = self._why_not(identity, join)
        if refused is not None:
            logger.warning("node %d cannot join: %s", join.node, refused.reason)
            self._send(identity, refused)
            return
        self._nodes[join.node] = _Node(identity)
        logger.info("node %d of %d has joined", join.node, self._config.nodes)

    def _why_not(self, identity: bytes, join: Join) -> Refused | None:
        if self.started:
            return Refused("its ranks run already", final=False)
        if join.version != PROTOCOL_VERSION:
            return _OTHER_VERSION
        for name, ours in self._options.items():
            theirs = join.options.get(name)
            if theirs != ours:
                option = "--" + name.replace("_", "-")
                return Refused(f"{option} must be the same on all nodes: {ours} on node 0, here {theirs}", final=True)
        if join.checkpoint != self._checkpoint:
            return Refused("--model must be the same on all nodes: its config.json differs from node 0's", final=True)
        if not 0 < join.node < self._config.nodes:
            return Refused(f"there is no node {join.node} of {self._config.nodes}", final=True)
        there = self._nodes.get(join.node)
        if there is not None and there.identity != identity:  # or one that died, which is noticed soon
            return Refused(f"another process is node {join.node} already; see --node-rank", final=False)
        return None

    def _gone(self, number: int, reason: str) -> None:
        del self._nodes[number]
        if self.started and self.loss is None:
            self.loss = Lost(reason)

    def _send(self, identity: bytes, message: ToNode) -> bool:
        try:
            self._socket.send_multipart([identity, _encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True


# ---- the other nodes' end --------------------------------------------------------------------------------------------


class MemberLine:
    """Another node's end: looks for node 0 until it is there, joins, and holds the line. `turn` it as `LeaderLine`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._options, self._checkpoint = shared_options(config), checkpoint_digest(config)
        self._deadline = time.monotonic() + config.join_timeout_s
        self._search: _Search | None = None
        self._secret = b""
        self._problem = ""
        self._not_before = 0.0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] | None = None
        self._breaks: zmq.Socket[bytes] | None = None  # ZeroMQ's own news of the connection
        self._heard = 0.0
        self._beat_at = 0.0
        self.started = False
        self.end: End | None = None

    def turn(self) -> None:
        """Go on with whatever comes next.

        Raises:
            ConfigError: node 0 was not found in time, or does not let this node in.
        """
        if self._socket is None:
            self._seek()
        else:
            self._hold(self._socket)
        if not self.started and self.end is None and time.monotonic() > self._deadline:
            raise ConfigError(
                f"could not join node 0 at {where(self._config)} within {self._config.join_timeout_s:g} s"
                f"{': ' + self._problem if self._problem else ''}; see --leader-address and --join-timeout-s"
            )

    def say(self, message: FromNode) -> None:
        if self._socket is not None:
            self._socket.send_multipart([self._secret, _encode(message)], zmq.NOBLOCK)

    def close(self) -> None:
        self._hang_up()
        self._context.term()

    def _seek(self) -> None:
        if self._search is None:
            if time.monotonic() >= self._not_before:
                self._search = _Search(self._config)
            return
        if self._search.is_alive():
            return
        found, self._search = self._search, None
        if found.line is None:
            self._again(found.problem)
            return
        address, self._secret = found.line
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        self._breaks = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self.say(Join(self._config.node_rank, PROTOCOL_VERSION, self._options, self._checkpoint))
        self._heard = time.monotonic()

    def _hold(self, line: zmq.Socket[bytes]) -> None:
        is_broken = self._breaks is not None and bool(self._breaks.poll(0))  # before its last words are taken
        while self.end is None and self._socket is line:
            try:
                message = _to_node.decode(line.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
            except msgspec.MsgspecError as error:
                raise ConfigError(f"what answers at {where(self._config)} is not lightqwen's node 0") from error
            self._heard = time.monotonic()
            self._take(message)
        if self._socket is not line:
            return
        now = time.monotonic()
        if is_broken:
            self._broken("the line to node 0 broke")
        elif now - self._heard > SILENCE_S:
            self._broken(f"node 0 said nothing for {SILENCE_S:g} s")
        elif now - self._beat_at >= BEAT_S:
            self._beat_at = now
            self.say(Alive())

    def _take(self, message: ToNode) -> None:
        if isinstance(message, Start):
            self.started = True
        elif isinstance(message, End):
            if self.started:
                self.end = message
            else:
                self._broken(message.reason or "node 0 has ended")
        elif isinstance(message, Refused):
            if message.final:
                raise ConfigError(f"node 0 at {where(self._config)} refuses this node: {message.reason}")
            self._broken(message.reason)

    def _broken(self, reason: str) -> None:
        """The line is of no use any more. After the start that is the end; before, another node 0 may come."""
        if self.started:
            if self.end is None:
                self.end = End(reason)
            return
        self._hang_up()
        self._again(reason)

    def _again(self, problem: str) -> None:
        self._problem = problem
        self._not_before = time.monotonic() + RETRY_S

    def _hang_up(self) -> None:
        if self._socket is not None and self._breaks is not None:
            self._socket.disable_monitor()
            self._breaks.close()
            self._socket.close()
        self._socket = self._breaks = None


class _Search(threading.Thread):
    """One try to find node 0, on a thread: names may take long to resolve, and signals must not wait for it."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(name="search", daemon=True)
        self._config = config
        self.line: tuple[str, bytes] | None = None  # its address and secret
        self.problem = ""
        self.start()

    def run(self) -> None:
        try:
            line = json.loads(connect_store(self._config).get(LINE_KEY))
            way = reach(leader_of(self._config), self._config.leader_port, REACH_TIMEOUT_S)
            self.line = tcp(way.theirs, line["port"]), bytes.fromhex(line["secret"])
        except OSError as error:
            self.problem = error.strerror or str(error)
        except RuntimeError as error:  # the store's: it went away again, or never said where the line is
            self.problem = str(error).partition("\n")[0]


# ---- small things ----------------------------------------------------------------------------------------------------


def shared_options(config: EngineConfig) -> dict[str, Any]:
    return {name: value for name, value in config.model_dump().items() if name not in MAY_DIFFER}


def checkpoint_digest(config: EngineConfig) -> str:
    """What tells two checkpoints apart cheaply.

    Raises:
        ConfigError: there is none.
    """
    path = Path(config.model) / "config.json"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
