"""Both ends of the line between nodes, in one process: who is let in, what breaks, and what is told then."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from worker import nodes
from worker.config import ConfigError, EngineConfig
from worker.network import interface_of, listen, own_address, reach
from worker.nodes import Alive, Join, LeaderLine, Leaving, Lost, MemberLine

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


def test_strangers_are_not_heard_and_break_nothing(lines: Lines) -> None:
    place = json.loads(lines.leader.store.get("line"))
    good: dict[str, Any] = {"version": 1, "options": {}, "checkpoint": ""}
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(f"tcp://127.0.0.1:{place['port']}")
        for said in (
            b"garbage",
            b"",
            msgspec.json.encode(Alive()),
            msgspec.json.encode(Lost("no", fatal=True)),
            msgspec.json.encode(Join(node=1, secret="guess", **good)),
            msgspec.json.encode(Join(node=0, secret=place["secret"], **good)),
            msgspec.json.encode(Join(node=3, secret=place["secret"], **good)),
        ):
            stranger.send(said)
        with socket.create_connection(("127.0.0.1", place["port"])) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with socket.create_connection(("127.0.0.1", lines.config.leader_port)) as store:
                store.sendall(b"GET / HTTP/1.1\r\n\r\n")
                lines.add(1)
                lines.add(2)
                lines.start()
    assert lines.leader.loss is None


def test_one_that_comes_when_all_run_is_told_so_and_keeps_looking(lines: Lines) -> None:
    lines.add(1)
    lines.add(2)
    lines.start()
    late = lines.add(1, join_timeout_s=3.0)
    with pytest.raises(ConfigError, match=r"could not join node 0 .* within 3 s: its ranks run already"):
        lines.turn_until(lambda: late.started)
    assert lines.leader.loss is None


def test_a_port_in_use_is_one_readable_line(config: EngineConfig) -> None:
    with (
        socket.create_server(("127.0.0.1", config.leader_port)),
        pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1:\d+: Address already in use; see --leader-port"),
    ):
        LeaderLine(config)


def test_it_listens_at_the_leaders_address_only(lines: Lines) -> None:
    port = json.loads(lines.leader.store.get("line"))["port"]
    for number in (port, lines.config.leader_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", number), timeout=2).close()


# ---- the network -----------------------------------------------------------------------------------------------------


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


def test_an_address_of_somebody_else_means_all_of_ours() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("192.0.2.1") is None
    assert own_address("no-such-host.invalid") is None
    with listen("192.0.2.1", 0) as server:
        assert server.getsockname()[0] == "0.0.0.0"


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
