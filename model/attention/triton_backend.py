"""Attention by this project's Triton kernels: the backend of choice on CUDA, at any block size."""

from __future__ import annotations

from typing import Final

import torch

from model.errors import ModelError
from model.inputs import StepInputs
from model.kernels.attention import AttentionPlan, paged_attention_triton, paged_decode_triton, plan_attention
from model.kernels.decode_attention import streams
from model.kernels.rope_kv import Projected
from model.kernels.runtime import wanted

_FEW_PROGRAMS = 128
"""Where keys do not stream (`decode_attention`), so many rows times KV heads are decoded in one launch with the norms
and RoPE: one for each of a Hopper's 132 multiprocessors. With twice as many it is slower. With a power of two, a step
and the graph that it is padded to are on the same side. A lone row is left out: it is split among many programs, each
of which would norm and rotate the same."""


class TritonAttention:
    """Implements `AttentionBackend`; see there."""

    graphs: Final = "all"

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Raises ModelError for a block size that is no power of two of at least 16."""
        if block_size < 16 or block_size & (block_size - 1):
            raise ModelError(f"attention backend triton needs a block size of 16, 32, 64, ..., not {block_size}")
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._block_size = block_size
        self._scale = scale
        self._dtype = dtype

    def plan(self, inputs: StepInputs) -> AttentionPlan:
        """List the step's units of work on the device."""
        return plan_attention(
            inputs.query_starts,
            inputs.kv_lens,
            inputs.block_tables,
            block_size=self._block_size,
            num_tokens=inputs.num_tokens,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            dtype=self._dtype,
            max_single_rows=inputs.max_single_rows,
            max_chunk_rows=inputs.max_chunk_rows,
        )

    def forward(
        self, q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, inputs: StepInputs
    ) -> torch.Tensor:
        """Return [tokens, heads, head_dim]; zeros for dead rows. Tokens of no row are undefined."""
        return paged_attention_triton(
            q, key_cache, value_cache, inputs.block_tables, self._scale, inputs.attention_plan
        )

    def decode(
        self, projected: Projected, key_cache: torch.Tensor, value_cache: torch.Tensor, inputs: StepInputs
    ) -> torch.Tensor | None:
        """Return what `forward` does, for steps of rows of one query where that pays; see `AttentionBackend`."""
        if inputs.num_decode_rows < inputs.num_rows or not wanted("fused_decode"):
            return None
        few = inputs.num_rows > 1 and inputs.num_rows * self._num_kv_heads <= _FEW_PROGRAMS
        if not few and not streams(self._num_heads, self._head_dim, key_cache):
            return None
        return paged_decode_triton(
            projected, key_cache, value_cache, inputs.block_tables, self._scale, inputs.attention_plan
        )
