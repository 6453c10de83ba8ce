"""The device's own state of every running request: tables with a row per slot, read and written by steps alone.

The host tells the device about a slot once, when a sequence is seated (`admit`), and about new KV blocks
(`set_blocks`). Everything else a step does itself: `prepare` gathers what the model needs, `retire` writes the drawn
tokens back and marks the rows that are done. All of it is free of host synchronisation and of data-dependent shapes, so
that the same code runs eagerly and inside a CUDA graph. The last row is scratch: padding rows point there, and it is
always done.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model.inputs import StepInputs
from model.sampler import SamplingTables
from worker.messages import MAX_STOP_IDS
from worker.plan import ADMISSION, StepPlan
from worker.scheduler import BROKEN_ROW, NO_TOKEN

SAMPLING_COLUMNS = (
    "temperature",
    "top_p",
    "min_p",
    "presence",
    "frequency",
    "repetition",
    "top_k",
    "seed",
    "stop_ids",
    "min_length",
)
"""Fields that ADMISSION and SamplingTables have in common, by the same names."""

_FIELDS = {name: (dtype, offset) for name, (dtype, offset, *_) in (ADMISSION.fields or {}).items()}
"""Type and offset in bytes of each field of an ADMISSION."""


@dataclass(slots=True)
class Rows:
    """What `retire` needs of a prepared step."""

    slots: torch.Tensor  # [rows] int64
    live: torch.Tensor  # [rows] bool
    computed_after: torch.Tensor  # [rows] int32
    samples: torch.Tensor  # [rows] bool
    last_tokens: torch.Tensor  # [rows] int64: index of the row's last token in the step


class SlotTables:
    """Device tables for `num_slots` requests (and the scratch row) of at most `max_model_len` tokens.

    Bytes: about 4 per slot and token of context, and 4 per slot and vocabulary entry (penalty counts).
    """

    def __init__(
        self, *, num_slots: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        rows = num_slots + 1
        self.scratch_slot = num_slots
        self.block_size = block_size
        self.max_blocks = -(-max_model_len // block_size)
        self.device = device
        self._tokens = torch.zeros((rows, max_model_len), dtype=torch.int32, device=device)
        self._blocks = torch.zeros((rows, self.max_blocks), dtype=torch.int32, device=device)
        self._computed = torch.zeros(rows, dtype=torch.int32, device=device)
        self._length = torch.ones(rows, dtype=torch.int32, device=device)
        self._max_length = torch.ones(rows, dtype=torch.int32, device=device)
        self._done = torch.ones(rows, dtype=torch.bool, device=device)
        self.sampling = SamplingTables.allocate(rows, vocab_size, MAX_STOP_IDS, device)

    def admit(self, plan: StepPlan) -> None:
        """Write the rows of the sequences that the plan seats."""
        # One upload for all records: every field is a column of the same bytes, read as its own type.
        words = upload(plan.admissions.view(np.int32).reshape(len(plan.admissions), -1), self.device)
        as_type = {"<i4": words, "<f4": words.view(torch.float32), "<i8": words.view(torch.int64)}

        def column(name: str) -> torch.Tensor:
            dtype, offset = _FIELDS[name]
            width = dtype.shape[0] if dtype.shape else 1
            first = offset // dtype.base.itemsize
            columns = as_type[dtype.base.str][:, first : first + width]
            return columns if dtype.shape else columns[:, 0]

        slots = column("slot").long()
        self._computed[slots] = column("num_cached")
        self._length[slots] = column("num_ids")
        self._max_length[slots] = column("max_length")
        self._done.index_fill_(0, slots, False)
        for name in SAMPLING_COLUMNS:
            getattr(self.sampling, name)[slots] = column(name)
        ids = upload(plan.admitted_ids, self.device)
        offset = 0
        for record in plan.admissions:
            slot, num_ids = int(record["slot"]), int(record["num_ids"])
            own = ids[offset : offset + num_ids]
            offset += num_ids
            self._tokens[slot, :num_ids] = own
            if record["penalizes"]:
                self._count(slot, own, int(record["num_prompt"]))

    def set_blocks(self, updates: torch.Tensor) -> None:
        """Enter new KV blocks: [n, 3] int32 of slot, index in its block table, block (on the device)."""
        slots, indices, blocks = updates.long().unbind(1)
        self._blocks[slots, indices] = blocks.int()

    def prepare(
        self, slots: torch.Tensor, query_lens: torch.Tensor, *, num_tokens: int, max_kv_len: int, plan: StepPlan
    ) -> tuple[StepInputs, Rows]:
        """Gather a step's inputs. `slots` [rows] int64, `query_lens` [rows] int32; other sizes come from the plan."""
        live = ~self._done[slots]
        before = self._computed[slots]
        after = before + query_lens
        starts = torch.zeros(len(slots) + 1, dtype=torch.int32, device=self.device)
        torch.cumsum(query_lens, 0, dtype=torch.int32, out=starts[1:])
        if num_tokens == len(slots):
            row_of = torch.arange(num_tokens, device=self.device)
        else:
            row_of = torch.repeat_interleave(
                torch.arange(len(slots), device=self.device), query_lens, output_size=num_tokens
            )
        positions = before[row_of] + (torch.arange(num_tokens, dtype=torch.int32, device=self.device) - starts[row_of])
        token_slots = slots[row_of]
        block = self._blocks[token_slots, (positions // self.block_size).long()]
        kv_slots = block.long() * self.block_size + positions % self.block_size
        inputs = StepInputs(
            token_ids=self._tokens[token_slots, positions.long()],
            positions=positions,
            kv_slots=torch.where(live[row_of], kv_slots, -1),
            query_starts=starts,
            kv_lens=torch.where(live, after, 0),
            block_tables=self._blocks[slots],
            num_decode_rows=plan.num_decode_rows,
            max_query_len=plan.max_query_len,
            max_kv_len=max_kv_len,
        )
        rows = Rows(
            slots=slots,
            live=live,
            computed_after=after,
            samples=live & (after == self._length[slots]),
            last_tokens=(starts[1:] - 1).long(),
        )
        return inputs, rows

    def lengths(self, rows: Rows) -> torch.Tensor:
        """[rows] int32: the position that each row's next token gets."""
        return self._length[rows.slots]

    def retire(self, rows: Rows, drawn: torch.Tensor) -> torch.Tensor:
        """Write the drawn tokens ([rows] int32, -1 where the logits hold a NaN) back and advance the rows.

        Returns [rows] int32: the token, NO_TOKEN where the row drew none, BROKEN_ROW where it holds a NaN.
        """
        slots = rows.slots
        broken = rows.samples & (drawn < 0)
        valid = rows.samples & (drawn >= 0)
        length = self._length[slots]
        # Rows that write nothing write to the scratch row, so that no shape depends on the data; and what they write is
        # a token, since padding rows read it there.
        targets = torch.where(valid, slots, self.scratch_slot)
        written = torch.where(valid, drawn, 0)
        self._tokens[targets, torch.where(valid, length, 0).long()] = written
        self.sampling.counts[targets, written.long()] += 2
        self._computed[slots] = torch.where(rows.live, rows.computed_after, self._computed[slots])
        length = length + valid.int()
        self._length[slots] = length
        stopped = (drawn[:, None] == self.sampling.stop_ids[slots]).any(1) & valid
        full = valid & (length == self._max_length[slots])
        self._done[slots] = ~rows.live | stopped | full | broken
        return torch.where(valid, drawn, torch.where(broken, BROKEN_ROW, NO_TOKEN)).int()

    def _count(self, slot: int, ids: torch.Tensor, num_prompt: int) -> None:
        counts = self.sampling.counts[slot]
        counts.zero_()
        output = ids[num_prompt:].long()
        counts.index_add_(0, output, torch.full_like(output, 2, dtype=counts.dtype))
        counts[ids[:num_prompt].long()] |= 1


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy a host array to the device without waiting for it."""
    host = torch.from_numpy(np.array(array))  # a copy: the array may be a read-only view of a frame
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host
