"""How the linear kernels of few rows are cut, for each size of a layer and number of rows.

What `python -m bench.small_linear` prints on a GPU goes into `MEASURED` as it is. Sizes that are not there get what
`default_tiling` reckons.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from model.kernels.small_linear import Tiling

ROW_CLASSES = (1, 2, 4, 8, 16)
"""Numbers of rows that have a tiling; in between, the next one counts, so that a padded batch has the same launch."""


class Work(NamedTuple):
    """One launch: a class of rows, the weight [n, k], and what is fused with it."""

    rows: int
    n: int
    k: int
    norm: bool = False
    gated: bool = False


MEASURED: Mapping[Work, Tiling | None] = MappingProxyType({})
"""None where separate kernels are faster; with `norm`, the same without it is then tried behind a norm kernel."""


def tiling_for(rows: int, n: int, k: int, *, norm: bool, gated: bool) -> Tiling | None:
    """Return how to launch a linear layer for so many rows.

    None where separate kernels are to be used: they are faster, the rows too many, or k is not divisible by 8.
    """
    row_class = next((most for most in ROW_CLASSES if rows <= most), None)
    if row_class is None or k % 8:
        return None
    work = Work(row_class, n, k, norm, gated)
    return MEASURED[work] if work in MEASURED else default_tiling(work)


def default_tiling(work: Work) -> Tiling | None:
    """Return a tiling of about one program or more for each of a Hopper's 132 multiprocessors.

    Reckoned from the kernels' registers and shared memory, not measured.
    """
    if work.rows <= 4:
        return _fma_tiling(work)
    # Every program norms all rows: with many of them that is more work than a kernel of its own.
    return None if work.norm and work.rows > 8 else _dot_tiling(work)


def _fma_tiling(work: Work) -> Tiling:
    """Hold whole weight rows in registers where they fit, else go along them one tile at a time."""
    warps = 4
    block_k = 256 * warps
    block_n = next((block for block in (8, 4) if work.n // block >= 256), 2)
    stages = -(-work.k // block_k)
    if stages > 3 or block_n * stages > 16:
        stages = 1
    return Tiling("fma", work.rows, block_n, block_k, warps, stages=stages)


def _dot_tiling(work: Work) -> Tiling:
    """Take wide tiles, so that few programs read x over and over; split the reduction where they are too few."""
    if work.n // 64 >= 120:
        # Each of 128 threads has to want four bytes of the norm's weight, for that to be fetched ahead.
        block_n, block_k, stages = (64, 256, 3) if work.norm else (64, 128, 4)
    else:
        block_n, block_k, stages = 32, 256, 4
    splits = 1
    while work.n // block_n * splits < 120 and 4 * splits * block_k <= work.k:
        splits *= 2
    part = work.k // splits
    prefetch = min(1024, 1 << part.bit_length() - 1) if part >= 64 else 0
    return Tiling("dot", work.rows, block_n, block_k, 4, splits, stages, prefetch)
