"""The kernels run compiled where there is a GPU, in Triton's interpreter elsewhere: the same tests, smaller shapes."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
