"""How the linear kernels of few rows are cut, for each size of a layer and number of rows.

Sizes that are not in `MEASURED` get what `default_tiling` says. `python -m bench.small_linear` prints, for a GPU, the
entries that are missing: where something else is faster than that by more than 3 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from model.kernels.small_linear import Tiling

ROW_CLASSES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of rows that have a tiling; in between, the next one counts, so that a padded batch has the same launch."""


class Work(NamedTuple):
    """One launch: a class of rows, the weight [n, k], and whether the gate is part of it."""

    rows: int
    n: int
    k: int
    gated: bool = False


MEASURED: Mapping[Work, Tiling | None] = MappingProxyType(
    {
        Work(16, 6144, 1024, gated=True): Tiling("held", 16, 16, 1024, 4, 1, 1, 0),  # 0.6B gate_up: 7.3 us, else 10.3
        Work(32, 6144, 1024, gated=True): Tiling("dot", 32, 32, 256, 4, 1, 4, 0),  # 0.6B gate_up: 8.2 us, else 10.4
        Work(64, 6144, 1024, gated=True): Tiling("dot", 64, 32, 256, 4, 1, 3, 0),  # 0.6B gate_up: 9.5 us, else 10.7
        Work(2, 1024, 3072): Tiling("fma", 2, 2, 2048, 8, 1, 2, 0),  # 0.6B down: 3.3 us, else 3.8
        Work(16, 1024, 3072): Tiling("dot", 16, 16, 256, 1, 4, 4, 0),  # 0.6B down: 5.5 us, else 7.2
        Work(32, 1024, 3072): Tiling("dot", 32, 32, 256, 4, 4, 4, 1024),  # 0.6B down: 6.4 us, else 7.2
        Work(4, 151936, 1024): Tiling("fma", 4, 2, 256, 1, 1, 4, 0),  # 0.6B lm_head: 102.4 us, else 108.9
        Work(16, 151936, 1024): Tiling("dot", 16, 128, 128, 8, 1, 4, 0),  # 0.6B lm_head: 106.7 us, else 116.0
        Work(32, 151936, 1024): Tiling("dot", 32, 64, 128, 4, 1, 3, 0),  # 0.6B lm_head: 109.5 us, else 118.5
        Work(64, 151936, 1024): Tiling("dot", 64, 64, 128, 4, 1, 3, 0),  # 0.6B lm_head: 113.3 us, else 123.3
        Work(8, 6144, 4096): Tiling("dot", 8, 32, 256, 2, 2, 4, 1024),  # 8B qkv: 21.0 us, else 22.7
        Work(16, 6144, 4096): Tiling("dot", 16, 32, 256, 4, 2, 4, 1024),  # 8B qkv: 21.7 us, else 22.9
        Work(32, 24576, 4096, gated=True): Tiling("dot", 32, 64, 256, 4, 1, 3, 0),  # 8B gate_up: 71.9 us, else 77.2
        Work(32, 4096, 12288): Tiling("dot", 32, 64, 256, 4, 2, 3, 1024),  # 8B down: 37.0 us, else 40.1
        Work(16, 151936, 4096): Tiling("dot", 16, 128, 128, 8, 1, 4, 0),  # 8B lm_head: 409.7 us, else 442.6
        Work(32, 151936, 4096): Tiling("dot", 32, 128, 128, 8, 1, 4, 0),  # 8B lm_head: 415.5 us, else 446.3
        Work(8, 3072, 4096): Tiling("dot", 8, 32, 256, 2, 4, 4, 0),  # 8B/2 qkv: 12.9 us, else 15.0
        Work(16, 3072, 4096): Tiling("dot", 16, 32, 256, 4, 4, 4, 0),  # 8B/2 qkv: 13.1 us, else 15.3
        Work(32, 3072, 4096): Tiling("dot", 32, 64, 128, 4, 4, 4, 0),  # 8B/2 qkv: 13.9 us, else 15.7
        Work(2, 4096, 2048): Tiling("fma", 2, 4, 512, 2, 1, 4, 0),  # 8B/2 o: 6.9 us, else 7.1
        Work(16, 4096, 2048): Tiling("dot", 16, 64, 256, 4, 2, 3, 1024),  # 8B/2 o: 8.0 us, else 8.2
        Work(16, 12288, 4096, gated=True): Tiling("dot", 16, 32, 256, 2, 1, 4, 0),  # 8B/2 gate_up: 38.3 us, else 41.8
        Work(32, 12288, 4096, gated=True): Tiling("dot", 32, 64, 128, 4, 1, 4, 0),  # 8B/2 gate_up: 38.4 us, else 44.4
        Work(64, 12288, 4096, gated=True): Tiling("dot", 64, 64, 128, 4, 1, 3, 0),  # 8B/2 gate_up: 39.8 us, else 43.1
        Work(2, 4096, 6144): Tiling("fma", 2, 2, 2048, 8, 1, 3, 0),  # 8B/2 down: 18.0 us, else 18.8
        Work(4, 4096, 6144): Tiling("fma", 4, 4, 2048, 8, 1, 3, 0),  # 8B/2 down: 19.0 us, else 21.5
        Work(32, 4096, 6144): Tiling("dot", 32, 64, 256, 4, 2, 3, 1024),  # 8B/2 down: 20.4 us, else 22.5
        Work(32, 75968, 4096): Tiling("dot", 32, 64, 128, 4, 1, 3, 0),  # 8B/2 lm_head: 210.0 us, else 222.5
        Work(64, 75968, 4096): Tiling("dot", 64, 128, 128, 8, 1, 4, 0),  # 8B/2 lm_head: 217.1 us, else 226.3
        Work(4, 5120, 5120): None,  # 32B/2 qkv: 24.1 us, else 22.4
        Work(2, 25600, 5120, gated=True): Tiling("fma", 2, 8, 1024, 4, 1, 1, 0),  # 32B/2 gate_up: 88.5 us, else 91.5
        Work(4, 25600, 5120, gated=True): Tiling("fma", 4, 8, 1024, 4, 1, 1, 0),  # 32B/2 gate_up: 94.8 us, else 97.1
        Work(16, 25600, 5120, gated=True): Tiling("dot", 16, 64, 128, 4, 1, 4, 0),  # 32B/2 gate_up: 91.0 us, else 97.6
        Work(4, 5120, 12800): Tiling("dot", 8, 32, 256, 2, 1, 4, 1024),  # 32B/2 down: 48.4 us, else 50.2
        Work(2, 75968, 5120): Tiling("fma", 2, 2, 2048, 8, 1, 3, 0),  # 32B/2 lm_head: 245.3 us, else 268.9
        Work(4, 75968, 5120): Tiling("dot", 8, 32, 256, 2, 1, 4, 0),  # 32B/2 lm_head: 254.7 us, else 270.1
    }
)
"""None where separate kernels are faster.

Measured on an H100, without what stands behind the product or is applied to it, but for the gate; the comments tell
what a launch takes, and what it takes without the entry (docs/performance.md).
"""


def tiling_for(rows: int, n: int, k: int, *, gated: bool) -> Tiling | None:
    """Return how to launch a linear layer for so many rows.

    None where separate kernels are to be used: they are faster, the rows too many, or k is not divisible by 8.
    """
    row_class = next((most for most in ROW_CLASSES if rows <= most), None)
    if row_class is None or k % 8:
        return None
    work = Work(row_class, n, k, gated)
    return MEASURED[work] if work in MEASURED else default_tiling(work)


_MOST_HELD = {4: 3072, 8: 3072, 16: 2048}
"""Columns, for each class of rows."""


def default_tiling(work: Work) -> Tiling | None:
    """Return what is like the best tilings of the sizes that were measured; None where few of those beat cuBLAS."""
    if work.rows <= 2:
        return _fma_tiling(work)
    if work.rows > 16:
        return None
    if work.k <= _MOST_HELD[work.rows] and work.n <= 16384:
        return _held_tiling(work)
    return _fma_tiling(work) if work.rows == 4 else _dot_tiling(work)


def _fma_tiling(work: Work) -> Tiling:
    """Hold whole weight rows in registers where they are short enough; long ones in wide tiles, with many warps.

    More weight rows share what a program does beside reading them: four rows of x, or applying a norm's scale. Where a
    row of what comes out is long, they also leave fewer sums of squares, all of which every program of the next layer
    reads.
    """
    wide = work.rows == 4 or work.gated or (work.k > 1024 and 4096 <= work.n <= 16384)
    warps = 16
    if work.k <= 1024:
        warps = 1 if wide else 4
    elif wide or work.k <= 2048:
        warps = 8
    block_n = 4 if wide else 2
    stages = -(-work.k // (256 * warps))
    if stages * block_n * work.rows > 32 or stages > 4:
        stages = 2
    return Tiling("fma", work.rows, block_n, 256 * warps, warps, stages=stages)


def _held_tiling(work: Work) -> Tiling:
    """Hold up to 12 KiB a warp; take as few columns at a time as the warps need, so that x arrives in pieces."""
    block_n = 16 if work.n >= 4096 else 8
    warps = 4 if block_n * work.k <= 16384 else 8
    block_k = 128 * warps
    return Tiling("held", max(8, work.rows), block_n, block_k, warps, stages=-(-work.k // block_k))


def _dot_tiling(work: Work) -> Tiling:
    """Split the reduction where the programs are too few for a Hopper's 132 multiprocessors."""
    few = work.rows <= 8
    block_n, block_k, warps = (32, 256, 2) if few else (64, 256, 4)
    splits = 1
    while work.n // block_n * splits < 100 and 4 * splits * block_k <= work.k:
        splits *= 2
    prefetch = 0 if few or splits == 1 else 1024
    return Tiling("dot", work.rows, block_n, block_k, warps, splits, stages=4 if few else 3, prefetch=prefetch)
