"""Rows with memory behind the last one."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from model.kernels.activation import silu_and_mul_triton
from model.kernels.embedding import embed_rms_norm_triton
from model.kernels.norm import add_rms_norm_triton, rms_norm_triton
from model.kernels.rows import empty_rows, whole_tiles
from model.kernels.runtime import triton
from model.kernels.small_linear import Tiling
from model.kernels.tilings import CLUSTERED, MEASURED, PUSHED, ROW_CLASSES, Work


@pytest.mark.parametrize(
    ("rows", "block_rows", "whole"),
    [
        (1, 8, 8),
        (7, 8, 8),
        (9, 16, 16),
        (24, 32, 32),
        (40, 64, 64),
        (64, 64, 64),
        (72, 96, 96),
        (72, 128, 128),
        (129, 128, 256),
        (256, 128, 256),
        (0, 64, 0),
    ],
)
def test_tiles_of_few_rows_are_whole(rows: int, block_rows: int, whole: int) -> None:
    x = empty_rows(rows, 24, like=torch.empty(0, dtype=torch.bfloat16))
    assert x.shape == (rows, 24)
    assert x.is_contiguous()
    assert x.dtype is torch.bfloat16
    tiles = whole_tiles(x, block_rows)
    assert tiles.shape == (whole, 24)
    assert tiles.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("table", [MEASURED, PUSHED, CLUSTERED], ids=["measured", "pushed", "clustered"])
def test_every_tiling_has_whole_tiles(table: Mapping[Work, Tiling | None]) -> None:
    tilings = [tiling for tiling in table.values() if tiling is not None and tiling.block_rows]
    assert tilings
    for tiling in tilings:
        fewest = max(most for most in (0, *ROW_CLASSES) if most < tiling.rows) + 1
        for rows in range(fewest, tiling.rows + 1):
            tiles = whole_tiles(empty_rows(rows, 8, like=torch.empty(0)), tiling.block_rows)
            assert len(tiles) % tiling.block_rows == 0, (tiling, rows)


def test_nothing_is_read_past_the_memory_that_there_is() -> None:
    x = torch.randn(40, 24)
    assert whole_tiles(x, 64).shape == (40, 24)
    assert whole_tiles(x[10:20], 64).shape == (30, 24), "as far as it goes"
    assert whole_tiles(x[10:], 16).shape == (30, 24)
    assert torch.equal(whole_tiles(x[3:5], 4), x[3:7])


def test_many_rows_have_no_more_than_they_are() -> None:
    x = empty_rows(257, 3, 4, like=torch.empty(0))
    assert x.shape == (257, 3, 4)
    assert whole_tiles(x.view(257, 12), 64).shape == (257, 12)


@pytest.mark.skipif(triton is None, reason="kernels are Triton's")
def test_what_layers_read_has_room(triton_device: torch.device) -> None:
    x, weight = torch.randn(5, 64, device=triton_device), torch.ones(64, device=triton_device)
    ids = torch.arange(5, device=triton_device)
    for normed in (
        rms_norm_triton(x, weight, 1e-6),
        add_rms_norm_triton(x, x, weight, 1e-6)[0],
        embed_rms_norm_triton(ids, x, weight, 1e-6)[0],
        silu_and_mul_triton(x),
    ):
        assert whole_tiles(normed, 8).shape[0] == 8
