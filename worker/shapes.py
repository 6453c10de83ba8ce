"""Which steps get a CUDA graph of their own: so many decode rows, or so many tokens and rows of any kind.

A step is padded to the first shape that it fits: with rows of the scratch slot, tokens of no row, and block updates for
the scratch slot's table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.attention import CapturedSteps
from worker.plan import StepBounds, StepPlan
from worker.runtime import RuntimeConfig

_DECODE_ROWS = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 4097, 64))
_MIXED_TOKENS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_FEW_ROWS = 8
_LAUNCH_BOUND_FLOPS = 1e13
"""A step of more takes the device longer (some 15 ms) than the host takes to launch it: padding it would be a waste."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a captured step has room for."""

    num_rows: int
    bounds: StepBounds
    max_updates: int

    @classmethod
    def decode(cls, rows: int, max_model_len: int) -> StepShape:
        """A step of decode rows alone; padding rows are dead decodes."""
        bounds = StepBounds(
            num_tokens=rows, num_decode_rows=rows, max_chunk_rows=0, max_query_len=1, max_kv_len=max_model_len
        )
        return cls(rows, bounds, max_updates=rows)

    @classmethod
    def mixed(cls, tokens: int, rows: int, max_model_len: int) -> StepShape:
        """A step of any rows; padding rows have no tokens, padding tokens no row."""
        bounds = StepBounds(
            num_tokens=tokens,
            num_decode_rows=0,
            max_chunk_rows=min(rows, tokens // 2),
            max_query_len=tokens,
            max_kv_len=max_model_len,
        )
        return cls(rows, bounds, max_updates=rows + 128)

    @property
    def is_decode(self) -> bool:
        return self.bounds.max_chunk_rows == 0

    @property
    def num_words(self) -> int:
        """int32 words of its input: slots, query_lens, block updates."""
        return 2 * self.num_rows + 3 * self.max_updates

    def fits(self, plan: StepPlan) -> bool:
        if self.is_decode and not plan.is_decode:
            return False
        return plan.num_rows <= self.num_rows and plan.num_tokens <= self.bounds.num_tokens

    def fill(self, words: np.ndarray, plan: StepPlan, updates: np.ndarray, scratch_slot: int) -> None:
        """Write the input for `plan` with `updates` [n, 3] into `words` [num_words] int32, padded."""
        slots, query_lens = words[: 2 * self.num_rows].reshape(2, self.num_rows)
        slots[: plan.num_rows] = plan.slots
        slots[plan.num_rows :] = scratch_slot
        query_lens[: plan.num_rows] = plan.query_lens
        query_lens[plan.num_rows :] = int(self.is_decode)
        entered = words[2 * self.num_rows :].reshape(self.max_updates, 3)
        entered[: len(updates)] = updates
        entered[len(updates) :] = (scratch_slot, 0, 0)


def step_shapes(runtime: RuntimeConfig, captured: CapturedSteps) -> list[StepShape]:
    """The steps that get a graph of their own, cheapest first; a step is padded to the first that it fits."""
    if captured == "none":
        return []
    limit = runtime.max_running
    shapes = [
        StepShape.decode(rows, runtime.max_model_len)
        for rows in [*(rows for rows in _DECODE_ROWS if rows < limit), limit]
    ]
    if captured == "all":
        most = min(runtime.max_batched_tokens, _LAUNCH_BOUND_FLOPS / runtime.flops_per_token)
        shapes += [
            StepShape.mixed(tokens, rows, runtime.max_model_len)
            for tokens in _MIXED_TOKENS
            if tokens <= most
            for rows in sorted({min(_FEW_ROWS, limit), limit})
        ]
    return shapes
