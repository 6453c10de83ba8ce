"""What one forward pass is told, as one explicit argument from the runner down to the attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True, kw_only=True)
class StepInputs:
    """A batch of rows: decode rows of one query token each, and prefill chunks of any length.

    A row's queries are its newest tokens: query i of a row with q queries and kv_len k stands at position k - q + i and
    sees the keys 0 .. k - q + i. A dead row (padding of a CUDA graph, or a finished request that was still planned) has
    kv_len 0 and kv_slots -1: it reads no keys, writes none, and its outputs are never used. Padding rows of a mixed
    step's graph have no queries at all, and its padding tokens belong to no row.

    What a step holds is known to the host only outside of a CUDA graph; in one, the numbers are bounds for all steps.

    All tensors are on the model's device; int32 unless said otherwise.
    """

    token_ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    kv_slots: torch.Tensor  # [tokens] int64: block * block_size + offset where key and value go; -1: nowhere
    query_starts: torch.Tensor  # [rows + 1] first token of each row
    kv_lens: torch.Tensor  # [rows] keys that the row's last query sees, this step's included
    block_tables: torch.Tensor  # [rows, max_blocks] KV block of each block_size tokens; entries past kv_len are garbage
    num_decode_rows: int  # rows at the front that are known to have one query
    max_single_rows: int  # at most so many rows have one query, those at the front included
    max_chunk_rows: int  # at most so many rows have more than one
    max_query_len: int  # over all rows
    max_kv_len: int  # over all rows
    attention_plan: Any = None  # what the attention backend's `plan` made of the step, for the layers' `forward`

    @property
    def num_rows(self) -> int:
        return self.kv_lens.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]
