"""Attention by this project's Triton kernels: the backend of choice on CUDA, at any block size."""

from __future__ import annotations

import torch

from model.errors import ModelError
from model.inputs import StepInputs
from model.kernels.attention import paged_decode_triton, paged_prefill_triton


class TritonAttention:
    """Implements `AttentionBackend`; see there."""

    capturable = True

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
        self._scale = scale

    def forward(
        self, q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, inputs: StepInputs
    ) -> torch.Tensor:
        """Return [tokens, heads, head_dim]; zeros for dead rows. Tokens of no row are undefined."""
        out = torch.empty_like(q)
        decodes = inputs.num_decode_rows
        if decodes:
            paged_decode_triton(
                q[:decodes],
                key_cache,
                value_cache,
                inputs.block_tables[:decodes],
                inputs.kv_lens[:decodes],
                self._scale,
                inputs.max_kv_len,
                out[:decodes],
            )
        if inputs.num_rows > decodes:
            paged_prefill_triton(
                q,
                key_cache,
                value_cache,
                inputs.block_tables[decodes:],
                inputs.query_starts[decodes:],
                inputs.kv_lens[decodes:],
                self._scale,
                inputs.max_query_len,
                out,
            )
        return out
