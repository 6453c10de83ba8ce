"""How the linear kernels of few rows are cut, for each size of a layer and number of rows.

Sizes that are not in `MEASURED` get what `default_tiling` says. `python -m bench.small_linear` prints, for a GPU, the
entries that are missing: where something else is faster than that by more than 3 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from model.kernels import cluster_linear
from model.kernels.cuda_source import SLICE
from model.kernels.small_linear import Tiling

ROW_CLASSES = (1, 2, 8, 16, 32, 64, 80, 96, 128, 256)
"""Numbers of rows that have a tiling; in between, the next one counts, so that a padded batch has the same launch.
(Not a step with a prompt: the smallest graphs that it is padded to have 64 and 128 tokens, so that of up to 32 tokens,
or of 65 to 96, it may round otherwise in a graph than without. Fewer than 8 rows cost matrix units as much as 8.) 80
and 96 are for clusters only, others have 128."""
CLUSTERS_ONLY = (80, 96)


class Work(NamedTuple):
    """One launch: a class of rows, the weight [n, k], and whether the gate is part of it."""

    rows: int
    n: int
    k: int
    gated: bool = False


MEASURED: Mapping[Work, Tiling | None] = MappingProxyType(
    {
        Work(1, 4096, 1024): Tiling("fma", 1, 4, 256, 1, 1, 4),  # 0.6B qkv: 3.1, else 3.7
        Work(8, 4096, 1024): Tiling("ring", 8, 64, 128, 4, 1, 8, 8),  # 0.6B qkv: 3.2, else 3.4
        Work(16, 4096, 1024): Tiling("ring", 16, 64, 128, 4, 1, 8, 16),  # 0.6B qkv: 3.2, else 3.5
        Work(32, 4096, 1024): Tiling("ring", 32, 64, 128, 4, 1, 8, 32),  # 0.6B qkv: 3.6, else 4.0
        Work(64, 4096, 1024): Tiling("ring", 64, 64, 128, 4, 1, 6, 64),  # 0.6B qkv: 3.9, else 4.6
        Work(128, 4096, 1024): Tiling("ring", 128, 128, 128, 4, 1, 4, 64),  # 0.6B qkv: 5.0, else 6.3
        Work(256, 4096, 1024): Tiling("ring", 256, 64, 128, 4, 1, 4, 128),  # 0.6B qkv: 6.2, else 7.2
        Work(2, 1024, 2048): Tiling("fma", 2, 2, 1024, 4, 1, 2),  # 0.6B o: 2.6, else 2.9
        Work(64, 1024, 2048): Tiling("ring", 64, 16, 256, 4, 1, 5, 64),  # 0.6B o: 4.2, else 5.3
        Work(128, 1024, 2048): Tiling("ring", 128, 32, 256, 4, 1, 4, 64),  # 0.6B o: 4.6, else 7.1
        Work(256, 1024, 2048): Tiling("ring", 256, 32, 256, 4, 1, 4, 64),  # 0.6B o: 5.3, else 7.5
        Work(32, 6144, 1024, gated=True): Tiling("ring", 32, 64, 128, 4, 1, 4, 32),  # 0.6B gate_up: 4.9, else 5.1
        Work(128, 6144, 1024, gated=True): Tiling("ring", 128, 64, 128, 4, 1, 4, 128),  # 0.6B gate_up: 6.6, else 9.5
        Work(256, 6144, 1024, gated=True): Tiling("ring", 256, 128, 64, 8, 1, 6, 128),  # 0.6B gate_up: 9.5, else 11.3
        Work(1, 1024, 3072): Tiling("fma", 1, 2, 1024, 4, 1, 3),  # 0.6B down: 2.6, else 3.0
        Work(2, 1024, 3072): Tiling("fma", 2, 4, 2048, 8, 1, 2),  # 0.6B down: 3.4, else 4.2
        Work(64, 1024, 3072): Tiling("ring", 64, 16, 256, 4, 2, 5, 64),  # 0.6B down: 5.4, else 5.9
        Work(128, 1024, 3072): Tiling("ring", 128, 32, 256, 4, 1, 4, 64),  # 0.6B down: 5.9, else 8.7
        Work(256, 1024, 3072): Tiling("ring", 256, 32, 256, 4, 1, 4, 64),  # 0.6B down: 7.0, else 8.8
        Work(1, 151936, 1024): Tiling("ring", 1, 64, 256, 4, 1, 2, 8),  # 0.6B lm_head: 69.9, else 92.0
        Work(64, 151936, 1024): Tiling("ring", 64, 128, 64, 4, 1, 9, 64),  # 0.6B lm_head: 79.0, else 81.7
        Work(1, 6144, 4096): Tiling("ring", 1, 64, 256, 4, 1, 6, 8),  # 8B qkv: see below
        Work(1, 24576, 4096, gated=True): Tiling("ring", 1, 64, 128, 4, 1, 4, 8),  # 8B gate_up: see below
        Work(2, 4096, 4096): Tiling("ring", 2, 64, 128, 4, 4, 5, 8),  # 8B o: 9.6, else 9.9
        Work(16, 4096, 4096): Tiling("ring", 16, 64, 256, 4, 2, 5, 16),  # 8B o: 9.9, else 10.3
        Work(128, 4096, 4096): Tiling("ring", 128, 32, 128, 4, 1, 5, 128),  # 8B o: 14.1, else 15.4
        Work(1, 4096, 12288): Tiling("fma", 1, 2, 4096, 16, 1, 3),  # 8B down: 24.1, else 26.8
        Work(2, 3072, 4096): Tiling("fma", 2, 4, 2048, 8, 1, 2),  # 8B/2 qkv: 7.6, else 8.2
        Work(1, 4096, 2048): Tiling("fma", 1, 4, 512, 2, 1, 4),  # 8B/2 o: 5.0, else 5.6
        Work(64, 4096, 2048): Tiling("ring", 64, 64, 128, 4, 1, 6, 64),  # 8B/2 o: 5.9, else 6.5
        Work(2, 12288, 4096, gated=True): Tiling("fma", 2, 4, 1024, 4, 1, 4),  # 8B/2 gate_up: 24.3, else 25.2
        Work(64, 12288, 4096, gated=True): Tiling("ring", 64, 96, 128, 4, 1, 5, 64),  # 8B/2 gate_up: 26.3, else 36.7
        Work(8, 5120, 5120): Tiling("ring", 8, 64, 128, 4, 1, 5, 8),  # 32B/2 qkv: 14.5, else 15.4
        Work(16, 5120, 5120): Tiling("ring", 16, 64, 128, 4, 1, 5, 16),  # 32B/2 qkv: 14.8, else 16.2
        Work(32, 5120, 5120): None,  # 32B/2 qkv: 15.7, else 17.2
        Work(2, 5120, 4096): Tiling("fma", 2, 4, 2048, 8, 1, 2),  # 32B/2 o: 11.3, else 11.7
        Work(16, 5120, 4096): Tiling("ring", 16, 64, 128, 4, 1, 5, 16),  # 32B/2 o: 12.3, else 12.7
        Work(32, 5120, 4096): Tiling("ring", 32, 64, 128, 4, 1, 4, 32),  # 32B/2 o: 13.0, else 13.6
        Work(64, 5120, 4096): None,  # 32B/2 o: 13.6, else 19.0
        Work(2, 25600, 5120, gated=True): Tiling("ring", 2, 64, 256, 4, 1, 6, 8),  # 32B/2 gate_up: 60.2, else 64.8
        Work(8, 25600, 5120, gated=True): Tiling("ring", 8, 64, 256, 4, 1, 6, 8),  # 32B/2 gate_up: 60.4, else 65.2
        Work(16, 25600, 5120, gated=True): Tiling("ring", 16, 64, 256, 4, 1, 5, 16),  # 32B/2 gate_up: 61.0, else 67.7
        Work(32, 25600, 5120, gated=True): Tiling("ring", 32, 64, 256, 4, 1, 2, 32),  # 32B/2 gate_up: 63.6, else 68.8
        Work(64, 25600, 5120, gated=True): Tiling("ring", 64, 128, 128, 4, 1, 4, 64),  # 32B/2 gate_up: 66.1, else 72.4
        Work(1, 5120, 12800): Tiling("fma", 1, 2, 4096, 16, 1, 4),  # 32B/2 down: 30.4, else 35.8
        Work(2, 5120, 12800): Tiling("fma", 2, 8, 1024, 4, 1, 1),  # 32B/2 down: 33.1, else 41.0
        Work(8, 5120, 12800): Tiling("ring", 8, 128, 128, 4, 3, 6, 8),  # 32B/2 down: 33.3, else 41.1
        Work(16, 5120, 12800): Tiling("ring", 16, 64, 128, 4, 1, 5, 16),  # 32B/2 down: 35.5, else 42.1
        Work(32, 5120, 12800): None,  # 32B/2 down: 37.7, else 43.3
        Work(64, 5120, 12800): Tiling("ring", 64, 80, 128, 4, 2, 6, 64),  # 32B/2 down: 35.7, else 40.1
        Work(1, 75968, 5120): Tiling("fma", 1, 2, 2048, 8, 1, 3),  # 32B/2 lm_head: 171.1, else 189.7
    }
)
"""None where separate kernels are faster.

A width that is no power of two is of two pieces, which lets a launch have a program for nearly every multiprocessor.
Measured on an H200 with what stands around the layers. The comments tell for which layer (others may have the same
size), what a launch takes, and what it takes without the entry, in microseconds (docs/performance.md).

Of one row, 8B's layers were chosen by what a step takes, where those of eight rows ask for more of their weights while
attention runs: 3.73 ms a token, and 4.06 with fma for these two. 8B/2's gate_up is the other way round: 2.45, and 2.32.
"""

PUSHED: Mapping[Work, Tiling] = MappingProxyType(
    {
        Work(32, 5120, 12800): Tiling("ring", 32, 80, 128, 4, 2, 6, 64),  # 32B/2 down: 37.9, cuBLAS 37.6
        Work(64, 5120, 4096): Tiling("ring", 64, 48, 128, 4, 1, 7, 64),  # 32B/2 o: 13.7, cuBLAS 13.4
    }
)
"""Where separate kernels are a little faster, but cannot push what they make to other ranks, which saves some 4 us."""


CLUSTERED: Mapping[Work, Tiling | None] = MappingProxyType(
    {
        **{Work(rows, 4096, 1024): None for rows in (2, 8, 16, 32, 64)},  # 0.6B qkv: 3.1 to 3.9, else 3.1 to 4.5
        Work(16, 1024, 3072): Tiling("cluster", 16, 64, 256, 4, 4, 3, 16),  # 0.6B down: 2.7, else 2.8
        Work(32, 1024, 3072): Tiling("cluster", 32, 64, 192, 4, 4, 4, 32),  # 0.6B down: 3.0, else 3.2
        Work(1, 2048, 2048): Tiling("cluster", 1, 64, 256, 4, 2, 4, 8),  # 1.7B o: 2.7, else 3.4
        Work(2, 2048, 2048): Tiling("cluster", 2, 64, 128, 4, 2, 8, 8),  # 1.7B o: 2.9, else 3.1
        Work(8, 2048, 2048): Tiling("cluster", 8, 64, 64, 4, 4, 8, 8),  # 1.7B o: 3.0, else 3.1
        Work(16, 2048, 2048): Tiling("cluster", 16, 64, 64, 4, 4, 8, 16),  # 1.7B o: 3.2, else 3.4
        Work(32, 2048, 2048): Tiling("cluster", 32, 64, 64, 4, 4, 8, 32),  # 1.7B o: 3.6, else 4.0
        Work(1, 2048, 6144): Tiling("cluster", 1, 64, 192, 4, 4, 4, 8),  # 1.7B down: 7.6, else 7.8
        Work(1, 2560, 4096): Tiling("cluster", 1, 64, 128, 4, 4, 6, 8),  # 4B o: 6.3, else 7.0
        Work(64, 2560, 4096): Tiling("cluster", 64, 64, 64, 4, 2, 13, 64),  # 4B o: 7.9, else 8.3
        Work(32, 2560, 9728): Tiling("cluster", 32, 64, 128, 4, 4, 4, 32),  # 4B down: 16.0, else 16.6
        Work(1, 4096, 4096): Tiling("cluster", 1, 64, 256, 4, 2, 6, 8),  # 8B o: 8.5, else 9.2
        Work(1, 4096, 12288): Tiling("cluster", 1, 64, 128, 4, 2, 12, 8),  # 8B down: 23.4, else 24.1
        Work(1, 3072, 4096): Tiling("cluster", 1, 64, 128, 4, 4, 6, 8),  # 8B/2 qkv: 6.9, else 7.2
        # 8B/2 qkv, alone 6.9 to 8.6, else 8.2 to 9.2; but a token takes 2.41 ms at 8 rows, else 2.40.
        **{Work(rows, 3072, 4096): None for rows in (2, 8, 16, 32, 64)},
        Work(8, 4096, 2048): Tiling("cluster", 8, 64, 256, 4, 2, 4, 8),  # 8B/2 o: 5.2, else 5.4
        Work(16, 4096, 2048): Tiling("cluster", 16, 64, 64, 4, 2, 11, 16),  # 8B/2 o: 5.4, else 5.5
        Work(32, 4096, 2048): None,  # 8B/2 o: 5.8, else 5.9
        Work(64, 4096, 2048): None,  # 8B/2 o: 5.9, else 6.5
        Work(1, 4096, 6144): Tiling("cluster", 1, 64, 256, 4, 2, 6, 8),  # 8B/2 down: 12.0, else 12.9
        **{Work(rows, 1024, 2048): None for rows in CLUSTERS_ONLY},  # 0.6B o: 4.5, else 6.0
        **{Work(rows, 1024, 3072): None for rows in CLUSTERS_ONLY},  # 0.6B down: 5.8, else 7.3
    }
)
"""Where layers without bias and gate have clusters cut otherwise than `cluster_tiling` says; None where something else
is faster."""


MAX_SUMMED_ROWS = 16
"""So many rows of a tensor-parallel group are summed by the layer that makes them. 8B on two H200s takes 2.33 ms a
token instead of 2.41 at batch 8 if they are, 2.49 instead of 2.53 at 16, but 2.73 instead of 2.69 at 32. With more
ranks it was not measured."""


def tiling_for(
    rows: int, n: int, k: int, *, gated: bool, adds: bool = False, push: bool = False, clusters: bool = False
) -> Tiling | None:
    """Return how to launch a linear layer for so many rows, whose result is pushed to other ranks or not.

    `adds` says that a residual is added to it, with a norm behind that. `clusters` says that cluster can compute it:
    the GPU has them, and the layer has no bias.
    None where separate kernels are to be used: they are faster, the rows too many, or k is not divisible by 8.
    """
    row_class = next((most for most in ROW_CLASSES if rows <= most), None)
    if row_class is None or k % 8:
        return None
    work = Work(row_class, n, k, gated)
    if push and work in PUSHED:
        return PUSHED[work]
    if clusters and rows <= most_clustered_rows(adds=adds):
        tiling = CLUSTERED[work] if work in CLUSTERED else cluster_tiling(work)
        if tiling is not None:
            return tiling
    if row_class in CLUSTERS_ONLY:
        work = Work(128, n, k, gated)
    return MEASURED[work] if work in MEASURED else default_tiling(work)


def most_clustered_rows(*, adds: bool) -> int:
    """Return how many rows a layer in clusters may have: more if it adds, since a library needs a norm behind that.

    (Of 112, 8B's o and down are faster in clusters, 14.4 and 31.2 us instead of 14.6 and 32.5, but its steps are not.)
    """
    return cluster_linear.MAX_ROWS if adds else 64


def summing_tiling_for(rows: int, n: int, k: int) -> Tiling | None:
    """Return how to launch a layer that adds up what all ranks have, which clusters alone do; None: not at all.

    They do so also where something else is faster without, since no launch for the sum follows.
    """
    if rows > MAX_SUMMED_ROWS:
        return None
    work = Work(next(most for most in ROW_CLASSES if max(rows, 8) <= most), n, k)  # 8 are the fewest that are pushed
    return CLUSTERED.get(work) or cluster_tiling(work)


def default_tiling(work: Work) -> Tiling | None:
    """Return what is like the best tilings of the sizes that were measured; None where few of those beat cuBLAS."""
    if work.rows == 1 or (work.rows == 2 and work.n <= 2048):
        return _fma_tiling(work)
    if work.rows <= 32:
        return _narrow_tiling(work)
    return _wide_tiling(work) if work.rows == 64 and min(work.n, work.k) <= 4096 else None


def cluster_tiling(work: Work) -> Tiling | None:
    """Split the reduction, so that nearly all multiprocessors have a program; None where that needs no splitting.

    Clusters of two reach all of a Hopper's 132 multiprocessors at a time, those of four no more than 120. With few rows
    four are the better also where there are more, two programs to a multiprocessor.
    """
    clusters = work.n // cluster_linear.FEATURES
    if work.gated or work.n % cluster_linear.FEATURES or not 2 <= work.rows <= cluster_linear.MAX_ROWS:
        return None
    rows, slices = max(8, work.rows), 1 if work.rows > 64 else 2
    block_k = slices * SLICE
    for size, programs, at_a_time in ((4, 1, 120), (4, 2, 240), (2, 1, 132)):
        stages = min(cluster_linear.most_stages(rows, slices, programs), work.k // (size * block_k))
        fits = size * clusters <= at_a_time and work.k % (size * block_k) == 0 and stages > 1
        if fits and (programs == 1 or work.rows <= 16):
            return Tiling("cluster", work.rows, cluster_linear.FEATURES, block_k, 4, size, stages, rows)
    return None


def _fma_tiling(work: Work) -> Tiling:
    """Hold whole weight rows in registers where they are short enough; long ones in wide tiles, with many warps.

    More weight rows share what a program does beside reading them, such as applying a norm's scale. Where a row of what
    comes out is long, they also leave fewer sums of squares, all of which every program of the next layer reads.
    """
    wide = work.gated or (work.k > 1024 and 4096 <= work.n <= 16384)
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


def _narrow_tiling(work: Work) -> Tiling:
    """Give a program 64 weight rows, and split the reduction where too many of a Hopper's 132 multiprocessors would
    have none."""
    splits = 1
    while work.n // 64 * splits < 64 and 4 * splits * 256 <= work.k and work.k % (2 * splits * 256) == 0:
        splits *= 2
    return _ring_tiling(work, max(8, work.rows), 64, 256 if work.n // 64 <= 132 else 128, splits)


def _wide_tiling(work: Work) -> Tiling:
    """Give a program 64 weight rows, unless that leaves too many of a Hopper's multiprocessors without one."""
    if work.n // 64 >= 90:
        return _ring_tiling(work, 64, 64, 128)
    splits = 1
    while work.n // 32 * splits < 60 and 4 * splits * 256 <= work.k:
        splits *= 2
    return _ring_tiling(work, 64, 32, 128, splits)


def _ring_tiling(work: Work, block_rows: int, block_n: int, block_k: int, splits: int = 1) -> Tiling:
    """Have as many tiles under way as fit: of one program on each multiprocessor, or where there are more, of three,
    with which most of the measured sizes were faster than with two."""
    room = 222_000 if work.n // block_n * splits <= 132 else 74_000
    stages = min(room // (2 * (block_rows + block_n) * block_k), -(-work.k // (splits * block_k)), 12)
    return Tiling("ring", work.rows, block_n, block_k, 4, splits, max(2, stages), block_rows)
