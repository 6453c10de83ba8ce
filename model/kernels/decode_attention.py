"""Attention of rows with one query (decode) over the paged KV cache, as one stream of tiles.

A tile is up to 64 keys of one row. `plan_tiles` lists all tiles of a step on the device, row after row, and where each
lies in the cache; every layer's launch then cuts the list into equal parts, one for each program and KV head. A program
walks along its part without a pause: the keys of its next tiles are on their way while it ends one row and begins the
next, so that short rows read as fast as long ones, and no program has more to do than another.

Where a part ends inside of a row, the row's result is put together from several programs: each leaves its softmax sum
(log-sum-exp, base 2) and output, and the one that arrives last merges them in the order of the keys, as in
flash-decoding. The online softmax itself is that of FlashAttention-2 (Dao 2023), accumulated in float32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead.)

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from model.kernels.dependent import begin_dependents, dependent_launch, wait
from model.kernels.runtime import jit, jit_once, tl, triton

_MULTIPROCESSORS = 132  # of a Hopper
_PROGRAMS_EACH = 2
_LEAST_TILES = 2  # of a part: a shorter one costs more to merge than it saves
_STAGES = 5  # of which the record and the keys take two each
_RECORD = 8  # int32 words


@dataclass(frozen=True, slots=True)
class TilePlan:
    """A step's tiles, and the scratch memory of its launches."""

    records: torch.Tensor
    """[max_tiles, 8] int32: first row in the cache, keys, token, row, place in its row, the row's tiles, two unused."""
    totals: torch.Tensor
    """[2] int32: tiles that hold keys, which come first in `records`; then rows without keys, with one tile each."""
    partial_out: torch.Tensor  # [2 * parts, heads, head_dim] float32
    partial_lse: torch.Tensor  # [2 * parts, heads] float32, base 2
    arrivals: torch.Tensor  # [rows, kv_heads] int32, zero between launches: parts of the row that have ended


def plan_tiles(
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
) -> TilePlan:
    """List the tiles of all rows of one query; the arguments are those of `paged_attention`.

    Where parts end depends on the rows that have keys, not on how many without stand between or behind them: a step
    gives the same bits with and without a CUDA graph's padding.
    """
    rows, device = kv_lens.shape[0], kv_lens.device
    tile = min(64, block_size)
    parts = _num_parts(num_kv_heads)

    def empty(*shape: int, of: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device=device)

    plan = TilePlan(
        records=empty(rows * max(1, block_tables.shape[1] * block_size // tile), _RECORD),
        totals=empty(2),
        partial_out=empty(2 * parts, num_heads, head_dim, of=torch.float32),
        partial_lse=empty(2 * parts, num_heads, of=torch.float32),
        arrivals=empty(rows, num_kv_heads),
    )
    _plan_tiles_kernel[(rows,)](
        query_starts,
        kv_lens,
        block_tables,
        plan.records,
        plan.totals,
        plan.arrivals,
        rows,
        block_tables.stride(0),
        KV_HEADS=num_kv_heads,
        ROWS=max(256, triton.next_power_of_2(rows)),
        BLOCK_SIZE=block_size,
        TILE=tile,
        WIDTH=256,
        RECORD=_RECORD,
        num_warps=8,
    )
    return plan


def decode_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scale: float,
    plan: TilePlan,
    out: torch.Tensor,
) -> None:
    """Write the outputs of all rows of one query into `out` [tokens, heads, head_dim]; arguments: `paged_attention`."""
    _, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = key_cache.shape
    assert all(x.is_contiguous() for x in (q, out, key_cache, value_cache)), "q, out and the caches are contiguous"
    group = heads // kv_heads
    dependent = dependent_launch(q)
    _decode_tiles_kernel[(kv_heads, _num_parts(kv_heads))](
        q,
        key_cache,
        value_cache,
        plan.records,
        plan.totals,
        plan.partial_out,
        plan.partial_lse,
        plan.arrivals,
        out,
        scale / math.log(2),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        TILE=min(64, block_size),
        PARTS=_num_parts(kv_heads),
        LEAST_TILES=_LEAST_TILES,
        STAGES=_STAGES if q.dtype.itemsize == 2 else 2,
        RECORD=_RECORD,
        PDL=bool(dependent),
        num_warps=4,
        **dependent,
    )


def _num_parts(num_kv_heads: int) -> int:
    return triton.cdiv(_PROGRAMS_EACH * _MULTIPROCESSORS, num_kv_heads)


@jit_once("query_starts_ptr", "kv_lens_ptr", "tables_ptr", "num_rows")
def _plan_tiles_kernel(
    query_starts_ptr,  # [num_rows + 1] int32
    kv_lens_ptr,  # [num_rows] int32
    tables_ptr,  # [num_rows, table_stride] int32
    records_ptr,  # [max_tiles, RECORD] int32
    totals_ptr,  # [2] int32
    arrivals_ptr,  # [num_rows, KV_HEADS] int32
    num_rows,
    table_stride,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    RECORD: tl.constexpr,
):
    """One program: the tiles of one row. It must not take part in dependent launches: see `_decode_tiles_kernel`."""
    own_row = tl.program_id(0)
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    token = tl.load(query_starts_ptr + row, mask=is_row, other=0)
    num_queries = tl.load(query_starts_ptr + row + 1, mask=is_row, other=0) - token
    single = num_queries == 1
    kv_len = tl.where(single, tl.load(kv_lens_ptr + row, mask=is_row, other=0), 0)
    count = tl.cdiv(kv_len, TILE)
    empty = (single & (kv_len == 0)).to(tl.int32)
    num_tiles = tl.sum(count, axis=0)
    if own_row == 0:
        tl.store(totals_ptr, num_tiles)
        tl.store(totals_ptr + 1, tl.sum(empty, axis=0))
    for kv_head in range(KV_HEADS):
        tl.store(arrivals_ptr + own_row * KV_HEADS + kv_head, 0)

    is_own, before = row == own_row, row < own_row
    own_len = tl.sum(tl.where(is_own, kv_len, 0), axis=0)
    own_count = tl.sum(tl.where(is_own, count, 0), axis=0)
    own_token = tl.sum(tl.where(is_own, token, 0), axis=0)
    first = tl.sum(tl.where(before, count, 0), axis=0)
    if tl.sum(tl.where(is_own, empty, 0), axis=0) > 0:
        own_count += 1
        first = num_tiles + tl.sum(tl.where(before, empty, 0), axis=0)
    for done in range(0, own_count, WIDTH):
        place = done + tl.arange(0, WIDTH)
        is_tile = place < own_count
        position = place * TILE
        inside = position < own_len
        block = tl.load(tables_ptr + own_row.to(tl.int64) * table_stride + position // BLOCK_SIZE, mask=inside, other=0)
        record = records_ptr + (first + place) * RECORD
        tl.store(record, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=is_tile)
        tl.store(record + 1, tl.minimum(own_len - position, TILE), mask=is_tile)
        tl.store(record + 2, tl.zeros_like(place) + own_token, mask=is_tile)
        tl.store(record + 3, tl.zeros_like(place) + own_row, mask=is_tile)
        tl.store(record + 4, place, mask=is_tile)
        tl.store(record + 5, tl.zeros_like(place) + own_count, mask=is_tile)


@jit
def _decode_tiles_kernel(
    q_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    key_ptr,  # [cache rows, KV_HEADS, HEAD_DIM]
    value_ptr,  # same
    records_ptr,  # [tiles, RECORD] int32
    totals_ptr,  # [2] int32
    partial_out_ptr,  # [2 * PARTS, KV_HEADS * GROUP, HEAD_DIM] float32, written for rows that several parts share
    partial_lse_ptr,  # [2 * PARTS, KV_HEADS * GROUP] float32, base 2, likewise
    arrivals_ptr,  # [rows, KV_HEADS] int32, zero before and after
    out_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    scale,  # of scores that are exponents of 2
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    STAGES: tl.constexpr,
    RECORD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: the GROUP query heads of one KV head, over one part of the tiles.

    With PDL it reads the totals before `wait`: the kernel that wrote them is no dependent launch and lets none start
    early, so that it had ended when the first kernel behind it began.
    """
    begin_dependents(PDL)
    kv_head = tl.program_id(0)
    part = tl.program_id(1)
    num_tiles = tl.load(totals_ptr)
    num_empty = tl.load(totals_ptr + 1)
    wait(PDL)
    part_len = tl.maximum(tl.cdiv(num_tiles, PARTS), LEAST_TILES)
    first = part * part_len
    own_tiles = tl.maximum(tl.minimum(num_tiles - first, part_len), 0)
    own_empty = tl.cdiv(tl.maximum(num_empty - part, 0), PARTS)

    member = tl.arange(0, GROUP_BLOCK)
    column = tl.arange(0, HEAD_BLOCK)
    in_head = column < HEAD_DIM
    key = tl.arange(0, TILE)
    own_head = kv_head * GROUP + member
    own_mask = (member < GROUP)[:, None] & in_head[None, :]

    highest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.zeros([GROUP_BLOCK, HEAD_BLOCK], tl.float32)
    for step in tl.range(0, own_tiles + own_empty, num_stages=STAGES):
        tile = tl.where(step < own_tiles, first + step, num_tiles + part + (step - own_tiles) * PARTS)
        record = records_ptr + tile * RECORD
        cache_row = tl.load(record).to(tl.int64)
        num_keys = tl.load(record + 1)
        token = tl.load(record + 2).to(tl.int64)
        offsets = ((cache_row + key) * KV_HEADS + kv_head)[:, None] * HEAD_DIM + column[None, :]
        mask = (key < num_keys)[:, None] & in_head[None, :]
        places = (token * (KV_HEADS * GROUP) + own_head)[:, None] * HEAD_DIM + column[None, :]
        q = tl.load(q_ptr + places, mask=own_mask, other=0.0)
        keys = tl.load(key_ptr + offsets, mask=mask, other=0.0)
        values = tl.load(value_ptr + offsets, mask=mask, other=0.0)
        place = tl.load(record + 4)
        begins = (place == 0) | (step == 0)

        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where((key < num_keys)[None, :], scores, float("-inf"))
        highest = tl.where(begins, float("-inf"), highest)
        # Finite also for a row without keys, whose weights are all zero.
        new_highest = tl.maximum(tl.maximum(highest, tl.max(scores, axis=1)), -1e30)
        weights = tl.exp2(scores - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        total = tl.where(begins, 0.0, total * decay) + tl.sum(weights, axis=1)
        acc = tl.where(begins, 0.0, acc * decay[:, None])
        acc += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = new_highest

        row_tiles = tl.load(record + 5)
        if (place == row_tiles - 1) | (step == own_tiles - 1):
            safe_total = tl.where(total > 0, total, 1.0)
            result = acc / safe_total[:, None]
            row_first = tile - place
            if (row_first + row_tiles - 1) // part_len == row_first // part_len:
                tl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=own_mask)
            else:
                slot = 2 * part + (row_first > first).to(tl.int32)
                heads = slot * (KV_HEADS * GROUP) + own_head
                tl.store(partial_out_ptr + heads[:, None] * HEAD_DIM + column[None, :], result, mask=own_mask)
                tl.store(partial_lse_ptr + heads, highest + tl.log2(safe_total), mask=member < GROUP)

    # Rows that other parts share, of which there can be two: one that began before or with this part, and one that goes
    # on behind it. (Not in the loop: with barriers or loops inside, Triton would not read ahead in it.)
    if own_tiles > 0:
        tl.debug_barrier()  # all threads have stored before one of them tells of it
        for end in tl.static_range(2):
            tile = first + end * (own_tiles - 1)
            record = records_ptr + tile * RECORD
            row_first = tile - tl.load(record + 4)
            first_part = row_first // part_len
            num_shares = (row_first + tl.load(record + 5) - 1) // part_len - first_part + 1
            if (num_shares > 1) & ((end == 0) | (row_first > first)):
                arrivals = arrivals_ptr + tl.load(record + 3) * KV_HEADS + kv_head
                if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_shares - 1:
                    tl.store(arrivals, 0)
                    _merge_shares(
                        partial_out_ptr, partial_lse_ptr, out_ptr, tl.load(record + 2).to(tl.int64), kv_head, row_first,
                        first_part, part_len, num_shares, KV_HEADS, GROUP, HEAD_DIM, HEAD_BLOCK,
                    )  # fmt: skip


@jit
def _merge_shares(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    token,
    kv_head,
    row_first,
    first_part,
    part_len,
    num_shares,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    """Put a row's result together from what the programs of its parts left, several shares at a time."""
    SHARES: tl.constexpr = 8
    MEMBERS: tl.constexpr = triton.next_power_of_2(GROUP)
    member = tl.arange(0, MEMBERS)
    column = tl.arange(0, HEAD_BLOCK)
    is_own = (member < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    highest = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    acc = tl.zeros([MEMBERS, HEAD_BLOCK], tl.float32)
    for begin in range(0, num_shares, SHARES):
        share = begin + tl.arange(0, SHARES)
        part = first_part + share
        slot = 2 * part + (row_first > part * part_len).to(tl.int32)
        is_share = share < num_shares
        head = (slot * (KV_HEADS * GROUP) + kv_head * GROUP)[:, None] + member[None, :]
        # Past the L1 cache, which does not see what other multiprocessors write.
        lse = tl.load(
            partial_lse_ptr + head,
            mask=is_share[:, None] & (member < GROUP)[None, :],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        partial = tl.load(
            partial_out_ptr + head[:, :, None] * HEAD_DIM + column[None, None, :],
            mask=is_share[:, None, None] & is_own[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_highest = tl.maximum(tl.maximum(highest, tl.max(lse, axis=0)), -1e30)
        decay = tl.exp2(highest - new_highest)
        weight = tl.exp2(lse - new_highest[None, :])
        acc = acc * decay[:, None] + tl.sum(partial * weight[:, :, None], axis=0)
        total = total * decay + tl.sum(weight, axis=0)
        highest = new_highest
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    place = (token * (KV_HEADS * GROUP) + kv_head * GROUP + member)[:, None] * HEAD_DIM + column[None, :]
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=is_own)
