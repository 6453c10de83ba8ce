"""*cluster*, a linear layer of few rows in CUDA C++, for Hopper: programs that share a reduction are neighbours.

A small model's output and down projections have so few features that the reduction must be split, for a GPU to have
something to do. Splits of *ring* leave their sums in memory, and who arrives last reads them all. Here the programs of
a reduction are a cluster, which the GPU runs at the same time on multiprocessors that reach each other's shared memory:
each sends its sums there, and each finishes a part of the features.

It does what `small_linear_torch` does, and `small_linear_add_norm_torch`, where there is nothing else in front of what
is added or put out: no scale, bias or gate. cluster_linear.cu tells how.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from model.kernels.cuda_source import Source, kernel_of, number, pointer, tensor_map
from model.kernels.peer_sum import Push

FEATURES = 64
"""A cluster's, the rows of matrix units' left operand."""
_PART = 16
"""Features of a warp."""
SLICE = 64
"""Columns of a tile come in slices: what is swizzled is 128 bytes wide."""
_THREADS = 160  # four warps that multiply, and one that fetches
_ALIGNMENT = 1024  # of swizzled memory
SHARED_BYTES = 232_448
"""What a program of a Hopper may have."""
MAX_STAGES = 32


class Added(NamedTuple):
    """The residual and the gain to read, totals and sums of squares to write."""

    residual: torch.Tensor
    gain: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor


def source_of(rows: int, cluster: int, slices: int, *, adds: bool = False, ranks: int = 0) -> Source:
    """Return the kernel for up to so many rows, a multiple of 8, `cluster` programs, and tiles of so many slices.

    With `adds` there is a residual; the result goes to the memory of as many ranks, of which one is this one.
    """
    assert rows % 8 == 0, rows
    assert cluster in (2, 4), cluster
    sums = rows // 2  # of a thread
    return Source(
        "cluster_linear.cu",
        (
            ("ROWS", str(rows)),
            ("CLUSTER", str(cluster)),
            ("SLICES", str(slices)),
            ("ADDS", str(int(adds))),
            ("RANKS", str(ranks)),
            ("SHAPE", f'"m64n{rows}k16"'),
            ("SUM_NAMES", f'"{", ".join(f"%{i}" for i in range(sums))}"'),
            ("SUMS", ", ".join(f'"+f"(sum[{i}])' for i in range(sums))),
            ("LEFT", f'"%{sums}"'),
            ("RIGHT", f'"%{sums + 1}"'),
        ),
    )


def most_stages(rows: int, slices: int) -> int:
    """Return how many tiles of each operand a program has room for."""
    fixed = _ALIGNMENT + FEATURES * rows * 4 + (2 * MAX_STAGES + 1) * 8
    return min((SHARED_BYTES - fixed) // _stage_bytes(rows, slices), MAX_STAGES)


def squared(rows: int, cluster: int) -> int:
    """Return how many features a sum of squares has: a warp that has all features of its rows adds theirs."""
    return _PART * (4 // cluster if rows % 32 == 0 else 1)


def cluster_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    added: Added | None = None,
    push: Push | None = None,
    block_rows: int,
    cluster: int,
    slices: int,
    stages: int,
    pdl: bool,
) -> None:
    """Write out = x @ weight.T, with `push` to the other ranks too, or with `added` that * gain behind its addition.

    x: [rows, k], of at least 1 and up to `block_rows` rows. weight: [n, k], n a multiple of 64, k of
    64 * slices * cluster. out, residual and total: [rows, n]. gain: [n]. All of bfloat16 and contiguous.
    squares: [rows, n / squared(block_rows, cluster)] float32.
    """
    assert added is None or push is None, "what is added is not pushed"
    rows, (n, k) = x.shape[0], weight.shape
    assert 0 < rows <= block_rows, f"{rows} rows, and room for {block_rows}"
    assert n % FEATURES == 0, f"{n} features are no whole number of {FEATURES}"
    assert k % (SLICE * slices * cluster) == 0, f"{k} columns are no whole number of tiles for each of {cluster}"
    assert 2 <= stages <= most_stages(block_rows, slices), f"{stages} stages"
    ranks = 0 if push is None else push.inboxes.shape[0]
    source = source_of(block_rows, cluster, slices, adds=added is not None, ranks=ranks)
    kernel = kernel_of(source, x.device)
    if kernel is None:
        return
    columns = (SLICE, k // SLICE, slices)
    kernel.launch(
        n // FEATURES * cluster,
        _THREADS,
        # In a part, features with even numbers lie before those with odd ones.
        tensor_map(
            weight, (SLICE, 8, 2, n // _PART, columns[1]), (2 * k, k, _PART * k, SLICE), (SLICE, 8, 2, 4, slices)
        ),
        tensor_map(x, (SLICE, rows, columns[1]), (k, SLICE), (SLICE, block_rows, slices)),
        # A pointer that nothing is read through stands for what is not given.
        *map(pointer, (*(added or (out,) * 4), out, out if push is None else push.inboxes)),
        *map(number, (0 if push is None else push.rank, rows, n, k, stages)),
        cluster=cluster,
        shared_bytes=_ALIGNMENT + stages * _stage_bytes(block_rows, slices),
        pdl=pdl,
    )


def _stage_bytes(rows: int, slices: int) -> int:
    return (FEATURES + rows) * slices * SLICE * 2
