"""Both ends of the line between nodes, in one process: who is let in, what breaks, and what is told then."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from worker import nodes
from worker.config import ConfigError, EngineConfig
from worker.nodes import Alive, Join, LeaderLine, Leaving, Lost, MemberLine, Refused, checkpoint_digest, shared_options

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several nodes are for Linux")


@pytest.fixture
def config(demo_checkpoint: Path) -> EngineConfig:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return EngineConfig(
        model=str(demo_checkpoint),
        nodes=3,
        tensor_parallel_size=6,
        leader_address="127.0.0.1",
        leader_port=port,
        join_timeout_s=30.0,
    )


def changed(config: EngineConfig, **fields: Any) -> EngineConfig:
    return EngineConfig.model_validate(config.model_dump() | fields)


class Lines:
    """Lines that are turned together."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.leader = LeaderLine(config)
        self.members: list[MemberLine] = []
        self._to_close = ExitStack()

    def add(self, node: int, **fields: Any) -> MemberLine:
        member = MemberLine(changed(self.config, node_rank=node, **fields))
        self._to_close.callback(member.close)
        self.members.append(member)
        return member

    def turn_until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up
            for line in (self.leader, *self.members):
                line.turn()
            time.sleep(0.01)

    def start(self) -> None:
        self.turn_until(lambda: not self.leader.missing)
        self.leader.start()
        self.turn_until(lambda: all(member.started for member in self.members))

    def close(self) -> None:
        self._to_close.close()
        self.leader.end("")


@pytest.fixture
def lines(config: EngineConfig) -> Iterator[Lines]:
    lines = Lines(config)
    yield lines
    lines.close()


def test_all_join_and_start_together_and_are_told_the_end(lines: Lines) -> None:
    first = lines.add(1)
    lines.turn_until(lambda: lines.leader.missing == [2])
    assert not first.started
    second = lines.add(2)
    lines.start()
    second.say(Leaving())
    lines.turn_until(lambda: lines.leader.leaving)
    first.say(Lost("rank2 was ended by SIGKILL"))
    lines.turn_until(lambda: lines.leader.loss is not None)
    assert lines.leader.loss == Lost("node 1: rank2 was ended by SIGKILL")
    lines.leader.end("rank2 was ended")
    for member in (first, second):
        give_up = time.monotonic() + 5
        while member.end is None and time.monotonic() < give_up:
            member.turn()
        assert member.end is not None
        assert member.end.reason == "rank2 was ended"
    lines.leader = LeaderLine(changed(lines.config, leader_port=lines.config.leader_port + 1))  # for the fixture to end


def test_a_member_that_goes_before_the_start_may_come_again(lines: Lines) -> None:
    first = lines.add(1)
    lines.turn_until(lambda: lines.leader.missing == [2])
    lines.members.remove(first)
    first.close()
    lines.turn_until(lambda: lines.leader.missing == [1, 2])
    assert lines.leader.loss is None
    lines.add(1)
    lines.add(2)
    lines.start()


def test_a_member_that_goes_after_the_start_is_a_loss(lines: Lines) -> None:
    first = lines.add(1)
    lines.add(2)
    lines.start()
    lines.members.remove(first)
    first.close()
    lines.turn_until(lambda: lines.leader.loss is not None, 5.0)
    assert lines.leader.loss == Lost("the line to node 1 broke")


def test_silence_is_a_loss_on_both_ends(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = lines.add(1)
    lines.add(2)
    lines.start()
    monkeypatch.setattr(nodes, "SILENCE_S", 2.5)
    lines.members.remove(silent)  # it is there, and turns no more
    lines.turn_until(lambda: lines.leader.loss is not None, 8.0)
    assert lines.leader.loss == Lost("node 1 said nothing for 2.5 s")
    deaf = lines.members[0]
    time.sleep(0.2)
    give_up = time.monotonic() + 8
    while deaf.end is None:
        assert time.monotonic() < give_up
        deaf.turn()
        time.sleep(0.05)
    assert deaf.end.reason == "node 0 said nothing for 2.5 s"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"block_size": 32}, "--block-size must be the same on all nodes: 64 on node 0, here 32"),
        ({"dtype": "float16"}, "--dtype must be the same on all nodes: auto on node 0, here float16"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size must be the same on all nodes: 6 on node 0, here 3"),
    ],
)
def test_options_that_must_agree(lines: Lines, fields: dict[str, Any], says: str) -> None:
    lines.add(1, **fields)
    with pytest.raises(ConfigError, match=f"node 0 at 127.0.0.1:.* refuses this node: {says}"):
        lines.turn_until(lambda: False)
    assert lines.leader.missing == [1, 2]


def test_options_that_may_differ(lines: Lines) -> None:
    lines.add(1, gpu_memory_utilization=0.5, hang_timeout_s=7.0, leader_address="localhost")
    lines.add(2, join_timeout_s=9.0)
    lines.start()


def test_another_checkpoint_is_refused(lines: Lines, tmp_path: Path) -> None:
    shutil.copy(Path(lines.config.model) / "config.json", tmp_path)
    with (tmp_path / "config.json").open("a") as file:
        file.write("\n")
    lines.add(1, model=str(tmp_path))
    with pytest.raises(ConfigError, match="--model must be the same on all nodes"):
        lines.turn_until(lambda: False)


def place_of(line: LeaderLine) -> Any:
    """What the store tells those who look for node 0."""
    line.turn()
    assert line.store is not None
    return json.loads(line.store.get("line"))


@contextmanager
def stranger(line: LeaderLine) -> Iterator[zmq.Socket[bytes]]:
    """Connected to node 0's end."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.connect(f"tcp://127.0.0.1:{place_of(line)['port']}")
        yield socket


JOIN: dict[str, Any] = {"node": 1, "version": 1, "options": {}, "checkpoint": ""}


def test_strangers_are_not_heard_and_break_nothing(lines: Lines) -> None:
    secret = bytes.fromhex(place_of(lines.leader)["secret"])
    join = msgspec.json.encode(Join(**JOIN))
    deep = b'{"type":"join","x":' + b"[" * 60_000
    with stranger(lines.leader) as socket:
        for parts in (
            [b"garbage"],
            [b""],
            [secret],
            [join],
            [b"guess", join],
            ["gu\u00e9ss".encode(), join],
            [b"", secret, join],
            [secret[:-1], join],
            [b"guess", deep],
            [b"guess", msgspec.json.encode(Lost("no", fatal=True))],
            [secret, msgspec.json.encode(Alive())],
            [secret, msgspec.json.encode(Lost("no", fatal=True))],
        ):
            socket.send_multipart(parts)
        with socket_to(place_of(lines.leader)["port"]) as plain, socket_to(lines.config.leader_port) as store:
            for scanner in (plain, store):
                scanner.sendall(b"GET / HTTP/1.1\r\n\r\n")
            lines.add(1)
            lines.add(2)
            lines.start()
    assert lines.leader.loss is None


def socket_to(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"something that comes later", "it runs another version of lightqwen"),
        (msgspec.json.encode(Join(**JOIN | {"version": 99})), "it runs another version of lightqwen"),
        (msgspec.json.encode(Join(**JOIN)), "must be the same on all nodes"),
    ],
)
def test_one_with_the_secret_that_cannot_join_is_told_why(lines: Lines, said: bytes, why: str) -> None:
    assert why in refusal(lines, said).reason


def test_a_number_beyond_the_nodes_is_refused(lines: Lines) -> None:
    """Each node holds its own number against its own options; node 0 has the last word."""
    facts = {"options": shared_options(lines.config), "checkpoint": checkpoint_digest(lines.config)}
    for node in (0, 3):
        said = msgspec.json.encode(Join(**JOIN | facts | {"node": node}))
        assert refusal(lines, said).reason == f"there is no node {node} of 3"


def refusal(lines: Lines, said: bytes) -> Refused:
    """What node 0 answers to one who knows the secret."""
    with stranger(lines.leader) as socket:
        socket.send_multipart([bytes.fromhex(place_of(lines.leader)["secret"]), said])
        give_up = time.monotonic() + 5
        while not socket.poll(10):
            assert time.monotonic() < give_up
            lines.leader.turn()
        refused = msgspec.json.decode(socket.recv(), type=Refused)
    assert refused.final
    return refused


def test_a_number_that_another_process_has_is_refused(lines: Lines) -> None:
    """Two that were started as the same node would otherwise push each other out for ever."""
    first = lines.add(1)
    lines.turn_until(lambda: lines.leader.missing == [2])
    lines.add(1, join_timeout_s=2.0)
    with pytest.raises(
        ConfigError, match=r"could not join .* within 2 s: another process is node 1 already; see --node-rank"
    ):
        lines.turn_until(lambda: False)
    lines.members.pop()
    lines.add(2)
    lines.start()
    assert first.started


def test_a_name_that_is_not_known_yet_is_waited_for(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a pod, which is known some seconds after the pod runs."""
    real, known = socket.getaddrinfo, False

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "leader.lightqwen.inference":
            if not known:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = "127.0.0.1"
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    lines = Lines(changed(config, leader_address="leader.lightqwen.inference"))
    try:
        lines.add(1)
        lines.add(2)
        lines.turn_until(lambda: lines.leader.problem != "")
        assert lines.leader.store is None
        known = True
        lines.start()
    finally:
        lines.close()


def test_what_may_surprise_is_said_once_it_listens(config: EngineConfig, caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines(changed(config, leader_address="192.0.2.1"))
    lines.leader.turn()
    lines.leader.turn()
    assert caplog.text.count("no interface has the address of 192.0.2.1") == 1
    lines.close()


def test_a_name_that_never_becomes_known_is_named(config: EngineConfig) -> None:
    lines = Lines(changed(config, leader_address="node0.invalid", join_timeout_s=1.0))
    with pytest.raises(ConfigError, match=r"cannot listen on node0\.invalid:\d+: .+; see --leader-address"):
        lines.turn_until(lambda: False, 20.0)
    lines.close()


def test_one_that_comes_when_all_run_is_told_so_and_keeps_looking(lines: Lines) -> None:
    lines.add(1)
    lines.add(2)
    lines.start()
    late = lines.add(1, join_timeout_s=3.0)
    with pytest.raises(ConfigError, match=r"could not join node 0 .* within 3 s: its ranks run already"):
        lines.turn_until(lambda: late.started)
    assert lines.leader.loss is None


def test_a_port_in_use_is_one_readable_line(lines: Lines) -> None:
    with (
        socket.create_server(("127.0.0.1", lines.config.leader_port)),
        pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1:\d+: Address already in use; see --leader-port"),
    ):
        lines.leader.turn()


def test_it_listens_at_the_leaders_address_only(lines: Lines) -> None:
    for number in (place_of(lines.leader)["port"], lines.config.leader_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", number), timeout=2).close()


# ---- the options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"nodes": 2}, "--tensor-parallel-size: counts the ranks of all nodes and must divide by --nodes 2, got 1"),
        ({"nodes": 2, "tensor_parallel_size": 3}, "must divide by --nodes 2, got 3"),
        ({"nodes": 2, "tensor_parallel_size": 2}, "--leader-address: 2 nodes need it to find node 0"),
        ({"node_rank": 1}, "--node-rank: must be below --nodes 1, got 1"),
    ],
)
def test_options_that_do_not_fit_together(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EngineConfig(**fields)


def test_each_node_has_its_share_of_the_ranks(config: EngineConfig) -> None:
    shares = [list(changed(config, node_rank=node).local_ranks) for node in range(3)]
    assert shares == [[0, 1], [2, 3], [4, 5]]
    assert list(EngineConfig(tensor_parallel_size=4).local_ranks) == [0, 1, 2, 3]
