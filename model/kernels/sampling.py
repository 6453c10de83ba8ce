"""The Triton half of `model/sampler.py`, which says what sampling means and holds the torch reference.

Two launches whatever the batch holds. `_score_kernel` spreads every row over programs of one vocabulary tile each, so
that a single row fills the GPU too: it reads the logits once and leaves each tile's best token. `_choose_kernel` has
one program a row. For most rows it only picks the best of the tiles.

A row that truncates needs the value from which up tokens survive. For it, the first kernel left the tempered scores and
the maximum of every group of 32. The k-th highest group maximum bounds the k-th highest score from below, so a row with
top-k needs to look at no groups but those that reach it. Over these groups the exact threshold is found by bisection on
the integer image of float32, which keeps the order: on counts for top-k, on probability mass for top-p. Every sum runs
in an order that depends on the row alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead.)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.kernels.runtime import jit, jit_once, tl, triton

if TYPE_CHECKING:
    from model.sampler import SamplingTables

MIN_TEMPERATURE = 1e-5
"""Rows with a lower temperature are greedy: dividing by less would overflow."""

_GROUP = 32  # scores whose maximum is kept, where a row truncates
_LISTED_GROUPS = 128  # groups that a pass of the bisection reads at a time
_FEW_ROWS = 16


def sample_triton(
    logits: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables
) -> torch.Tensor:
    """Compute `model.sampler.sample` on a GPU; the arguments are described there."""
    rows, vocab_size = logits.shape
    assert logits.is_contiguous(), "sample reads contiguous rows of logits"
    tile_groups = 32 if rows <= _FEW_ROWS else 128
    num_tiles = triton.cdiv(vocab_size, tile_groups * _GROUP)
    num_groups = triton.cdiv(vocab_size, _GROUP)
    device = logits.device
    scores = torch.empty((rows, vocab_size), dtype=torch.float32, device=device)
    group_max = torch.empty((rows, num_groups), dtype=torch.float32, device=device)
    groups = torch.empty((rows, num_groups), dtype=torch.int32, device=device)
    tile_best = torch.empty((rows, num_tiles), dtype=torch.float32, device=device)
    tile_token = torch.empty((rows, num_tiles), dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int32, device=device)
    _score_kernel[(num_tiles, rows)](
        logits,
        slots,
        lengths,
        tables.temperature,
        tables.top_k,
        tables.top_p,
        tables.min_p,
        tables.presence,
        tables.frequency,
        tables.repetition,
        tables.seed,
        tables.stop_ids,
        tables.min_length,
        tables.counts,
        scores,
        group_max,
        tile_best,
        tile_token,
        vocab_size,
        tables.stop_ids.shape[1],
        MIN_TEMPERATURE=MIN_TEMPERATURE,
        TILE_GROUPS=tile_groups,
        GROUP=_GROUP,
        num_warps=4 if rows <= _FEW_ROWS else 8,
        enable_fp_fusion=False,  # round as torch does
    )
    _choose_kernel[(rows,)](
        slots,
        lengths,
        tables.temperature,
        tables.top_k,
        tables.top_p,
        tables.min_p,
        tables.seed,
        scores,
        group_max,
        groups,
        tile_best,
        tile_token,
        tokens,
        vocab_size,
        num_groups,
        num_tiles,
        MIN_TEMPERATURE=MIN_TEMPERATURE,
        TILES=triton.next_power_of_2(num_tiles),
        GROUPS=triton.next_power_of_2(num_groups),
        LISTED=_LISTED_GROUPS,
        GROUP=_GROUP,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return tokens


@jit_once("slots_ptr", "lengths_ptr")  # a share of the rows may begin anywhere
def _score_kernel(
    logits_ptr,  # [rows, vocab_size]
    slots_ptr,  # [rows] int32
    lengths_ptr,  # [rows] int32
    temperature_ptr,  # [slots] float32, as all of SamplingTables down to counts
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    seed_ptr,
    stop_ids_ptr,  # [slots, max_stop_ids] int32
    min_length_ptr,
    counts_ptr,  # [slots, vocab_size] int32
    scores_ptr,  # [rows, vocab_size] float32, written for rows that truncate: tempered scores
    group_max_ptr,  # [rows, ceil(vocab_size / GROUP)] float32, likewise
    tile_best_ptr,  # [rows, tiles] float32: the tile's highest score, with noise unless the row is greedy or truncates
    tile_token_ptr,  # [rows, tiles] int32: its token; -1 where a logit of the tile is NaN or +inf
    vocab_size,
    max_stop_ids,
    MIN_TEMPERATURE: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    group = tile * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = token < vocab_size
    score = tl.load(logits_ptr + row * vocab_size + token, mask=mask, other=float("-inf")).to(tl.float32)
    unusable = tl.sum(tl.sum((score < float("inf")).to(tl.int32), axis=1), axis=0) < TILE_GROUPS * GROUP

    presence = tl.load(presence_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    repetition = tl.load(repetition_ptr + slot)
    if (presence != 0.0) | (frequency != 0.0) | (repetition != 1.0):
        count = tl.load(counts_ptr + slot * vocab_size + token, mask=mask, other=0)
        in_output = count >> 1
        divisor = tl.zeros_like(score) + repetition
        repeated = tl.where(score > 0.0, tl.div_rn(score, divisor), score * repetition)
        score = tl.where(count > 0, repeated, score)
        score = score - frequency * in_output.to(tl.float32) - tl.where(in_output > 0, presence, 0.0)
    if length < tl.load(min_length_ptr + slot):
        for i in range(max_stop_ids):
            stop_id = tl.load(stop_ids_ptr + slot * max_stop_ids + i)
            score = tl.where(token == stop_id, float("-inf"), score)

    temperature = tl.load(temperature_ptr + slot)
    if temperature >= MIN_TEMPERATURE:
        score = tl.div_rn(score, tl.zeros_like(score) + temperature)
        top_k = tl.load(top_k_ptr + slot)
        if _truncates(top_k, tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot), vocab_size):
            tl.store(scores_ptr + row * vocab_size + token, score, mask=mask)
            num_groups = tl.cdiv(vocab_size, GROUP)
            tl.store(group_max_ptr + row * num_groups + group, tl.max(score, axis=1), mask=group < num_groups)
        else:
            score += _gumbel_noise(tl.load(seed_ptr + slot), length, token)

    best = tl.max(tl.max(score, axis=1), axis=0)
    best_token = _lowest_token(mask & (score == best), token)
    place = row * tl.num_programs(0) + tile
    tl.store(tile_best_ptr + place, best)
    tl.store(tile_token_ptr + place, tl.where(unusable, -1, best_token))


@jit_once("slots_ptr", "lengths_ptr")
def _choose_kernel(
    slots_ptr,  # [rows] int32
    lengths_ptr,  # [rows] int32
    temperature_ptr,  # [slots] float32, as all of SamplingTables down to seed
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    scores_ptr,  # [rows, vocab_size] float32, only of rows that truncate
    group_max_ptr,  # [rows, num_groups] float32, likewise
    groups_ptr,  # [rows, num_groups] int32, scratch: the groups that can hold a survivor
    tile_best_ptr,  # [rows, num_tiles] float32
    tile_token_ptr,  # [rows, num_tiles] int32
    tokens_ptr,  # [rows] int32
    vocab_size,
    num_groups,
    num_tiles,
    MIN_TEMPERATURE: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    LISTED: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    is_tile = tile < num_tiles
    tile_best = tl.load(tile_best_ptr + row * num_tiles + tile, mask=is_tile, other=float("-inf"))
    tile_token = tl.load(tile_token_ptr + row * num_tiles + tile, mask=is_tile, other=0)
    unusable = tl.min(tile_token, axis=0) < 0
    highest = tl.max(tile_best, axis=0)
    is_best = is_tile & (tile_best == highest)
    chosen = tl.min(tl.where(is_best, tile_token, 0x7FFFFFFF), axis=0)

    slot = tl.load(slots_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    draws = (temperature >= MIN_TEMPERATURE) & _truncates(top_k, top_p, min_p, vocab_size)
    if draws & (unusable == 0) & (highest > float("-inf")):
        scores_row = scores_ptr + row * vocab_size
        groups_row = groups_ptr + row * num_groups
        has_top_k = (top_k > 0) & (top_k < vocab_size)
        lowest, num_listed = _list_groups(
            group_max_ptr + row * num_groups, groups_row, num_groups, has_top_k, top_k, highest, GROUPS
        )
        if has_top_k:
            lowest = _threshold(
                scores_row,
                groups_row,
                num_listed,
                vocab_size,
                lowest,
                highest,
                top_k.to(tl.float32),
                False,
                LISTED,
                GROUP,
            )
        if top_p < 1.0:
            mass = _total_from(scores_row, groups_row, num_listed, vocab_size, lowest, highest, True, LISTED, GROUP)
            lowest = _threshold(
                scores_row, groups_row, num_listed, vocab_size, lowest, highest, top_p * mass, True, LISTED, GROUP
            )
        if min_p > 0.0:
            lowest = tl.maximum(lowest, highest + tl.log(min_p))
        chosen = _draw(
            scores_row,
            groups_row,
            num_listed,
            vocab_size,
            lowest,
            tl.load(seed_ptr + slot),
            tl.load(lengths_ptr + row),
            LISTED,
            GROUP,
        )
    tl.store(tokens_ptr + row, tl.where(unusable, -1, chosen))


@jit
def _truncates(top_k, top_p, min_p, vocab_size):
    return ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0) | (min_p > 0.0)


@jit
def _lowest_token(is_best, token):
    """Return the lowest token id among the best of a two-dimensional tile."""
    return tl.min(tl.min(tl.where(is_best, token, 0x7FFFFFFF), axis=1), axis=0)


@jit
def _list_groups(group_max_ptr, groups_ptr, num_groups, has_top_k, top_k, highest, GROUPS: tl.constexpr):
    """List the groups that can hold one of the row's top_k highest scores; all groups without top-k.

    Returns a lower bound of the top_k-th highest score, and how many groups are listed, in ascending order.
    """
    group = tl.arange(0, GROUPS)
    group_max = tl.load(group_max_ptr + group, mask=group < num_groups, other=float("-inf"))
    low = _order_of(tl.full([], float("-inf"), tl.float32))
    if has_top_k:
        high = _order_of(highest)
        while low < high:
            middle = low + ((high - low + 1) >> 1)
            reached = tl.sum((group_max >= _value_of(middle)).to(tl.int32), axis=0)
            enough = reached >= top_k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
    bound = _value_of(low)
    listed = (group < num_groups) & (group_max >= bound)
    place = tl.cumsum(listed.to(tl.int32), axis=0) - 1
    tl.store(groups_ptr + place, group, mask=listed)
    tl.debug_barrier()  # other threads of this program read the list
    return bound, tl.sum(listed.to(tl.int32), axis=0)


@jit
def _threshold(
    scores_ptr,
    groups_ptr,
    num_listed,
    vocab_size,
    lowest,
    highest,
    target,
    WEIGHTED: tl.constexpr,
    LISTED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return a value that no fewer scores reach than it takes for `_total_from` to reach target; `lowest` reaches it.

    Ends early where a total meets the target: between there and the next score, all values keep the same scores.
    """
    low = _order_of(lowest)
    high = _order_of(highest)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        total = _total_from(
            scores_ptr, groups_ptr, num_listed, vocab_size, _value_of(middle), highest, WEIGHTED, LISTED, GROUP
        )
        low = tl.where(total >= target, middle, low)
        high = tl.where(total > target, high, tl.where(total == target, middle, middle - 1))
    return _value_of(low)


@jit
def _total_from(
    scores_ptr,
    groups_ptr,
    num_listed,
    vocab_size,
    lowest,
    highest,
    WEIGHTED: tl.constexpr,
    LISTED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return how many listed scores reach `lowest`, or with WEIGHTED the sum of exp(score - highest) over them."""
    total = tl.zeros([LISTED, GROUP], tl.float32)
    for start in range(0, num_listed, LISTED):
        score, _, _ = _listed_scores(scores_ptr, groups_ptr, start, num_listed, vocab_size, LISTED, GROUP)
        if WEIGHTED:
            total += tl.where(score >= lowest, tl.exp(score - highest), 0.0)
        else:
            total += tl.where(score >= lowest, 1.0, 0.0)
    return tl.sum(tl.sum(total, axis=1), axis=0)


@jit
def _draw(
    scores_ptr, groups_ptr, num_listed, vocab_size, lowest, seed, length, LISTED: tl.constexpr, GROUP: tl.constexpr
):
    """Return the token with the highest score plus noise among the listed ones that reach `lowest`."""
    best = tl.full([], float("-inf"), tl.float32)
    best_token = tl.full([], 0x7FFFFFFF, tl.int32)
    for start in range(0, num_listed, LISTED):
        score, token, valid = _listed_scores(scores_ptr, groups_ptr, start, num_listed, vocab_size, LISTED, GROUP)
        noisy = tl.where(score >= lowest, score + _gumbel_noise(seed, length, token), float("-inf"))
        here = tl.max(tl.max(noisy, axis=1), axis=0)
        token_here = _lowest_token(valid & (noisy == here), token)
        better = (here > best) | ((here == best) & (token_here < best_token))
        best = tl.where(better, here, best)
        best_token = tl.where(better, token_here, best_token)
    return best_token


@jit
def _listed_scores(scores_ptr, groups_ptr, start, num_listed, vocab_size, LISTED: tl.constexpr, GROUP: tl.constexpr):
    """Load LISTED groups of the list from `start` on: scores (-inf where there is none), token ids, which are there."""
    place = start + tl.arange(0, LISTED)
    group = tl.load(groups_ptr + place, mask=place < num_listed, other=0)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    valid = (place < num_listed)[:, None] & (token < vocab_size)
    return tl.load(scores_ptr + token, mask=valid, other=float("-inf")), token, valid


@jit
def _order_of(value):
    """Map a float32 to an int64 of the same order; -0.0 lies below 0.0, which no comparison of floats can tell."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@jit
def _value_of(order):
    """Invert `_order_of`."""
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@jit
def _gumbel_noise(seed, length, token):
    """Compute `model.sampler.gumbel_noise` for a tile of one row's tokens."""
    key = _mix64(_mix64(seed.to(tl.uint64, bitcast=True)) + length.to(tl.uint64))
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    bits = _mix32(_mix32(token.to(tl.uint32) ^ low) ^ high)
    v = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = v + v * v * (0.5 + v * 0.3333333333333333)
    exponential = tl.where(v < 0.0078125, series, -tl.log(tl.maximum(1.0 - v, 2.9802322387695312e-08)))
    return -tl.log(exponential)


@jit
def _mix64(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
