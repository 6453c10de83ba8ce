"""The sum over all ranks of a row-parallel layer's output, with the residual addition and the norm behind it.

Every rank has written its summand where the others can read it, and each of them sums all. A program has one row: it
tells the other ranks that this rank's summand is there, waits until they tell the same, and reads theirs. It says so
by counting: the n-th sum of a row begins with the flag n, so that nothing has to be put back.

Nobody says when it has read. A rank that has passed a sum knows, though, that all the others had begun it, and
therefore had ended what they did before. So a summand may be overwritten once a later sum of summands that lie
elsewhere has passed: sums that follow one another must use different memory (`model.one_shot` sees to that).

Programs need not all fit on a GPU at a time. They do have to start in the order of their numbers, as they do on every
GPU so far: then all ranks have begun the first row that any of them waits in.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, misc"
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead, and knows no lists:
# what a loop collects is a tuple that grows.)

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.kernels.dependent import begin_dependents, dependent_launch, wait
from model.kernels.norm import norm_row
from model.kernels.runtime import jit, tl, triton


@dataclass(frozen=True, slots=True)
class Peers:
    """What the ranks of a group know of one another's memory. Addresses are those that this rank reaches it by."""

    rank: int
    summands: torch.Tensor  # [size] int64: where each rank's summand begins, at a multiple of 16 bytes
    flags: torch.Tensor  # [size] int64: each rank's flags [size, max_rows] int32, of which the ranks write one row each
    epochs: torch.Tensor  # [max_rows] int32: how many sums of this row this rank has begun


def peer_sum(shape: torch.Size, dtype: torch.dtype, peers: Peers) -> torch.Tensor:
    """Return the sum of all ranks' summands, each [rows, d] of `dtype`: the same bits on every rank.

    Added in the order of the ranks, in float32, and rounded once.
    """
    out = torch.empty(shape, dtype=dtype, device=peers.epochs.device)
    _launch(out, out, out, out, 0.0, peers, norm=False)
    return out


def peer_sum_add_rms_norm(
    residual: torch.Tensor, weight: torch.Tensor, eps: float, peers: Peers
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `add_rms_norm` does of the sum and of `residual` [rows, d], with the same roundings. weight: [d]."""
    assert residual.is_contiguous(), "the residual's rows are contiguous"
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    _launch(normed, total, residual, weight, eps, peers, norm=True)
    return normed, total


def _launch(
    out: torch.Tensor,
    total: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    peers: Peers,
    *,
    norm: bool,
) -> None:
    rows, width = out.shape
    size, max_rows = peers.summands.shape[0], peers.epochs.shape[0]
    assert rows <= max_rows, f"{rows} rows are more than the {max_rows} that have flags"
    block = triton.next_power_of_2(width)
    launch = dependent_launch(out)
    _peer_sum_kernel[(rows,)](
        peers.summands,
        peers.flags,
        peers.epochs,
        residual,
        weight,
        out,
        total,
        eps,
        RANK=peers.rank,
        SIZE=size,
        SIZE_BLOCK=triton.next_power_of_2(size),
        MAX_ROWS=max_rows,
        WIDTH=width,
        BLOCK=block,
        NORM=norm,
        PDL=bool(launch),
        num_warps=min(max(block // 512, 1), 16),
        **launch,
    )


@jit
def _peer_sum_kernel(
    summands_ptr,  # [SIZE] int64: `Peers`
    flags_ptr,  # [SIZE] int64
    epochs_ptr,  # [MAX_ROWS] int32
    residual_ptr,  # [rows, WIDTH], read only with NORM
    weight_ptr,  # [WIDTH], read only with NORM
    out_ptr,  # [rows, WIDTH]: the sum, or with NORM the normed one
    total_ptr,  # [rows, WIDTH], written only with NORM
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    begin_dependents(PDL)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    dtype = out_ptr.dtype.element_ty
    places = row.to(tl.int64) * WIDTH + columns
    own_flags = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32))
    peer = tl.arange(0, SIZE_BLOCK)
    is_other = (peer < SIZE) & (peer != RANK)
    others = tl.load(flags_ptr + peer, mask=is_other, other=0).to(tl.pointer_type(tl.int32))
    pointers = ()
    for rank in tl.static_range(SIZE):
        # The compiler must be told of the alignment, and a pointer is what it listens for.
        summand = tl.multiple_of(tl.load(summands_ptr + rank).to(tl.pointer_type(dtype)), 16)
        pointers = pointers + (summand + places,)
    if NORM:
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)

    epoch = tl.atomic_add(epochs_ptr + row, 1, sem="relaxed") + 1
    # All at once: one after the other, each would wait for the one before to arrive.
    tl.atomic_xchg(others + RANK * MAX_ROWS + row, epoch, mask=is_other, sem="release", scope="sys")
    if NORM:  # on its way while others are waited for
        residual = tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            # By their difference, since numbers start anew after 2^32; a rank may be one sum ahead.
            while tl.atomic_add(own_flags + rank * MAX_ROWS + row, 0, sem="acquire", scope="sys") - epoch < 0:
                pass
    summands = ()
    for rank in tl.static_range(SIZE):
        # Not out of the L1 cache, which does not see what others write.
        summands = summands + (tl.load(pointers[rank], mask=mask, other=0.0, cache_modifier=".cg"),)
    total = summands[0].to(tl.float32)
    for rank in tl.static_range(1, SIZE):
        total += summands[rank].to(tl.float32)
    out = total.to(dtype)
    if NORM:
        out = (out.to(tl.float32) + residual).to(dtype)
        tl.store(total_ptr + places, out, mask=mask)
        out = norm_row(out.to(tl.float32), weight, eps, WIDTH, dtype)
    tl.store(out_ptr + places, out, mask=mask)
