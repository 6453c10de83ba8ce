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
        Work(1, 4096, 1024, norm=True): Tiling("fma", 1, 2, 256, 1, 1, 4, 0),  # 0.6B qkv: 3.5 us, not 3.8; separate 6.5
        Work(4, 4096, 1024, norm=True): Tiling("fma", 4, 8, 1024, 4, 1, 1, 0),  # 0.6B qkv: 5.7 us; separate 6.5
        Work(16, 4096, 1024, norm=True): Tiling(
            "dot", 16, 64, 256, 4, 2, 3, 0
        ),  # 0.6B qkv: 6.2 us, not 6.6; separate 6.6
        Work(4, 1024, 2048): Tiling("fma", 4, 2, 1024, 4, 1, 2, 0),  # 0.6B o: 3.1 us, not 3.4; separate 5.5
        Work(8, 1024, 2048): Tiling("dot", 8, 16, 256, 1, 4, 4, 512),  # 0.6B o: 4.0 us, not 4.8; separate 5.5
        Work(16, 1024, 2048): Tiling("dot", 16, 16, 256, 1, 4, 4, 512),  # 0.6B o: 4.1 us, not 5.5; separate 5.5
        Work(4, 6144, 1024, norm=True, gated=True): Tiling(
            "fma", 4, 4, 256, 1, 1, 2, 0
        ),  # 0.6B gate_up: 7.0 us; separate 10.2
        Work(16, 6144, 1024, gated=True): Tiling(
            "dot", 16, 16, 256, 1, 1, 4, 0
        ),  # 0.6B gate_up: 7.8 us, not 10.2; separate 10.2
        Work(2, 1024, 3072): Tiling("fma", 2, 2, 2048, 8, 1, 2, 0),  # 0.6B down: 3.3 us, not 3.8; separate 7.0
        Work(8, 1024, 3072): Tiling("dot", 8, 16, 256, 1, 4, 4, 1024),  # 0.6B down: 5.1 us, not 6.0; separate 7.1
        Work(16, 1024, 3072): Tiling("dot", 16, 16, 256, 1, 4, 4, 1024),  # 0.6B down: 4.9 us, not 7.2; separate 7.2
        Work(4, 151936, 1024): Tiling(
            "fma", 4, 2, 256, 1, 1, 4, 0
        ),  # 0.6B lm_head: 102.4 us, not 109.2; separate 112.9
        Work(16, 151936, 1024): Tiling(
            "dot", 16, 64, 128, 4, 1, 4, 0
        ),  # 0.6B lm_head: 106.6 us, not 115.8; separate 115.8
        Work(8, 6144, 4096): Tiling("dot", 8, 32, 256, 2, 2, 4, 1024),  # 8B qkv: 21.0 us, not 24.1; separate 22.1
        Work(16, 6144, 4096): Tiling("dot", 16, 32, 256, 4, 2, 4, 1024),  # 8B qkv: 21.5 us, not 22.3; separate 22.3
        Work(16, 4096, 4096): Tiling("dot", 16, 16, 256, 1, 1, 4, 0),  # 8B o: 14.1 us, not 15.9; separate 15.9
        Work(2, 24576, 4096, norm=True, gated=True): Tiling(
            "fma", 2, 8, 2048, 8, 1, 2, 0
        ),  # 8B gate_up: 65.9 us, not 69.3; separate 75.2
        Work(16, 24576, 4096, gated=True): Tiling(
            "dot", 16, 64, 256, 4, 1, 3, 0
        ),  # 8B gate_up: 70.4 us, not 76.4; separate 76.4
        Work(16, 4096, 12288): Tiling("dot", 16, 64, 256, 4, 2, 3, 1024),  # 8B down: 36.2 us, not 39.3; separate 39.3
        Work(16, 151936, 4096): Tiling(
            "dot", 16, 128, 128, 8, 1, 4, 0
        ),  # 8B lm_head: 409.4 us, not 439.9; separate 439.9
        Work(8, 5120, 4096): None,  # 32B/2 o: 18.0 us, not 18.0; separate 16.8
        Work(2, 25600, 5120, gated=True): Tiling(
            "fma", 2, 8, 1024, 4, 1, 1, 0
        ),  # 32B/2 gate_up: 88.5 us, not 91.5; separate 96.8
        Work(4, 25600, 5120, gated=True): Tiling(
            "fma", 4, 8, 1024, 4, 1, 1, 0
        ),  # 32B/2 gate_up: 94.8 us; separate 97.1
        Work(16, 25600, 5120, gated=True): Tiling(
            "dot", 16, 64, 128, 4, 1, 4, 0
        ),  # 32B/2 gate_up: 91.0 us, not 97.6; separate 97.6
        Work(4, 5120, 12800): Tiling("dot", 8, 32, 256, 2, 1, 4, 1024),  # 32B/2 down: 48.4 us, not 52.9; separate 50.2
        Work(2, 75968, 5120): Tiling(
            "fma", 2, 2, 2048, 8, 1, 3, 0
        ),  # 32B/2 lm_head: 245.3 us, not 297.7; separate 268.9
        Work(4, 75968, 5120): Tiling("dot", 8, 32, 256, 2, 1, 4, 0),  # 32B/2 lm_head: 254.7 us; separate 270.1
        Work(16, 75968, 5120): Tiling(
            "dot", 16, 64, 256, 4, 1, 3, 0
        ),  # 32B/2 lm_head: 258.0 us, not 273.1; separate 273.1
    }
)
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
    """Return what is like the best tilings of the sizes that were measured; None where few of those beat cuBLAS.

    With a norm, every program norms all rows: from 4 rows on that is more work than a kernel of its own.
    """
    if work.rows <= 2 or (work.rows == 4 and not work.norm):
        return _fma_tiling(work)
    return None if work.norm or work.rows > 8 else _dot_tiling(work)


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


def _dot_tiling(work: Work) -> Tiling:
    """Split the reduction where the programs are too few for a Hopper's 132 multiprocessors."""
    block_n, block_k, warps = 32, 256, 2
    splits = 1
    while work.n // block_n * splits < 100 and 4 * splits * block_k <= work.k:
        splits *= 2
    return Tiling("dot", work.rows, block_n, block_k, warps, splits, stages=4)
