"""Attention of prompts in Gluon, for Hopper: the matrix units multiply while exponentials are computed.

A unit of work is `QUERIES` queries of two heads that share keys and values, so that each tile of these is fetched once
for both. A launch has a program for each multiprocessor, which takes one unit after the other. Three groups of warps
share its work: one asks for queries and tiles, of the next unit too, and each of the others attends with one head,
so that while one head's scores become weights the matrix units work for the other. (As in FlashAttention-3, Shah et al.
2024. A head's own products beside its exponentials, as there, are slower here: docs/performance.md.)

Barriers in shared memory tell of the next unit, when its queries or a tile have arrived, and when both heads are done
with one, so that its place is free.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# (As in the other kernel modules.)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.kernels.dependent import dependent_launch
from model.kernels.runtime import (
    constexpr,
    fetches_tiles,
    gl,
    gluon_jit,
    gluon_jit_once,
    hopper,
    multiprocessors,
    triton,
)
from model.kernels.tiles import (
    as_words,
    begin_dependents,
    copy_tile,
    hear,
    load_record,
    products_layout,
    queue_of_numbers,
    tell,
    tiles_of,
    wait,
)

if TYPE_CHECKING:
    from model.kernels.attention import AttentionPlan

QUERIES = 64
"""Of a tile: as many as the matrix units take rows."""
_HEAD_DIM = 128
_FETCHED = constexpr(64)  # keys that are fetched at a time: they lie in one block


def overlaps(q: torch.Tensor, key_cache: torch.Tensor) -> bool:
    """Tell whether `overlapped_prefill` takes these; the arguments are those of `paged_attention`."""
    fits = q.shape[2] == _HEAD_DIM and key_cache.shape[1] % 64 == 0 and q.dtype.itemsize == 2
    return fits and fetches_tiles(q.device)


def overlapped_prefill(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    plan: AttentionPlan,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Attend for the rows of several queries, in the plan's tiles, of `QUERIES` queries.

    Scores times `scale` are exponents of 2. The other arguments are those of `paged_attention`.
    """
    tokens, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = key_cache.shape
    group = heads // kv_heads
    pairs = kv_heads * triton.cdiv(group, 2)
    dependent = dependent_launch(q)
    prefill_kernel[(min(multiprocessors(q.device), pairs * len(plan.tiles.records)),)](
        tiles_of(q.view(tokens, heads * head_dim), QUERIES, head_dim),
        *(tiles_of(cache.view(-1, kv_heads * head_dim), 64, head_dim) for cache in (key_cache, value_cache)),
        block_tables,
        plan.tiles.records,
        plan.tiles.firsts,
        plan.tickets,
        out,
        scale,
        block_tables.stride(0),
        len(plan.tiles.firsts) - 1,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        QUERIES=QUERIES,
        TILE=128,
        STAGES=2,
        QUEUED=2,
        PDL=bool(dependent),
        num_warps=4,
        **dependent,
    )


@gluon_jit
def _fetch(
    tiles,
    table_ptr,
    kv_head,
    memory,
    ready,
    start,
    kv_len,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
):
    """Ask for the keys, or values, from `start` on. What comes for those from `kv_len` on may be anything."""
    hopper.mbarrier.expect(ready, TILE * HEAD_DIM * 2)
    for part in gl.static_range(TILE // _FETCHED):
        key = start + part * _FETCHED
        block = gl.load(table_ptr + key // BLOCK_SIZE, mask=key < kv_len, other=0)
        place = [block * BLOCK_SIZE + key % BLOCK_SIZE, kv_head * HEAD_DIM]
        copy_tile(tiles, place, ready, memory.slice(part * _FETCHED, _FETCHED))


@gluon_jit
def _keys_seen(first_query, num_queries, kv_len, QUERIES: gl.constexpr, TILE: gl.constexpr):
    """Return the first query's position, the key behind the last one that any query sees, and in how many tiles."""
    first_position = kv_len - num_queries + first_query
    end = gl.minimum(first_position + QUERIES, kv_len)
    return first_position, end, gl.maximum((end + TILE - 1) // TILE, 0)


@gluon_jit
def _stream(
    q_tiles,
    key_tiles,
    value_tiles,
    tables_ptr,
    records_ptr,
    tile_firsts_ptr,
    tickets_ptr,
    table_stride,
    num_rows,
    memories,  # queries: [2 * QUEUED, QUERIES, HEAD_DIM]; keys, values: [STAGES, TILE, HEAD_DIM]; numbers of units
    barriers,  # unit told, queries ready, unit free: [QUEUED, 1]; keys and values ready, and free: [STAGES, 1]
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    QUERIES: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    QUEUED: gl.constexpr,
    PDL: gl.constexpr,
):
    """What one warp does: take units, tell the others of them, and ask for queries and tiles, each when its place is
    free. Which unit is next but one it asks for before a unit's tiles, so that it knows where the next one is."""
    queries, keys, values, units = memories
    unit_told, queries_ready, unit_free, keys_ready, values_ready, keys_free, values_free = barriers
    # Of heads that share a KV head; the last one is alone where their number is odd.
    PAIRS: gl.constexpr = (GROUP + 1) // 2
    programs = gl.num_programs(0)
    stage = 0
    phase = 1  # of what is free: at first all is
    slot = 0
    slot_phase = 1
    num_units = gl.load(tile_firsts_ptr + num_rows) * (KV_HEADS * PAIRS)
    unit = gl.program_id(0)
    record = load_record(records_ptr, unit // (KV_HEADS * PAIRS), True)[:5]  # there is one for each program
    upcoming = num_units
    wait(PDL)  # whether or not there is a unit; the work lists, and they alone, are older than the launch before
    if num_units > programs:
        upcoming = programs + gl.atomic_add(tickets_ptr, 1, sem="relaxed")
    while unit < num_units:
        row, first_token, first_query, num_queries, kv_len = record
        kv_head = unit // PAIRS % KV_HEADS
        head = kv_head * GROUP + unit % PAIRS * 2
        hopper.mbarrier.wait(unit_free.index(slot), slot_phase)
        tell(head, slot, 0, units)
        tell(first_token, slot, 1, units)
        tell(first_query, slot, 2, units)
        tell(num_queries, slot, 3, units)
        tell(kv_len, slot, 4, units)
        hopper.mbarrier.arrive(unit_told.index(slot), count=1)
        hopper.mbarrier.expect(queries_ready.index(slot), 2 * QUERIES * HEAD_DIM * 2)
        for which in gl.static_range(2):
            place = [first_token + first_query, (head + which) * HEAD_DIM]
            copy_tile(q_tiles, place, queries_ready.index(slot), queries.index(slot * 2 + which))
        slot += 1
        if slot == QUEUED:
            slot = 0
            slot_phase ^= 1
        next_record = load_record(records_ptr, upcoming // (KV_HEADS * PAIRS), upcoming < num_units)[:5]
        following = num_units
        if upcoming < num_units:
            following = programs + gl.atomic_add(tickets_ptr, 1, sem="relaxed")
        _, _, num_tiles = _keys_seen(first_query, num_queries, kv_len, QUERIES, TILE)
        table_ptr = tables_ptr + row.to(gl.int64) * table_stride
        for number in range(num_tiles):
            start = number * TILE
            hopper.mbarrier.wait(keys_free.index(stage), phase)
            _fetch(
                *(key_tiles, table_ptr, kv_head, keys.index(stage), keys_ready.index(stage), start, kv_len),
                *(HEAD_DIM, BLOCK_SIZE, TILE),
            )
            hopper.mbarrier.wait(values_free.index(stage), phase)
            _fetch(
                *(value_tiles, table_ptr, kv_head, values.index(stage), values_ready.index(stage), start, kv_len),
                *(HEAD_DIM, BLOCK_SIZE, TILE),
            )
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        unit = upcoming
        record = next_record
        upcoming = following
    hopper.mbarrier.wait(unit_free.index(slot), slot_phase)
    tell(-1, slot, 0, units)  # that there is none
    hopper.mbarrier.arrive(unit_told.index(slot), count=1)
    if num_units > programs:
        ended = gl.atomic_add(tickets_ptr + 1, 1, sem="acq_rel")
        if ended == programs - 1:  # nobody takes any more
            gl.store(tickets_ptr, 0)
            gl.store(tickets_ptr + 1, 0)


@gluon_jit
def _mask(scores, start, first_position, end, QUERIES: gl.constexpr, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Return scores of keys from `start` on, -inf where a query does not see the key, which is before `end`."""
    if start + TILE > gl.maximum(first_position + 1, 0):
        key = start + gl.arange(0, TILE, gl.SliceLayout(0, LAYOUT))
        position = first_position + gl.arange(0, QUERIES, gl.SliceLayout(1, LAYOUT))
        # Queries past the row's last one are masked like it, by `end`; key 0 leaves no query without a key.
        sees = (key[None, :] <= position[:, None]) & (key < end)[None, :]
        scores = gl.where(sees, scores, float("-inf"))
    return scores


@gluon_jit
def _attend(
    out_ptr,
    scale,
    memories,  # as in `_stream`
    barriers,
    WHICH: gl.constexpr,  # of the two heads
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    QUERIES: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    QUEUED: gl.constexpr,
    PDL: gl.constexpr,
):
    """What each of the two other groups does: QUERIES queries of one head, over all the keys they see."""
    queries, keys, values, units = memories
    unit_told, queries_ready, unit_free, keys_ready, values_ready, keys_free, values_free = barriers
    SCORES: gl.constexpr = products_layout(TILE, 4)
    OUT: gl.constexpr = products_layout(HEAD_DIM, 4)
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    IN_WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    nothing = gl.full([QUERIES, TILE], 0.0, gl.float32, SCORES)
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 0
    hopper.mbarrier.wait(unit_told.index(slot), slot_phase)
    head = hear(slot, 0, units)
    while head >= 0:
        place = (hear(slot, 2, units), hear(slot, 3, units), hear(slot, 4, units))
        first_position, end, num_tiles = _keys_seen(*place, QUERIES, TILE)
        own_q = queries.index(slot * 2 + WHICH)
        hopper.mbarrier.wait(queries_ready.index(slot), slot_phase)
        begin_dependents(PDL)
        acc = gl.full([QUERIES, HEAD_DIM], 0.0, gl.float32, OUT)
        total = gl.full([QUERIES], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        if num_tiles > 0:
            hopper.mbarrier.wait(keys_ready.index(stage), phase)
            keys_here = keys.index(stage).permute((1, 0))
            scores = hopper.warpgroup_mma(own_q, keys_here, nothing, use_acc=False, is_async=True)
            scores = hopper.warpgroup_mma_wait(0, deps=(scores,))
            hopper.mbarrier.arrive(keys_free.index(stage), count=1)
            scores = _mask(scores, 0, first_position, end, QUERIES, TILE, SCORES)
            highest = gl.max(scores, axis=1)
            exponentials = gl.exp2(scores * scale - (highest * scale)[:, None])
            total = gl.sum(exponentials, axis=1)
            weights = gl.convert_layout(exponentials.to(dtype), gl.DotOperandLayout(0, OUT, 2))
            for number in range(1, num_tiles):
                before = stage
                phase_before = phase
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
                hopper.mbarrier.wait(keys_ready.index(stage), phase)
                keys_here = keys.index(stage).permute((1, 0))
                scores = hopper.warpgroup_mma(own_q, keys_here, nothing, use_acc=False, is_async=True)
                hopper.mbarrier.wait(values_ready.index(before), phase_before)
                acc = hopper.warpgroup_mma(weights, values.index(before), acc, is_async=True)
                scores = hopper.warpgroup_mma_wait(1, deps=(scores,))
                hopper.mbarrier.arrive(keys_free.index(stage), count=1)
                scores = _mask(scores, number * TILE, first_position, end, QUERIES, TILE, SCORES)
                new_highest = gl.maximum(highest, gl.max(scores, axis=1))
                decay = gl.exp2((highest - new_highest) * scale)
                exponentials = gl.exp2(scores * scale - (new_highest * scale)[:, None])
                total = total * decay + gl.sum(exponentials, axis=1)
                new_weights = gl.convert_layout(exponentials.to(dtype), gl.DotOperandLayout(0, OUT, 2))
                highest = new_highest
                acc, weights = hopper.warpgroup_mma_wait(0, deps=(acc, weights))
                hopper.mbarrier.arrive(values_free.index(before), count=1)
                acc *= gl.convert_layout(decay, gl.SliceLayout(1, OUT))[:, None]
                weights = new_weights
            hopper.mbarrier.wait(values_ready.index(stage), phase)
            last = values.index(stage)
            if num_tiles * TILE > end:
                # What nobody sees may be anything, and 0 times that not 0. (The other head, which may be reading,
                # writes the same: what is there, or the zeros that both need.) In words this is less code.
                words = as_words(last, TILE, HEAD_DIM)
                key = (num_tiles - 1) * TILE + gl.arange(0, TILE, gl.SliceLayout(1, IN_WORDS))
                words.store(gl.where((key < end)[:, None], words.load(IN_WORDS), 0))
                hopper.fence_async_shared()
            acc = hopper.warpgroup_mma(weights, last, acc, is_async=True)
            acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
            hopper.mbarrier.arrive(values_free.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        # Heard here, since registers are scarce above.
        first_token = hear(slot, 1, units)
        first_query = hear(slot, 2, units)
        num_queries = hear(slot, 3, units)
        hopper.mbarrier.arrive(unit_free.index(slot), count=1)
        slot += 1
        if slot == QUEUED:
            slot = 0
            slot_phase ^= 1
        query = first_query + gl.arange(0, QUERIES, gl.SliceLayout(1, MEMORY))
        column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, MEMORY))
        # Where a group is odd, its last head is alone.
        own_queries = gl.where(head % GROUP + WHICH < GROUP, num_queries, 0)
        inside = (query < own_queries)[:, None] & (column < HEAD_DIM)[None, :]
        offsets = ((first_token + query).to(gl.int64) * HEADS + head + WHICH)[:, None] * HEAD_DIM + column[None, :]
        total = gl.convert_layout(total, gl.SliceLayout(1, OUT))
        result = gl.convert_layout((acc / gl.where(total > 0, total, 1.0)[:, None]).to(dtype), MEMORY)
        gl.store(out_ptr + offsets, result, mask=inside)
        hopper.mbarrier.wait(unit_told.index(slot), slot_phase)
        head = hear(slot, 0, units)


@gluon_jit_once("num_rows")
def prefill_kernel(
    q_tiles,  # descriptor of the queries, as [tokens, KV_HEADS * GROUP * HEAD_DIM] in tiles of QUERIES of one head
    key_tiles,  # descriptors of the cache, as [cache rows, KV_HEADS * HEAD_DIM] in tiles of 64 keys of one head
    value_tiles,
    tables_ptr,  # [rows, table_stride] int32
    records_ptr,  # [tiles, 8] int32: `TileList`
    tile_firsts_ptr,  # [num_rows + 1] int32
    tickets_ptr,  # [2] int32, zero before and after: units that were taken beside the first ones, programs that ended
    out_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    scale,
    table_stride,
    num_rows,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    QUERIES: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    QUEUED: gl.constexpr,
    PDL: gl.constexpr,
):
    """One program, which takes units as it comes to them."""
    HEADS: gl.constexpr = KV_HEADS * GROUP
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    queries = gl.allocate_shared_memory(dtype, [2 * QUEUED, QUERIES, HEAD_DIM], q_tiles.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], key_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], value_tiles.layout)
    units = queue_of_numbers(QUEUED)
    unit_told = gl.allocate_shared_memory(gl.int64, [QUEUED, 1], hopper.mbarrier.MBarrierLayout())
    queries_ready = gl.allocate_shared_memory(gl.int64, [QUEUED, 1], hopper.mbarrier.MBarrierLayout())
    unit_free = gl.allocate_shared_memory(gl.int64, [QUEUED, 1], hopper.mbarrier.MBarrierLayout())
    for slot in gl.static_range(QUEUED):
        hopper.mbarrier.init(unit_told.index(slot), count=1)
        hopper.mbarrier.init(queries_ready.index(slot), count=1)
        hopper.mbarrier.init(unit_free.index(slot), count=2)  # both heads
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(keys_ready.index(stage), count=1)
        hopper.mbarrier.init(values_ready.index(stage), count=1)
        hopper.mbarrier.init(keys_free.index(stage), count=2)
        hopper.mbarrier.init(values_free.index(stage), count=2)
    memories = (queries, keys, values, units)
    barriers = (unit_told, queries_ready, unit_free, keys_ready, values_ready, keys_free, values_free)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    out_ptr,
                    scale,
                    memories,
                    barriers,
                    FIRST,
                    HEADS,
                    GROUP,
                    HEAD_DIM,
                    QUERIES,
                    TILE,
                    STAGES,
                    QUEUED,
                    PDL,
                ),
            ),
            (
                _attend,
                (
                    out_ptr,
                    scale,
                    memories,
                    barriers,
                    SECOND,
                    HEADS,
                    GROUP,
                    HEAD_DIM,
                    QUERIES,
                    TILE,
                    STAGES,
                    QUEUED,
                    PDL,
                ),
            ),
            (
                _stream,
                (
                    q_tiles,
                    key_tiles,
                    value_tiles,
                    tables_ptr,
                    records_ptr,
                    tile_firsts_ptr,
                    tickets_ptr,
                    table_stride,
                    num_rows,
                    memories,
                    barriers,
                    KV_HEADS,
                    GROUP,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    QUERIES,
                    TILE,
                    STAGES,
                    QUEUED,
                    PDL,
                ),
            ),
        ],
        [4, 1],  # warps, beside the kernel's own four
        [240, 24],  # registers of a thread
    )
