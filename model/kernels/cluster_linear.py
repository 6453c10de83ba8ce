"""*cluster*, a linear layer of few rows in CUDA C++, for Hopper: programs that share a reduction are neighbours.

A small model's output and down projections have so few features that the reduction must be split, for a GPU to have
something to do. Splits of *ring* leave their sums in memory, and who arrives last reads them all. Here the programs of
a reduction are a cluster, which the GPU runs at the same time on multiprocessors that reach each other's shared memory:
each sends its sums there, and each finishes a part of the features.

It does what `small_linear_torch` does, and `small_linear_add_norm_torch`, without a bias or a gate. What it adds may be
the sum over all ranks of a tensor-parallel group: a program pushes its own summands to the others, and waits until
theirs are there, as `model.kernels.peer_sum` says of one shot, whose inboxes these are. Clusters of one number then
wait for one another on all ranks, as programs of one number do there. cluster_linear.cu tells how.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from model.kernels.cuda_source import (
    ALIGNMENT,
    SLICE,
    Source,
    dispensable,
    kernel_of,
    multiplication,
    number,
    pointer,
    tensor_map,
)
from model.kernels.norm import Scale
from model.kernels.peer_sum import EMPTY, OneShot
from model.kernels.rows import whole_tiles

FEATURES = 64
"""A cluster's, the rows of matrix units' left operand."""
MAX_ROWS = 96
_PART = 16
"""Features of a warp."""
_THREADS = 160  # four warps that multiply, and one that fetches
_SHARED_BYTES = 228 << 10  # of a Hopper's multiprocessor
_RESERVED_BYTES = 1 << 10  # of each program's
MAX_STAGES = 32


class Added(NamedTuple):
    """The residual and the gain to read, totals and sums of squares to write."""

    residual: torch.Tensor
    gain: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor


def source_of(
    rows: int, cluster: int, slices: int, *, scaled: bool = False, adds: bool = False, ranks: int = 0
) -> Source:
    """Return the kernel for up to so many rows, 8 to 96 in steps of 8, `cluster` programs, tiles of so many slices.

    With `scaled`, x is still to be scaled, and with `adds` there is a residual, to which it may be the sum over so many
    ranks that is added.
    """
    assert rows in range(8, MAX_ROWS + 1, 8), rows
    assert cluster in (2, 4), cluster
    return Source(
        "cluster_linear.cu",
        (
            ("ROWS", str(rows)),
            ("CLUSTER", str(cluster)),
            ("SLICES", str(slices)),
            ("SCALED", str(int(scaled))),
            ("ADDS", str(int(adds))),
            ("RANKS", str(ranks)),
            ("EMPTY", f"{EMPTY & 0xFFFF}u"),
            *multiplication(rows),
        ),
    )


def most_stages(rows: int, slices: int, programs: int = 1) -> int:
    """Return how many tiles of each operand a program has room for, of so many on a multiprocessor."""
    fixed = _RESERVED_BYTES + ALIGNMENT + (FEATURES + 1) * rows * 4 + (2 * MAX_STAGES + 2) * 8
    return min((_SHARED_BYTES // programs - fixed) // _stage_bytes(rows, slices), MAX_STAGES)


def squared(rows: int, cluster: int) -> int:
    """Return how many features a sum of squares has: a warp that has all features of its rows adds theirs."""
    return _PART * (4 // cluster if rows % 32 == 0 else 1)


def cluster_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: Scale | None = None,
    added: Added | None = None,
    one_shot: OneShot | None = None,
    block_rows: int,
    cluster: int,
    slices: int,
    stages: int,
    pdl: bool,
) -> None:
    """Write out = x @ weight.T, or with `added` that * gain behind its addition.

    With `scale` x is one that is still to be scaled. With `one_shot`, what is added is the sum of all ranks' products,
    each rounded, in the order of the ranks and rounded; this rank's inboxes are empty before and after.
    x: [rows, k], of at least 1 and up to `block_rows` rows. weight: [n, k], n a multiple of 64, k of
    64 * slices * cluster. out, residual and total: [rows, n]. gain: [n]. All of bfloat16 and contiguous.
    squares: [rows, n / squared(block_rows, cluster)] float32.

    Raises ModelError where the kernel cannot be compiled, loaded or launched.
    """
    assert one_shot is None or added is not None, "what is summed is added"
    rows, (n, k) = x.shape[0], weight.shape
    assert 0 < rows <= block_rows, f"{rows} rows, and room for {block_rows}"
    assert n % FEATURES == 0, f"{n} features are no whole number of {FEATURES}"
    assert k % (SLICE * slices * cluster) == 0, f"{k} columns are no whole number of tiles for each of {cluster}"
    assert 2 <= stages <= most_stages(block_rows, slices), f"{stages} stages"
    ranks = 0 if one_shot is None else len(one_shot.push.inboxes)
    source = source_of(block_rows, cluster, slices, scaled=scale is not None, adds=added is not None, ranks=ranks)
    of_row = k // SLICE  # slices
    tiles = whole_tiles(x, block_rows)
    with dispensable("clusters"):
        kernel = kernel_of(source, x.device)
        if kernel is None:
            return
        kernel.launch(
            n // FEATURES * cluster,
            _THREADS,
            # In a part, features with even numbers lie before those with odd ones.
            tensor_map(
                weight, (SLICE, 8, 2, n // _PART, of_row), (2 * k, k, _PART * k, SLICE), (SLICE, 8, 2, 4, slices)
            ),
            tensor_map(tiles, (SLICE, len(tiles), of_row), (k, SLICE), (SLICE, block_rows, slices)),
            # A pointer that nothing is read through stands for what is not given.
            pointer(out if scale is None else scale.squares),
            *map(pointer, (*(added or (out,) * 4), out)),
            *map(pointer, (out, out) if one_shot is None else (one_shot.push.inboxes, one_shot.inboxes)),
            *map(number, (0, 0) if one_shot is None else (one_shot.inboxes.shape[1], one_shot.push.rank)),
            number(0.0 if scale is None else scale.eps),
            *map(number, (0 if scale is None else scale.squares.shape[1], rows, n, k, stages)),
            cluster=cluster,
            shared_bytes=ALIGNMENT + stages * _stage_bytes(block_rows, slices),
            pdl=pdl,
        )


def _stage_bytes(rows: int, slices: int) -> int:
    return (FEATURES + rows) * slices * SLICE * 2
