"""When a row-parallel layer leaves its sum to its own kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch

from model.kernels.norm import Normed
from model.kernels.peer_sum import OneShot, Push
from model.layers import linear as layers
from model.layers.linear import RowParallelLinear
from model.layers.norm import RMSNorm
from model.parallel import TensorParallel
from model.peer_sums import Place

CPU, FLOAT = torch.device("cpu"), torch.float32
ONE_SHOT = OneShot(torch.zeros((2, 64)), Push(1, torch.zeros(2, dtype=torch.int64)))


@dataclass
class Ranks:
    """Stands for two ranks: a sum is twice this rank's summand."""

    way: OneShot | None
    rank: int = 1
    size: int = 2
    asked: list[tuple[torch.Size, Place]] = field(default_factory=list)

    def one_shot(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> OneShot | None:
        self.asked.append((shape, place))
        return self.way

    def room_for_summand(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> None:
        return None

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, place: Place, residual: torch.Tensor, *norm: Any, pushed: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert not pushed
        return residual, 2 * x + residual


def call(ranks: Ranks, *, bias: bool) -> tuple[torch.Tensor, list[Any]]:
    """Return the total, and what the kernel that sums was told, if it was called."""
    tp = cast(TensorParallel, ranks)
    layer = RowParallelLinear(8, 16, bias=bias, tp=tp, place=Place.MLP, dtype=FLOAT, device=CPU)
    layer.weight.data.fill_(1.0)
    if layer.bias is not None:
        layer.bias.data.fill_(100.0)  # which only rank 0 adds
    told: list[Any] = []

    def by_itself(*arguments: Any) -> tuple[Normed, torch.Tensor]:
        told.extend(arguments)
        x, weight, residual, *_ = arguments
        return Normed(residual), 2 * x @ weight.T + residual

    with (
        patch.object(layers, "can_sum", lambda x, weight: True),
        patch.object(layers, "linear_sum_add_norm", by_itself),
    ):
        _, total = layer(torch.ones(3, 4), torch.ones(3, 16), RMSNorm(16, 1e-6, dtype=FLOAT, device=CPU))
    return total, told


@pytest.mark.parametrize(
    ("way", "bias", "by_itself"), [(ONE_SHOT, False, True), (None, False, False), (ONE_SHOT, True, False)]
)
def test_a_layer_sums_by_itself_where_it_can(way: OneShot | None, bias: bool, by_itself: bool) -> None:
    ranks = Ranks(way)
    total, told = call(ranks, bias=bias)
    assert torch.equal(total, torch.full((3, 16), 9.0))
    assert bool(told) == by_itself
    if by_itself:
        assert told[-1] is way
    # A sum is announced for a layer without a bias only: rank 0 would have another tiling with it.
    assert ranks.asked == ([] if bias else [(torch.Size((3, 16)), Place.MLP)])
