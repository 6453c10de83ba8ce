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
"""Numbers of rows that have a tiling; in between, the next one counts, so that a padded batch has the same launch.
(Not a short prompt: a graph of 64 tokens is the smallest that it is padded to.)"""


class Work(NamedTuple):
    """One launch: a class of rows, the weight [n, k], and whether the gate is part of it."""

    rows: int
    n: int
    k: int
    gated: bool = False


MEASURED: Mapping[Work, Tiling | None] = MappingProxyType(
    {
        Work(1, 4096, 1024): Tiling("fma", 1, 4, 256, 1, 1, 4, 0),  # 0.6B qkv: 3.1, else 3.7
        Work(2, 4096, 1024): Tiling("fma", 2, 4, 512, 2, 1, 2, 0),  # 0.6B qkv: 3.5, else 4.6
        Work(8, 4096, 1024): Tiling("held", 8, 16, 1024, 4, 1, 1, 0),  # 0.6B qkv: 3.6, else 3.7
        Work(16, 4096, 1024): Tiling("wide", 16, 64, 256, 4, 1, 4, 1024, 16),  # 0.6B qkv: 3.7, else 5.1
        Work(32, 4096, 1024): Tiling("wide", 32, 64, 256, 4, 1, 4, 1024, 32),  # 0.6B qkv: 3.8, else 6.1
        Work(128, 4096, 1024): Tiling("wide", 128, 64, 128, 4, 1, 6, 1024, 64),  # 0.6B qkv: 5.0, else 6.3
        Work(256, 4096, 1024): Tiling("wide", 256, 64, 128, 4, 1, 4, 1024, 128),  # 0.6B qkv: 6.0, else 7.3
        Work(1, 1024, 2048): Tiling("fma", 1, 2, 1024, 4, 1, 2, 0),  # 0.6B o: 2.1, else 2.2
        Work(2, 1024, 2048): Tiling("fma", 2, 2, 1024, 4, 1, 2, 0),  # 0.6B o: 2.6, else 2.9
        Work(8, 1024, 2048): Tiling("held", 8, 8, 1024, 4, 1, 2, 0),  # 0.6B o: 3.2, else 3.3
        Work(16, 1024, 2048): Tiling("dot", 16, 16, 256, 1, 4, 4, 0),  # 0.6B o: 4.5, else 4.7
        Work(32, 1024, 2048): Tiling("wide", 32, 32, 256, 4, 2, 4, 1024, 64),  # 0.6B o: 4.9, else 6.8
        Work(64, 1024, 2048): Tiling("wide", 64, 32, 256, 4, 2, 4, 1024, 64),  # 0.6B o: 4.8, else 5.2
        Work(128, 1024, 2048): Tiling("wide", 128, 32, 256, 4, 1, 4, 1024, 64),  # 0.6B o: 4.9, else 7.1
        Work(256, 1024, 2048): Tiling("wide", 256, 32, 256, 4, 1, 4, 1024, 64),  # 0.6B o: 5.5, else 7.5
        Work(32, 6144, 1024, gated=True): Tiling("dot", 32, 32, 256, 4, 1, 4, 0),  # 0.6B gate_up: 6.6, else 9.0
        Work(64, 6144, 1024, gated=True): Tiling("wide", 64, 64, 128, 4, 1, 6, 1024, 64),  # 0.6B gate_up: 5.9, else 6.1
        Work(128, 6144, 1024, gated=True): Tiling("wide", 128, 64, 128, 4, 1, 4, 0, 128),  # 0.6B gate_up: 7.6, else 9.6
        Work(256, 6144, 1024, gated=True): Tiling(
            "wide", 256, 128, 64, 4, 1, 6, 0, 128
        ),  # 0.6B gate_up: 9.6, else 11.5
        Work(1, 1024, 3072): Tiling("fma", 1, 2, 1024, 4, 1, 3, 0),  # 0.6B down: 2.6, else 3.0
        Work(2, 1024, 3072): Tiling("fma", 2, 4, 2048, 8, 1, 2, 0),  # 0.6B down: 3.4, else 4.2
        Work(32, 1024, 3072): Tiling("wide", 32, 64, 128, 4, 4, 6, 1024, 32),  # 0.6B down: 5.1, else 8.2
        Work(64, 1024, 3072): Tiling("wide", 64, 32, 128, 4, 4, 6, 0, 64),  # 0.6B down: 5.8, else 6.0
        Work(128, 1024, 3072): Tiling("wide", 128, 32, 256, 4, 2, 4, 0, 64),  # 0.6B down: 6.4, else 8.7
        Work(256, 1024, 3072): Tiling("wide", 256, 32, 256, 4, 1, 4, 0, 64),  # 0.6B down: 7.3, else 8.8
        Work(1, 151936, 1024): Tiling("fma", 1, 8, 512, 2, 1, 2, 0),  # 0.6B lm_head: 70.5, else 92.0
        Work(2, 151936, 1024): Tiling("fma", 2, 4, 512, 2, 1, 2, 0),  # 0.6B lm_head: 71.1, else 92.1
        Work(4, 151936, 1024): Tiling("dot", 8, 64, 256, 4, 1, 3, 0),  # 0.6B lm_head: 73.4, else 86.4
        Work(16, 151936, 1024): Tiling("wide", 16, 128, 128, 4, 1, 2, 0, 16),  # 0.6B lm_head: 75.1, else 80.5
        Work(32, 151936, 1024): Tiling("dot", 32, 64, 128, 4, 1, 3, 0),  # 0.6B lm_head: 77.2, else 83.0
        Work(16, 6144, 4096): Tiling("wide", 16, 64, 256, 4, 1, 4, 0, 16),  # 8B qkv: 16.0, else 19.2
        Work(32, 6144, 4096): Tiling("wide", 32, 64, 256, 4, 1, 4, 0, 32),  # 8B qkv: 16.2, else 17.1
        Work(8, 4096, 4096): Tiling("wide", 8, 64, 256, 4, 1, 5, 0, 8),  # 8B o: 10.7, else 12.1
        Work(32, 4096, 4096): Tiling("wide", 32, 64, 128, 4, 1, 8, 0, 32),  # 8B o: 10.9, else 14.8
        Work(128, 4096, 4096): Tiling("wide", 128, 32, 64, 4, 1, 8, 0, 128),  # 8B o: 14.4, else 15.5
        Work(32, 24576, 4096, gated=True): Tiling("dot", 32, 64, 128, 4, 1, 3, 0),  # 8B gate_up: 49.8, else 54.0
        Work(64, 24576, 4096, gated=True): Tiling("wide", 64, 64, 64, 4, 1, 4, 0, 64),  # 8B gate_up: 52.7, else 57.6
        Work(1, 4096, 12288): Tiling("fma", 1, 2, 4096, 16, 1, 3, 0),  # 8B down: 24.1, else 26.9
        Work(8, 4096, 12288): Tiling("wide", 8, 64, 256, 4, 2, 4, 1024, 16),  # 8B down: 26.2, else 30.8
        Work(32, 4096, 12288): Tiling("wide", 32, 64, 128, 4, 1, 8, 0, 32),  # 8B down: 27.2, else 31.0
        Work(128, 4096, 12288): Tiling("wide", 128, 64, 128, 8, 2, 4, 0, 128),  # 8B down: 33.6, else 35.3
        Work(16, 151936, 4096): Tiling("wide", 16, 128, 128, 4, 1, 2, 0, 16),  # 8B lm_head: 282.2, else 296.4
        Work(32, 151936, 4096): Tiling("dot", 32, 64, 128, 4, 1, 3, 0),  # 8B lm_head: 288.7, else 305.5
        Work(64, 151936, 4096): Tiling("wide", 64, 128, 64, 4, 1, 3, 0, 64),  # 8B lm_head: 295.3, else 306.6
        Work(8, 3072, 4096): Tiling("dot", 8, 32, 256, 2, 4, 4, 0),  # 8B/2 qkv: 9.1, else 9.5
        Work(16, 3072, 4096): Tiling("dot", 16, 32, 256, 2, 4, 4, 0),  # 8B/2 qkv: 9.7, else 12.9
        Work(32, 3072, 4096): Tiling("dot", 32, 64, 128, 4, 4, 3, 0),  # 8B/2 qkv: 10.7, else 11.4
        Work(64, 3072, 4096): None,  # 8B/2 qkv: 9.6, else 10.0
        Work(1, 4096, 2048): Tiling("fma", 1, 4, 512, 2, 1, 4, 0),  # 8B/2 o: 5.2, else 5.7
        Work(8, 4096, 2048): Tiling("wide", 8, 64, 128, 4, 1, 8, 1024, 16),  # 8B/2 o: 6.0, else 6.8
        Work(16, 4096, 2048): Tiling("wide", 16, 64, 128, 4, 1, 8, 1024, 16),  # 8B/2 o: 6.0, else 11.7
        Work(32, 4096, 2048): Tiling("wide", 32, 64, 128, 4, 1, 8, 1024, 32),  # 8B/2 o: 6.1, else 6.9
        Work(16, 12288, 4096, gated=True): Tiling("dot", 16, 32, 256, 2, 1, 4, 1024),  # 8B/2 gate_up: 26.4, else 28.1
        Work(32, 12288, 4096, gated=True): Tiling("dot", 32, 64, 128, 4, 1, 3, 0),  # 8B/2 gate_up: 26.7, else 29.4
        Work(64, 12288, 4096, gated=True): None,  # 8B/2 gate_up: 29.4, else 30.5
        Work(8, 4096, 6144): Tiling("wide", 8, 64, 128, 4, 1, 8, 0, 16),  # 8B/2 down: 14.3, else 16.9
        Work(16, 4096, 6144): Tiling("wide", 16, 64, 128, 4, 1, 8, 0, 16),  # 8B/2 down: 14.3, else 15.1
        Work(32, 4096, 6144): Tiling("wide", 32, 64, 128, 4, 1, 8, 0, 32),  # 8B/2 down: 14.6, else 17.2
        Work(16, 75968, 4096): Tiling("wide", 16, 64, 128, 4, 1, 5, 0, 16),  # 8B/2 lm_head: 143.2, else 148.3
        Work(64, 75968, 4096): None,  # 8B/2 lm_head: 151.3, else 155.0
        Work(8, 5120, 5120): None,  # 32B/2 qkv: 15.1, else 17.0
        Work(16, 5120, 5120): None,  # 32B/2 qkv: 15.4, else 20.9
        Work(8, 5120, 4096): Tiling("wide", 8, 64, 128, 4, 1, 5, 0, 16),  # 32B/2 o: 12.7, else 14.2
        Work(16, 5120, 4096): None,  # 32B/2 o: 12.9, else 17.6
        Work(64, 5120, 4096): None,  # 32B/2 o: 13.2, else 17.7
        Work(8, 25600, 5120, gated=True): Tiling("wide", 8, 128, 128, 4, 1, 5, 0, 16),  # 32B/2 gate_up: 61.7, else 64.7
        Work(16, 25600, 5120, gated=True): Tiling("dot", 16, 64, 128, 4, 1, 4, 0),  # 32B/2 gate_up: 61.7, else 70.4
        Work(32, 25600, 5120, gated=True): Tiling("dot", 32, 64, 128, 4, 1, 4, 0),  # 32B/2 gate_up: 63.4, else 68.6
        Work(64, 25600, 5120, gated=True): Tiling(
            "wide", 64, 128, 128, 4, 1, 4, 0, 64
        ),  # 32B/2 gate_up: 65.5, else 71.2
        Work(1, 5120, 12800): Tiling("fma", 1, 2, 4096, 16, 1, 4, 0),  # 32B/2 down: 30.1, else 35.6
        Work(8, 5120, 12800): Tiling("wide", 8, 64, 128, 4, 1, 5, 0, 16),  # 32B/2 down: 36.3, else 39.5
        Work(16, 5120, 12800): Tiling("wide", 16, 64, 128, 4, 1, 5, 0, 16),  # 32B/2 down: 36.3, else 42.9
        Work(1, 75968, 5120): Tiling("fma", 1, 2, 2048, 8, 1, 3, 0),  # 32B/2 lm_head: 168.5, else 189.0
        Work(16, 75968, 5120): None,  # 32B/2 lm_head: 179.5, else 181.9
        # On an H100:
        Work(2, 4096, 2048): Tiling("fma", 2, 4, 512, 2, 1, 4, 0),  # 8B/2 o: 6.9, else 7.1
        Work(2, 4096, 6144): Tiling("fma", 2, 2, 2048, 8, 1, 3, 0),  # 8B/2 down: 18.0, else 18.8
        Work(4, 4096, 6144): Tiling("fma", 4, 4, 2048, 8, 1, 3, 0),  # 8B/2 down: 19.0, else 21.5
        Work(4, 5120, 5120): None,  # 32B/2 qkv: 24.1, else 22.4
        Work(2, 25600, 5120, gated=True): Tiling("fma", 2, 8, 1024, 4, 1, 1, 0),  # 32B/2 gate_up: 88.5, else 91.5
        Work(4, 25600, 5120, gated=True): Tiling("fma", 4, 8, 1024, 4, 1, 1, 0),  # 32B/2 gate_up: 94.8, else 97.1
        Work(4, 5120, 12800): Tiling("dot", 8, 32, 256, 2, 1, 4, 1024),  # 32B/2 down: 48.4, else 50.2
        Work(2, 75968, 5120): Tiling("fma", 2, 2, 2048, 8, 1, 3, 0),  # 32B/2 lm_head: 245.3, else 268.9
        Work(4, 75968, 5120): Tiling("dot", 8, 32, 256, 2, 1, 4, 0),  # 32B/2 lm_head: 254.7, else 270.1
    }
)
"""None where separate kernels are faster.

Measured on an H200 with what stands around the layers, or as it says on an H100, there without norms. The comments tell
what a launch takes, and what it takes without the entry, in microseconds (docs/performance.md).
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
    if work.rows == 64 and min(work.n, work.k) <= 4096:
        return _wide_tiling(work)
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


def _wide_tiling(work: Work) -> Tiling:
    """Give each program 64 weight rows, unless that leaves too many of a Hopper's multiprocessors without one."""
    programs = work.n // 64
    if programs >= 90:
        # Beyond two for each of them, programs that fit on one together hide what each of them waits for.
        return Tiling("wide", work.rows, 64, 128, 4, stages=6 if programs <= 264 else 3, block_rows=64)
    splits = 1
    while work.n // 32 * splits < 60 and 4 * splits * 256 <= work.k:
        splits *= 2
    return Tiling("wide", work.rows, 32, 256, 4, splits, stages=4, block_rows=64)
