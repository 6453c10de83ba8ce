"""The embedding: with the norm behind it where a rank has the whole table, and a rank's summand where it has a part.

A summand has rows of the rank's part, and zeros for other ids, and is summed over all ranks. If that is in one shot, it
is pushed (`model.kernels.peer_sum`): written to the other ranks' memory too, which tells them by itself that it has
come.

The launches are no dependent ones: what they read was made by this step, and what they write may be written once all
before it has ended, so that there is nothing to do earlier. Behind them the step's lists can be read
(`model.kernels.dependent`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, misc"
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead, and knows no lists:
# what a loop collects is a tuple that grows.)

from __future__ import annotations

import torch
import torch.nn.functional as F

from model.kernels.dependent import begin_dependents, dependent_launch
from model.kernels.norm import norm_row, rms_norm
from model.kernels.peer_sum import Push, address_in, without_empty
from model.kernels.rows import empty_rows
from model.kernels.runtime import jit, jit_once, tl, triton, use_triton

_BLOCK = 1024


def can_push(weight: torch.Tensor) -> bool:
    """Tell whether `embed` can push rows of this table to other ranks."""
    return use_triton(weight)


def embed(
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    first: int,
    count: int,
    *,
    out: torch.Tensor | None = None,
    push: Push | None = None,
) -> torch.Tensor:
    """Return [tokens, d]: for ids from `first` on their rows of `weight`, which has `count` of them; for others zeros.

    token_ids: [tokens] int32 or int64. weight: [at least count, d], contiguous. `out` is where the result goes; with
    `push`, for which `can_push` must be true, it goes to the other ranks too. A NaN may come out as another one.
    """
    if use_triton(weight):
        return embed_triton(token_ids, weight, first, count, out=out, push=push)
    assert push is None, "only the kernel pushes"
    return embed_torch(token_ids, weight, first, count, out=out)


def embed_rms_norm(
    token_ids: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rms_norm(rows), rows), the rows being those of the table [ids, d] that token_ids name: [tokens, d].

    token_ids: [tokens] int32 or int64, of the table's. weight: [d], the norm's.
    """
    if use_triton(table):
        return embed_rms_norm_triton(token_ids, table, weight, eps)
    rows = F.embedding(token_ids, table)
    return rms_norm(rows, weight, eps), rows


def embed_rms_norm_triton(
    token_ids: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width = token_ids.shape[0], table.shape[1]
    normed, rows = empty_rows(tokens, width, like=table), table.new_empty((tokens, width))
    assert all(tensor.is_contiguous() for tensor in (token_ids, table)), "embed_rms_norm reads contiguous rows"
    block = triton.next_power_of_2(width)
    _embed_rms_norm_kernel[(tokens,)](
        token_ids,
        table,
        weight,
        normed,
        rows,
        eps,
        WIDTH=width,
        BLOCK=block,
        PDL=bool(dependent_launch(table)),
        num_warps=min(max(block // 512, 1), 16),
    )
    return normed, rows


def embed_torch(
    token_ids: torch.Tensor, weight: torch.Tensor, first: int, count: int, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    local = token_ids - first
    elsewhere = (local < 0) | (local >= count)
    rows = F.embedding(local.masked_fill(elsewhere, 0), weight)
    return torch.where(elsewhere.unsqueeze(1), rows.new_zeros(()), rows, out=out)


def embed_triton(
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    first: int,
    count: int,
    *,
    out: torch.Tensor | None = None,
    push: Push | None = None,
) -> torch.Tensor:
    tokens, width = token_ids.shape[0], weight.shape[1]
    out = weight.new_empty((tokens, width)) if out is None else out
    assert all(tensor.is_contiguous() for tensor in (token_ids, weight, out)), "embed reads and writes contiguous rows"
    block = min(_BLOCK, triton.next_power_of_2(width))
    _embed_kernel[(tokens, triton.cdiv(width, block))](
        token_ids,
        weight,
        out,
        token_ids if push is None else push.inboxes,
        first,
        count,
        RANK=0 if push is None else push.rank,
        RANKS=0 if push is None else push.inboxes.shape[0],
        WIDTH=width,
        BLOCK=block,
        num_warps=4,
    )
    return out


@jit_once("first", "count")
def _embed_kernel(
    ids_ptr,  # [tokens]
    weight_ptr,  # [at least count, WIDTH]
    out_ptr,  # [tokens, WIDTH]
    inboxes_ptr,  # [RANKS] int64: of `peer_sum.Push`, read only where RANKS is not 0
    first,
    count,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    dtype = out_ptr.dtype.element_ty
    local = tl.load(ids_ptr + token).to(tl.int64) - first
    below = tl.where(local < count, WIDTH, 0)
    there = columns < tl.where(local >= 0, below, 0)
    row = tl.load(weight_ptr + local * WIDTH + columns, mask=there, other=0.0)
    row = without_empty(row)  # a checkpoint might have that NaN
    places = token * WIDTH + columns
    for rank in tl.static_range(RANKS):
        if rank != RANK:  # these first, since they have the longer way
            tl.store(address_in(inboxes_ptr, rank, dtype) + places, row, mask=mask)
    tl.store(out_ptr + places, row, mask=mask)


@jit
def _embed_rms_norm_kernel(
    ids_ptr,  # [tokens]
    table_ptr,  # [ids, WIDTH]
    weight_ptr,  # [WIDTH]
    normed_ptr,  # [tokens, WIDTH]
    rows_ptr,  # [tokens, WIDTH]
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    row = tl.load(ids_ptr + token).to(tl.int64)
    x = tl.load(table_ptr + row * WIDTH + columns, mask=mask, other=0.0)
    tl.store(rows_ptr + token * WIDTH + columns, x, mask=mask)
    normed = norm_row(x.to(tl.float32), weight, eps, WIDTH, rows_ptr.dtype.element_ty)
    tl.store(normed_ptr + token * WIDTH + columns, normed, mask=mask)
