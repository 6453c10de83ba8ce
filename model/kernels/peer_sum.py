"""The sum over all ranks of a row-parallel layer's output, with the residual addition and the norm behind it.

All of this happens on the device, in memory that is there before and stays, so that a CUDA graph that has captured a
sum goes on making it at every replay. There are two ways.

In one shot every rank sums every row. Each has an inbox for every other, to which that one *pushes* its summand: the
layer that makes it does while it stores it, if it can, and else the kernel that sums, before it waits. Inboxes are
empty before: full of an element that nobody pushes, so that an element tells by itself that it has come. A program
waits until its row in all inboxes is there, sums, and empties them. So of what passes between two GPUs only the way of
the last element is waited for, and no order of writes is counted on. (The idea is that of the Lamport-style all-reduce
in TensorRT-LLM.) A layer that sums by itself does the same in its own kernel, and counts as a sum in all that is said
here.

In two shots every rank sums the rows that it owns, one of `size` rows in turn, and writes the result to all ranks'
outputs: what passes between the ranks does not grow with their number. Every rank has its summand written where the
others can read it. The programs of one number, one on each rank, *meet*: each raises its flag at all others, and waits
until theirs are up. Flags are counters: at a program's n-th meeting they become n, so that nothing has to be put back.
A program has one own row: it meets the others, who then have their summands there, reads, writes, and meets them again,
who then have written theirs. No rank ends before all rows have come. Rows are owned in turn so that a program is about
`size` rows next to each other, and each rank has as much to do as every other at any time. What only the next sum
needs, the residual stream, is not passed on: of the total each rank has its own rows, and in the next sum, of the same
shape, it needs no others. The arithmetic is the same, and so are the bits.

What may be overwritten, and when, follows from two facts. A summand is pushed, and a flag raised, after `wait`, that
is, when all kernels that were launched before on that rank have ended; and a sum ends when it has received what it
sums.

- An inbox, by the rank that pushes: once a later sum, with other inboxes, has ended there. That one needed what the
  inbox's owner pushed, or its flag, after it had ended this sum, and had therefore emptied the inbox. So sums that
  follow one another must use different inboxes (`model.peer_sums` sees to that), whatever kind the later one is.
- A summand of two shots: once its sum has ended here, since the others come to the second meeting when they have read.
- What two shots have put out: others write there only between the meetings of a later sum of two shots, and pass the
  first of them only if this rank has come to it too, and has therefore ended all that it launched before. So one memory
  serves all sums, and a result is there until this rank's next sum of two shots. That one may even have its residual
  there: one and the same program reads a row of it and then writes the row's result to the owner's memory.

A rank may be one meeting ahead of another, but not two, since the next one needs both. So flags are waited for to reach
a number, or to have passed it. Sums of both kinds and of any number of rows may follow one another, as long as they do
so in the same order on every rank: a program's number of meetings is then the same everywhere. Logits are gathered with
the same flags (`model.kernels.peer_logits`), which is a meeting like others. What NCCL does in between touches none of
this memory.

Programs need not all fit on a GPU at a time. They do have to start in the order of their numbers, as they do on every
GPU so far: of those that have not ended on every rank, the ones of the lowest number then run on all ranks, or can
start; and they wait for nobody but each other. Only where a layer sums on one rank and a kernel on another does each of
its programs wait for all of theirs: those of `model.kernels.tilings.MAX_SUMMED_ROWS` rows do fit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, misc"
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead, and knows no lists:
# what a loop collects is a tuple that grows.)

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.kernels.dependent import begin_dependents, dependent_launch, wait
from model.kernels.norm import norm_row
from model.kernels.rows import empty_rows
from model.kernels.runtime import constexpr, jit, jit_once, tl, triton


@dataclass(frozen=True, slots=True)
class Push:
    """Where a rank pushes its summand to. Addresses are those that this rank reaches memory by."""

    rank: int
    inboxes: torch.Tensor  # [size] int64: where each other's inbox for this one begins, at a multiple of 16 bytes


@dataclass(frozen=True, slots=True)
class OneShot:
    """Where summands come and go."""

    inboxes: torch.Tensor  # [size - 1, numel]: this rank's, one for each other; `EMPTY` where nothing has come
    push: Push


@dataclass(frozen=True, slots=True)
class TwoShots:
    """What the ranks of a group know of one another's memory. Addresses are those that this rank reaches it by."""

    rank: int
    summand: torch.Tensor  # [numel]: this rank's
    summands: torch.Tensor  # [size] int64: where each rank's begins, at a multiple of 16 bytes
    output: torch.Tensor  # [numel]: where results go, this rank's
    outputs: torch.Tensor  # [size] int64: where each rank's begins, at a multiple of 16 bytes
    flags: torch.Tensor  # [size] int64: each rank's flags [size, max_programs] int32; each rank writes one row of them
    meetings: torch.Tensor  # [max_programs] int32: how many meetings each program of this rank has come to

    def programs(self, rows: int) -> int:
        """How many programs sum so many rows."""
        return -(-rows // self.summands.shape[0])


Way = OneShot | TwoShots

EMPTY = -91
"""The bits of an element that has not come, as an integer. No layer puts it out: it is a NaN, in all dtypes, but none
that arithmetic gives or float32 is rounded to (0x7FFF in bfloat16 on GPUs, 0xFFFF or 0x7FC0 on CPUs)."""
_EMPTY = constexpr(EMPTY)


def peer_sum(x: torch.Tensor, way: Way, *, pushed: bool = False) -> torch.Tensor:
    """Return the sum of all ranks' `x`, each [rows, d], contiguous: the same bits on every rank.

    Added in the order of the ranks, in float32, and rounded once. In one shot, `pushed` tells that `x` is in all
    others' inboxes already. In two, it lies at the beginning of `way.summand`, and the result in `way.output`, until
    the next sum in two shots.
    """
    out = _output(x, way)
    _launch(x, out, out, out, out, 0.0, way, pushed=pushed, norm=False)
    return out


def peer_sum_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    way: Way,
    *,
    pushed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `add_rms_norm` does of the sum and of `residual` [rows, d], with the same roundings. weight: [d].

    `x`, `way`, `pushed`: as for `peer_sum`. In two shots the first result lies in `way.output`, until the next sum in
    two shots, and of the second one and of `residual` there are only the rows that this rank owns: [rank::size]. The
    others are neither written nor read.
    """
    assert residual.is_contiguous(), "the residual's rows are contiguous"
    normed, total = _output(x, way), torch.empty_like(residual)
    _launch(x, normed, total, residual, weight, eps, way, pushed=pushed, norm=True)
    return normed, total


def _output(x: torch.Tensor, way: Way) -> torch.Tensor:
    if isinstance(way, OneShot):
        return empty_rows(*x.shape, like=x)
    assert way.output.dtype is x.dtype, f"the outputs are of {way.output.dtype}, not of {x.dtype}"
    return way.output[: x.numel()].view(x.shape)


def _launch(
    x: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    way: Way,
    *,
    pushed: bool,
    norm: bool,
) -> None:
    rows, width = x.shape
    assert x.is_contiguous(), "a summand's rows are contiguous"
    block = triton.next_power_of_2(width)
    launch = dependent_launch(x)
    options = {"PDL": bool(launch), "num_warps": min(max(block // 512, 1), 16), **launch}
    operands = {"WIDTH": width, "BLOCK": block, "NORM": norm}
    if isinstance(way, OneShot):
        size, numel = len(way.push.inboxes), way.inboxes.shape[1]
        assert x.numel() <= numel, f"{x.numel()} elements are more than the {numel} that inboxes have room for"
        _one_shot_kernel[(rows,)](
            *(x, way.inboxes, way.push.inboxes, residual, weight, out, total, eps),
            RANK=way.push.rank,
            SIZE=size,
            INBOX=numel,
            PUSHES=not pushed,
            **operands,
            **options,
        )
        return
    size, max_programs = way.summands.shape[0], way.meetings.shape[0]
    programs = way.programs(rows)
    assert programs <= max_programs, f"{programs} programs are more than the {max_programs} that have flags"
    assert x.data_ptr() == way.summand.data_ptr(), "the summand is not where others read it"
    assert not pushed, "nothing is pushed in two shots"
    _two_shots_kernel[(programs,)](
        *(way.summands, way.flags, way.meetings, residual, weight, way.outputs, total, rows, eps),
        RANK=way.rank,
        SIZE=size,
        SIZE_BLOCK=triton.next_power_of_2(size),
        MAX_PROGRAMS=max_programs,
        **operands,
        **options,
    )


@jit
def _one_shot_kernel(
    x_ptr,  # [rows, WIDTH]
    inboxes_ptr,  # [SIZE - 1, INBOX]
    theirs_ptr,  # [SIZE] int64: `Push.inboxes`, read only with PUSHES
    residual_ptr,  # [rows, WIDTH], read only with NORM
    weight_ptr,  # [WIDTH], read only with NORM
    out_ptr,  # [rows, WIDTH]: the sum, or with NORM the normed one
    total_ptr,  # [rows, WIDTH], written only with NORM
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    INBOX: tl.constexpr,
    PUSHES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    places = tl.program_id(0).to(tl.int64) * WIDTH + columns
    theirs = ()
    for rank in tl.static_range(SIZE):
        if PUSHES:
            theirs = theirs + (address_in(theirs_ptr, rank, dtype) + places,)
    weight, residual = _load_weight(weight_ptr, columns, WIDTH, NORM), 0.0
    wait(PDL)
    begin_dependents(PDL)  # not before: the next layer's weights would be in the way of this one's

    own = tl.load(x_ptr + places, mask=mask, other=0.0)
    if NORM:  # on its way while others are waited for
        residual = tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if PUSHES:
        own = without_empty(own)
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                tl.store(theirs[rank], own, mask=mask)
    summands = ()
    for rank in tl.static_range(SIZE):
        summand = own
        if rank != RANK:
            summand = _take(inboxes_ptr + (rank - (rank > RANK)) * INBOX + places, mask)
        summands = summands + (summand,)
    out = _add_up(summands, residual, weight, eps, total_ptr + places, mask, dtype, SIZE, WIDTH, NORM)
    tl.store(out_ptr + places, out, mask=mask)


@jit_once("rows")
def _two_shots_kernel(
    summands_ptr,  # [SIZE] int64: `TwoShots`
    flags_ptr,  # [SIZE] int64
    meetings_ptr,  # [MAX_PROGRAMS] int32
    residual_ptr,  # [rows, WIDTH], read only with NORM
    weight_ptr,  # [WIDTH], read only with NORM
    outputs_ptr,  # [SIZE] int64: of sums, or with NORM of what is normed
    total_ptr,  # [rows, WIDTH], written only with NORM
    rows,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype = total_ptr.dtype.element_ty
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    row = program * SIZE + RANK
    mask = columns < tl.where(row < rows, WIDTH, 0)  # the last program may have no row, but is waited for
    places = row.to(tl.int64) * WIDTH + columns
    # All flags of programs of this number: the ones that the others raise here, and this rank's at each of them.
    own_flags = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + program
    peer = tl.arange(0, SIZE_BLOCK)
    is_other = (peer < SIZE) & (peer != RANK)
    others = tl.load(flags_ptr + peer, mask=is_other, other=0).to(tl.pointer_type(tl.int32))
    others += RANK * MAX_PROGRAMS + program
    pointers = ()
    outputs = ()
    for rank in tl.static_range(SIZE):
        pointers = pointers + (address_in(summands_ptr, rank, dtype) + places,)
        outputs = outputs + (address_in(outputs_ptr, rank, dtype) + places,)
    weight, residual = _load_weight(weight_ptr, columns, WIDTH, NORM), 0.0
    wait(PDL)
    begin_dependents(PDL)  # not before: the next layer's weights would be in the way of this one's

    meeting = tl.atomic_add(meetings_ptr + program, 2, sem="relaxed") + 1
    raise_flags(others, is_other, meeting)
    if NORM:  # on its way while others are waited for
        residual = tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    wait_for_flags(own_flags, meeting, RANK, SIZE, MAX_PROGRAMS)
    summands = ()
    for rank in tl.static_range(SIZE):
        # Not out of the L1 cache, which does not see what others write.
        summands = summands + (tl.load(pointers[rank], mask=mask, other=0.0, cache_modifier=".cg"),)
    out = _add_up(summands, residual, weight, eps, total_ptr + places, mask, dtype, SIZE, WIDTH, NORM)
    for rank in tl.static_range(SIZE):
        tl.store(outputs[rank], out, mask=mask)
    tl.debug_barrier()  # all threads have read and written before one of them tells of it
    raise_flags(others, is_other, meeting + 1)
    wait_for_flags(own_flags, meeting + 1, RANK, SIZE, MAX_PROGRAMS)


@jit
def address_in(addresses, rank, dtype: tl.constexpr):
    """Return the pointer to a rank's elements. The compiler must be told of the alignment, and a pointer is what it
    listens for."""
    return tl.multiple_of(tl.load(addresses + rank).to(tl.pointer_type(dtype)), 16)


@jit
def without_empty(elements):
    """Return what may be pushed: another NaN where there is the one that says that nothing has come."""
    INTEGER: tl.constexpr = tl.int16 if elements.dtype.primitive_bitwidth == 16 else tl.int32
    OTHER_NAN: tl.constexpr = 0x7FFF if elements.dtype.primitive_bitwidth == 16 else 0x7FFFFFFF
    bits = elements.to(INTEGER, bitcast=True)
    return tl.where(bits == _EMPTY, tl.full(bits.shape, OTHER_NAN, INTEGER), bits).to(elements.dtype, bitcast=True)


@jit
def _load_weight(weight_ptr, columns, WIDTH: tl.constexpr, NORM: tl.constexpr):
    weight = 0.0
    if NORM:
        weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    return weight


@jit
def _add_up(
    summands,
    residual,
    weight,
    eps,
    totals,
    mask,
    dtype: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
):
    """Return what is put out of a row's summands."""
    total = summands[0].to(tl.float32)
    for rank in tl.static_range(1, SIZE):
        total += summands[rank].to(tl.float32)
    out = total.to(dtype)
    if NORM:
        out = (out.to(tl.float32) + residual).to(dtype)
        tl.store(totals, out, mask=mask)
        out = norm_row(out.to(tl.float32), weight, eps, WIDTH, dtype)
    return out


@jit
def _take(inbox, mask):
    """Wait until all elements have come, and leave the inbox empty."""
    elements = tl.load(inbox, mask=mask, other=0.0, volatile=True)
    INTEGER: tl.constexpr = tl.int16 if elements.dtype.primitive_bitwidth == 16 else tl.int32
    while tl.max((elements.to(INTEGER, bitcast=True) == _EMPTY).to(tl.int32), axis=0) > 0:
        elements = tl.load(inbox, mask=mask, other=0.0, volatile=True)
    empty = tl.full(elements.shape, _EMPTY, INTEGER).to(elements.dtype, bitcast=True)
    tl.store(inbox, empty, mask=mask)
    return elements


@jit
def raise_flags(flags, mask, meeting):
    """Tell all other ranks that this one has come to a meeting, and can be seen to have done all before it."""
    # All at once: one after the other, each would wait for the one before to arrive.
    tl.atomic_xchg(flags, meeting, mask=mask, sem="release", scope="sys")


@jit
def wait_for_flags(flags, meeting, RANK: tl.constexpr, SIZE: tl.constexpr, MAX_PROGRAMS: tl.constexpr):
    """Wait until all other ranks have come to a meeting, and see what they have done before it."""
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            # By their difference, since numbers start anew after 2^32; a rank may be one meeting ahead.
            while tl.atomic_add(flags + rank * MAX_PROGRAMS, 0, sem="acquire", scope="sys") - meeting < 0:
                pass
