"""Attention of rows of one query in Gluon, for Hopper: keys and values stream on from one unit of work to the next.

A unit is one split of a row (`attention.SplitList`), and of it the query heads that share a KV head. A launch has as
many programs as the GPU runs at a time. Each begins with the unit of its own number, and then takes whichever is next:
rows are of any length. One warp of a program asks for tiles of keys and values, for the next units too, as soon as
there is room in a ring of shared memory; the other four attend. So the memory does not idle while a unit's queries
come, while its result is stored, or while the launch before still runs: where the newest keys come with the queries,
the others, which earlier steps have stored, are asked for before the program waits for it.

Heads are few, and matrix units take 64 rows of their left operand. So the tile of keys is the left operand of the
scores [keys, heads], and that of the values, turned over, the left one of the result [head_dim, heads].
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# (As in the other kernel modules.)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.kernels.rope_kv import Projected
from model.kernels.runtime import (
    constexpr,
    fetches_tiles,
    gl,
    gluon_constexpr,
    gluon_jit,
    gluon_jit_once,
    hopper,
    multiprocessors,
    triton,
)
from model.kernels.tiles import (
    begin_dependents,
    copy_tile,
    hear,
    load_record,
    products_layout,
    queue_of_numbers,
    tell,
    thread_barrier,
    tiles_of,
    wait,
)

if TYPE_CHECKING:
    from model.kernels.attention import AttentionPlan

TILE = 64
"""Keys of a tile: as many as the matrix units take rows. Splits begin at multiples of it, and blocks hold as many or
several times as many, so that a tile lies in one block."""
_HEAD_DIM = 128
_MAX_GROUP = 16
_STAGES = 3  # tiles of keys, and as many of values, in a program's ring
_PROGRAMS = 2  # that run on a multiprocessor at a time
_PIECE = 16  # keys of a tile that are fetched at a time: of the last tile no more than these are fetched for nothing
_FETCHED = constexpr(_PIECE)
_QUEUED = 4  # units that the warps that attend have been told of, and have not begun
MERGED = 8
"""Splits whose results a merge loads at a time."""


def streams(heads: int, head_dim: int, key_cache: torch.Tensor) -> bool:
    """Tell whether `streamed_decode` takes queries of these heads; key_cache is that of `paged_attention`."""
    fits = head_dim == _HEAD_DIM and key_cache.shape[1] % TILE == 0 and heads // key_cache.shape[2] <= _MAX_GROUP
    return fits and key_cache.dtype.itemsize == 2 and fetches_tiles(key_cache.device)


def programs_at_a_time(device: torch.device) -> int:
    """Return how many programs of `streamed_decode` a GPU runs; for a CPU, on which Triton's interpreter runs one after
    the other, those of one multiprocessor."""
    return _PROGRAMS * (1 if device.type == "cpu" else multiprocessors(device))


def streamed_decode(
    q: torch.Tensor,
    projected: Projected | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    plan: AttentionPlan,
    out: torch.Tensor,
    scale: float,
    *,
    pdl: bool,
) -> None:
    """Attend for the rows of one query. Scores times `scale` are exponents of 2.

    q: what `projected` holds, where that is given; else [tokens, heads, head_dim]. out: [tokens, heads, head_dim]. With
    `projected`, q and the newest key and value of each row are normed, rotated and stored first. The other arguments
    are those of `paged_attention`.
    """
    _, block_size, kv_heads, head_dim = key_cache.shape
    group = out.shape[1] // kv_heads
    # A pointer that nothing is read through stands for what is not given.
    weights = (q, q, q) if projected is None else (projected.q_weight, projected.k_weight, projected.cos_sin)
    caches = (cache.view(-1, kv_heads * head_dim) for cache in (key_cache, value_cache))
    tiles = (tiles_of(cache, _PIECE, head_dim) for cache in caches)
    max_units = kv_heads * plan.splits.records.shape[0]
    programs = programs_at_a_time(q.device)
    options = {"launch_pdl": True} if pdl else {}
    decode_kernel[(min(programs, max_units),)](
        q,
        *weights,
        *tiles,
        key_cache,
        value_cache,
        block_tables,
        plan.splits.records,
        plan.splits.firsts,
        plan.partial_out,
        plan.partial_lse,
        plan.arrivals,
        plan.tickets,
        out,
        scale,
        0.0 if projected is None else projected.eps,
        block_tables.stride(0),
        plan.splits.firsts.shape[0] - 1,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEADS=max(8, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=TILE,
        STAGES=_STAGES,
        QUEUED=_QUEUED,
        MERGED=MERGED,
        RAW=projected is not None,
        PDL=pdl,
        num_warps=4,
        maxnreg=128,  # so that there is room for two programs
        **options,
    )


@gluon_constexpr
def _heads_layout(columns):
    """[heads, columns], of which a thread has neighbours of a row, and half a warp a row."""
    return gl.BlockedLayout([1, columns // 16], [2, 16], [4, 1], [1, 0])


@gluon_jit
def _fetch(tiles, cache_row, column, memory, ready, wanted, TILE: gl.constexpr):
    """Ask for the keys, or values, of a tile, up to the `wanted`-th, which may lie behind it; and for a few more."""
    PIECES: gl.constexpr = TILE // _FETCHED
    pieces = gl.minimum((wanted + _FETCHED - 1) // _FETCHED, PIECES)
    for number in gl.static_range(1, PIECES + 1):  # a barrier expects a constant
        hopper.mbarrier.expect(ready, number * _FETCHED * memory.shape[1] * 2, pred=pieces == number)
    for piece in gl.static_range(PIECES):
        place = [cache_row + piece * _FETCHED, column]
        copy_tile(tiles, place, ready, memory.slice(piece * _FETCHED, _FETCHED), pred=piece < pieces)


@gluon_jit
def _stream(
    key_tiles,
    value_tiles,
    tables_ptr,
    records_ptr,
    split_firsts_ptr,
    tickets_ptr,
    table_stride,
    num_rows,
    memories,  # keys, values: [STAGES, TILE, HEAD_DIM]; numbers of units: -1 if there is none, and its split's record
    barriers,  # keys ready, values ready, keys free, values free: [STAGES, 1]; unit ready, unit free: [QUEUED, 1]
    KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    QUEUED: gl.constexpr,
    RAW: gl.constexpr,
    PDL: gl.constexpr,
):
    """What one warp does: take units, tell the others of them, and ask for their tiles, each when its place is free."""
    keys, values, units = memories
    keys_ready, values_ready, keys_free, values_free, unit_ready, unit_free = barriers
    if not RAW:  # the newest keys may have been stored by the kernel before
        wait(PDL)
    programs = gl.num_programs(0)
    stage = 0
    phase = 1  # of what is free: at first all is
    slot = 0
    slot_phase = 1
    unit = gl.program_id(0)
    # Asked for together, since the first tile waits for both; there is a record for each program, with or without work.
    record = load_record(records_ptr, unit // KV_HEADS, True)
    num_units = gl.load(split_firsts_ptr + num_rows) * KV_HEADS
    while unit < num_units:
        row, token, begin, end, first_split, num_splits, kv_len, block = record
        column = unit % KV_HEADS * HEAD_DIM
        hopper.mbarrier.wait(unit_free.index(slot), slot_phase)
        tell(unit, slot, 0, units)
        tell(row, slot, 1, units)
        tell(token, slot, 2, units)
        tell(begin, slot, 3, units)
        tell(end, slot, 4, units)
        tell(first_split, slot, 5, units)
        tell(num_splits, slot, 6, units)
        tell(kv_len, slot, 7, units)
        hopper.mbarrier.arrive(unit_ready.index(slot), count=1)
        slot += 1
        if slot == QUEUED:
            slot = 0
            slot_phase ^= 1
        if RAW:  # the cache does not hold the newest key
            end = gl.minimum(end, kv_len - 1)
        table_ptr = tables_ptr + row.to(gl.int64) * table_stride
        for start in range(begin, end, TILE):
            cache_row = block * BLOCK_SIZE + start % BLOCK_SIZE
            ahead = start + TILE
            block = gl.load(table_ptr + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
            hopper.mbarrier.wait(keys_free.index(stage), phase)
            _fetch(key_tiles, cache_row, column, keys.index(stage), keys_ready.index(stage), end - start, TILE)
            hopper.mbarrier.wait(values_free.index(stage), phase)
            _fetch(value_tiles, cache_row, column, values.index(stage), values_ready.index(stage), end - start, TILE)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        unit = num_units
        if num_units > programs:
            wait(PDL)  # only then has the launch before put the tickets back
            unit = programs + gl.atomic_add(tickets_ptr, 1, sem="relaxed")
        record = load_record(records_ptr, unit // KV_HEADS, unit < num_units)
    hopper.mbarrier.wait(unit_free.index(slot), slot_phase)
    tell(-1, slot, 0, units)  # that there is none
    hopper.mbarrier.arrive(unit_ready.index(slot), count=1)
    if num_units > programs:
        wait(PDL)
        if gl.atomic_add(tickets_ptr + 1, 1, sem="acq_rel") == programs - 1:  # nobody takes any more
            gl.store(tickets_ptr, 0)
            gl.store(tickets_ptr + 1, 0)


@gluon_jit
def _load_halves(pointer, HALF: gl.constexpr, mask):
    """Load elements i and i + HALF, which are rotated with each other."""
    return gl.load(pointer, mask=mask, other=0.0), gl.load(pointer + HALF, mask=mask, other=0.0)


@gluon_jit
def _norm_and_rotate(raw, weights, cos, sin, eps, HALF: gl.constexpr):
    """Return both halves of heads [n, HALF] as `qk_norm_rope_store` does: normed, rounded, weighted, rounded, rotated,
    rounded. All arguments come in halves, or are the same for both."""
    dtype: gl.constexpr = raw[0].dtype
    first = raw[0].to(gl.float32)
    second = raw[1].to(gl.float32)
    mean = (gl.sum(first * first, axis=1) + gl.sum(second * second, axis=1)) / (2 * HALF)
    scale = gl.rsqrt(mean + eps)[:, None]
    first = ((first * scale).to(dtype).to(gl.float32) * weights[0]).to(dtype).to(gl.float32)
    second = ((second * scale).to(dtype).to(gl.float32) * weights[1]).to(dtype).to(gl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@gluon_jit
def _weigh(scores, seen, highest, totals):
    """Return the running maximum [heads] and sums with a tile's keys, their weights, and what older weights fall by.

    scores, totals: [keys, heads]. seen: [keys], of which one or more are.
    """
    scores = gl.where(seen[:, None], scores, float("-inf"))
    new_highest = gl.maximum(highest, gl.max(scores, axis=0))
    weights = gl.exp2(scores - new_highest[None, :])
    decay = gl.exp2(highest - new_highest)[None, :]
    return new_highest, totals * decay + weights, weights, decay


@gluon_jit
def _attend(
    q_ptr,
    weight_ptrs,  # of q's norm and of k's, and the rotations
    cache_ptrs,  # keys and values
    tables_ptr,
    partial_ptrs,  # results and their log-sum-exp
    arrivals_ptr,
    out_ptr,
    numbers,  # scale, eps, table_stride
    own_q,  # [HEADS, HEAD_DIM]
    own_weights,  # [HEADS, TILE]
    memories,  # as in `_stream`
    barriers,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    QUEUED: gl.constexpr,
    MERGED: gl.constexpr,
    RAW: gl.constexpr,
    PDL: gl.constexpr,
):
    """What the other warps do: attend with the queries of each unit."""
    scale, eps, table_stride = numbers
    q_weight_ptr, k_weight_ptr, cos_sin_ptr = weight_ptrs
    key_ptr, value_ptr = cache_ptrs
    partial_out_ptr, partial_lse_ptr = partial_ptrs
    keys, values, units = memories
    keys_ready, values_ready, keys_free, values_free, unit_ready, unit_free = barriers
    HALF: gl.constexpr = HEAD_DIM // 2
    ALL_HEADS: gl.constexpr = KV_HEADS * (GROUP + 2)
    PRODUCTS: gl.constexpr = products_layout(HEADS, 4)  # of [TILE, HEADS] and of [HEAD_DIM, HEADS]
    OF_HEAD: gl.constexpr = gl.SliceLayout(0, PRODUCTS)
    ROWS: gl.constexpr = _heads_layout(HEAD_DIM)
    HALVES: gl.constexpr = _heads_layout(HALF)
    TILES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    key = gl.arange(0, TILE, gl.SliceLayout(1, PRODUCTS))
    member = gl.arange(0, HEADS, gl.SliceLayout(1, ROWS))
    column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, ROWS))
    row_of_half = gl.arange(0, HEADS, gl.SliceLayout(1, HALVES))
    column_of_half = gl.arange(0, HALF, gl.SliceLayout(0, HALVES))
    no_scores = gl.full([TILE, HEADS], 0.0, gl.float32, PRODUCTS)
    if RAW:
        anywhere = (column_of_half >= 0)[None, :]
        q_first, q_second = _load_halves(q_weight_ptr + column_of_half[None, :], HALF, anywhere)
        k_first, k_second = _load_halves(k_weight_ptr + column_of_half[None, :], HALF, anywhere)
        q_weights = (q_first.to(gl.float32), q_second.to(gl.float32))
        k_weights = (k_first.to(gl.float32), k_second.to(gl.float32))
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 0
    hopper.mbarrier.wait(unit_ready.index(slot), slot_phase)
    unit = hear(slot, 0, units)
    while unit >= 0:
        kv_head = unit % KV_HEADS
        split = unit // KV_HEADS
        row = hear(slot, 1, units)
        token = hear(slot, 2, units)
        begin = hear(slot, 3, units)
        end = hear(slot, 4, units)
        first_split = hear(slot, 5, units)
        num_splits = hear(slot, 6, units)
        kv_len = hear(slot, 7, units)
        hopper.mbarrier.arrive(unit_free.index(slot), count=1)
        has_newest = (begin < end) & (end == kv_len)
        if RAW:
            end = gl.minimum(end, kv_len - 1)
        own_head = kv_head * GROUP + member
        is_member = (member < GROUP)[:, None]
        places = (token.to(gl.int64) * (KV_HEADS * GROUP) + own_head)[:, None] * HEAD_DIM + column[None, :]
        highest = gl.full([HEADS], float("-inf"), gl.float32, OF_HEAD)
        totals = gl.full([TILE, HEADS], 0.0, gl.float32, PRODUCTS)  # summed up behind the loop
        acc = gl.full([HEAD_DIM, HEADS], 0.0, gl.float32, PRODUCTS)
        if RAW:
            position = gl.maximum(kv_len - 1, 0)
            table_ptr = tables_ptr + row.to(gl.int64) * table_stride
            block = gl.load(table_ptr + position // BLOCK_SIZE, mask=kv_len > 0, other=0).to(gl.int64)
            angle = cos_sin_ptr + position.to(gl.int64) * HEAD_DIM + column_of_half[None, :]
            cos, sin = _load_halves(angle, HALF, (column_of_half >= 0)[None, :])
            wait(PDL)
            source = q_ptr + token.to(gl.int64) * (ALL_HEADS * HEAD_DIM)
            own_half = (kv_head * GROUP + row_of_half)[:, None] * HEAD_DIM + column_of_half[None, :]
            raw_q = _load_halves(source + own_half, HALF, (row_of_half < GROUP)[:, None])
            # The newest key is the same for all heads: each has it beside its query.
            of_key = (KV_HEADS * GROUP + kv_head) * HEAD_DIM + row_of_half[:, None] * 0 + column_of_half[None, :]
            raw_key = _load_halves(source + of_key, HALF, (row_of_half < GROUP)[:, None])
            of_value = (KV_HEADS * (GROUP + 1) + kv_head) * HEAD_DIM
            dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(1, PRODUCTS))
            value = gl.load(source + of_value + dim)
            own_first, own_second = _norm_and_rotate(raw_q, q_weights, cos, sin, eps, HALF)
            key_first, key_second = _norm_and_rotate(raw_key, k_weights, cos, sin, eps, HALF)
            own_q.slice(0, HALF, dim=1).store(own_first)
            own_q.slice(HALF, HALF, dim=1).store(own_second)
            hopper.fence_async_shared()
            place = ((block * BLOCK_SIZE + position % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
            kept = (row_of_half < gl.where(has_newest, 1, 0))[:, None]
            half_place = place + row_of_half[:, None] * 0 + column_of_half[None, :]
            gl.store(key_ptr + half_place, key_first, mask=kept)
            gl.store(key_ptr + half_place + HALF, key_second, mask=kept)
            gl.store(value_ptr + place + dim, value, mask=dim < gl.where(has_newest, HEAD_DIM, 0))
            score = gl.sum(own_first.to(gl.float32) * key_first.to(gl.float32), axis=1)
            score += gl.sum(own_second.to(gl.float32) * key_second.to(gl.float32), axis=1)
            score = gl.convert_layout(score * scale, OF_HEAD)
            highest = gl.where(has_newest, score, highest)
            totals = gl.where((key == 0)[:, None] & has_newest, 1.0, totals)
            acc = gl.where(has_newest, value.to(gl.float32)[:, None], acc)
        else:
            wait(PDL)
            own_q.store(gl.load(q_ptr + places, mask=is_member, other=0.0))
            hopper.fence_async_shared()
        begin_dependents(PDL)

        if begin < end:
            hopper.mbarrier.wait(keys_ready.index(stage), phase)
            scores = hopper.warpgroup_mma(
                keys.index(stage), own_q.permute((1, 0)), no_scores, use_acc=False, is_async=True
            )
            scores = hopper.warpgroup_mma_wait(0, deps=(scores,))
            hopper.mbarrier.arrive(keys_free.index(stage), count=1)
            highest, totals, weights, decay = _weigh(scores * scale, begin + key < end, highest, totals)
            acc *= decay
            for start in range(begin + TILE, end, TILE):
                before = stage
                phase_before = phase
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
                own_weights.permute((1, 0)).store(weights.to(dtype))
                hopper.fence_async_shared()
                hopper.mbarrier.wait(keys_ready.index(stage), phase)
                scores = hopper.warpgroup_mma(
                    keys.index(stage), own_q.permute((1, 0)), no_scores, use_acc=False, is_async=True
                )
                hopper.mbarrier.wait(values_ready.index(before), phase_before)
                acc = hopper.warpgroup_mma(
                    values.index(before).permute((1, 0)), own_weights.permute((1, 0)), acc, is_async=True
                )
                scores = hopper.warpgroup_mma_wait(1, deps=(scores,))
                hopper.mbarrier.arrive(keys_free.index(stage), count=1)
                highest, totals, weights, decay = _weigh(scores * scale, start + key < end, highest, totals)
                acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
                hopper.mbarrier.arrive(values_free.index(before), count=1)
                acc *= decay
            own_weights.permute((1, 0)).store(weights.to(dtype))
            hopper.mbarrier.wait(values_ready.index(stage), phase)
            last = values.index(stage)
            if (end - begin) % TILE != 0:  # what nobody sees may be anything, and 0 times that not 0
                seen = gl.arange(0, TILE, gl.SliceLayout(1, TILES)) < (end - begin) % TILE
                last.store(gl.where(seen[:, None], last.load(TILES), 0.0))
            hopper.fence_async_shared()
            acc = hopper.warpgroup_mma(last.permute((1, 0)), own_weights.permute((1, 0)), acc, is_async=True)
            acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
            hopper.mbarrier.arrive(values_free.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1

        total = gl.sum(totals, axis=0)
        safe_total = gl.where(total > 0, total, 1.0)
        result = gl.convert_layout(gl.permute(acc / safe_total[None, :], (1, 0)), ROWS)
        if num_splits == 1:
            gl.store(out_ptr + places, result.to(dtype), mask=is_member)
        else:
            heads = (split * (KV_HEADS * GROUP) + own_head).to(gl.int64)
            gl.store(partial_out_ptr + heads[:, None] * HEAD_DIM + column[None, :], result, mask=is_member)
            lse = gl.convert_layout(highest + gl.log2(safe_total), gl.SliceLayout(1, ROWS))
            gl.store(partial_lse_ptr + heads, lse, mask=member < GROUP)
            thread_barrier()  # all threads have stored before one of them tells of it
            arrivals = arrivals_ptr + row * KV_HEADS + kv_head
            if gl.atomic_add(arrivals, 1, sem="acq_rel") == num_splits - 1:
                gl.store(arrivals, 0)
                _merge(
                    *(partial_out_ptr, partial_lse_ptr, out_ptr, first_split, num_splits, token, kv_head),
                    *(KV_HEADS, GROUP, HEADS, HEAD_DIM, MERGED),
                )
        slot += 1
        if slot == QUEUED:
            slot = 0
            slot_phase ^= 1
        hopper.mbarrier.wait(unit_ready.index(slot), slot_phase)
        unit = hear(slot, 0, units)
    wait(PDL)  # also without a unit
    begin_dependents(PDL)


@gluon_jit
def _merge(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    first_split,
    num_splits,
    token,
    kv_head,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    MERGED: gl.constexpr,
):
    """Store the sum of one row's partial results, each weighted by the mass that it has seen.

    MERGED of them are requested at a time: one after the other, each would wait for the memory.
    """
    ROWS: gl.constexpr = _heads_layout(HEAD_DIM)
    OF_HEAD: gl.constexpr = gl.SliceLayout(1, ROWS)
    member = gl.arange(0, HEADS, OF_HEAD)
    is_member = member < GROUP
    own_head = kv_head * GROUP + member
    column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, ROWS))
    highest = gl.full([HEADS], float("-inf"), gl.float32, OF_HEAD)
    total = gl.full([HEADS], 0.0, gl.float32, OF_HEAD)
    acc = gl.full([HEADS, HEAD_DIM], 0.0, gl.float32, ROWS)
    for first in range(0, num_splits, MERGED):
        lses = ()
        partials = ()
        new_highest = highest
        for index in gl.static_range(MERGED):
            there = is_member & (member >= gl.where(first + index < num_splits, 0, HEADS))
            heads = ((first_split + first + index) * (KV_HEADS * GROUP)).to(gl.int64) + own_head
            # Past the L1 cache, which other multiprocessors' stores do not reach.
            lse = gl.load(partial_lse_ptr + heads, mask=there, other=float("-inf"), cache_modifier=".cg")
            places = heads[:, None] * HEAD_DIM + column[None, :]
            partial = gl.load(partial_out_ptr + places, mask=there[:, None], other=0.0, cache_modifier=".cg")
            lses = lses + (lse,)  # noqa: RUF005 (kernels know no starred lists)
            partials = partials + (partial,)  # noqa: RUF005
        for index in gl.static_range(MERGED):
            new_highest = gl.maximum(new_highest, lses[index])
        # Rows of nobody have seen nothing.
        new_highest = gl.where(is_member, new_highest, 0.0)
        decay = gl.exp2(highest - new_highest)
        acc *= decay[:, None]
        total *= decay
        for index in gl.static_range(MERGED):
            weight = gl.exp2(lses[index] - new_highest)
            acc += partials[index] * weight[:, None]
            total += weight
        highest = new_highest
    out = (acc / gl.where(is_member, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
    places = (token.to(gl.int64) * (KV_HEADS * GROUP) + own_head)[:, None] * HEAD_DIM + column[None, :]
    gl.store(out_ptr + places, out, mask=is_member[:, None])


@gluon_jit_once("tables_ptr", "num_rows")
def decode_kernel(
    q_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]; with RAW [tokens, KV_HEADS * (GROUP + 2), HEAD_DIM], of q, k and v
    q_weight_ptr,  # [HEAD_DIM], read only with RAW
    k_weight_ptr,  # [HEAD_DIM], read only with RAW
    cos_sin_ptr,  # [max_positions, HEAD_DIM] float32, read only with RAW
    key_tiles,  # descriptors of the cache, as [cache rows, KV_HEADS * HEAD_DIM] in tiles of `_FETCHED` keys of one head
    value_tiles,
    key_ptr,  # [cache rows, KV_HEADS, HEAD_DIM], written with RAW
    value_ptr,  # same
    tables_ptr,  # [rows, table_stride] int32
    records_ptr,  # [splits, 8] int32: `SplitList`
    split_firsts_ptr,  # [num_rows + 1] int32
    partial_out_ptr,  # [splits, KV_HEADS * GROUP, HEAD_DIM] float32, written for rows of several splits
    partial_lse_ptr,  # [splits, KV_HEADS * GROUP] float32, base 2, likewise
    arrivals_ptr,  # [rows, KV_HEADS] int32, zero before and after
    tickets_ptr,  # [2] int32, zero before and after: units that were taken beside the first ones, programs that ended
    out_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    scale,
    eps,
    table_stride,
    num_rows,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,  # GROUP, rounded up to what the matrix units take
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    QUEUED: gl.constexpr,
    MERGED: gl.constexpr,
    RAW: gl.constexpr,
    PDL: gl.constexpr,
):
    """One program. What is read before `wait`, and why it may be: `attention._decode_kernel`; how many
    units there are stands in the same lists.

    The next kernel may start when every program has its first queries: what it fetches would be in their way.
    """
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    keys = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], key_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], value_tiles.layout)
    own_q = gl.allocate_shared_memory(dtype, [HEADS, HEAD_DIM], key_tiles.layout)
    own_weights = gl.allocate_shared_memory(dtype, [HEADS, TILE], key_tiles.layout)
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(keys_ready.index(stage), count=1)
        hopper.mbarrier.init(values_ready.index(stage), count=1)
        hopper.mbarrier.init(keys_free.index(stage), count=1)
        hopper.mbarrier.init(values_free.index(stage), count=1)
    units = queue_of_numbers(QUEUED)
    unit_ready = gl.allocate_shared_memory(gl.int64, [QUEUED, 1], hopper.mbarrier.MBarrierLayout())
    unit_free = gl.allocate_shared_memory(gl.int64, [QUEUED, 1], hopper.mbarrier.MBarrierLayout())
    for slot in gl.static_range(QUEUED):
        hopper.mbarrier.init(unit_ready.index(slot), count=1)
        hopper.mbarrier.init(unit_free.index(slot), count=1)
    memories = (keys, values, units)
    barriers = (keys_ready, values_ready, keys_free, values_free, unit_ready, unit_free)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    q_ptr,
                    (q_weight_ptr, k_weight_ptr, cos_sin_ptr),
                    (key_ptr, value_ptr),
                    tables_ptr,
                    (partial_out_ptr, partial_lse_ptr),
                    arrivals_ptr,
                    out_ptr,
                    (scale, eps, table_stride),
                    own_q,
                    own_weights,
                    memories,
                    barriers,
                    KV_HEADS,
                    GROUP,
                    HEADS,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    TILE,
                    STAGES,
                    QUEUED,
                    MERGED,
                    RAW,
                    PDL,
                ),
            ),
            (
                _stream,
                (
                    key_tiles,
                    value_tiles,
                    tables_ptr,
                    records_ptr,
                    split_firsts_ptr,
                    tickets_ptr,
                    table_stride,
                    num_rows,
                    memories,
                    barriers,
                    KV_HEADS,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    TILE,
                    STAGES,
                    QUEUED,
                    RAW,
                    PDL,
                ),
            ),
        ],
        [1],  # warps, beside the kernel's own four
        [40],  # registers of a thread
    )
