"""Which steps get a CUDA graph of their own: so many decode rows, or so many tokens and rows (of prompts, or any).

A step is padded to the first shape that it fits: with rows of the scratch slot, tokens of no row, block updates for the
scratch slot's table, and admissions to no slot. All that a graph reads is one array of words, so that a step is one
launch. A step without a graph has a shape of its own, for the same words.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from model.attention import CapturedSteps
from worker.plan import ADMISSION, NO_ADMISSION, StepBounds, StepPlan
from worker.runtime import RuntimeConfig

_DECODE_ROWS = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 4097, 64))
_FEW_ROWS = 8
_FEW_TOKENS = 1024  # of prompts: in longer steps, launches for nobody are less than 0.4 % of the time
_MAX_ADMISSIONS = 16
_ADMISSION_WORDS = ADMISSION.itemsize // 4


class StepWords(NamedTuple):
    """What a step on a GPU reads: arrays on the host, or tensors on the device."""

    slots: Any  # [rows] int32
    query_lens: Any  # [rows] int32
    updates: Any  # [updates, 3] int32: slot, index in its block table, block
    admissions: Any  # [admissions, words] int32: `ADMISSION`s
    ids: Any  # [ids] int32: those of the admissions


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step has room for."""

    num_rows: int
    bounds: StepBounds
    max_updates: int
    max_admissions: int = 0
    max_ids: int = 0

    @classmethod
    def decode(cls, rows: int, max_model_len: int) -> StepShape:
        """A step of decode rows alone; padding rows are dead decodes."""
        bounds = StepBounds(
            num_tokens=rows,
            num_decode_rows=rows,
            max_single_rows=rows,
            max_chunk_rows=0,
            max_query_len=1,
            max_kv_len=max_model_len,
        )
        return cls(rows, bounds, max_updates=rows)

    @classmethod
    def mixed(cls, tokens: int, rows: int, max_model_len: int) -> StepShape:
        """A step of any rows; padding rows have no tokens, padding tokens no row.

        It admits sequences, unless there are very many, or their prompts longer than the step.
        """
        bounds = StepBounds(
            num_tokens=tokens,
            num_decode_rows=0,
            max_single_rows=rows,
            max_chunk_rows=min(rows, tokens // 2),
            max_query_len=tokens,
            max_kv_len=max_model_len,
        )
        return cls(
            rows, bounds, max_updates=_max_updates(rows), max_admissions=min(rows, _MAX_ADMISSIONS), max_ids=tokens
        )

    @classmethod
    def prompts(cls, tokens: int, rows: int, max_model_len: int) -> StepShape:
        """A mixed step without rows of one query, for which each layer then launches nothing."""
        mixed = cls.mixed(tokens, rows, max_model_len)
        return replace(mixed, bounds=replace(mixed.bounds, max_single_rows=0))

    @classmethod
    def of(cls, plan: StepPlan, max_running: int) -> StepShape:
        """The shape of a step that gets no graph: its own. It admits nobody, and enters no unusual number of blocks."""
        updates = len(plan.block_updates)
        return cls(plan.num_rows, plan.bounds, max_updates=updates if updates <= _max_updates(max_running) else 0)

    @property
    def is_decode(self) -> bool:
        return self.bounds.max_chunk_rows == 0

    @property
    def num_words(self) -> int:
        """int32 words of its input, of which those of `split` follow one another."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> tuple[int, ...]:
        updates, admissions = 3 * self.max_updates, _ADMISSION_WORDS * self.max_admissions
        return self.num_rows, self.num_rows, updates, admissions, self.max_ids

    def split(self, words: Any) -> StepWords:
        """Divide the words of its input, an array on the host or a tensor on the device."""
        ends = itertools.accumulate(self._sizes)
        slots, lens, updates, admissions, ids = (
            words[end - size : end] for end, size in zip(ends, self._sizes, strict=True)
        )
        return StepWords(slots, lens, updates.reshape(-1, 3), admissions.reshape(-1, _ADMISSION_WORDS), ids)

    def fits(self, plan: StepPlan) -> bool:
        if self.is_decode and not plan.is_decode:
            return False
        if plan.num_single_rows > self.bounds.max_single_rows:
            return False
        return plan.num_rows <= self.num_rows and plan.num_tokens <= self.bounds.num_tokens

    def admits(self, plan: StepPlan) -> bool:
        """Whether there is room for the sequences that a plan admits."""
        return len(plan.admissions) <= self.max_admissions and len(plan.admitted_ids) <= self.max_ids

    def enters(self, plan: StepPlan) -> bool:
        """Whether there is room for the blocks that a plan enters."""
        return len(plan.block_updates) <= self.max_updates

    def fill(self, words: np.ndarray, plan: StepPlan, scratch_slot: int) -> None:
        """Write the input for `plan` into `words` int32, padded to the first `num_words` of them.

        What it has no room for, admissions or block updates, is left out, all of a kind.
        """
        parts = self.split(words)
        parts.slots[: plan.num_rows] = plan.slots
        parts.slots[plan.num_rows :] = scratch_slot
        parts.query_lens[: plan.num_rows] = plan.query_lens
        parts.query_lens[plan.num_rows :] = int(self.is_decode)
        updates = len(plan.block_updates) if self.enters(plan) else 0
        parts.updates[:updates] = plan.block_updates[:updates]
        parts.updates[updates:] = (scratch_slot, 0, 0)
        admissions = len(plan.admissions) if self.admits(plan) else 0
        ids = len(plan.admitted_ids) if admissions else 0
        parts.admissions[:admissions] = plan.admissions[:admissions].view(np.int32).reshape(-1, _ADMISSION_WORDS)
        parts.admissions[admissions:] = NO_ADMISSION.view(np.int32)
        parts.ids[:ids] = plan.admitted_ids[:ids]


def _max_updates(rows: int) -> int:
    """Block updates that a step of any rows has room for: more come when a long prefix is found in the cache."""
    return rows + 128


def input_words(shapes: Sequence[StepShape], max_running: int) -> int:
    """int32 words of the largest input of a step: one of `shapes`, or without a graph."""
    return max([2 * max_running + 3 * _max_updates(max_running), *(shape.num_words for shape in shapes)])


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
        few = min(_FEW_ROWS, limit)
        for tokens in runtime.captured_tokens:
            if tokens <= _FEW_TOKENS:
                shapes.append(StepShape.prompts(tokens, few, runtime.max_model_len))
            shapes += [StepShape.mixed(tokens, rows, runtime.max_model_len) for rows in sorted({few, limit})]
    return shapes
