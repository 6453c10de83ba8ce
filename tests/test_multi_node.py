"""One model over several machines: as launches of their own on loopback, and in network namespaces of their own.

Starting ranks takes some seconds, so each test is the life of one group of nodes. What a group answers must be what one
rank alone answers.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc
import pytest

from lightqwen.client import Client, Delta, Generation, LightqwenError
from tests.processes import Serve, is_alive, listening, until
from tests.service.test_probes import NOT_SERVING, SERVING, Prober

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

PROMPTS = [list(range(300, 300 + length)) for length in (3, 20, 45)]
LONG = 400
HEAD_START_S = 6.0
"""Long enough for a node to look for the other in vain."""


def ask(client: Client, prompt: list[int], max_tokens: int) -> Generation:
    return client.generate(
        prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, token_ids=True, text=False, timeout=60
    )


def answers(address: str) -> list[list[int]]:
    with Client(address) as client:
        return [
            [token for event in ask(client, prompt, 24) if isinstance(event, Delta) for token in event.token_ids]
            for prompt in PROMPTS
        ]


@contextlib.contextmanager
def running_stream(address: str) -> Iterator[Generation]:
    """A long generation, some tokens of which have come."""
    with Client(address) as client:
        generation = ask(client, PROMPTS[0], LONG)
        events = iter(generation)
        for _ in range(5):
            next(events)
        yield generation


def failure(generation: Generation) -> LightqwenError:
    with pytest.raises(LightqwenError) as caught:
        for _ in generation:
            pass
    return caught.value


@pytest.fixture(scope="module")
def expected() -> Iterator[list[list[int]]]:
    """What one rank answers."""
    server = Serve.start("--port", "0")
    server.wait_ready()
    yield answers(server.address)
    server.process.terminate()
    assert server.exit_code(30) == 0
    server.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@dataclass
class Group:
    """Nodes of one group; node 0 first, whoever was started first."""

    nodes: list[Serve]

    @property
    def leader(self) -> Serve:
        return self.nodes[0]

    @property
    def member(self) -> Serve:
        return self.nodes[1]

    def wait_ready(self) -> None:
        for node in self.nodes:
            node.wait_ready()

    def look(self) -> None:
        for node in self.nodes:
            node.look()

    def exit_codes(self, seconds: float) -> list[int]:
        give_up = time.monotonic() + seconds
        return [node.exit_code(max(0.1, give_up - time.monotonic())) for node in self.nodes]

    def errors(self) -> list[str]:
        return [node.errors() for node in self.nodes]

    def close(self) -> None:
        for node in self.nodes:
            node.close()


@contextlib.contextmanager
def loopback(
    *options: str, first: int = 0, ranks: int = 2, env: Sequence[dict[str, str]] | None = None
) -> Iterator[Group]:
    """Two nodes on this machine; `first` begins, the other follows when that one has been looking for it for a while.
    `env`: what each is told by its environment instead of options."""
    port = free_port()
    common = ["--tensor-parallel-size", str(ranks), "--port", "0", *options]
    nodes: dict[int, Serve] = {}
    try:
        for node in (first, 1 - first):
            told = ["--nodes", "2", "--node-rank", str(node), "--leader-address", "127.0.0.1"]
            told += ["--leader-port", str(port)]
            variables = None if env is None else {key: value.format(port=port) for key, value in env[node].items()}
            nodes[node] = Serve.start(*common, *(told if variables is None else []), env=variables)
            if node == first:
                time.sleep(HEAD_START_S)
        yield Group([nodes[0], nodes[1]])
    finally:
        for serve in nodes.values():
            serve.close()


def test_the_tokens_are_those_of_one_rank_and_sigterm_drains_all(expected: list[list[int]]) -> None:
    with loopback("--health-port", "0", "--join-timeout-s", "60", first=0) as group:
        group.wait_ready()
        assert group.leader.facts["tensor_parallel_size"] == "2"
        assert group.member.facts["node"] == "1"
        assert group.member.facts["ranks"] == "1"
        probers = [Prober(node.facts["health"]) for node in group.nodes]
        for prober in probers:
            until(lambda prober=prober: prober.check() == SERVING, 5.0, "not ready")  # type: ignore[misc]
        assert answers(group.leader.address) == expected
        for node in group.nodes:
            assert listening(node.seen) == {"127.0.0.1"}, "nothing is open beyond the leader's address"
        with running_stream(group.leader.address) as generation:
            group.leader.process.terminate()
            until(lambda: probers[0].check() == NOT_SERVING, 5.0, "draining is not seen")
            assert probers[1].check("liveness") == SERVING
            assert len(list(generation)) > 0
            assert generation.finished is not None
            assert generation.finished.usage.output_tokens == LONG
        assert group.exit_codes(20) == [0, 0]
        for prober in probers:
            prober.channel.close()


def test_a_rank_that_is_killed_elsewhere_fails_the_streams_and_ends_all(expected: list[list[int]]) -> None:
    """The others were there before node 0."""
    with loopback(first=1) as group:
        group.wait_ready()
        assert answers(group.leader.address) == expected
        (rank,) = group.member.workers
        with running_stream(group.leader.address) as generation:
            began = time.monotonic()
            os.kill(rank, signal.SIGKILL)
            failed = failure(generation)
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
        assert group.exit_codes(20) == [1, 1]
        assert time.monotonic() - began < 20
        leader, member = group.errors()
        assert "giving up: ranks on other nodes cannot be started again from here" in leader
        assert "rank1 was ended by SIGKILL" in member


def test_a_rank_of_node_0_that_is_killed_fails_the_streams_and_ends_all() -> None:
    """While it drains, too: an end that loses streams is no end as asked."""
    variables = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "localhost", "LIGHTQWEN_LEADER_PORT": "{port}"}
    env = [variables | {"LWS_WORKER_INDEX": str(node)} for node in range(2)]
    with loopback(env=env) as group:
        group.wait_ready()
        _, rank = group.leader.workers
        with running_stream(group.leader.address) as generation:
            group.leader.process.terminate()
            os.kill(rank, signal.SIGKILL)
            assert failure(generation).code is grpc.StatusCode.UNAVAILABLE
        assert group.exit_codes(20) == [1, 1]


def test_a_node_that_is_asked_to_end_lets_what_runs_finish() -> None:
    """Though node 0 is asked as well a moment later, as it is when a whole group must go."""
    variables = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}
    env = [variables | {"NODE_RANK": str(node)} for node in range(2)]
    with loopback("--health-port", "0", "--gateways", "2", env=env) as group:  # which is for node 0 only
        group.wait_ready()
        prober = Prober(group.leader.facts["health"])
        with running_stream(group.leader.address) as generation:
            group.member.process.terminate()
            until(lambda: prober.check() == NOT_SERVING, 5.0, "it does not drain")
            group.leader.process.terminate()
            assert len(list(generation)) > 0
            assert generation.finished is not None
            assert generation.finished.usage.output_tokens == LONG
        assert group.exit_codes(20) == [0, 0]
        prober.channel.close()


def test_torchrun_starts_it_like_any_other_program(expected: list[list[int]]) -> None:
    """Its agent holds the store at the master's port; the nodes meet there."""
    port = free_port()
    nodes = []
    try:
        for number in range(2):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
            torchrun += ["--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", str(port)]
            common = ["--tensor-parallel-size", "2", "--port", "0"]
            nodes.append(Serve.start(*common, prefix=[*torchrun, "--no-python"]))
        group = Group(nodes)
        group.wait_ready()
        assert answers(group.leader.address) == expected
        group.look()
        group.leader.process.terminate()
        until(lambda: not any(node.is_running for node in nodes), 40.0, "torchrun lives on")
        until(lambda: not any(is_alive(pid) for node in nodes for pid in node.seen), 10.0, "a server lives on")
    finally:
        for node in nodes:
            node.process.terminate()  # a launcher that is killed would leave what it has launched
            node.process.wait(40)
            node.close()


def test_a_node_without_its_node_0_ends_within_seconds() -> None:
    with loopback() as group:
        group.wait_ready()
        group.look()
        group.leader.process.kill()
        began = time.monotonic()
        assert group.member.exit_code(15) == 1
        assert time.monotonic() - began < 10
        assert "is gone: " in group.member.errors()


def test_nodes_that_disagree_say_in_what() -> None:
    port = free_port()
    common = ["--nodes", "2", "--tensor-parallel-size", "2", "--leader-address", "127.0.0.1", "--port", "0"]
    common += ["--leader-port", str(port), "--join-timeout-s", "20"]
    leader = Serve.start(*common)
    member = Serve.start(*common, "--node-rank", "1", "--max-running", "3")
    try:
        assert member.exit_code(30) == 1
        assert (
            f"lightqwen: error: node 0 at 127.0.0.1:{port} refuses this node: --max-running must be the same on all "
            "nodes: None on node 0, here 3\n"
        ) in member.errors()
        assert leader.is_running
        leader.process.terminate()
        assert leader.exit_code(10) == 128 + signal.SIGTERM
    finally:
        leader.close()
        member.close()


def test_who_is_not_found_in_time_is_named() -> None:
    ports = [free_port(), free_port()]
    common = ["--nodes", "2", "--tensor-parallel-size", "2", "--port", "0", "--join-timeout-s", "2"]
    leader = Serve.start(*common, "--leader-address", "127.0.0.1", "--leader-port", str(ports[0]))
    member = Serve.start(*common, "--leader-address", "127.0.0.1", "--leader-port", str(ports[1]), "--node-rank", "1")
    nowhere = Serve.start(*common, "--leader-address", "node0.invalid", "--node-rank", "1")
    try:
        assert [node.exit_code(40) for node in (leader, member, nowhere)] == [1, 1, 1]
        assert leader.errors().splitlines()[-1] == (
            f"lightqwen: error: node 1 of 2 did not join at 127.0.0.1:{ports[0]} within 2 s; see --join-timeout-s"
        )
        assert member.errors().splitlines()[-1] == (
            f"lightqwen: error: could not join node 0 at 127.0.0.1:{ports[1]} within 2 s: Connection refused; "
            "see --leader-address and --join-timeout-s"
        )
        assert "could not join node 0 at node0.invalid:29500 within 2 s: " in nowhere.errors()
    finally:
        for node in (leader, member, nowhere):
            node.close()


# ---- in network namespaces -------------------------------------------------------------------------------------------


class Machines:
    """Network namespaces on a bridge: as many machines as it takes, each with an interface `eth0` and its address."""

    def __init__(self, count: int) -> None:
        self._tag = secrets.token_hex(3)
        self._net = f"10.{secrets.randbelow(56) + 200}.{secrets.randbelow(256)}"
        self.bridge = f"lqb{self._tag}"
        self.names = [f"lq{self._tag}-{number}" for number in range(count)]
        self.addresses = [f"{self._net}.{10 + number}" for number in range(count)]

    def create(self) -> None:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self._net}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            ip("netns", "add", name)
            ip("link", "add", self.cable(number), "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", self.cable(number), "master", self.bridge, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def cable(self, number: int) -> str:
        """This machine's interface on the switch."""
        return f"lqv{self._tag}{number}"

    def pull(self, number: int) -> None:
        """Unplug a machine: nobody is told, packets are simply lost."""
        ip("link", "set", self.cable(number), "down")

    def destroy(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=10)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, timeout=10)

    def run_on(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[number]]


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10)
    if done.returncode != 0:
        raise PermissionError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def machines() -> Iterator[Machines]:
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (Debian: apt-get install iproute2)")
    machines = Machines(2)
    try:
        machines.create()
    except PermissionError as error:
        machines.destroy()
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield machines
    machines.destroy()


@contextlib.contextmanager
def on_machines(machines: Machines, *options: str) -> Iterator[Group]:
    """Two nodes of two ranks each, the second machine begins; clients reach node 0 by its address."""
    common = ["--nodes", "2", "--tensor-parallel-size", "4", "--leader-address", machines.addresses[0], "--port", "0"]
    nodes = []
    try:
        for number in (1, 0):
            own = ["--node-rank", str(number), "--host", machines.addresses[number]]
            nodes.insert(0, Serve.start(*common, *own, *options, prefix=machines.run_on(number)))
            time.sleep(1.0)
        yield Group(nodes)
    finally:
        for node in nodes:
            node.close()


def test_machines_with_addresses_of_their_own(machines: Machines, expected: list[list[int]]) -> None:
    """Nothing but the leader's address is known; each machine has a loopback of its own, so nothing can go there."""
    with on_machines(machines) as group:
        group.wait_ready()
        assert group.member.facts["ranks"] == "2,3"
        assert answers(group.leader.address) == expected
        group.look()
        for node, address in zip(group.nodes, machines.addresses, strict=True):
            assert listening(node.seen) == {address}, "the leader's address, and the interface that leads there"
        with running_stream(group.leader.address) as generation:
            began = time.monotonic()
            group.member.process.kill()  # with it its ranks
            assert failure(generation).code is grpc.StatusCode.UNAVAILABLE
        assert group.leader.exit_code(20) == 1
        assert time.monotonic() - began < 20


def test_a_machine_that_falls_silent_is_given_up(machines: Machines) -> None:
    with on_machines(machines) as group:
        group.wait_ready()
        group.look()
        with running_stream(group.leader.address) as generation:
            began = time.monotonic()
            machines.pull(1)
            assert failure(generation).code is grpc.StatusCode.UNAVAILABLE
        assert group.exit_codes(40) == [1, 1]
        assert time.monotonic() - began < 40
        leader, member = group.errors()
        assert "node 1 said nothing for 15 s" in leader
        assert "node 0 said nothing for 15 s" in member
