"""The Triton half of `model/sampler.py`, which says what sampling means and holds the torch reference.

Two launches whatever the batch holds. `_score_kernel` spreads every row over programs, so that a single row fills the
GPU too: it reads the logits once and leaves the best token of each program's part of the vocabulary. `_choose_kernel`
has one program a row. For most rows it only picks the best of the parts.

A row that truncates needs to know which tokens survive. For it, the first kernel left the highest score of every group
of 32 tokens, and for top-p their mass. The second one finds a bound that all survivors reach, lists the groups that
reach it, and makes their scores once more from the logits: storing all scores would cost several times what reading the
logits does. The k-th highest group maximum bounds the k-th highest score from below; what top-p and min-p keep is
bounded by the highest score, and what top-p keeps by the groups' maxima.

For top-k the exact threshold is then found: where few scores of the listed groups reach the bound, which is usual, each
is compared with each, else by bisection of the counts on the integer image of float32, which keeps the order. For top-p
no threshold is needed: the best token with noise is drawn, and kept if the tokens above it leave room for it, which is
one sum. Every sum runs in an order that depends on the row alone.

What is looked at again and again lies in registers: all groups' maxima, and the scores of the groups that are listed
first, which for most rows are all of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead.)

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.kernels.dependent import begin_dependents, dependent_launch, wait
from model.kernels.runtime import jit, jit_once, tl, triton, use_triton

if TYPE_CHECKING:
    from model.sampler import SamplingTables

MIN_TEMPERATURE = 1e-5
"""Rows with a lower temperature are greedy: dividing by less would overflow."""

_GROUP = 32  # scores whose maximum is kept, where a row truncates
_LISTED_GROUPS = 64  # listed groups whose scores are made at a time: most rows list fewer
_FEW = 64  # scores that are compared each with each


@dataclass(frozen=True, slots=True)
class Parts:
    """How rows are cut: a program takes so many tiles one after the other, of so many groups each."""

    tiles: int
    groups: int = 32
    warps: int = 4

    @property
    def width(self) -> int:
        """Tokens of a program."""
        return self.groups * _GROUP * self.tiles


def parts_for(rows: int) -> Parts:
    """With few rows all programs run at once, and what counts is how long one takes. With many, it is what all of them
    do beside reading logits: learning how the row is sampled, and comparing their threads' best.

    On an H200, 256 rows take 31 us greedy and 68 with noise with 8 tiles, 50 and 99 with 1, 31 and 74 with 16; 64 rows
    12 and 21 with 8, 15 and 27 with 1; 8 rows 6.4 and 7.2, and 4.5 and 6.2.
    """
    return Parts(tiles=1 if rows <= 16 else 8)


def sample_triton(
    logits: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables
) -> torch.Tensor:
    """Compute `model.sampler.sample` on a GPU; the arguments are described there."""
    rows, vocab_size = logits.shape
    assert logits.is_contiguous(), "sample reads contiguous rows of logits"
    parts = parts_for(rows)
    num_parts = triton.cdiv(vocab_size, parts.width)
    num_groups = triton.cdiv(vocab_size, _GROUP)
    device = logits.device
    group_max = torch.empty((rows, num_groups), dtype=torch.float32, device=device)
    group_mass = torch.empty_like(group_max)
    groups = torch.empty((rows, num_groups), dtype=torch.int32, device=device)
    few = torch.empty((rows, _FEW), dtype=torch.float32, device=device)
    part_best = torch.empty((rows, num_parts), dtype=torch.float32, device=device)
    part_token = torch.empty((rows, num_parts), dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int32, device=device)
    inputs = (
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
    )
    dependent = dependent_launch(logits)
    settings = {
        "MIN_TEMPERATURE": MIN_TEMPERATURE,
        "GROUP": _GROUP,
        "STOP_IDS": tables.stop_ids.shape[1],
        "APPROX": use_triton(logits),
        "PDL": bool(dependent),
        "enable_fp_fusion": False,  # round as torch does
        **dependent,
    }
    _score_kernel[(num_parts, rows)](
        *inputs,
        group_max,
        group_mass,
        part_best,
        part_token,
        vocab_size,
        TILE_GROUPS=parts.groups,
        TILES=parts.tiles,
        num_warps=parts.warps,
        maxnreg=64,  # eight programs a multiprocessor, so that the next kernel finds room among them, too
        **settings,
    )
    _choose_kernel[(rows,)](
        *inputs,
        group_max,
        group_mass,
        groups,
        few,
        part_best,
        part_token,
        tokens,
        vocab_size,
        num_groups,
        num_parts,
        PARTS=triton.next_power_of_2(num_parts),
        GROUPS=triton.next_power_of_2(num_groups),
        LISTED=_LISTED_GROUPS,
        FEW=_FEW,
        num_warps=8,
        maxnreg=128,  # two programs a multiprocessor; left alone, the compiler aims at more and spills
        **settings,
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
    stop_ids_ptr,  # [slots, STOP_IDS] int32
    min_length_ptr,
    counts_ptr,  # [slots, vocab_size] int32
    group_max_ptr,  # [rows, ceil(vocab_size / GROUP)] float32, written for rows that truncate: highest tempered scores
    group_mass_ptr,  # same, written where all tokens count for top-p: sums of exp(score - the group's highest)
    part_best_ptr,  # [rows, parts] float32: the part's highest score, with noise unless the row is greedy or truncates
    part_token_ptr,  # [rows, parts] int32: its token; -1 where a score of the part is NaN or +inf
    vocab_size,
    MIN_TEMPERATURE: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    STOP_IDS: tl.constexpr,
    APPROX: tl.constexpr,
    PDL: tl.constexpr,
):
    begin_dependents(PDL)
    wait(PDL)
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    TILE: tl.constexpr = TILE_GROUPS * GROUP
    end = tl.minimum((part + 1) * TILES * TILE, vocab_size)
    group = part * TILES * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits_row = logits_ptr + row * vocab_size
    # Asked for before anything else: all the rest depends on what lies in the slot.
    logit = tl.load(logits_row + token, mask=token < vocab_size, other=float("-inf"))
    slot = tl.load(slots_ptr + row).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    seed = tl.load(seed_ptr + slot)
    rules = _rules_of(
        slot, length, temperature, presence_ptr, frequency_ptr, repetition_ptr, stop_ids_ptr, min_length_ptr,
        counts_ptr, vocab_size, MIN_TEMPERATURE, STOP_IDS,
    )  # fmt: skip
    draws = temperature >= MIN_TEMPERATURE
    truncates = draws & _truncates(top_k, top_p, min_p, vocab_size)
    weighs = truncates & _weighs_all(top_k, top_p, vocab_size)
    num_groups = tl.cdiv(vocab_size, GROUP)

    # The best of each place of a tile, over all tiles. Where no token is better than those behind the vocabulary's end,
    # they are not the lowest.
    best = tl.full([TILE_GROUPS, GROUP], float("-inf"), tl.float32)
    best_token = token
    for _ in range(TILES):
        upcoming = logit
        if TILES > 1:
            beyond = token + TILE
            upcoming = tl.load(logits_row + beyond, mask=beyond < end, other=float("-inf"))
        score = _score(logit.to(tl.float32), token, token < vocab_size, rules, STOP_IDS)
        if draws & (truncates == 0):
            score = _with_noise(score, seed, length, token, APPROX)
        if truncates:
            group_max = tl.reduce(score, 1, _larger_or_nan)
            tl.store(group_max_ptr + row * num_groups + group, group_max, mask=group < num_groups)
            if weighs:
                finite = (group_max > float("-inf")) & (group_max < float("inf"))
                weight = tl.exp(score - tl.where(finite, group_max, 0.0)[:, None])
                tl.store(group_mass_ptr + row * num_groups + group, tl.sum(weight, axis=1), mask=group < num_groups)
        best_token = tl.where(score > best, token, best_token)
        best = _larger_or_nan(best, score)
        group += TILE_GROUPS
        token += TILE
        logit = upcoming
    highest = tl.reduce(tl.reduce(best, 1, _larger_or_nan), 0, _larger_or_nan)
    best_token = _lowest_token(best == highest, best_token)
    usable = highest < float("inf")
    place = row * tl.num_programs(0) + part
    tl.store(part_best_ptr + place, tl.where(usable, highest, float("-inf")))
    tl.store(part_token_ptr + place, tl.where(usable, best_token, -1))


@jit_once("slots_ptr", "lengths_ptr")
def _choose_kernel(
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
    stop_ids_ptr,  # [slots, STOP_IDS] int32
    min_length_ptr,
    counts_ptr,  # [slots, vocab_size] int32
    group_max_ptr,  # [rows, num_groups] float32, only of rows that truncate
    group_mass_ptr,  # [rows, num_groups] float32, only of rows of which all tokens count for top-p
    groups_ptr,  # [rows, num_groups] int32, scratch: the groups that can hold a survivor
    few_ptr,  # [rows, FEW] float32, scratch: the scores that can survive, where there are few
    part_best_ptr,  # [rows, num_parts] float32
    part_token_ptr,  # [rows, num_parts] int32
    tokens_ptr,  # [rows] int32
    vocab_size,
    num_groups,
    num_parts,
    MIN_TEMPERATURE: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    LISTED: tl.constexpr,
    FEW: tl.constexpr,
    GROUP: tl.constexpr,
    STOP_IDS: tl.constexpr,
    APPROX: tl.constexpr,
    PDL: tl.constexpr,
):
    begin_dependents(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    is_part = part < num_parts
    part_best = tl.load(part_best_ptr + row * num_parts + part, mask=is_part, other=float("-inf"))
    part_token = tl.load(part_token_ptr + row * num_parts + part, mask=is_part, other=0)
    unusable = tl.min(part_token, axis=0) < 0
    highest = tl.max(part_best, axis=0)
    is_best = is_part & (part_best == highest)
    chosen = tl.min(tl.where(is_best, part_token, 0x7FFFFFFF), axis=0)

    slot = tl.load(slots_ptr + row).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    draws = (temperature >= MIN_TEMPERATURE) & _truncates(top_k, top_p, min_p, vocab_size)
    if draws & (unusable == 0) & (highest > float("-inf")):
        rules = _rules_of(
            slot, length, temperature, presence_ptr, frequency_ptr, repetition_ptr, stop_ids_ptr, min_length_ptr,
            counts_ptr, vocab_size, MIN_TEMPERATURE, STOP_IDS,
        )  # fmt: skip
        groups_row = groups_ptr + row * num_groups
        scores = (logits_ptr + row * vocab_size, groups_row, vocab_size, rules)
        maxima_and_mass = (group_max_ptr + row * num_groups, group_mass_ptr + row * num_groups, num_groups)
        limits = (top_k, top_p, min_p)
        lowest, target, num_listed, score, token = _bound_survivors(
            scores, maxima_and_mass, few_ptr + row * FEW, limits, highest, GROUPS, LISTED, FEW, GROUP, STOP_IDS
        )
        seed = tl.load(seed_ptr + slot)
        chosen = _draw_survivor(
            scores, score, token, num_listed, lowest, target, highest, seed, length, APPROX, LISTED, GROUP, STOP_IDS
        )
    tl.store(tokens_ptr + row, tl.where(unusable, -1, chosen))


@jit
def _bound_survivors(
    scores, maxima_and_mass, few_row, limits, highest,
    GROUPS: tl.constexpr, LISTED: tl.constexpr, FEW: tl.constexpr, GROUP: tl.constexpr, STOP_IDS: tl.constexpr,
):  # fmt: skip
    """Return `lowest`, which all survivors reach, and `target`: of the tokens that reach it, those survive above which
    there is less weight than that, or all where it is inf. Further how many groups are listed, which hold all of these,
    and the first ones' scores and tokens, [LISTED * GROUP].

    scores: as for `_listed_scores`; maxima_and_mass: what `_score_kernel` left of the row's groups, and their number.
    """
    groups_row, vocab_size = scores[1], scores[2]
    group_max_row, group_mass_row, num_groups = maxima_and_mass
    top_k, top_p, min_p = limits
    group = tl.arange(0, GROUPS)
    is_group = group < num_groups
    group_max = tl.load(group_max_row + group, mask=is_group, other=float("-inf"))
    has_top_k = _has_top_k(top_k, vocab_size)
    lowest = tl.full([], float("-inf"), tl.float32)
    target = tl.full([], float("inf"), tl.float32)
    if has_top_k:
        lowest = _bound_of_top_k(group_max, top_k, highest)
    elif top_p < 1.0:
        group_mass = tl.load(group_mass_row + group, mask=is_group, other=0.0)
        weight = tl.exp(group_max - highest)
        mass = tl.sum(group_mass * weight, axis=0)
        target = top_p * mass
        lowest = _bound_of_top_p(group_max, weight, target, mass, highest, vocab_size)
    elif min_p > 0.0:
        lowest = highest + tl.log(min_p)
    num_listed = _list_groups(group_max, groups_row, lowest, GROUPS)
    score, token = _listed_scores(scores, 0, num_listed, LISTED, GROUP, STOP_IDS)
    if has_top_k:
        if _are_few(score, num_listed, lowest, LISTED, FEW):
            lowest = _threshold_of_few(few_row, score, lowest, highest, top_k, top_p, FEW)
        else:
            lowest = _threshold_of_top_k(scores, score, num_listed, lowest, highest, top_k, LISTED, GROUP, STOP_IDS)
            if top_p < 1.0:
                bounds = (lowest, float("-inf"))
                target = top_p * _total(scores, score, num_listed, bounds, highest, True, LISTED, GROUP, STOP_IDS)
    if min_p > 0.0:
        lowest = tl.maximum(lowest, highest + tl.log(min_p))
    return lowest, target, num_listed, score, token


@jit
def _has_top_k(top_k, vocab_size):
    return (top_k > 0) & (top_k < vocab_size)


@jit
def _truncates(top_k, top_p, min_p, vocab_size):
    return _has_top_k(top_k, vocab_size) | (top_p < 1.0) | (min_p > 0.0)


@jit
def _weighs_all(top_k, top_p, vocab_size):
    """Whether top-p leaves a part of the mass of all tokens."""
    return (top_p < 1.0) & (_has_top_k(top_k, vocab_size) == 0)


@jit
def _rules_of(
    slot, length, temperature, presence_ptr, frequency_ptr, repetition_ptr, stop_ids_ptr, min_length_ptr, counts_ptr,
    vocab_size, MIN_TEMPERATURE: tl.constexpr, STOP_IDS: tl.constexpr,
):  # fmt: skip
    """Return what `_score` must know of a slot."""
    presence = tl.load(presence_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    repetition = tl.load(repetition_ptr + slot)
    penalizes = (presence != 0.0) | (frequency != 0.0) | (repetition != 1.0)
    bans = length < tl.load(min_length_ptr + slot)
    scale = tl.div_rn(1.0, tl.where(temperature >= MIN_TEMPERATURE, temperature, 1.0))
    counts_row = counts_ptr + slot * vocab_size
    inverse_repetition = tl.div_rn(1.0, repetition)
    stop_ids_row = stop_ids_ptr + slot * STOP_IDS
    return penalizes, presence, frequency, repetition, inverse_repetition, counts_row, bans, stop_ids_row, scale


@jit
def _score(logit, token, mask, rules, STOP_IDS: tl.constexpr):
    """Return the tempered scores of some tokens from their logits: the same bits in both kernels."""
    penalizes, presence, frequency, repetition, inverse_repetition, counts_row, bans, stop_ids_row, scale = rules
    score = logit
    if penalizes:
        count = tl.load(counts_row + token, mask=mask, other=0)
        in_output = count >> 1
        factor = tl.where(score > 0.0, inverse_repetition, repetition)
        score = tl.where(count > 0, score * factor, score)
        score = score - frequency * in_output.to(tl.float32) - tl.where(in_output > 0, presence, 0.0)
    if bans:
        for i in range(STOP_IDS):
            banned = (token == tl.load(stop_ids_row + i)) & (score < float("inf"))  # what is unusable stays so
            score = tl.where(banned, float("-inf"), score)
    return score * scale


@jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _lowest_token(is_best, token):
    """Return the lowest token id among the best of a two-dimensional tile."""
    return tl.min(tl.min(tl.where(is_best, token, 0x7FFFFFFF), axis=1), axis=0)


@jit
def _bound_of_top_k(group_max, k, highest):
    """Return a value that the maxima of k groups reach, and so k scores; or -inf where there are fewer within 64.

    It lies less than a sixteenth below the highest such value: what it is for is listing few groups.
    """
    low = tl.full([], -1, tl.int32)  # of 1,024 parts of highest - 64 .. highest
    high = tl.full([], 1024, tl.int32)
    while high - low > 1:
        middle = (low + high) >> 1
        enough = tl.sum((group_max >= highest - (1024 - middle) * 0.0625).to(tl.int32), axis=0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return tl.where(low < 0, float("-inf"), highest - (1024 - low) * 0.0625)


@jit
def _bound_of_top_p(group_max, weight, target, mass, highest, vocab_size):
    """Return a value that all reach of what top-p keeps of `mass`, which is `target`.

    weight: of each group's highest score. If those of the groups whose highest reach a value come to the target, then
    so do all scores from there up. The value is at most a hundredth below the highest of which that is true.
    """
    bound = highest + tl.log((mass - target) / vocab_size)  # below, all tokens weigh less than is cut off
    low = _order_of(tl.minimum(bound, highest))  # a GPU's quotient of equal numbers may come to more than 1
    high = _order_of(highest)
    while high - low >= 1 << 16:
        middle = low + ((high - low + 1) >> 1)
        enough = tl.sum(tl.where(group_max >= _value_of(middle), weight, 0.0), axis=0) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return _value_of(low)


@jit
def _list_groups(group_max, groups_ptr, lowest, GROUPS: tl.constexpr):
    """List the groups that hold a score from `lowest` up, in ascending order; return how many."""
    listed = (group_max >= lowest) & (group_max > float("-inf"))
    tl.debug_barrier()  # other threads of this program may still read an earlier list
    place = tl.cumsum(listed.to(tl.int32), axis=0) - 1
    tl.store(groups_ptr + place, tl.arange(0, GROUPS), mask=listed)
    tl.debug_barrier()  # and will read this one
    return tl.sum(listed.to(tl.int32), axis=0)


@jit
def _are_few(score, num_listed, lowest, LISTED: tl.constexpr, FEW: tl.constexpr):
    """Whether no more than FEW scores reach `lowest`, all of them of the first groups."""
    return (num_listed <= LISTED) & (tl.sum((score >= lowest).to(tl.int32), axis=0) <= FEW)


@jit
def _threshold_of_few(few_ptr, score, lowest, highest, top_k, top_p, FEW: tl.constexpr):
    """Return the value from which up scores survive top-k and top-p, where few reach `lowest`, and no others can: each
    of these is compared with each.
    """
    is_candidate = score >= lowest
    place = tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
    tl.store(few_ptr + place, score, mask=is_candidate)
    tl.debug_barrier()  # other threads of this program read it
    number = tl.arange(0, FEW)
    is_one = number < tl.sum(is_candidate.to(tl.int32), axis=0)
    few = tl.load(few_ptr + number, mask=is_one, other=float("-inf"))
    higher = few[:, None] > few[None, :]
    kept = tl.sum(higher.to(tl.int32), axis=0) < top_k
    weight = tl.where(kept, tl.exp(few - highest), 0.0)
    above = tl.sum(tl.where(higher, weight[:, None], 0.0), axis=0)
    target = tl.where(top_p < 1.0, top_p * tl.sum(weight, axis=0), float("inf"))
    return tl.min(tl.where(kept & is_one & (above < target), few, highest), axis=0)


@jit
def _threshold_of_top_k(
    scores, score, num_listed, lowest, highest, top_k,
    LISTED: tl.constexpr, GROUP: tl.constexpr, STOP_IDS: tl.constexpr,
):  # fmt: skip
    """Return a value that top_k listed scores reach and no more, but where some are equal, by bisection."""
    low = _order_of(lowest)
    high = _order_of(highest)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        bounds = (_value_of(middle), float("-inf"))
        count = _total(scores, score, num_listed, bounds, highest, False, LISTED, GROUP, STOP_IDS)
        low = tl.where(count >= top_k, middle, low)
        high = tl.where(count > top_k, high, middle - 1)  # and so ends where the count is met
    return _value_of(low)


@jit
def _draw_survivor(
    scores, score, token, num_listed, lowest, target, highest, seed, length,
    APPROX: tl.constexpr, LISTED: tl.constexpr, GROUP: tl.constexpr, STOP_IDS: tl.constexpr,
):  # fmt: skip
    """Return the survivor with the highest score plus noise.

    The arguments are what `_bound_survivors` returns. The best of all that reach `lowest` is the best of the survivors,
    if it is one. If not, none is that has no higher score, and the best of the others is looked at. How much weight is
    left by then is uniformly distributed, so that this ends soon, mostly at once.
    """
    chosen = tl.full([], 0, tl.int32)
    beyond = tl.full([], float("-inf"), tl.float32)
    above = target
    while (above >= target) & (beyond < highest):  # the highest survives, even where the target is 0
        bounds = (lowest, beyond)
        chosen = _draw(scores, score, token, num_listed, bounds, seed, length, APPROX, LISTED, GROUP, STOP_IDS)
        above = tl.full([], 0.0, tl.float32)
        if target < float("inf"):
            logits_row, _, _, rules = scores
            beyond = _score(tl.load(logits_row + chosen).to(tl.float32), chosen, True, rules, STOP_IDS)
            bounds = (lowest, beyond)
            above = _total(scores, score, num_listed, bounds, highest, True, LISTED, GROUP, STOP_IDS)
    return chosen


@jit
def _draw(
    scores, score, token, num_listed, bounds, seed, length,
    APPROX: tl.constexpr, LISTED: tl.constexpr, GROUP: tl.constexpr, STOP_IDS: tl.constexpr,
):  # fmt: skip
    """Return the token with the highest score plus noise among the listed ones within bounds.

    score, token: those of the first groups, [LISTED * GROUP]; the others are made.
    """
    best = tl.full([LISTED * GROUP], float("-inf"), tl.float32)
    best_token = token
    for start in range(0, num_listed, LISTED):
        if start > 0:
            score, token = _listed_scores(scores, start, num_listed, LISTED, GROUP, STOP_IDS)
        noisy = _with_noise(score, seed, length, token, APPROX)
        better = _within(score, bounds) & (noisy > best)
        best = tl.where(better, noisy, best)
        best_token = tl.where(better, token, best_token)
    is_best = (best == tl.max(best, axis=0)) & (best > float("-inf"))
    return tl.min(tl.where(is_best, best_token, 0x7FFFFFFF), axis=0)


@jit
def _total(
    scores, score, num_listed, bounds, highest,
    WEIGHTED: tl.constexpr, LISTED: tl.constexpr, GROUP: tl.constexpr, STOP_IDS: tl.constexpr,
):  # fmt: skip
    """Return how many listed scores are within bounds, or with WEIGHTED the sum of exp(score - highest) over them.

    score: those of the first groups, [LISTED * GROUP]; the others are made.
    """
    total = _weight(score, bounds, highest, WEIGHTED)
    for start in range(LISTED, num_listed, LISTED):
        more, _ = _listed_scores(scores, start, num_listed, LISTED, GROUP, STOP_IDS)
        total += _weight(more, bounds, highest, WEIGHTED)
    return tl.sum(total, axis=0)


@jit
def _weight(score, bounds, highest, WEIGHTED: tl.constexpr):
    weight = 1.0
    if WEIGHTED:
        weight = tl.exp(score - highest)
    return tl.where(_within(score, bounds), weight, 0.0)


@jit
def _within(score, bounds):
    """Whether scores reach the first of two bounds, and lie above the second."""
    lowest, beyond = bounds
    return (score >= lowest) & (score > beyond)


@jit
def _listed_scores(scores, start, num_listed, LISTED: tl.constexpr, GROUP: tl.constexpr, STOP_IDS: tl.constexpr):
    """Make LISTED groups' scores, from the list's place `start` on (-inf where there is none), and their token ids,
    [LISTED * GROUP] each.

    scores: a row's logits and list of groups, the vocabulary's size, and the row's rules.
    """
    logits_row, groups_row, vocab_size, rules = scores
    number = tl.arange(0, LISTED * GROUP)
    place = start + number // GROUP
    group = tl.load(groups_row + place, mask=place < num_listed, other=0)
    token = group * GROUP + number % GROUP
    valid = (place < num_listed) & (token < vocab_size)
    logit = tl.load(logits_row + token, mask=valid, other=float("-inf")).to(tl.float32)
    return _score(logit, token, valid, rules, STOP_IDS), token


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
def _with_noise(score, seed, length, token, APPROX: tl.constexpr):
    """Add `model.sampler.gumbel_noise` to a tile of one row's scores.

    With APPROX by the GPU's own logarithm, whose error is 2^-22: absolutely near one, relatively elsewhere. So that it
    does not show where the result is nearly zero, the series is longer and used up to larger values. The noise is then
    within 1e-5 of the definition's.
    """
    key = _mix64(_mix64(seed.to(tl.uint64, bitcast=True)) + length.to(tl.uint64))
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    bits = _mix32(_mix32(token.to(tl.uint32) ^ low) ^ high)
    v = tl.fma(bits.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # (bits + 0.5) / 2^32
    rest = tl.maximum(1.0 - v, 2.9802322387695312e-08)
    if APPROX:
        LN2: tl.constexpr = 0.6931471805599453
        slope = tl.fma(v, tl.fma(v, tl.fma(v, tl.fma(v, 0.2, 0.25), 0.3333333333333333), 0.5), 1.0)
        exponential = tl.where(v < 0.0625, v * slope, tl.extra.cuda.libdevice.fast_log2f(rest) * -LN2)
        noisy = tl.fma(tl.extra.cuda.libdevice.fast_log2f(exponential), -LN2, score)
    else:
        series = v + v * v * (0.5 + v * 0.3333333333333333)
        noisy = score - tl.log(tl.where(v < 0.0078125, series, -tl.log(rest)))
    return noisy


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
