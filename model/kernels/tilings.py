"""How the linear kernels of few rows are cut, for each size of a layer and number of rows.

Sizes that are not in `MEASURED` get what `default_tiling` says. `python -m bench.small_linear` prints, for a GPU, the
entries that are missing: where something else is faster than that by more than 3 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from model.kernels.small_linear import Tiling

ROW_CLASSES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows that have a tiling; in between, the next one counts, so that a padded batch has the same launch."""


class Work(NamedTuple):
    """One launch: a class of rows, the weight [n, k], and what is fused with it."""

    rows: int
    n: int
    k: int
    norm: bool = False
    gated: bool = False


MEASURED: Mapping[Work, Tiling | None] = MappingProxyType(
    {
        Work(1, 4096, 1024, norm=True): Tiling("fma", 1, 2, 256, 1, 1, 4, 0),  # 0.6B qkv: 3.5 us, else 3.8
        Work(16, 4096, 1024): Tiling("held", 16, 16, 1024, 4, 1, 1, 0),  # 0.6B qkv: 5.6 us, else 6.5
        Work(8, 1024, 2048): Tiling("held", 8, 8, 512, 4, 1, 4, 0),  # 0.6B o: 2.8 us, else 2.9
        Work(16, 1024, 2048): Tiling("held", 16, 8, 1024, 8, 1, 2, 0),  # 0.6B o: 4.1 us, else 5.4
        Work(16, 6144, 1024, gated=True): Tiling("held", 16, 16, 512, 4, 1, 2, 0),  # 0.6B gate_up: 7.0 us, else 10.3
        Work(32, 6144, 1024, gated=True): Tiling("dot", 32, 32, 256, 4, 1, 4, 0),  # 0.6B gate_up: 8.1 us, else 10.4
        Work(64, 6144, 1024, gated=True): Tiling("dot", 64, 32, 256, 4, 1, 3, 0),  # 0.6B gate_up: 9.4 us, else 10.6
        Work(2, 1024, 3072): Tiling("fma", 2, 2, 2048, 8, 1, 2, 0),  # 0.6B down: 3.3 us, else 3.8
        Work(16, 1024, 3072): Tiling("held", 16, 8, 1024, 8, 1, 3, 0),  # 0.6B down: 5.2 us, else 7.1
        Work(32, 1024, 3072): Tiling("dot", 32, 32, 256, 4, 4, 4, 1024),  # 0.6B down: 6.3 us, else 7.2
        Work(4, 151936, 1024): Tiling("fma", 4, 2, 256, 1, 1, 4, 0),  # 0.6B lm_head: 102.2 us, else 108.9
        Work(16, 151936, 1024): Tiling("dot", 16, 128, 128, 8, 1, 4, 0),  # 0.6B lm_head: 106.5 us, else 115.3
        Work(32, 151936, 1024): Tiling("dot", 32, 64, 128, 4, 1, 4, 0),  # 0.6B lm_head: 109.4 us, else 117.9
        Work(64, 151936, 1024): Tiling("dot", 64, 64, 128, 4, 1, 3, 0),  # 0.6B lm_head: 112.7 us, else 123.0
        Work(4, 6144, 4096): None,  # 8B qkv: 22.0 us, else 21.9
        Work(8, 6144, 4096): Tiling("dot", 8, 32, 256, 2, 2, 4, 1024),  # 8B qkv: 21.0 us, else 22.1
        Work(16, 6144, 4096): Tiling("dot", 16, 32, 256, 4, 2, 4, 1024),  # 8B qkv: 21.5 us, else 22.3
        Work(16, 4096, 4096): Tiling("dot", 16, 16, 256, 1, 1, 4, 0),  # 8B o: 14.1 us, else 15.9
        Work(2, 24576, 4096, norm=True, gated=True): Tiling(
            "fma", 2, 8, 2048, 8, 1, 2, 0
        ),  # 8B gate_up: 65.9 us, else 69.3
        Work(4, 24576, 4096, gated=True): None,  # 8B gate_up: 76.1 us, else 75.5
        Work(16, 24576, 4096, gated=True): Tiling("dot", 16, 64, 256, 4, 1, 3, 0),  # 8B gate_up: 70.4 us, else 76.4
        Work(16, 4096, 12288): Tiling("dot", 16, 64, 256, 4, 2, 3, 1024),  # 8B down: 36.2 us, else 39.3
        Work(16, 151936, 4096): Tiling("dot", 16, 128, 128, 8, 1, 4, 0),  # 8B lm_head: 409.4 us, else 439.9
        Work(4, 5120, 5120): None,  # 32B/2 qkv: 24.1 us, else 22.4
        Work(8, 5120, 4096): None,  # 32B/2 o: 18.0 us, else 16.8
        Work(2, 25600, 5120, norm=True, gated=True): None,  # 32B/2 gate_up: 88.5 us, else 91.5
        Work(2, 25600, 5120, gated=True): Tiling("fma", 2, 8, 1024, 4, 1, 1, 0),  # 32B/2 gate_up: 88.5 us, else 91.5
        Work(4, 25600, 5120, gated=True): Tiling("fma", 4, 8, 1024, 4, 1, 1, 0),  # 32B/2 gate_up: 94.8 us, else 97.1
        Work(16, 25600, 5120, gated=True): Tiling("dot", 16, 64, 128, 4, 1, 4, 0),  # 32B/2 gate_up: 91.0 us, else 97.6
        Work(4, 5120, 12800): Tiling("dot", 8, 32, 256, 2, 1, 4, 1024),  # 32B/2 down: 48.4 us, else 50.2
        Work(2, 75968, 5120): Tiling("fma", 2, 2, 2048, 8, 1, 3, 0),  # 32B/2 lm_head: 245.3 us, else 268.9
        Work(4, 75968, 5120): Tiling("dot", 8, 32, 256, 2, 1, 4, 0),  # 32B/2 lm_head: 254.7 us, else 270.1
        Work(16, 75968, 5120): Tiling("dot", 16, 64, 256, 4, 1, 3, 0),  # 32B/2 lm_head: 258.0 us, else 273.1
    }
)
"""None where separate kernels are faster; with `norm`, the same without it is then tried behind a norm kernel.

Measured on an H100; the comments tell what a launch takes, and what it takes without the entry (docs/performance.md).
"""


def tiling_for(rows: int, n: int, k: int, *, norm: bool, gated: bool) -> Tiling | None:
    """Return how to launch a linear layer for so many rows.

    None where separate kernels are to be used: they are faster, the rows too many, or k is not divisible by 8.
    """
    row_class = next((most for most in ROW_CLASSES if rows <= most), None)
    if row_class is None or k % 8:
        return None
    work = Work(row_class, n, k, norm, gated)
    return MEASURED[work] if work in MEASURED else default_tiling(work)


_MOST_HELD = 3072  # columns


def default_tiling(work: Work) -> Tiling | None:
    """Return what is like the best tilings of the sizes that were measured; None where few of those beat cuBLAS.

    With a norm, every program norms all rows: from 4 rows on that is more work than a kernel of its own.
    """
    if work.rows <= 2:
        return _fma_tiling(work)
    if work.norm or work.rows > 8:
        return None
    if work.k <= _MOST_HELD and work.n <= 16384:
        return _held_tiling(work)
    return _fma_tiling(work) if work.rows == 4 else _dot_tiling(work)


def _fma_tiling(work: Work) -> Tiling:
    """Hold whole weight rows in registers where they are short enough; long ones in wide tiles, with many warps."""
    costly = work.norm or work.rows == 4  # what a program does with x is then worth sharing by more weight rows
    warps = 16
    if work.k <= 1024:
        warps = 1 if work.norm else 4
    elif costly or work.k <= 2048:
        warps = 8
    block_n = 4 if costly else 2
    stages = -(-work.k // (256 * warps))
    if stages * block_n * work.rows > 32 or stages > 4:
        stages = 2
    return Tiling("fma", work.rows, block_n, 256 * warps, warps, stages=stages)


def _held_tiling(work: Work) -> Tiling:
    """Hold up to 12 KiB a warp; take as few columns at a time as the warps need, so that x arrives in pieces."""
    block_n = 16 if work.n >= 4096 else 8
    warps = 4 if block_n * work.k <= 16384 else 8
    block_k = 512 if work.k <= 1024 else 1024
    return Tiling("held", 8, block_n, block_k, warps, stages=-(-work.k // block_k))


def _dot_tiling(work: Work) -> Tiling:
    """Split the reduction where the programs are too few for a Hopper's 132 multiprocessors."""
    block_n, block_k, warps = 32, 256, 2
    splits = 1
    while work.n // block_n * splits < 100 and 4 * splits * block_k <= work.k:
        splits *= 2
    return Tiling("dot", work.rows, block_n, block_k, warps, splits, stages=4)
