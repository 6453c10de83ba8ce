"""What one forward pass is told, as one explicit argument from the runner down to the attention kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True, kw_only=True)
class StepInputs:
    """A batch of rows: first `num_decode_rows` rows of one query token each, then prefill chunks of any length.

    A row's queries are its newest tokens: query i of a row with q queries and kv_len k stands at position k - q + i and
    sees the keys 0 .. k - q + i. A dead row (padding of a CUDA graph, or a finished request that was still planned) has
    kv_len 0 and kv_slots -1: it reads no keys, writes none, and its outputs are never used (they must still be finite).

    All tensors are on the model's device; int32 unless said otherwise.
    """

    token_ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    kv_slots: torch.Tensor  # [tokens] int64: block * block_size + offset where key and value go; -1: nowhere
    query_starts: torch.Tensor  # [rows + 1] first token of each row
    kv_lens: torch.Tensor  # [rows] keys that the row's last query sees, this step's included
    block_tables: torch.Tensor  # [rows, max_blocks] KV block of each block_size tokens; entries past kv_len are garbage
    num_decode_rows: int
    max_query_len: int  # over the prefill rows; 1 when there are none
    max_kv_len: int  # an upper bound over all rows (inside a CUDA graph: the longest that can ever be)

    @property
    def num_rows(self) -> int:
        return self.kv_lens.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]
