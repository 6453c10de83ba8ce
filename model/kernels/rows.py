"""Rows of activations, with memory behind the last one, for kernels that fetch them in tiles.

A tile has a fixed number of rows. Those outside of a tensor come as zeros, but not for nothing: on an H200, 56 rows of
128 that are not there made a linear layer take 25 us instead of 14. So tensors of few rows, if a linear layer reads
them, are allocated as part of a larger one, and tiles are fetched whole. What lies behind the last row is not written,
and may be anything: rows of a product do not depend on one another, and those behind the last one are not stored.
"""

from __future__ import annotations

import torch

_LEAST, _MOST = 8, 256  # rows of a tile


def empty_rows(rows: int, *shape: int, like: torch.Tensor) -> torch.Tensor:
    """Return [rows, *shape] of `like`'s dtype, on its device, contiguous; with memory behind for any tile."""
    room = rows
    if 0 < rows <= _MOST:
        room = max(_LEAST, 1 << (rows - 1).bit_length())
        if room == 32:  # of which some layers have tiles of 64
            room = 64
    return like.new_empty((room, *shape))[:rows]


def whole_tiles(x: torch.Tensor, block_rows: int) -> torch.Tensor:
    """Return x [rows, k], contiguous, with as many more rows as its last tile of `block_rows` has, if there is memory
    for them behind it."""
    rows, k = x.shape
    behind = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    whole = min(-(-rows // block_rows) * block_rows, behind // k)
    return x.as_strided((whole, k), (k, 1))
