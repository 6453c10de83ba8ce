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
    """Draw each row's next token; returns [rows] int32, -1 for a row whose logits hold a NaN or +inf.

    logits: [rows, vocab_size] in the model's dtype, contiguous. slots: [rows] int32, each row's index into `tables`.
    lengths: [rows] int32, tokens of the sequence so far, which is the position of the token that is drawn.

    In float32, in this order:
      1. the repetition penalty divides positive logits of tokens in prompt or output, and multiplies others; then
         frequency times the occurrences in the output, and presence for any of them, are subtracted;
      2. while length < min_length, the slot's stop ids are banned;
      3. greedy rows take the highest logit, ties to the lowest id, and are done; others divide by the temperature;
      4. top-k keeps the values from the k-th highest up (ties with it included);
      5. top-p keeps, of those, the highest-probability tokens down to the value at which their mass reaches top_p of
         the mass that top-k left (ties included, so that the order of ids does not matter; at least one);
      6. min-p keeps tokens with at least min_p times the highest probability;
      7. the token with the highest logit + Gumbel noise is drawn, ties to the lowest id.

    The noise is a function of (seed, length, token id) alone, so the same logits, seed and position draw the same token
    whatever the row, the batch and the slot. Nothing waits for the host; usable inside a CUDA graph.
    """
    return (sample_triton if use_triton(logits) else sample_torch)(logits, slots, lengths, tables)


def sample_torch(
    logits: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables
) -> torch.Tensor:
    """Compute `sample` with plain torch operations: the reference, and what runs on the CPU."""
    scores = _penalize(logits.float(), slots, tables)
    scores = _ban_stop_ids(scores, slots, lengths, tables)
    drawing = (tables.temperature[slots] >= MIN_TEMPERATURE).nonzero().squeeze(1)
    scores[drawing] = _perturb(scores[drawing], slots[drawing], lengths[drawing], tables)
    usable = (logits < math.inf).all(dim=-1)
    return torch.where(usable, scores.argmax(dim=-1), -1).int()


def _penalize(scores: torch.Tensor, slots: torch.Tensor, tables: SamplingTables) -> torch.Tensor:
    counts = tables.counts[slots]
    in_output = counts >> 1
    repetition, frequency, presence = (
        table[slots].unsqueeze(1) for table in (tables.repetition, tables.frequency, tables.presence)
    )
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(counts > 0, repeated, scores)
    return scores - frequency * in_output - presence * (in_output > 0)


def _ban_stop_ids(
    scores: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables
) -> torch.Tensor:
    stop_ids = tables.stop_ids[slots]
    banned = (stop_ids >= 0) & (lengths < tables.min_length[slots]).unsqueeze(1)
    rows, columns = banned.nonzero(as_tuple=True)
    scores[rows, stop_ids[rows, columns].long()] = -math.inf
    return scores


def _perturb(scores: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, tables: SamplingTables) -> torch.Tensor:
    """Return tempered scores plus noise, -inf for what top-k, top-p and min-p cut off."""
    scores = scores / tables.temperature[slots].unsqueeze(1)
    lowest = _lowest_kept(scores, tables.top_k[slots], tables.top_p[slots], tables.min_p[slots])
    return scores.masked_fill(scores < lowest, -math.inf) + gumbel_noise(tables.seed[slots], lengths, scores.shape[1])


def _lowest_kept(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Return the value [rows, 1] from which up a tempered score [rows, vocab] survives top-k, top-p and min-p."""
    vocab_size = scores.shape[1]
    descending = scores.sort(dim=-1, descending=True).values
    highest = descending[:, :1]
    kth = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long() - 1
    lowest = descending.gather(1, kth.unsqueeze(1))
    mass = torch.where(descending >= lowest, (descending - highest).exp(), 0).double().cumsum(dim=-1)
    reached = mass >= top_p.unsqueeze(1) * mass[:, -1:]
    nucleus = descending.gather(1, reached.int().argmax(dim=-1, keepdim=True))
    lowest = torch.where(top_p.unsqueeze(1) < 1, torch.maximum(lowest, nucleus), lowest)
    return torch.maximum(lowest, highest + min_p.log().unsqueeze(1))


def gumbel_noise(seeds: torch.Tensor, lengths: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return standard Gumbel noise [rows, vocab_size] float32, a function of (seed, length, token id) alone.

    seeds: [rows] int64 (64 bits of an unsigned seed), lengths: [rows] int32. -log of an exponential variate, which is
    -log(1 - v) for a uniform v of 32 bits; a series takes over where v is small, since those are the tokens that win.
    """
    v = (_random_bits(seeds, lengths, vocab_size).float() + 0.5) * 2.0**-32
    series = v + v * v * (0.5 + v * (1 / 3))
    exponential = torch.where(v < 2.0**-7, series, -torch.log((1 - v).clamp(min=2.0**-25)))
    return -exponential.log()


def _random_bits(seeds: torch.Tensor, lengths: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return 32 random bits [rows, vocab_size] as int64: a key of 64 bits per row, mixed with each token id."""
    key = _mix64(_mix64(seeds) + lengths).unsqueeze(1)
    low, high = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    token_ids = torch.arange(vocab_size, device=seeds.device)
    return _mix32(_mix32(token_ids ^ low) ^ high)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """Step splitmix64 from state x; int64 holds the bits of the unsigned value, sums and products wrap."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """Mix 32 bits (held in an int64) with the lowbias32 finalizer."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without copying the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
