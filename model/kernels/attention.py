"""Attention over the paged KV cache, for rows of one query (decode) and of many (prefill chunks) in any mixture.

All kernels keep a running maximum and sum of base-2 exponentials per query (online softmax, Milakov & Gimelshein 2018;
FlashAttention-2, Dao 2023) and accumulate in float32. Long decode rows are split over several programs, as in
flash-decoding; the one that ends last merges what they found, by their log-sum-exp and in a fixed order.

What there is to compute stands in work lists on the device, made once per step (`plan_attention`) and read by every
layer's launches. So a CUDA graph holds launches whose bounds are fixed and whose work follows the lengths of the step.

A decode launch over little data is a chain of loads that wait for one another. So a split's record holds all that its
program must know before it can ask for a block table and for queries, and a merge asks for many results at once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead.)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from model.kernels.decode_attention import MERGED, TILE, programs_at_a_time, streamed_decode, streams
from model.kernels.dependent import begin_dependents, dependent_launch, wait
from model.kernels.prefill_attention import QUERIES, overlapped_prefill, overlaps
from model.kernels.rope_kv import Projected
from model.kernels.rows import empty_rows
from model.kernels.runtime import jit, jit_once, tl, triton, use_triton


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitting:
    """How far rows of one query are split: so that a launch is estimated to end soonest (`_split_len`).

    Times are in keys that a program attends to meanwhile, where all programs share the memory (some 30 ns each on an
    H200). The defaults are what is best for steps with `decode_attention` there.
    """

    programs: int | None = None  # that take units; None: as many as the GPU runs at a time
    min_keys: int = 192  # of a split
    turn_keys: float = 140.0  # what it costs each program to take another unit, beside its keys
    merge_keys: float = 56.0  # what it costs to merge a row's splits, for every `MERGED` of them
    uneven: float = 0.3  # how much of a split programs wait for one another in the end, where units differ in length
    max_units: int = 1056  # of rows that are split, beside one for each row and KV head


SPLITTING = Splitting()


@dataclass(frozen=True, slots=True)
class SplitList:
    """The splits of rows of one query: their keys, in parts of nearly equal length; a row's follow one another."""

    records: torch.Tensor
    """[splits, 8] int32, 32 bytes that a program reads at once: row (-1: nothing to do), its token, first key of the
    split, key behind its last one, the row's first split, number of splits and number of keys, and the KV block that
    the first key lies in, which a program then need not look up before it asks for it."""
    firsts: torch.Tensor  # [rows + 1] int32: each row's first split, and behind the last the number of splits


@dataclass(frozen=True, slots=True)
class TileList:
    """The tiles of rows of several queries; a row's follow one another. Its last queries, which see the most keys, come
    first, so that a launch does not end on them."""

    records: torch.Tensor
    """[tiles, 8] int32, as `SplitList.records`: row (-1: nothing to do), the row's first token, the tile's first query,
    and the row's numbers of queries and of keys; the rest is undefined."""
    firsts: torch.Tensor  # [rows + 1] int32: each row's first tile, and behind the last the number of tiles


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A step's work lists, and the scratch memory of its launches."""

    splits: SplitList  # these, and the tiles, of length 0 where the step can have none
    tiles: TileList
    partial_out: torch.Tensor  # [splits, heads, head_dim] float32
    partial_lse: torch.Tensor  # [splits, heads] float32, base 2
    arrivals: torch.Tensor  # [rows, kv_heads] int32, zero between launches: splits that have ended
    tickets: torch.Tensor  # [2] int32, zero between launches: of `decode_attention` and `prefill_attention`


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    *,
    max_single_rows: int | None = None,
    max_chunk_rows: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally from each row's newest tokens to the row's kv_len keys, theirs included.

    q: [tokens, heads, head_dim], contiguous. key_cache, value_cache: [num_blocks, block_size, kv_heads, head_dim],
    contiguous. block_tables: [rows, max_blocks] int32, entries past kv_len are never followed. query_starts: [rows + 1]
    int32, where in q each row begins and the last one ends. kv_lens: [rows] int32. `scale` multiplies the scores.
    Query i of a row with n queries sees keys 0 .. kv_len - n + i; a row with kv_len 0 gets zeros. At most
    `max_single_rows` rows have one query, and `max_chunk_rows` more (default: any number). Writes into `out` [tokens,
    heads, head_dim] where it is given, and returns it; tokens that belong to no row are left as `out` has them.
    """
    if not use_triton(q):
        return paged_attention_torch(q, key_cache, value_cache, block_tables, query_starts, kv_lens, scale, out)
    plan = plan_attention(
        query_starts,
        kv_lens,
        block_tables,
        block_size=key_cache.shape[1],
        num_tokens=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=key_cache.shape[2],
        head_dim=q.shape[2],
        dtype=q.dtype,
        max_single_rows=max_single_rows,
        max_chunk_rows=max_chunk_rows,
    )
    return paged_attention_triton(q, key_cache, value_cache, block_tables, scale, plan, out)


def paged_attention_torch(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty_like(q) if out is None else out
    starts = query_starts.tolist()
    for row, kv_len in enumerate(kv_lens.tolist()):
        queries = slice(starts[row], starts[row + 1])
        keys = _gather(key_cache, block_tables[row], kv_len)
        values = _gather(value_cache, block_tables[row], kv_len)
        out[queries] = _causal_attention(q[queries], keys, values, scale) if kv_len else 0
    return out


def _gather(cache: torch.Tensor, block_table: torch.Tensor, kv_len: int) -> torch.Tensor:
    """Return a row's keys or values in order: [kv_len, kv_heads, head_dim]."""
    num_blocks = -(-kv_len // cache.shape[1])
    return cache[block_table[:num_blocks].long()].flatten(0, 1)[:kv_len]


def _causal_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend from the newest tokens of one sequence to all of it, in float32.

    q: [queries, heads, head_dim]; keys, values: [kv_len, kv_heads, head_dim]. Returns q's shape and dtype.
    """
    queries, heads, head_dim = q.shape
    kv_len, kv_heads, _ = keys.shape
    grouped = q.float().view(queries, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("qkgd,nkd->kgqn", grouped, keys.float()) * scale
    last_key = torch.arange(kv_len - queries, kv_len, device=q.device)
    hidden = torch.arange(kv_len, device=q.device) > last_key[:, None]
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return torch.einsum("kgqn,nkd->qkgd", weights, values.float()).reshape(q.shape).to(q.dtype)


def plan_attention(
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    block_size: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    max_single_rows: int | None = None,
    max_chunk_rows: int | None = None,
    splitting: Splitting | None = None,
) -> AttentionPlan:
    """Divide a step's attention into splits and tiles; the arguments are those of `paged_attention`. Triton only.

    Rows have no more than `num_tokens` queries together, and no more than `max_single_rows` of them one, and
    `max_chunk_rows` several: the lists have no room for more.

    Rows are split as `splitting` says, by default as `SPLITTING`.

    How work is divided depends on the lengths alone, not on how many rows of no query stand behind them: a step gives
    the same bits with and without a CUDA graph's padding.
    """
    splitting = splitting or SPLITTING
    rows, device = kv_lens.shape[0], kv_lens.device
    max_single_rows = rows if max_single_rows is None else min(max_single_rows, rows)
    max_chunk_rows = rows if max_chunk_rows is None else min(max_chunk_rows, rows)
    programs = splitting.programs or programs_at_a_time(device)
    more_splits = triton.cdiv(splitting.max_units, num_kv_heads)
    max_splits = max_single_rows + more_splits if max_single_rows else 0
    queries = _prefill_tiles(dtype)["QUERIES"]
    max_tiles = num_tokens // queries + max_chunk_rows if max_chunk_rows else 0

    def empty(*shape: int, of: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device=device)

    plan = AttentionPlan(
        splits=SplitList(empty(max_splits, 8), empty(rows + 1)),
        tiles=TileList(empty(max_tiles, 8), empty(rows + 1)),
        partial_out=empty(max_splits, num_heads, head_dim, of=torch.float32),
        partial_lse=empty(max_splits, num_heads, of=torch.float32),
        arrivals=empty(rows, num_kv_heads),
        tickets=empty(2),
    )
    all_rows = max(256, triton.next_power_of_2(rows))
    _plan_kernel[(2 if max_tiles else 1,)](
        query_starts,
        kv_lens,
        block_tables,
        plan.splits.records,
        plan.splits.firsts,
        plan.tiles.records,
        plan.tiles.firsts,
        plan.arrivals,
        plan.tickets,
        rows,
        max_splits,
        max_tiles,
        programs,
        more_splits,
        splitting.min_keys,
        splitting.turn_keys,
        splitting.merge_keys,
        splitting.uneven,
        block_tables.stride(0),
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        ROWS=all_rows,
        TILE=TILE,
        MERGED=MERGED,
        QUERIES=queries,
        num_warps=min(all_rows // 32, 32),
    )
    return plan


def paged_attention_triton(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    plan: AttentionPlan,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `paged_attention`, for the rows and lengths that `plan` was made of."""
    heads = q.shape[1]
    out = empty_rows(*q.shape, like=q) if out is None else out
    if len(plan.splits.records):
        _launch_decode(q, None, key_cache, value_cache, block_tables, scale, plan, out)
    if len(plan.tiles.records):
        shape = _shape_of(out, key_cache)
        if overlaps(q, key_cache):
            overlapped_prefill(q, key_cache, value_cache, block_tables, plan, out, scale / math.log(2))
            return out
        _prefill_kernel[(heads, len(plan.tiles.records))](
            q,
            key_cache,
            value_cache,
            block_tables,
            plan.tiles.records,
            out,
            scale / math.log(2),
            block_tables.stride(0),
            **shape,
            **_prefill_tiles(q.dtype),
        )
    return out


def paged_decode_triton(
    projected: Projected,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    plan: AttentionPlan,
) -> torch.Tensor:
    """As `projected.store` and `paged_attention_triton` behind it, in one launch, where no row has several queries.

    A row's position and the place of its newest key are known from its kv_len and its block table.
    """
    qkv = projected.qkv
    assert not len(plan.tiles.records), "rows of several queries are not for this kernel"
    out = empty_rows(qkv.shape[0], projected.num_heads, projected.q_weight.shape[0], like=qkv)
    _launch_decode(qkv, projected, key_cache, value_cache, block_tables, scale, plan, out)
    return out


def _launch_decode(
    q: torch.Tensor,
    projected: Projected | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    plan: AttentionPlan,
    out: torch.Tensor,
) -> None:
    """Attend for the rows of one query; `q` is what `projected` holds, where that is given."""
    tensors = (q, out, key_cache, value_cache)
    assert all(x.is_contiguous() for x in tensors), "q, out and the caches are contiguous"
    assert len({x.dtype for x in tensors}) == 1, "q, out and the caches are of one dtype"
    assert block_tables.stride(1) == 1, "a row's block table is contiguous"
    heads, kv_heads = out.shape[1], key_cache.shape[2]
    if streams(heads, out.shape[2], key_cache):
        lists, pdl = (block_tables, plan), bool(dependent_launch(q))
        streamed_decode(q, projected, key_cache, value_cache, *lists, out, scale / math.log(2), pdl=pdl)
        return
    group_block = triton.next_power_of_2(heads // kv_heads)
    dependent = dependent_launch(q)
    # A pointer that nothing is read through stands for what is not given.
    weights = (q, q, q) if projected is None else (projected.q_weight, projected.k_weight, projected.cos_sin)
    _decode_kernel[(kv_heads, plan.splits.records.shape[0])](
        q,
        *weights,
        key_cache,
        value_cache,
        block_tables,
        plan.splits.records,
        plan.partial_out,
        plan.partial_lse,
        plan.arrivals,
        out,
        scale / math.log(2),
        0.0 if projected is None else projected.eps,
        block_tables.stride(0),
        GROUP_BLOCK=group_block,
        DOT_BLOCK=max(16, group_block),
        MERGED=MERGED,
        TILE=TILE,
        RAW=projected is not None,
        PDL=bool(dependent),
        **_shape_of(out, key_cache),
        **_decode_launch(q.dtype),
        **dependent,
    )


def _shape_of(out: torch.Tensor, key_cache: torch.Tensor) -> dict[str, int]:
    """What both kernels know of heads and blocks; out: [tokens, heads, head_dim]."""
    _, heads, head_dim = out.shape
    _, block_size, kv_heads, _ = key_cache.shape
    return {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "HEAD_BLOCK": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_SIZE": block_size,
    }


def _decode_launch(dtype: torch.dtype) -> dict[str, Any]:
    """Return warps and pipeline stages."""
    return {"num_warps": 4, "num_stages": 3 if dtype.itemsize == 2 else 2}


def _prefill_tiles(dtype: torch.dtype) -> dict[str, Any]:
    """Return the tiles for 16 bits on the matrix units, or for float32, which has none and must fit in registers."""
    if dtype.itemsize == 2:
        return {"QUERIES": QUERIES, "TILE": 64, "num_warps": 4, "num_stages": 2}
    return {"QUERIES": 16, "TILE": 32, "num_warps": 4, "num_stages": 2}


@jit_once(
    *("query_starts_ptr", "kv_lens_ptr", "tables_ptr", "num_rows", "max_splits", "max_tiles"),
    *("programs", "more_splits", "min_keys"),
)
def _plan_kernel(
    query_starts_ptr,  # [num_rows + 1] int32
    kv_lens_ptr,  # [num_rows] int32
    tables_ptr,  # [num_rows, table_stride] int32
    records_ptr,  # [max_splits, 8] int32: `SplitList`
    split_firsts_ptr,  # [num_rows + 1] int32
    tiles_ptr,  # [max_tiles, 8] int32: `TileList`
    tile_firsts_ptr,  # [num_rows + 1] int32
    arrivals_ptr,  # [num_rows, KV_HEADS] int32
    tickets_ptr,  # [2] int32
    num_rows,
    max_splits,
    max_tiles,
    programs,
    more_splits,  # at most, beside one for each row
    min_keys,  # these and the next: `Splitting`
    turn_keys,
    merge_keys,
    uneven,
    table_stride,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    MERGED: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Program 0 lists the splits of rows of one query, program 1 the tiles of the others.

    It must not take part in dependent launches: `_decode_kernel` says why.
    """
    WIDTH: tl.constexpr = 512  # units that are listed at a time
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    begin = tl.load(query_starts_ptr + row, mask=is_row, other=0)
    num_queries = tl.load(query_starts_ptr + row + 1, mask=is_row, other=0) - begin
    if tl.program_id(0) == 0:
        single = num_queries == 1
        kv_len = tl.where(single, tl.load(kv_lens_ptr + row, mask=is_row, other=0), 0)
        split_len = _split_len(
            *(kv_len, programs, more_splits, min_keys, turn_keys, merge_keys, uneven),
            *(KV_HEADS, TILE, MERGED),
        )
        # A row without keys has one split too: it writes the zeros.
        count = tl.maximum(tl.cdiv(kv_len, split_len), 1)
        num_splits = _list_firsts(tl.where(single, count, 0), row, is_row, split_firsts_ptr)
        for first in range(0, max_splits, WIDTH):
            split = first + tl.arange(0, WIDTH)
            there = split < num_splits
            own_row = _rows_of(split, split_firsts_ptr, num_rows, WIDTH)
            first_split = tl.load(split_firsts_ptr + own_row, mask=there, other=0)
            own_count = tl.load(split_firsts_ptr + own_row + 1, mask=there, other=1) - first_split
            own_len = tl.load(kv_lens_ptr + own_row, mask=there, other=0)
            part = tl.cdiv(tl.cdiv(own_len, own_count), TILE) * TILE
            first_key = (split - first_split) * part
            record = records_ptr + split * 8
            listed = split < max_splits
            tl.store(record, tl.where(there, own_row, -1), mask=listed)
            tl.store(record + 1, tl.load(query_starts_ptr + own_row, mask=there, other=0), mask=listed)
            tl.store(record + 2, first_key, mask=listed)
            tl.store(record + 3, tl.minimum(first_key + part, own_len), mask=listed)
            tl.store(record + 4, first_split, mask=listed)
            tl.store(record + 5, own_count, mask=listed)
            tl.store(record + 6, own_len, mask=listed)
            table = tables_ptr + own_row.to(tl.int64) * table_stride
            block = tl.load(table + first_key // BLOCK_SIZE, mask=there & (first_key < own_len), other=0)
            tl.store(record + 7, block, mask=listed)
        for kv_head in range(KV_HEADS):
            tl.store(arrivals_ptr + row * KV_HEADS + kv_head, 0, mask=is_row)
        tl.store(tickets_ptr + tl.arange(0, 2), 0)
    else:
        count = tl.where(num_queries > 1, tl.cdiv(num_queries, QUERIES), 0)
        num_tiles = _list_firsts(count, row, is_row, tile_firsts_ptr)
        for first in range(0, max_tiles, WIDTH):
            tile = first + tl.arange(0, WIDTH)
            there = tile < num_tiles
            own_row = _rows_of(tile, tile_firsts_ptr, num_rows, WIDTH)
            first_token = tl.load(query_starts_ptr + own_row, mask=there, other=0)
            behind = tl.load(query_starts_ptr + own_row + 1, mask=there, other=0)
            last_tile = tl.load(tile_firsts_ptr + own_row + 1, mask=there, other=0) - 1
            record = tiles_ptr + tile * 8
            listed = tile < max_tiles
            tl.store(record, tl.where(there, own_row, -1), mask=listed)
            tl.store(record + 1, first_token, mask=listed)
            tl.store(record + 2, (last_tile - tile) * QUERIES, mask=listed)
            tl.store(record + 3, behind - first_token, mask=listed)
            tl.store(record + 4, tl.load(kv_lens_ptr + own_row, mask=there, other=0), mask=listed)


@jit
def _split_len(
    kv_len,  # [ROWS] int32, 0 where there is nothing to split
    programs,
    more_splits,
    min_keys,
    turn_keys,
    merge_keys,
    uneven,
    KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Return of how many keys a split may be, at most: what is estimated to take the least time.

    What is tried gives the longest row 1 to 16 splits, or more in steps. If all units are as long as the longest,
    programs take them in turns, of which each lasts as long as one. Otherwise who ends first takes the next, so that
    each has its share of all keys, and waits for some of a unit in the end. On top come what each turn costs and what
    the longest row's merge does.
    """
    longest = tl.max(kv_len, axis=0)
    number = tl.arange(0, 32)
    step = tl.maximum(tl.cdiv(tl.cdiv(programs, KV_HEADS) - 16, 16), 1)
    parts = tl.where(number < 16, number + 1, 16 + (number - 15) * step)
    split_len = tl.cdiv(tl.maximum(tl.cdiv(longest, parts), min_keys), TILE) * TILE
    # Quotients, rounded up, by a multiplication: half a key keeps them far enough from the next number.
    wide_len = split_len.to(tl.float32)
    inverse = 1 / wide_len
    rounding = wide_len - 0.5
    wide = kv_len.to(tl.float32)
    # Each thread has one of the lengths that are tried, and many rows.
    splits = tl.sum(tl.floor((wide[:, None] + rounding[None, :]) * inverse[None, :]), axis=0)
    live = tl.min(splits, axis=0)  # rows that have keys: the longest length that is tried splits none
    keys = tl.minimum(wide_len, longest.to(tl.float32))
    turns = tl.floor((splits * KV_HEADS + (programs - 0.5)) / programs)
    share = tl.sum(wide, axis=0) * KV_HEADS / programs
    merges = tl.floor((longest + rounding) * inverse)
    rounds = tl.where(merges > 1, tl.ceil(merges / MERGED), 0.0)
    time = tl.minimum(turns * keys, share + uneven * keys) + turn_keys * turns + merge_keys * rounds
    time = tl.where(splits <= live + more_splits, time, float("inf"))
    return tl.max(tl.where(time == tl.min(time, axis=0), split_len, 0), axis=0)


@jit
def _list_firsts(count, row, is_row, firsts_ptr):
    """Write each row's first unit from how many units each has, for all threads to read; return how many there are."""
    ends = tl.cumsum(count, axis=0)
    tl.store(firsts_ptr + row + 1, ends, mask=is_row)
    tl.store(firsts_ptr + row, ends - count, mask=is_row & (row == 0))
    tl.debug_barrier()  # other threads of this program read the list
    return tl.sum(count, axis=0)


@jit
def _rows_of(unit, firsts_ptr, num_rows, WIDTH: tl.constexpr):
    """Return which row each unit is of, [WIDTH]: the first one that ends behind it."""
    low = tl.zeros([WIDTH], tl.int32)  # it lies in low .. high
    high = low + num_rows
    width = num_rows
    while width > 0:
        middle = (low + high) // 2
        end = tl.load(firsts_ptr + 1 + middle, mask=middle < num_rows, other=0x7FFFFFFF)
        low = tl.where(end > unit, low, tl.minimum(middle + 1, high))
        high = tl.where(end > unit, middle, high)
        width = width // 2
    return low


@jit_once("tables_ptr")
def _decode_kernel(
    q_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]; with RAW [tokens, KV_HEADS * (GROUP + 2), HEAD_DIM], of q, k and v
    q_weight_ptr,  # [HEAD_DIM], read only with RAW
    k_weight_ptr,  # [HEAD_DIM], read only with RAW
    cos_sin_ptr,  # [max_positions, HEAD_DIM] float32, read only with RAW
    key_ptr,  # [cache rows, KV_HEADS, HEAD_DIM], written with RAW
    value_ptr,  # same
    tables_ptr,  # [rows, table_stride] int32
    records_ptr,  # [splits, 8] int32: `SplitList`
    partial_out_ptr,  # [splits, KV_HEADS * GROUP, HEAD_DIM] float32, written for rows of several splits
    partial_lse_ptr,  # [splits, KV_HEADS * GROUP] float32, base 2, likewise
    arrivals_ptr,  # [rows, KV_HEADS] int32, zero before and after
    out_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    scale,  # of scores that are exponents of 2
    eps,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,  # GROUP, rounded up to a power of two
    DOT_BLOCK: tl.constexpr,  # and to what the matrix units take
    MERGED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    RAW: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: the GROUP query heads of one KV head of one row, over one split of its keys.

    With PDL, it reads its record and the block table before `wait`. Both were written at the step's beginning, before
    the last of two ordinary launches, the plan and the embedding: each begins when all before it has ended, and only
    what comes behind the second may start early. Nothing else was there then: queries and the newest keys come from the
    kernels just before, and the partial results, the counters and `out` may still be in use.

    With RAW, q and the newest key and value are what the projection gave. They are normed and rotated here; the last
    split has the newest key in registers, and stores it for the steps to come. So the cache holds only what earlier
    steps wrote, and the first keys and values are on their way before `wait`.
    """
    begin_dependents(PDL)
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    record = records_ptr + split * 8
    row = tl.load(record).to(tl.int64)
    token = tl.load(record + 1).to(tl.int64)
    begin = tl.load(record + 2)
    end = tl.load(record + 3)
    first_split = tl.load(record + 4)
    num_splits = tl.load(record + 5)
    # The table before the queries: a program waits for these before it goes on, and keys are asked for by the table.
    table_ptr = tables_ptr + row * table_stride
    tile_row = _tile_row(table_ptr, begin, end, BLOCK_SIZE, TILE)

    member = tl.arange(0, DOT_BLOCK)
    column = tl.arange(0, HEAD_BLOCK)
    in_head = column < HEAD_DIM
    own_head = kv_head * GROUP + member
    own_mask = (member < GROUP)[:, None] & in_head[None, :]
    places = (token * (KV_HEADS * GROUP) + own_head)[:, None] * HEAD_DIM + column[None, :]
    key = tl.arange(0, TILE)
    in_tile = key[:, None] * (KV_HEADS * HEAD_DIM) + (kv_head * HEAD_DIM + column)[None, :]
    highest = tl.full([DOT_BLOCK], float("-inf"), tl.float32)
    totals = tl.zeros([DOT_BLOCK, TILE], tl.float32)  # summed up behind the loop: threads need not meet for it before
    acc = tl.zeros([DOT_BLOCK, HEAD_BLOCK], tl.float32)

    if RAW:
        kv_len = tl.load(record + 6)
        has_newest = (begin < end) & (end == kv_len)
        end -= has_newest.to(tl.int32)
        is_key = begin + key < end
        mask = is_key[:, None] & in_head[None, :]
        offset = tile_row * (KV_HEADS * HEAD_DIM)
        first_values = tl.load(value_ptr + offset + in_tile, mask=mask, other=0.0)
        # As the right operand: to turn them over, the compiler would wait for them before it asks for the values.
        turned_row = tile_row
        if BLOCK_SIZE % TILE != 0:  # then there is one for each key
            turned_row = tl.trans(tile_row)
        turned = (turned_row + key[None, :]) * (KV_HEADS * HEAD_DIM) + (kv_head * HEAD_DIM + column)[:, None]
        first_keys = tl.load(key_ptr + turned, mask=is_key[None, :] & in_head[:, None], other=0.0)
        position = tl.maximum(kv_len - 1, 0)
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=kv_len > 0, other=0).to(tl.int64)
        newest = ((block * BLOCK_SIZE + position % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM + column[None, :]
        tile_row = _tile_row(table_ptr, begin + TILE, end, BLOCK_SIZE, TILE)
        # Element i is rotated with i + HEAD_DIM / 2, and that with i.
        HALF: tl.constexpr = HEAD_DIM // 2
        partner = tl.where(column < HALF, column + HALF, column - HALF)
        angle = cos_sin_ptr + position.to(tl.int64) * HEAD_DIM + column % HALF
        cos = tl.load(angle, mask=in_head, other=0.0)[None, :]
        sin = tl.load(angle + HALF, mask=in_head, other=0.0)[None, :]
        sin = tl.where((column < HALF)[None, :], -sin, sin)
        q_weights = _both(q_weight_ptr, column[None, :], partner[None, :], in_head[None, :])
        k_weights = _both(k_weight_ptr, column[None, :], partner[None, :], in_head[None, :])
    wait(PDL)
    if row < 0:
        return

    if RAW:
        source = q_ptr + token * (KV_HEADS * (GROUP + 2) * HEAD_DIM)
        own = own_head[:, None] * HEAD_DIM
        raw_q = _both(source, own + column[None, :], own + partner[None, :], own_mask)
        own = ((KV_HEADS * GROUP + kv_head + tl.arange(0, 1)) * HEAD_DIM)[:, None]
        raw_k = _both(source, own + column[None, :], own + partner[None, :], in_head[None, :])
        new_value = tl.load(source + KV_HEADS * HEAD_DIM + own + column[None, :], mask=in_head[None, :], other=0.0)
        q = _norm_and_rotate(raw_q, q_weights, cos, sin, eps, HEAD_DIM)
        new_key = _norm_and_rotate(raw_k, k_weights, cos, sin, eps, HEAD_DIM)
        kept = (column < tl.where(has_newest, HEAD_DIM, 0))[None, :]
        tl.store(key_ptr + newest, new_key, mask=kept)
        tl.store(value_ptr + newest, new_value, mask=kept)
        score = tl.sum(q.to(tl.float32) * new_key.to(tl.float32), axis=1) * scale
        highest = tl.where(has_newest, score, highest)
        totals = tl.where((key == 0)[None, :] & has_newest, 1.0, totals)
        acc = tl.where(has_newest, new_value.to(tl.float32), acc)
        if begin < end:
            highest, totals, acc = _attend_tile(q, first_keys, first_values, is_key, scale, highest, totals, acc)
        begin += TILE
    else:
        q = tl.load(q_ptr + places, mask=own_mask, other=0.0)
    for start in range(begin, end, TILE):
        is_key = start + key < end
        mask = is_key[:, None] & in_head[None, :]
        offset = tile_row * (KV_HEADS * HEAD_DIM)
        keys = tl.load(key_ptr + offset + in_tile, mask=mask, other=0.0)
        values = tl.load(value_ptr + offset + in_tile, mask=mask, other=0.0)
        tile_row = _tile_row(table_ptr, start + TILE, end, BLOCK_SIZE, TILE)
        highest, totals, acc = _attend_tile(q, tl.trans(keys), values, is_key, scale, highest, totals, acc)

    total = tl.sum(totals, axis=1)
    safe_total = tl.where(total > 0, total, 1.0)
    result = acc * (1.0 / safe_total)[:, None]
    if num_splits == 1:
        tl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=own_mask)
    else:
        heads = (split * (KV_HEADS * GROUP) + own_head).to(tl.int64)
        tl.store(partial_out_ptr + heads[:, None] * HEAD_DIM + column[None, :], result, mask=own_mask)
        tl.store(partial_lse_ptr + heads, highest + tl.log2(safe_total), mask=member < GROUP)
        tl.debug_barrier()  # all threads have stored before one of them tells of it
        arrivals = arrivals_ptr + row * KV_HEADS + kv_head
        if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_splits - 1:
            tl.store(arrivals, 0)
            _merge_splits(
                partial_out_ptr, partial_lse_ptr, out_ptr, first_split, num_splits, token, kv_head, KV_HEADS, GROUP,
                GROUP_BLOCK, MERGED, HEAD_DIM, HEAD_BLOCK,
            )  # fmt: skip


@jit
def _attend_tile(q, keys, values, is_key, scale, highest, totals, acc):
    """Return the running maximum, sums and weighted values with those of one tile of keys [HEAD_BLOCK, TILE]."""
    scores = tl.dot(q, keys, input_precision="ieee") * scale
    scores = tl.where(is_key[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_highest[:, None])
    decay = tl.exp2(highest - new_highest)
    totals = totals * decay[:, None] + weights
    acc = acc * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new_highest, totals, acc


@jit
def _both(pointer, own, partner, mask):
    """Load elements, and those that they are rotated with."""
    return tl.load(pointer + own, mask=mask, other=0.0), tl.load(pointer + partner, mask=mask, other=0.0)


@jit
def _norm_and_rotate(raw, weights, cos, sin, eps, HEAD_DIM: tl.constexpr):
    """Return heads [n, HEAD_BLOCK] as `qk_norm_rope_store` does: normed, rounded, weighted, rounded, rotated, rounded.

    `raw` and `weights` are pairs, of elements and of those that they are rotated with; sin has its sign.
    """
    dtype = raw[0].dtype
    wide = raw[0].to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)[:, None]
    own = ((wide * scale).to(dtype).to(tl.float32) * weights[0].to(tl.float32)).to(dtype).to(tl.float32)
    other = (raw[1].to(tl.float32) * scale).to(dtype).to(tl.float32)
    other = (other * weights[1].to(tl.float32)).to(dtype).to(tl.float32)
    return (own * cos + other * sin).to(dtype)


@jit
def _tile_row(table_ptr, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Return at which row of the cache [blocks * BLOCK_SIZE] the tile of keys from `start` on begins, int64.

    Where blocks are smaller than tiles there is one for each key, [TILE, 1]: where the tile would begin if all of it
    lay in the key's block. Nothing is read for keys from `end` on.
    """
    if BLOCK_SIZE % TILE == 0:  # the tile lies in one block, since start is a multiple of TILE
        block = tl.load(table_ptr + start // BLOCK_SIZE, mask=start < end, other=0)
        tile_row = block.to(tl.int64) * BLOCK_SIZE + start % BLOCK_SIZE
    else:
        key = tl.arange(0, TILE)
        position = start + key
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=position < end, other=0)
        tile_row = (block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE - key)[:, None]
    return tile_row


@jit
def _merge_splits(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    first_split,
    num_splits,
    token,
    kv_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    """Store the sum of one row's partial results, each weighted by the mass that it has seen.

    MERGED of them are requested at a time: one after the other, each would wait for the memory.
    """
    highest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.zeros([GROUP_BLOCK, HEAD_BLOCK], tl.float32)
    # Where GROUP is no power of two, its last head comes several times.
    own_head = kv_head * GROUP + tl.minimum(tl.arange(0, GROUP_BLOCK), GROUP - 1)
    column = tl.arange(0, HEAD_BLOCK)
    in_head = column < HEAD_DIM
    places = own_head[:, None] * HEAD_DIM + column[None, :]
    for first in range(0, num_splits, MERGED):
        lses = ()
        partials = ()
        new_highest = highest
        left = tl.full([GROUP_BLOCK], 0, tl.int32) + (num_splits - first)
        for index in tl.static_range(MERGED):
            there = index < left
            heads = ((first_split + first + index) * (KV_HEADS * GROUP)).to(tl.int64)
            # Past the L1 cache, which other multiprocessors' stores do not reach.
            lse = tl.load(partial_lse_ptr + heads + own_head, mask=there, other=float("-inf"), cache_modifier=".cg")
            partial = tl.load(
                partial_out_ptr + heads * HEAD_DIM + places,
                mask=there[:, None] & in_head[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            lses = lses + (lse,)  # type: ignore  # noqa: RUF005
            partials = partials + (partial,)  # type: ignore  # noqa: RUF005
        for index in tl.static_range(MERGED):
            new_highest = tl.maximum(new_highest, lses[index])
        decay = tl.exp2(highest - new_highest)
        acc *= decay[:, None]
        total *= decay
        for index in tl.static_range(MERGED):
            weight = tl.exp2(lses[index] - new_highest)
            acc += partials[index] * weight[:, None]
            total += weight
        highest = new_highest
    out_ptr += token * (KV_HEADS * GROUP * HEAD_DIM)
    tl.store(out_ptr + places, (acc * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty), mask=in_head[None, :])


@jit
def _cache_rows(table_ptr, start, kv_len, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Return where in the cache [blocks * BLOCK_SIZE] the keys start .. start + TILE - 1 of a row lie: [TILE] int64."""
    position = start + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:  # the tile lies in one block, since start is a multiple of TILE
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        cache_rows = block * BLOCK_SIZE + position % BLOCK_SIZE
    else:
        blocks = tl.load(table_ptr + position // BLOCK_SIZE, mask=position < kv_len, other=0).to(tl.int64)
        cache_rows = blocks * BLOCK_SIZE + position % BLOCK_SIZE
    return cache_rows


@jit_once("tables_ptr")
def _prefill_kernel(
    q_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    key_ptr,  # [cache rows, KV_HEADS, HEAD_DIM]
    value_ptr,  # same
    tables_ptr,  # [rows, table_stride] int32
    tiles_ptr,  # [tiles, 8] int32: `TileList`
    out_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    scale,  # of scores that are exponents of 2
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: QUERIES queries of one head of one row, over all the keys they see.

    For what `model.kernels.prefill_attention` does not take.
    """
    head = tl.program_id(0)
    record = tiles_ptr + tl.program_id(1) * 8
    row = tl.load(record).to(tl.int64)
    if row < 0:
        return
    first_token = tl.load(record + 1).to(tl.int64)
    first_query = tl.load(record + 2)
    num_queries = tl.load(record + 3)
    kv_len = tl.load(record + 4)
    query = first_query + tl.arange(0, QUERIES)
    column = tl.arange(0, HEAD_BLOCK)
    q_mask = (query < num_queries)[:, None] & (column < HEAD_DIM)[None, :]
    q_offsets = ((first_token + query) * (KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM + column[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, HEAD_BLOCK], tl.float32)
    first_position = kv_len - num_queries + first_query
    seen_by_all = tl.maximum(first_position + 1, 0) // TILE * TILE
    seen_by_any = tl.minimum(first_position + QUERIES, kv_len)
    table_ptr = tables_ptr + row * table_stride
    kv_head = head // GROUP
    acc, total, highest = _attend(
        q, acc, total, highest, key_ptr, value_ptr, table_ptr, kv_head, scale, 0, seen_by_all, kv_len, first_position,
        False, KV_HEADS, HEAD_DIM, HEAD_BLOCK, BLOCK_SIZE, QUERIES, TILE,
    )  # fmt: skip
    acc, total, highest = _attend(
        q, acc, total, highest, key_ptr, value_ptr, table_ptr, kv_head, scale, seen_by_all, seen_by_any, kv_len,
        first_position, True, KV_HEADS, HEAD_DIM, HEAD_BLOCK, BLOCK_SIZE, QUERIES, TILE,
    )  # fmt: skip
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + q_offsets, result.to(out_ptr.dtype.element_ty), mask=q_mask)


@jit
def _attend(
    q,  # [QUERIES, HEAD_BLOCK]
    acc,  # [QUERIES, HEAD_BLOCK] float32
    total,  # [QUERIES] float32
    highest,  # [QUERIES] float32
    key_ptr,
    value_ptr,
    table_ptr,
    kv_head,
    scale,
    begin,
    end,
    kv_len,
    first_position,
    MASKED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Go on with the online softmax over keys begin .. end - 1; without MASKED, every query sees all of them."""
    column = tl.arange(0, HEAD_BLOCK)
    in_head = column < HEAD_DIM
    for start in range(begin, end, TILE):
        position = start + tl.arange(0, TILE)
        cache_rows = _cache_rows(table_ptr, start, kv_len, BLOCK_SIZE, TILE)
        offsets = (cache_rows * KV_HEADS + kv_head)[:, None] * HEAD_DIM + column[None, :]
        if MASKED:
            mask = (position < end)[:, None] & in_head[None, :]
            keys = tl.load(key_ptr + offsets, mask=mask, other=0.0)
            values = tl.load(value_ptr + offsets, mask=mask, other=0.0)
        elif HEAD_DIM == HEAD_BLOCK:
            keys = tl.load(key_ptr + offsets)
            values = tl.load(value_ptr + offsets)
        else:
            keys = tl.load(key_ptr + offsets, mask=in_head[None, :], other=0.0)
            values = tl.load(value_ptr + offsets, mask=in_head[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if MASKED:
            # Queries past the row's last one are masked like it, by `end`; key 0 leaves no query without a key.
            sees = position[None, :] <= (first_position + tl.arange(0, QUERIES))[:, None]
            scores = tl.where(sees & (position < end)[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = new_highest
    return acc, total, highest
