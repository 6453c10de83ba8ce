"""What every test gets: one thread for each process's maths, and the bundled checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests start many processes; each with as many threads as there are cores would only wait for the others. Set before
# anything imports torch, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in a test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# Without a GPU, Triton's kernels run in its interpreter, which must be asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The bundled checkpoint: random weights, 2 layers, 4 query heads on 2 KV heads, 1024 tokens. Read only."""
    return ROOT / "model" / "demo"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, by name, where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
