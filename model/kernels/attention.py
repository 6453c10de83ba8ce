"""Attention over the paged KV cache: decode (one query a row, split over the KV length) and varlen prefill.

Both kernels keep a running maximum and sum of base-2 exponentials per query (online softmax, Milakov & Gimelshein 2018;
FlashAttention-2, Dao 2023) and accumulate in float32. Decode splits long rows over several programs, whose partial
results a second kernel merges by their log-sum-exp (flash-decoding); how many there are follows from the shapes alone,
so that a CUDA graph can hold both launches.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead.)

from __future__ import annotations

import math

import torch

from model.kernels.runtime import jit, jit_once, tl, triton, use_triton

_DECODE_TILE = 64  # keys that a decode program reads at a time
_DECODE_PROGRAMS = 528  # programs that fill a GPU: four for each of an H200's 132 multiprocessors
_MAX_SPLITS = 64


def paged_decode(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_kv_len: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from each row's one query to the row's kv_len keys.

    q: [rows, heads, head_dim], contiguous. key_cache, value_cache: [num_blocks, block_size, kv_heads, head_dim],
    contiguous. block_tables: [rows, max_blocks] int32, entries past kv_len are never followed. kv_lens: [rows] int32; 0
    gives zeros. `scale` multiplies the scores. max_kv_len bounds kv_lens. Writes into `out` [rows, heads, head_dim]
    where it is given, and returns it.
    """
    implementation = paged_decode_triton if use_triton(q) else paged_decode_torch
    return implementation(q, key_cache, value_cache, block_tables, kv_lens, scale, max_kv_len, out)


def paged_prefill(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_query_len: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally from each row's newest tokens to the row's kv_len keys, theirs included.

    As `paged_decode`, with q: [tokens, heads, head_dim] and query_starts: [rows + 1] int32, where in q each row begins
    and the last one ends. Query i of a row with n queries sees keys 0 .. kv_len - n + i. max_query_len bounds n. Tokens
    that belong to no row are left as `out` has them.
    """
    implementation = paged_prefill_triton if use_triton(q) else paged_prefill_torch
    return implementation(q, key_cache, value_cache, block_tables, query_starts, kv_lens, scale, max_query_len, out)


def paged_decode_torch(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_kv_len: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    query_starts = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    return paged_prefill_torch(q, key_cache, value_cache, block_tables, query_starts, kv_lens, scale, 1, out)


def paged_prefill_torch(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_query_len: int,
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


def paged_decode_triton(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_kv_len: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    rows, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = key_cache.shape
    out = torch.empty_like(q) if out is None else out
    _check_layouts(q, out, key_cache, value_cache, block_tables)
    splits = _num_splits(rows * kv_heads, max_kv_len)
    partial_shape = (rows, heads, splits) if splits > 1 else (0, 0, 0)
    partial_out = torch.empty((*partial_shape, head_dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial_shape, dtype=torch.float32, device=q.device)
    group = heads // kv_heads
    _decode_kernel[(kv_heads, splits, rows)](
        q,
        key_cache,
        value_cache,
        block_tables,
        kv_lens,
        out,
        partial_out,
        partial_lse,
        scale / math.log(2),
        block_tables.stride(0),
        splits,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size,
        TILE=_DECODE_TILE,
        SPLIT=splits > 1,
        num_warps=4,
        num_stages=5 if q.element_size() == 2 else 2,  # of which the block table's load takes some
    )
    if splits > 1:
        _merge_kernel[(heads, rows)](
            partial_out,
            partial_lse,
            kv_lens,
            out,
            splits,
            HEAD_DIM=head_dim,
            HEAD_BLOCK=triton.next_power_of_2(head_dim),
            TILE=_DECODE_TILE,
            MAX_SPLITS=_MAX_SPLITS,
            num_warps=4,
        )
    return out


def _num_splits(programs: int, max_kv_len: int) -> int:
    """Return into how many parts each row's keys are split, given how many programs there are without it."""
    wanted = triton.cdiv(_DECODE_PROGRAMS, max(programs, 1)) if programs < _DECODE_PROGRAMS else 1
    return max(1, min(wanted, triton.cdiv(max_kv_len, _DECODE_TILE), _MAX_SPLITS))


def _check_layouts(
    q: torch.Tensor, out: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, tables: torch.Tensor
) -> None:
    assert all(x.is_contiguous() for x in (q, out, key_cache, value_cache)), "q, out and the caches are contiguous"
    assert tables.stride(1) == 1, "a row's block table is contiguous"


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


@jit
def _split_len(kv_len, splits, TILE: tl.constexpr):
    """Return how many keys each split of a row takes: whole tiles, so that late splits of short rows are empty."""
    return tl.cdiv(tl.cdiv(kv_len, splits), TILE) * TILE


@jit_once("splits")
def _decode_kernel(
    q_ptr,  # [rows, KV_HEADS * GROUP, HEAD_DIM]
    key_ptr,  # [cache rows, KV_HEADS, HEAD_DIM]
    value_ptr,  # same
    tables_ptr,  # [rows, table_stride] int32
    kv_lens_ptr,  # [rows] int32
    out_ptr,  # [rows, KV_HEADS * GROUP, HEAD_DIM], written unless SPLIT
    partial_out_ptr,  # [rows, KV_HEADS * GROUP, splits, HEAD_DIM] float32, written with SPLIT where a split has keys
    partial_lse_ptr,  # [rows, KV_HEADS * GROUP, splits] float32, base 2, likewise
    scale,  # of scores that are exponents of 2
    table_stride,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program: the GROUP query heads of one KV head of one row, over one split of its keys."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    kv_len = tl.load(kv_lens_ptr + row)
    split_len = _split_len(kv_len, splits, TILE)
    begin = split * split_len
    end = tl.minimum(begin + split_len, kv_len)
    if SPLIT and begin >= end:
        return

    member = tl.arange(0, GROUP_BLOCK)
    column = tl.arange(0, HEAD_BLOCK)
    in_head = column < HEAD_DIM
    head = row * (KV_HEADS * GROUP) + kv_head * GROUP + member
    q_mask = (member < GROUP)[:, None] & in_head[None, :]
    q = tl.load(q_ptr + head[:, None] * HEAD_DIM + column[None, :], mask=q_mask, other=0.0)

    highest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.zeros([GROUP_BLOCK, HEAD_BLOCK], tl.float32)
    for start in range(begin, end, TILE):
        position = start + tl.arange(0, TILE)
        cache_rows = _cache_rows(tables_ptr + row * table_stride, start, kv_len, BLOCK_SIZE, TILE)
        offsets = (cache_rows * KV_HEADS + kv_head)[:, None] * HEAD_DIM + column[None, :]
        mask = (position < end)[:, None] & in_head[None, :]
        keys = tl.load(key_ptr + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where((position < end)[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(weights, axis=1)
        values = tl.load(value_ptr + offsets, mask=mask, other=0.0)
        acc = acc * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = new_highest

    safe_total = tl.where(total > 0, total, 1.0)
    result = acc / safe_total[:, None]
    if SPLIT:
        place = head * splits + split
        tl.store(partial_out_ptr + place[:, None] * HEAD_DIM + column[None, :], result, mask=q_mask)
        tl.store(partial_lse_ptr + place, highest + tl.log2(safe_total), mask=member < GROUP)
    else:
        out = out_ptr + head[:, None] * HEAD_DIM + column[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=q_mask)


@jit_once("splits")
def _merge_kernel(
    partial_out_ptr,  # [rows, heads, splits, HEAD_DIM] float32
    partial_lse_ptr,  # [rows, heads, splits] float32, base 2
    kv_lens_ptr,  # [rows] int32
    out_ptr,  # [rows, heads, HEAD_DIM]
    splits,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """One program: one head of one row. Splits without keys wrote nothing and are not read."""
    row = tl.program_id(1).to(tl.int64)
    head = row * tl.num_programs(0) + tl.program_id(0)
    kv_len = tl.load(kv_lens_ptr + row)
    split = tl.arange(0, MAX_SPLITS)
    column = tl.arange(0, HEAD_BLOCK)
    live = (split * _split_len(kv_len, splits, TILE) < kv_len) & (split < splits)
    lse = tl.load(partial_lse_ptr + head * splits + split, mask=live, other=float("-inf"))
    highest = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, axis=0)
    partial = tl.load(
        partial_out_ptr + (head * splits + split)[:, None] * HEAD_DIM + column[None, :],
        mask=live[:, None] & (column < HEAD_DIM)[None, :],
        other=0.0,
    )
    result = tl.sum(partial * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * HEAD_DIM + column, result.to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)


def paged_prefill_triton(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_query_len: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    _, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = key_cache.shape
    out = torch.empty_like(q) if out is None else out
    _check_layouts(q, out, key_cache, value_cache, block_tables)
    tiles = _prefill_tiles(q.element_size())
    _prefill_kernel[(heads, triton.cdiv(max_query_len, tiles["QUERIES"]), kv_lens.shape[0])](
        q,
        key_cache,
        value_cache,
        block_tables,
        query_starts,
        kv_lens,
        out,
        scale / math.log(2),
        block_tables.stride(0),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size,
        **tiles,
    )
    return out


def _prefill_tiles(element_size: int) -> dict[str, int]:
    """Return the tiles for bf16 on Hopper's matrix units, or for float32, which has none and must fit in registers."""
    if element_size == 2:
        return {"QUERIES": 128, "TILE": 64, "num_warps": 8, "num_stages": 3}
    return {"QUERIES": 16, "TILE": 32, "num_warps": 4, "num_stages": 2}


@jit_once("tables_ptr", "query_starts_ptr", "kv_lens_ptr")
def _prefill_kernel(
    q_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    key_ptr,  # [cache rows, KV_HEADS, HEAD_DIM]
    value_ptr,  # same
    tables_ptr,  # [rows, table_stride] int32
    query_starts_ptr,  # [rows + 1] int32
    kv_lens_ptr,  # [rows] int32
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
    """One program: QUERIES queries of one head of one row, over all the keys they see."""
    head = tl.program_id(0)
    # The last queries see the most keys: start them first, so that the launch does not end on them.
    first_query = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES
    row = tl.program_id(2).to(tl.int64)
    first_token = tl.load(query_starts_ptr + row).to(tl.int64)
    num_queries = (tl.load(query_starts_ptr + row + 1) - first_token).to(tl.int32)
    if first_query >= num_queries:
        return

    kv_len = tl.load(kv_lens_ptr + row)
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
