"""The kernels run compiled where there is a GPU, in Triton's interpreter elsewhere: the same tests, smaller shapes."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """The device on which Triton kernels run here."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert triton.knobs.runtime.interpret, "tests/conftest.py did not set TRITON_INTERPRET=1"
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
