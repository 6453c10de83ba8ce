"""Attention in plain torch: the backend of the CPU.

Row by row: a row's keys and values are read where they lie if their blocks follow each other, else gathered into a
buffer that stays in the processor's cache, and read once by torch's fused attention. Padding all rows to the longest
and gathering them together was slower from 16 rows of a few hundred tokens on, and a row computed alone cannot depend
on its neighbours. Lengths are read back to the host, so on a GPU this cannot be part of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

from model.inputs import StepInputs
from model.kernels.rope_kv import Projected


@dataclass(frozen=True, slots=True)
class _Row:
    """A living row of a step."""

    queries: slice
    kv_len: int
    blocks: slice | torch.Tensor
    """Of the cache: a slice where they follow each other, as most do until the cache has been full once."""


class TorchAttention:
    """Implements `AttentionBackend`; see there. Not for several threads at once: they would share its buffers."""

    graphs: Final = "none"

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
        self._group = num_heads // num_kv_heads  # query heads that share a KV head
        self._scale = scale
        self._block_size = block_size
        self._gathered = torch.empty(2, 0, block_size, num_kv_heads, head_dim, dtype=dtype, device=device)

    def plan(self, inputs: StepInputs) -> list[_Row]:
        """List the living rows."""
        starts = inputs.query_starts.tolist()
        return [
            _Row(slice(starts[row], starts[row + 1]), kv_len, self._blocks(inputs.block_tables[row], kv_len))
            for row, kv_len in enumerate(inputs.kv_lens.tolist())
            if kv_len
        ]

    def forward(
        self, q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, inputs: StepInputs
    ) -> torch.Tensor:
        """Return [tokens, heads, head_dim]; zeros for dead rows and for tokens of no row."""
        out = torch.zeros_like(q)
        rows: list[_Row] = inputs.attention_plan
        for row in rows:
            keys, values = self._read(key_cache, value_cache, row.blocks)
            out[row.queries] = self._attend(q[row.queries], keys[: row.kv_len], values[: row.kv_len])
        return out

    def decode(
        self, projected: Projected, key_cache: torch.Tensor, value_cache: torch.Tensor, inputs: StepInputs
    ) -> None:
        """Nothing is faster in one."""

    def _blocks(self, block_table: torch.Tensor, kv_len: int) -> slice | torch.Tensor:
        table = block_table[: -(-kv_len // self._block_size)]
        blocks = table.tolist()
        first, last = blocks[0], blocks[-1]
        return slice(first, last + 1) if blocks == list(range(first, last + 1)) else table

    def _read(
        self, key_cache: torch.Tensor, value_cache: torch.Tensor, blocks: slice | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the blocks, [tokens, kv_heads, head_dim] each, valid until the next call."""
        if isinstance(blocks, slice):
            return key_cache[blocks].flatten(0, 1), value_cache[blocks].flatten(0, 1)
        if len(blocks) > self._gathered.shape[1]:
            # Kept, and grown by doubling: fresh memory of this size costs more in page faults than the copy into it.
            self._gathered = self._gathered.new_empty(2, 2 * len(blocks), *self._gathered.shape[2:])
        keys, values = self._gathered[:, : len(blocks)].unbind(0)
        torch.index_select(key_cache, 0, blocks, out=keys)
        torch.index_select(value_cache, 0, blocks, out=values)
        return keys.flatten(0, 1), values.flatten(0, 1)

    def _attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attend from the newest tokens of one row, [queries, heads, head_dim], to all of it."""
        num_queries, num_heads, head_dim = q.shape
        keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
        if num_queries == 1:
            # The query heads of a group stand where queries of one head would: no key is copied for them.
            grouped = q.view(1, -1, self._group, head_dim)
            return F.scaled_dot_product_attention(grouped, keys, values, scale=self._scale).view(1, num_heads, head_dim)
        kv_len = keys.shape[2]
        mask = None
        if num_queries < kv_len:
            mask = torch.ones(num_queries, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - num_queries)
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
            enable_gqa=self._group > 1,
        )
        return attended.squeeze(0).transpose(0, 1)
