"""Rotary position embedding (arXiv:2104.09864) and its scaling strategies, as one table of cosines and sines.

A strategy turns a `RopeConfig` into one frequency per pair of dimensions. All arithmetic is float32 in the order that
transformers uses, because at long contexts the rounding of a frequency shows in the angle, and checkpoints were trained
with exactly that rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from model.config import RopeConfig, RopeType


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_positions: int) -> torch.Tensor:
    """Return the [head_dim / 2] float32 angles per position, on the CPU, for a table of `max_positions` rows."""
    return _STRATEGIES[rope.rope_type](rope, head_dim, max_positions)


def _plain(theta: float, head_dim: int) -> torch.Tensor:
    """theta^(-2i/d), the original formula."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    return 1.0 / (theta**exponents)


def _default(rope: RopeConfig, head_dim: int, max_positions: int) -> torch.Tensor:
    return _plain(rope.theta, head_dim)


def _linear(rope: RopeConfig, head_dim: int, max_positions: int) -> torch.Tensor:
    """Position interpolation (arXiv:2306.15595): positions, and so angles, shrink by the factor."""
    return _plain(rope.theta, head_dim) / rope.factor


def _dynamic(rope: RopeConfig, head_dim: int, max_positions: int) -> torch.Tensor:
    """NTK-aware scaling (arXiv:2309.00071, appendix A.2) for the longest sequence that this server takes.

    The original recomputes the base whenever a sequence grows past the trained context. Keys in a KV cache, shared by
    sequences of many lengths, cannot be rotated again, so the base is fixed at `max_positions`: sequences of that
    length are as the formula says, shorter ones are scaled like them. A server that takes no more than the trained
    context scales nothing.
    """
    length = max(max_positions, rope.original_max_position)
    stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
    return _plain(rope.theta * stretch ** (head_dim / (head_dim - 2)), head_dim)


def _yarn(rope: RopeConfig, head_dim: int, max_positions: int) -> torch.Tensor:
    """YaRN (arXiv:2309.00071, section 3.2): interpolate slow dimensions, keep fast ones, blend in a ramp between."""

    def dimension_of(rotations: float) -> float:
        """The dimension pair that turns `rotations` times over the trained context."""
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # a ramp of no width is a step
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    plain, interpolated = 1.0 / wavelengths, 1.0 / (rope.factor * wavelengths)
    weight = 1 - ramp  # and 1 - weight below, not ramp: rounds as transformers does
    return interpolated * (1 - weight) + plain * weight


_STRATEGIES: Mapping[RopeType, Callable[[RopeConfig, int, int], torch.Tensor]] = MappingProxyType(
    {"default": _default, "linear": _linear, "dynamic": _dynamic, "yarn": _yarn}
)


class RotaryEmbedding(nn.Module):
    """Owns the table that the q/k-norm + RoPE + KV-write kernel reads; one serves every layer.

    `cos_sin`: [max_positions, head_dim] float32, first half cosines, second half sines, YaRN's factor multiplied in.
    """

    cos_sin: torch.Tensor

    def __init__(self, rope: RopeConfig, head_dim: int, max_positions: int, *, device: torch.device) -> None:
        super().__init__()
        self._rope = rope
        self._head_dim = head_dim
        self._max_positions = max_positions
        self.register_buffer(
            "cos_sin", torch.empty(max_positions, head_dim, dtype=torch.float32, device=device), persistent=False
        )
        self.reset()

    def reset(self) -> None:
        """Compute the table, on the CPU so that every rank and device has the same; nothing to do on meta."""
        if self.cos_sin.is_meta:
            return
        frequencies = inverse_frequencies(self._rope, self._head_dim, self._max_positions)
        angles = torch.arange(self._max_positions, dtype=torch.float32, device="cpu")[:, None] * frequencies
        table = torch.cat((angles.cos(), angles.sin()), dim=-1) * self._rope.attention_factor
        self.cos_sin.copy_(table)
