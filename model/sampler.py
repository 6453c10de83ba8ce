"""Sampling: every slot's parameters on the device, and what it means to draw one token a row.

`sample_torch` is the definition; `model/kernels/sampling.py` computes the same on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Self

import torch

from model.kernels.runtime import use_triton
from model.kernels.sampling import MIN_TEMPERATURE, sample_triton
from model.parallel import TensorParallel

_CHUNK = 1 << 18  # scores that get noise at a time: what is made of them meanwhile stays in a core's caches
_TIES = 32  # scores behind the k-th that are looked at, too, as they may equal it


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTables:
    """Sampling parameters and token counts of every slot, on the device, indexed by slot.

    Fresh tables hold the neutral values: greedy, nothing truncated, nothing penalized, nothing banned.
    """

    temperature: torch.Tensor  # [slots] float32; below 1e-5: greedy
    top_k: torch.Tensor  # [slots] int32; 0: off
    top_p: torch.Tensor  # [slots] float32; 1: off
    min_p: torch.Tensor  # [slots] float32; 0: off
    presence: torch.Tensor  # [slots] float32; 0: off
    frequency: torch.Tensor  # [slots] float32; 0: off
    repetition: torch.Tensor  # [slots] float32, above 0; 1: off
    seed: torch.Tensor  # [slots] int64: the 64 bits of an unsigned seed
    stop_ids: torch.Tensor  # [slots, max_stop_ids] int32, padded with -1
    min_length: torch.Tensor  # [slots] int32: length of the whole sequence below which stop ids are banned
    counts: torch.Tensor  # [slots, vocab_size] int32: 2 * (times in the output) + (1 if in the prompt)

    @classmethod
    def allocate(cls, num_slots: int, vocab_size: int, max_stop_ids: int, device: torch.device | str) -> Self:
        def full(value: float, dtype: torch.dtype, *width: int) -> torch.Tensor:
            return torch.full((num_slots, *width), value, dtype=dtype, device=device)

        return cls(
            temperature=full(0, torch.float32),
            top_k=full(0, torch.int32),
            top_p=full(1, torch.float32),
            min_p=full(0, torch.float32),
            presence=full(0, torch.float32),
            frequency=full(0, torch.float32),
            repetition=full(1, torch.float32),
            seed=full(0, torch.int64),
            stop_ids=full(-1, torch.int32, max_stop_ids),
            min_length=full(0, torch.int32),
            counts=full(0, torch.int32, vocab_size),
        )

    @property
    def num_bytes(self) -> int:
        """Device memory that the tables take."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def sample(logits: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables) -> torch.Tensor:
    """Draw each row's next token; returns [rows] int32, -1 for a row whose logits or scores hold a NaN or +inf.

    logits: [rows, vocab_size] in the model's dtype, contiguous. slots: [rows] int32, each row's index into `tables`.
    lengths: [rows] int32, tokens of the sequence so far, which is the position of the token that is drawn.

    In float32, in this order:
      1. the repetition penalty divides positive logits of tokens in prompt or output, and multiplies others; then
         frequency times the occurrences in the output, and presence for any of them, are subtracted;
      2. while length < min_length, the slot's stop ids are banned;
      3. greedy rows take the highest logit, ties to the lowest id, and are done; others divide by the temperature
         (here and in 1., dividing is multiplying by the reciprocal, which float32 rounds: it costs a tenth);
      4. top-k keeps the values from the k-th highest up (ties with it included);
      5. top-p keeps, of those, the highest-probability tokens down to the value at which their mass reaches top_p of
         the mass that top-k left (ties included, so that the order of ids does not matter; at least one);
      6. min-p keeps tokens with at least min_p times the highest probability;
      7. the token with the highest logit + Gumbel noise is drawn, ties to the lowest id.

    The noise is a function of (seed, length, token id) alone, so the same logits, seed and position draw the same token
    whatever the row, the batch and the slot. Nothing waits for the host; usable inside a CUDA graph.
    """
    return (sample_triton if use_triton(logits) else sample_torch)(logits, slots, lengths, tables)


def sample_share(
    logits: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables, tp: TensorParallel
) -> torch.Tensor:
    """Compute `sample` with the rows shared out over the ranks: each draws for its own, and all learn of all tokens.

    logits: those of this rank's share, [ceil(rows / size), vocab_size], as `ParallelLMHead.forward_share` gives them;
    the share of rank r are the r-th so many rows. The other arguments are of all rows, the same on every rank; so is
    what is returned, [rows] int32.
    """
    rows, share = len(slots), len(logits)
    missing = share * tp.size - rows
    if missing:  # rows that nobody asks for draw with the first slot's parameters
        slots, lengths = (torch.cat((of_row, of_row.new_zeros(missing))) for of_row in (slots, lengths))
    own = slice(tp.rank * share, (tp.rank + 1) * share)
    return tp.all_gather_rows(sample(logits, slots[own], lengths[own], tables))[:rows]


def sample_torch(
    logits: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables
) -> torch.Tensor:
    """Compute `sample` with plain torch operations: the reference, and what runs on the CPU.

    There a pass over the vocabulary costs as much as a layer of a small model. Two are for every row; more are only for
    those that ask for it.
    """
    usable = logits.amax(dim=-1) < math.inf  # nor is it so with a NaN
    tokens = logits.argmax(dim=-1)
    banning = _banned(slots, lengths, tables).any(dim=-1)
    changed = (_is_penalized(slots, tables) | banning | _is_drawing(slots, tables)).nonzero().squeeze(1)
    if len(changed):
        tokens[changed] = _choose(logits[changed].float(), slots[changed], lengths[changed], tables)
    return torch.where(usable, tokens, -1).int()


def _choose(scores: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables) -> torch.Tensor:
    """Return a token for each row of scores, which it may overwrite."""
    penalized = _is_penalized(slots, tables).nonzero().squeeze(1)
    if len(penalized):
        scores[penalized] = _penalize(scores[penalized], slots[penalized], tables)
    rows, columns = _banned(slots, lengths, tables).nonzero(as_tuple=True)
    scores[rows, tables.stop_ids[slots[rows], columns].long()] = -math.inf
    tokens = scores.argmax(dim=-1)
    highest = scores.gather(1, tokens.unsqueeze(1)).squeeze(1)
    drawing = _is_drawing(slots, tables).nonzero().squeeze(1)
    scale = tables.temperature[slots[drawing]].reciprocal()
    tokens[drawing] = _draw(scores[drawing] * scale.unsqueeze(1), slots[drawing], lengths[drawing], tables)
    highest[drawing] *= scale
    return torch.where(highest < math.inf, tokens, -1)


def _is_penalized(slots: torch.Tensor, tables: SamplingTables) -> torch.Tensor:
    return (tables.repetition[slots] != 1) | (tables.frequency[slots] != 0) | (tables.presence[slots] != 0)


def _is_drawing(slots: torch.Tensor, tables: SamplingTables) -> torch.Tensor:
    return tables.temperature[slots] >= MIN_TEMPERATURE


def _banned(slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables) -> torch.Tensor:
    """Tell which of the slots' stop ids [rows, max_stop_ids] may not come yet."""
    return (tables.stop_ids[slots] >= 0) & (lengths < tables.min_length[slots]).unsqueeze(1)


def _penalize(scores: torch.Tensor, slots: torch.Tensor, tables: SamplingTables) -> torch.Tensor:
    counts = tables.counts[slots]
    in_output = counts >> 1
    repetition, frequency, presence = (
        table[slots].unsqueeze(1) for table in (tables.repetition, tables.frequency, tables.presence)
    )
    repeated = scores * torch.where(scores > 0, repetition.reciprocal(), repetition)
    scores = torch.where(counts > 0, repeated, scores)
    return scores - frequency * in_output - presence * (in_output > 0)


def _draw(scores: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables) -> torch.Tensor:
    """Draw from tempered scores [rows, vocab]."""
    top_k = tables.top_k[slots]
    limited, others = (top_k > 0).nonzero().squeeze(1), (top_k <= 0).nonzero().squeeze(1)
    tokens = torch.empty_like(slots, dtype=torch.int64)
    if len(limited):
        values, ids = _top_k(scores[limited], top_k[limited])
        tokens[limited] = _draw_survivor(values, ids, slots[limited], lengths[limited], tables)
    if len(others):
        ids = torch.arange(scores.shape[1], device=scores.device)
        for rows in others.split(max(1, _CHUNK // len(ids))):
            tokens[rows] = _draw_survivor(scores[rows], ids.expand(len(rows), -1), slots[rows], lengths[rows], tables)
    return tokens


def _top_k(scores: torch.Tensor, top_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's k highest scores and what ties with the last of them, with their ids, which ascend.

    [rows, n] both, for the largest such number n; further values of a row are -inf.
    """
    top_k = top_k.clamp(max=scores.shape[1]).long()
    values, ids = scores.topk(min(int(top_k.max()) + _TIES, scores.shape[1]))
    kth = values.gather(1, top_k.unsqueeze(1) - 1)
    if bool((values[:, -1:] >= kth).any()):  # there may be more of them
        ids = scores.topk(int((scores >= kth).sum(dim=1).max())).indices
    ids = ids.sort(dim=-1).values
    values = scores.gather(1, ids)
    return values.masked_fill(values < kth, -math.inf), ids


def _draw_survivor(
    values: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables
) -> torch.Tensor:
    """Return the id of the candidate with the highest value plus noise, of those that top-p and min-p keep.

    values, ids: [rows, n]; ids ascend. A token survives top-p if those with higher values weigh less than top_p of all.
    So the best of all is drawn, and is the best of the survivors if it is one. If not, none is that has no higher
    value, and the best of the others is looked at. No row has to be sorted for that.
    """
    top_p, min_p = tables.top_p[slots].unsqueeze(1), tables.min_p[slots].unsqueeze(1)
    highest = values.amax(dim=-1, keepdim=True)
    noisy = values + gumbel_noise(tables.seed[slots], lengths, ids)
    noisy.masked_fill_(values < highest + min_p.log(), -math.inf)
    best = noisy.argmax(dim=-1, keepdim=True)
    if bool((top_p < 1).any()):
        weight = (values - highest).exp()
        target = top_p * weight.sum(dim=-1, keepdim=True, dtype=torch.float64)
        while True:
            value = values.gather(1, best)
            above = weight.masked_fill(values <= value, 0.0).sum(dim=-1, keepdim=True, dtype=torch.float64)
            is_cut = (top_p < 1) & (above >= target) & (value < highest)
            if not bool(is_cut.any()):
                break
            noisy.masked_fill_(is_cut & (values <= value), -math.inf)
            best = noisy.argmax(dim=-1, keepdim=True)
    return ids.gather(1, best).squeeze(1)


def gumbel_noise(seeds: torch.Tensor, lengths: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise [rows, n] float32, a function of (seed, length, token id) alone.

    seeds: [rows] int64 (64 bits of an unsigned seed), lengths: [rows] int32, token_ids: [rows, n] or [n] int64. -log of
    an exponential variate, which is -log(1 - v) for a uniform v of 32 bits; a series takes over where v is small, since
    those are the tokens that win.
    """
    v = _random_bits(seeds, lengths, token_ids).float().add_(0.5).mul_(2.0**-32)
    series = (v * v).mul_((v * (1 / 3)).add_(0.5)).add_(v)
    exponential = torch.where(v < 2.0**-7, series, (1 - v).clamp_(min=2.0**-25).log_().neg_())
    return exponential.log_().neg_()


def _random_bits(seeds: torch.Tensor, lengths: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return 32 random bits [rows, n] as int64: a key of 64 bits per row, mixed with each token id.

    In int32, of which processors multiply whole vectors: several times as fast as in int64.
    """
    key = _mix64(_mix64(seeds) + lengths).unsqueeze(1)
    bits = _mix32(_mix32(token_ids.int() ^ key.int()) ^ (key >> 32).int())
    return bits.long() & 0xFFFFFFFF


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """Step splitmix64 from state x; int64 holds the bits of the unsigned value, sums and products wrap."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """Mix 32 bits with the lowbias32 finalizer; int32 holds the bits of the unsigned value."""
    x = (x ^ _shift_right(x, 16)) * 0x7FEB352D
    x = (x ^ _shift_right(x, 15)) * _signed(0x846CA68B, 32)
    return x ^ _shift_right(x, 16)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without copying the sign."""
    return (x >> bits) & ((1 << (x.dtype.itemsize * 8 - bits)) - 1)


def _signed(constant: int, bits: int = 64) -> int:
    return constant - (1 << bits) if constant >= 1 << (bits - 1) else constant
