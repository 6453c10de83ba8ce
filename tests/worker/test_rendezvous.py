"""The store where all nodes meet: who opens it, where, and what the leader's plans are told through it."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from worker import rendezvous
from worker.channel import PlanReceiver, PlanSender
from worker.config import ConfigError, EngineConfig
from worker.endpoint import private_endpoint
from worker.rendezvous import bind_address, connect_store, find_plans, host_store, publish_plans, warn_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several nodes are for Linux")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def for_leader(address: str) -> EngineConfig:
    return EngineConfig(nodes=2, tensor_parallel_size=2, leader_address=address, leader_port=free_port())


@pytest.fixture
def config() -> EngineConfig:
    return for_leader("127.0.0.1")


@pytest.fixture
def from_the_leader(config: EngineConfig) -> Iterator[PlanSender]:
    sender = PlanSender(private_endpoint("plans"), 1)
    yield sender
    sender.close()


def test_what_node_0_writes_another_reads(config: EngineConfig) -> None:
    store = host_store(config, bind_address(config))
    store.set("word", "one")
    assert connect_store(config).get("word") == b"one"


def test_one_that_is_not_there_is_an_error_at_once(config: EngineConfig) -> None:
    with pytest.raises(ConnectionRefusedError):
        connect_store(config)


def test_a_port_in_use_is_one_readable_line(config: EngineConfig) -> None:
    with (
        socket.create_server(("127.0.0.1", config.leader_port)),
        pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1:\d+: Address already in use; see --leader-port"),
    ):
        host_store(config, "127.0.0.1")


def test_the_store_is_open_at_the_leaders_address_alone(config: EngineConfig) -> None:
    store = host_store(config, bind_address(config))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", config.leader_port), timeout=2).close()
    assert store.set("there", "still") is None


def test_behind_the_address_of_something_else_it_listens_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    """Such as that of a Service, which no interface of this machine has."""
    config = for_leader("192.0.2.1")
    address = bind_address(config)
    assert address is None
    with caplog.at_level(logging.WARNING):
        warn_of(config, address)
    assert "no interface has the address of 192.0.2.1; listening on all of them" in caplog.text
    store = host_store(config, address)
    with socket.create_connection(("127.0.0.2", config.leader_port), timeout=2):
        store.set("there", "too")


@pytest.mark.parametrize(
    ("name", "address", "warns"),
    [
        ("node0", "127.0.1.1", True),
        ("node0", "192.0.2.7", False),
        ("localhost", "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", False),
    ],
)
def test_a_name_that_only_this_machine_reaches_is_warned_of(
    name: str, address: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of(for_leader(name), address)
    assert ("no other machine reaches it" in caplog.text) is warns


def test_under_torchrun_the_agents_store_is_used_anew_after_each_of_its_restarts(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ConnectionRefusedError):
        host_store(config, "127.0.0.1")
    timeout = timedelta(seconds=10)
    agent = TCPStore("127.0.0.1", config.leader_port, is_master=True, wait_for_workers=False, timeout=timeout)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    host_store(config, "127.0.0.1").set("word", "first")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    host_store(config, "127.0.0.1").set("word", "second")
    assert connect_store(config).get("word") == b"second"
    assert agent.get("lightqwen/0/word") == b"first"


def test_plans_come_from_the_leaders_address_alone(config: EngineConfig, from_the_leader: PlanSender) -> None:
    store = host_store(config, bind_address(config))
    publish_plans(config, store, from_the_leader)
    place = find_plans(config, connect_store(config))
    host, _, port = place.address.removeprefix("tcp://").rpartition(":")
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(port)), timeout=2).close()
    follower = PlanReceiver(place)
    from_the_leader.gather()
    from_the_leader.send(b"plan")
    assert follower.receive(5.0) == b"plan"
    follower.close()


def test_the_interface_that_leads_there_is_chosen_unless_the_user_has_chosen(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set below is taken back in the end
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with socket.create_server(("127.0.0.1", config.leader_port)):
        rendezvous.choose_interface(config)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth7"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
