"""Where the processes of several nodes meet: torch's c10d store, at the leader's address and port.

Node 0 hosts it (under torchrun: its agent does). The ranks form their process group through it, the supervisors find
the line to node 0 in it (`worker/nodes.py`), and followers on other machines the leader's plans.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import timedelta
from typing import TYPE_CHECKING

from worker.config import ConfigError, EngineConfig
from worker.endpoint import EngineEndpoint
from worker.network import interface_of, is_loopback, listen, own_address, reach, tcp

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from worker.channel import PlanSender

logger = logging.getLogger(__name__)

STORE_TIMEOUT_S = 60.0
REACH_TIMEOUT_S = 5.0
PLANS_KEY = "plans"


def where(config: EngineConfig) -> str:
    """Node 0's address and port, for messages."""
    return f"{config.leader_address}:{config.leader_port}"


def leader_of(config: EngineConfig) -> str:
    """The leader's address, which is there when there are several nodes."""
    if config.leader_address is None:
        raise ConfigError("--leader-address: is needed with --nodes")
    return config.leader_address


def bind_address(config: EngineConfig) -> str | None:
    """Node 0: where it listens for the others. None: at all its addresses, for the leader's is that of something else
    which leads here, or still that of a pod which was the leader before.

    Raises:
        OSError: the leader's name is not known, or not yet.
    """
    return own_address(leader_of(config))


def warn_of(config: EngineConfig, address: str | None) -> None:
    """Say what about node 0's `bind_address` may surprise."""
    if address is None:
        logger.warning("no interface has the address of %s; listening on all of them", config.leader_address)
    elif is_loopback(address) and config.leader_address not in (address, "localhost"):
        logger.warning("%s is %s here: no other machine reaches it", config.leader_address, address)


def host_store(config: EngineConfig, address: str | None) -> Store:
    """Node 0: open the store at its `bind_address`, or join the one that torchrun's agent has opened.

    Raises:
        ConfigError: the port is in use.
        OSError: the agent's store is not there, or not yet.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if _agent_has_store():
        return connect_store(config)
    try:
        listener = listen(address, config.leader_port)
    except OSError as error:
        why = os.strerror(error.errno or 0)  # its own text has the address in it once more
        raise ConfigError(f"cannot listen on {where(config)}: {why}; see --leader-port") from error
    store = TCPStore(
        address or "127.0.0.1",
        config.leader_port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=STORE_TIMEOUT_S),
        master_listen_fd=listener.detach(),
    )
    return _ours(store)


def connect_store(config: EngineConfig) -> Store:
    """Reach the store that is there already.

    Raises:
        OSError: it is not there.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    way = reach(leader_of(config), config.leader_port, REACH_TIMEOUT_S)  # tells in one line what the store does in many
    store = TCPStore(
        way.theirs,
        config.leader_port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=STORE_TIMEOUT_S),
    )
    return _ours(store)


def choose_interface(config: EngineConfig) -> None:
    """Let gloo and NCCL use the interface that leads to node 0, unless the user has chosen one.

    Raises:
        OSError: node 0 is not there.
    """
    name = interface_of(reach(leader_of(config), config.leader_port, REACH_TIMEOUT_S).ours)
    if name is None:
        logger.warning("no interface has the address that leads to %s; gloo and NCCL choose one", where(config))
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this one, not all that begin so


def publish_plans(config: EngineConfig, store: Store, sender: PlanSender) -> None:
    """The leader: open its socket to the network, and say where."""
    place = {"port": sender.open_to(bind_address(config)), "secret": sender.secret.hex()}
    store.set(PLANS_KEY, json.dumps(place))


def find_plans(config: EngineConfig, store: Store) -> EngineEndpoint:
    """A follower on another node: where the leader's plans come from. Waits until the leader has said so.

    Raises:
        OSError: node 0 is not there.
    """
    place = json.loads(store.get(PLANS_KEY))
    leader = reach(leader_of(config), config.leader_port, REACH_TIMEOUT_S).theirs
    return EngineEndpoint(tcp(leader, place["port"]), bytes.fromhex(place["secret"]))


def _ours(store: Store) -> Store:
    """Our part of the store; with torchrun a new one after each of its restarts."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _agent_has_store() else "0"
    return PrefixStore(f"lightqwen/{attempt}", store)


def _agent_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
