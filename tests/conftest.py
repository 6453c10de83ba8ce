"""What every test gets: one thread for each process's maths, the bundled checkpoint, and one that never ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Tests start many processes; each with as many threads as there are cores would only wait for the others. Set before
# anything imports torch, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in a test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell lets what it starts in the background ignore Ctrl-C; what tests start would inherit that, and must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

from tests.checkpoints import DEMO, endless

# Without a GPU, Triton's kernels run in its interpreter, which must be asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """The device on which Triton kernels run here: a GPU, or in Triton's interpreter the CPU."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 was not set in time"
    return torch.device("cpu")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The bundled checkpoint: trained, 8 layers, 8 query heads on 2 KV heads, 4096 tokens. Read only."""
    return DEMO


@pytest.fixture(scope="session")
def endless_checkpoint() -> Path:
    """Random weights that never end by themselves; see `checkpoints.endless`."""
    return endless()


# Whole servers, several machines, a cluster's life, trainings: what `make test-fast` leaves to `make test`.
SLOW = (
    "bench/test_load.py",
    "bench/test_served.py",
    "helm",
    "model/demo/test_served.py",
    "model/demo/test_training.py",
    "observability",
    "test_cli.py",
    "test_end_to_end.py",
    "test_gateways.py",
    "test_multi_node.py",
    "test_packaging.py",
    "test_replicas.py",
    "worker/test_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and skip GPU tests, by name, where there is no GPU."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.path.relative_to(here).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
