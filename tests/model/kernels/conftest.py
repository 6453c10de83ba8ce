"""The kernels run compiled where there is a GPU, in Triton's interpreter elsewhere: the same tests, smaller shapes."""

from __future__ import annotations

import pytest
import torch

from model.kernels import attention
from tests.model.kernels.comparing import HOW_SPLIT


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPLITTING", HOW_SPLIT)
