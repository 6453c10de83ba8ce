"""Attention of prompts in Gluon, for Hopper: the matrix units multiply while exponentials are computed.

A program has `QUERIES` queries of two heads that share keys and values, so that each tile of these is fetched once for
both. Three groups of warps share its work: one asks for tiles, and each of the others attends with one head. While the
matrix units multiply weights and values of one tile, the next tile's scores, already there, become weights; and while
one head's scores become weights, the units are free for the other's. (So does FlashAttention-3, Shah et al. 2024.)

Barriers in shared memory tell when a tile has arrived, and when both heads are done with one, so that its place is
free.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# (As in the other kernel modules.)

from __future__ import annotations

import torch

from model.kernels.runtime import constexpr, fetches_tiles, gl, gluon_jit, gluon_jit_once, hopper, triton
from model.kernels.tiles import copy_tile, products_layout, tiles_of

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
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    tile_rows: torch.Tensor,
    tile_firsts: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Attend for the rows that `tile_rows` lists, in tiles of `QUERIES` queries (`attention.TileList`).

    Scores times `scale` are exponents of 2. The other arguments are those of `paged_attention`.
    """
    _, block_size, kv_heads, head_dim = key_cache.shape
    group = q.shape[1] // kv_heads
    tiles = (tiles_of(cache.view(-1, kv_heads * head_dim), 64, head_dim) for cache in (key_cache, value_cache))
    prefill_kernel[(kv_heads * triton.cdiv(group, 2), tile_rows.shape[0])](
        q,
        *tiles,
        block_tables,
        query_starts,
        kv_lens,
        tile_rows,
        tile_firsts,
        out,
        scale,
        block_tables.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        QUERIES=QUERIES,
        TILE=128,
        STAGES=2,
        num_warps=4,
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
def _fetch_all(
    key_tiles,
    value_tiles,
    table_ptr,
    kv_head,
    kv_len,
    num_tiles,
    memories,  # keys, values: [STAGES, TILE, HEAD_DIM]
    barriers,  # keys ready, values ready, keys free, values free: [STAGES, 1]
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What one group of warps does: ask for all tiles, each when its place is free."""
    keys, values = memories
    keys_ready, values_ready, keys_free, values_free = barriers
    stage = 0
    phase = 1  # of what is free: at first all is
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
    q_ptr,
    out_ptr,
    head,
    num_queries,
    place,  # which queries, where they stand in their row, and how many keys they see
    scale,
    own_q,  # [QUERIES, HEAD_DIM]
    memories,  # as in `_fetch_all`
    barriers,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    QUERIES: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What each of the two other groups does: QUERIES queries of one head, over all the keys they see."""
    first_token, first_query, first_position, end, num_tiles = place
    keys, values = memories
    keys_ready, values_ready, keys_free, values_free = barriers
    SCORES: gl.constexpr = products_layout(TILE, 4)
    OUT: gl.constexpr = products_layout(HEAD_DIM, 4)
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    query = first_query + gl.arange(0, QUERIES, gl.SliceLayout(1, MEMORY))
    column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, MEMORY))
    inside = (query < num_queries)[:, None] & (column < HEAD_DIM)[None, :]
    offsets = ((first_token + query) * HEADS + head)[:, None] * HEAD_DIM + column[None, :]
    own_q.store(gl.load(q_ptr + offsets, mask=inside, other=0.0))
    hopper.fence_async_shared()
    nothing = gl.full([QUERIES, TILE], 0.0, gl.float32, SCORES)
    acc = gl.full([QUERIES, HEAD_DIM], 0.0, gl.float32, OUT)
    total = gl.full([QUERIES], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    if num_tiles > 0:
        hopper.mbarrier.wait(keys_ready.index(0), 0)
        scores = hopper.warpgroup_mma(own_q, keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = hopper.warpgroup_mma_wait(0, deps=(scores,))
        hopper.mbarrier.arrive(keys_free.index(0), count=1)
        scores = _mask(scores, 0, first_position, end, QUERIES, TILE, SCORES)
        highest = gl.max(scores, axis=1)
        exponentials = gl.exp2(scores * scale - (highest * scale)[:, None])
        total = gl.sum(exponentials, axis=1)
        weights = gl.convert_layout(exponentials.to(dtype), gl.DotOperandLayout(0, OUT, 2))
        stage = 0
        phase = 0
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
            # What nobody sees may be anything, and 0 times that not 0. (The other head, which may be reading, writes
            # the same: what is there, or the zeros that both need. Nothing is fetched into this place any more.)
            key = (num_tiles - 1) * TILE + gl.arange(0, TILE, gl.SliceLayout(1, MEMORY))
            last.store(gl.where((key < end)[:, None], last.load(MEMORY), 0.0))
            hopper.fence_async_shared()
        acc = hopper.warpgroup_mma(weights, last, acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
    total = gl.convert_layout(total, gl.SliceLayout(1, OUT))
    result = gl.convert_layout((acc / gl.where(total > 0, total, 1.0)[:, None]).to(dtype), MEMORY)
    gl.store(out_ptr + offsets, result, mask=inside)


@gluon_jit_once("query_starts_ptr", "kv_lens_ptr")
def prefill_kernel(
    q_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    key_tiles,  # descriptors of the cache, as [cache rows, KV_HEADS * HEAD_DIM] in tiles of 64 keys of one head
    value_tiles,
    tables_ptr,  # [rows, table_stride] int32
    query_starts_ptr,  # [rows + 1] int32
    kv_lens_ptr,  # [rows] int32
    tile_rows_ptr,  # [tiles] int32
    tile_firsts_ptr,  # [rows + 1] int32
    out_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    scale,
    table_stride,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    QUERIES: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program: QUERIES queries of two heads of one row; of the last one alone, where a group is odd."""
    tile = gl.program_id(1)
    row = gl.load(tile_rows_ptr + tile).to(gl.int64)
    if row < 0:
        return
    # The last queries see the most keys: start them first, so that the launch does not end on them.
    first_query = (gl.load(tile_firsts_ptr + row + 1) - 1 - tile) * QUERIES
    first_token = gl.load(query_starts_ptr + row).to(gl.int64)
    num_queries = (gl.load(query_starts_ptr + row + 1) - first_token).to(gl.int32)
    kv_len = gl.load(kv_lens_ptr + row)
    first_position = kv_len - num_queries + first_query
    end = gl.minimum(first_position + QUERIES, kv_len)
    num_tiles = (end + TILE - 1) // TILE
    table_ptr = tables_ptr + row * table_stride
    PAIRS: gl.constexpr = (GROUP + 1) // 2
    HEADS: gl.constexpr = KV_HEADS * GROUP
    kv_head = gl.program_id(0) // PAIRS
    of_group = gl.program_id(0) % PAIRS * 2
    head = kv_head * GROUP + of_group
    queries_of_second = gl.where(of_group + 1 < GROUP, num_queries, 0)

    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q = gl.allocate_shared_memory(dtype, [2, QUERIES, HEAD_DIM], key_tiles.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], key_tiles.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], value_tiles.layout)
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(keys_ready.index(stage), count=1)
        hopper.mbarrier.init(values_ready.index(stage), count=1)
        hopper.mbarrier.init(keys_free.index(stage), count=2)  # both heads
        hopper.mbarrier.init(values_free.index(stage), count=2)
    memories = (keys, values)
    barriers = (keys_ready, values_ready, keys_free, values_free)
    place = (first_token, first_query, first_position, end, num_tiles)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    q_ptr,
                    out_ptr,
                    head,
                    num_queries,
                    place,
                    scale,
                    q.index(0),
                    memories,
                    barriers,
                    HEADS,
                    HEAD_DIM,
                    QUERIES,
                    TILE,
                    STAGES,
                ),
            ),
            (
                _attend,
                (
                    q_ptr,
                    out_ptr,
                    head + 1,
                    queries_of_second,
                    place,
                    scale,
                    q.index(1),
                    memories,
                    barriers,
                    HEADS,
                    HEAD_DIM,
                    QUERIES,
                    TILE,
                    STAGES,
                ),
            ),
            (
                _fetch_all,
                (
                    key_tiles,
                    value_tiles,
                    table_ptr,
                    kv_head,
                    kv_len,
                    num_tiles,
                    memories,
                    barriers,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    TILE,
                    STAGES,
                ),
            ),
        ],
        [4, 4],  # warps, beside the kernel's own four
        [232, 24],  # registers of a thread
    )
