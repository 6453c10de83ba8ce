"""Logits of the whole vocabulary, side by side, out of what every rank has of it in memory that the others read.

Every rank has written its columns of all rows. The programs of one number, one on each rank, meet as those of a sum do,
with the same flags (`model.kernels.peer_sum`). Then each copies what it is to copy from all ranks, to memory that is
this rank's alone: of every row, or of those rows that this rank samples from.

Programs are few, since each raises flags at all others: as many as fetch enough at a time, and they go on with what is
left. They meet once. That is enough to read, since a flag is raised after `wait`, when the head has ended on that rank.

What may be overwritten, and when: a rank's columns, by its next head, once this rank has made a later sum. Nobody says
when it has read. But a rank raises its flags of the later sum, or pushes its summand, after `wait`, and so when it has
ended its part of this; and a sum ends when all ranks have. `model.peer_logits` sees to it that there is a sum between.
For sums, in turn, this is one more meeting, and none of them needs it.

A program's number of meetings is the same on every rank, as long as all gather the same shapes in the same order, and
no rank is more than one ahead. Programs need not all fit on a GPU, for the same reason as those of sums: they start in
the order of their numbers, the ones of the lowest number that have not ended can run on all ranks, and they wait for
nobody but each other.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, misc"
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead, and knows no lists:
# what a loop collects is a tuple that grows.)

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.kernels.dependent import begin_dependents, dependent_launch, wait
from model.kernels.peer_sum import address_in, raise_flags, wait_for_flags
from model.kernels.runtime import jit_once, tl, triton

_PIECE_BYTES = 16 << 10
"""What a program copies at a time, from all ranks together: 64 bytes a thread and more, all on their way at once."""

_MOST_PROGRAMS = 264
"""Two for each multiprocessor of a Hopper, of which the half that comes from elsewhere is more than NVLink has on its
way. Not to be asked of the GPU: it must be the same on every rank."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Every rank's part of the columns. Addresses are those that this rank reaches it by."""

    rank: int
    addresses: torch.Tensor  # [size] int64: where each rank's [rows, width] begins, at a multiple of 16 bytes
    flags: torch.Tensor  # [size] int64: those of `peer_sum.TwoShots`
    meetings: torch.Tensor  # [max_programs] int32: likewise


def peer_logits(rows: int, width: int, columns: int, dtype: torch.dtype, parts: Parts, *, share: bool) -> torch.Tensor:
    """Return every rank's [rows, width] of `dtype` side by side, but for what lies past `columns`: [rows, columns].

    With `share`, of the rows this rank's: [ceil(rows / size), columns], in the order of the ranks. Where rows do not
    divide, the last shares end in rows of zeros. What is returned is contiguous.
    """
    size, max_programs = parts.addresses.shape[0], parts.meetings.shape[0]
    assert columns <= size * width, f"{size} ranks have {size * width} columns, fewer than {columns}"
    out_rows = -(-rows // size) if share else rows
    first_row = parts.rank * out_rows if share else 0
    out = torch.empty((out_rows, columns), dtype=dtype, device=parts.meetings.device)
    block = min(triton.next_power_of_2(_PIECE_BYTES // (size * dtype.itemsize)), triton.next_power_of_2(width))
    launch = dependent_launch(out)
    _peer_logits_kernel[(min(out_rows * triton.cdiv(width, block), _MOST_PROGRAMS, max_programs),)](
        parts.addresses,
        parts.flags,
        parts.meetings,
        out,
        rows,
        first_row,
        out_rows,
        RANK=parts.rank,
        SIZE=size,
        SIZE_BLOCK=triton.next_power_of_2(size),
        MAX_PROGRAMS=max_programs,
        WIDTH=width,
        COLUMNS=columns,
        BLOCK=block,
        PDL=bool(launch),
        num_warps=min(max(block * dtype.itemsize // 512, 1), 8),  # a thread has 16 bytes of each rank, or 32
        **launch,
    )
    return out


@jit_once("rows", "first_row", "out_rows")
def _peer_logits_kernel(
    addresses_ptr,  # [SIZE] int64: `Parts`; what lies there is [rows, WIDTH]
    flags_ptr,  # [SIZE] int64
    meetings_ptr,  # [MAX_PROGRAMS] int32
    out_ptr,  # [out_rows, COLUMNS]
    rows,
    first_row,
    out_rows,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    dtype = out_ptr.dtype.element_ty
    # All flags of programs of this number: the ones that the others raise here, and this rank's at each of them.
    own_flags = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + program
    peer = tl.arange(0, SIZE_BLOCK)
    is_other = (peer < SIZE) & (peer != RANK)
    others = tl.load(flags_ptr + peer, mask=is_other, other=0).to(tl.pointer_type(tl.int32))
    others += RANK * MAX_PROGRAMS + program
    parts = ()
    for rank in tl.static_range(SIZE):
        # (Rows of any other alignment the compiler finds out by itself.)
        parts = parts + (address_in(addresses_ptr, rank, dtype),)
    wait(PDL)
    begin_dependents(PDL)
    meeting = tl.atomic_add(meetings_ptr + program, 1, sem="relaxed") + 1
    raise_flags(others, is_other, meeting)
    wait_for_flags(own_flags, meeting, RANK, SIZE, MAX_PROGRAMS)

    pieces_of_row = tl.cdiv(WIDTH, BLOCK)
    for piece in range(program, out_rows * pieces_of_row, tl.num_programs(0)):
        out_row = piece // pieces_of_row
        row = first_row + out_row
        columns = piece % pieces_of_row * BLOCK + tl.arange(0, BLOCK)
        there = columns < tl.where(row < rows, WIDTH, 0)
        places = row.to(tl.int64) * WIDTH + columns
        blocks = ()
        for rank in tl.static_range(SIZE):
            # Not out of the L1 cache, which does not see what others write.
            blocks = blocks + (tl.load(parts[rank] + places, mask=there, other=0.0, cache_modifier=".cg"),)
        out = out_ptr + out_row.to(tl.int64) * COLUMNS + columns
        for rank in tl.static_range(SIZE):
            tl.store(out + rank * WIDTH, blocks[rank], mask=columns < min(WIDTH, COLUMNS - rank * WIDTH))
