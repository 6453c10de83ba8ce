"""The device's own state of every running request: tables with a row per slot, read and written by steps alone.

The host tells the device about a slot once, when a sequence is seated (`admit`), and about new KV blocks
(`set_blocks`). Everything else a step does itself: `prepare` gathers what the model needs, `retire` writes the drawn
tokens back and marks the rows that are done. All of it is free of host synchronisation and of data-dependent shapes, so
that the same code runs eagerly and inside a CUDA graph. The last row is scratch: padding rows point there, and it is
always done.

The torch code here is the definition; `worker/table_kernels.py` computes the same on a GPU, with a launch for each.
There a step begins with `fetch` and ends with `retire_to`, since its input and its tokens lie in the host's memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from model.inputs import StepInputs
from model.kernels.runtime import use_triton
from model.sampler import SamplingTables
from worker.handover import Handover
from worker.messages import MAX_STOP_IDS
from worker.plan import ADMISSION, StepBounds, StepPlan
from worker.scheduler import BROKEN_ROW, NO_TOKEN
from worker.shapes import StepShape, StepWords
from worker.table_kernels import admit_triton, enter_blocks_triton, fetch_triton, prepare_triton, retire_triton

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


@dataclass(frozen=True, slots=True)
class SlotState:
    """The tables. Steps are their only writers."""

    tokens: torch.Tensor  # [slots, max_model_len] int32: prompt and output
    blocks: torch.Tensor  # [slots, max_blocks] int32: KV blocks in order
    computed: torch.Tensor  # [slots] int32: tokens whose keys and values are in the cache
    length: torch.Tensor  # [slots] int32: tokens that there are
    max_length: torch.Tensor  # [slots] int32: at which the sequence is done
    done: torch.Tensor  # [slots] bool
    sampling: SamplingTables
    block_size: int


@dataclass(slots=True)
class Rows:
    """What a step goes on with after the model."""

    slots: torch.Tensor  # [rows] int32
    query_lens: torch.Tensor  # [rows] int32
    lengths: torch.Tensor  # [rows] int32: the position that each row's next token gets
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
        self.max_blocks = -(-max_model_len // block_size)
        self.device = device
        self.state = SlotState(
            tokens=torch.zeros((rows, max_model_len), dtype=torch.int32, device=device),
            blocks=torch.zeros((rows, self.max_blocks), dtype=torch.int32, device=device),
            computed=torch.zeros(rows, dtype=torch.int32, device=device),
            length=torch.ones(rows, dtype=torch.int32, device=device),
            max_length=torch.ones(rows, dtype=torch.int32, device=device),
            done=torch.ones(rows, dtype=torch.bool, device=device),
            sampling=SamplingTables.allocate(rows, vocab_size, MAX_STOP_IDS, device),
            block_size=block_size,
        )
        self.use_triton = use_triton(self.state.done)

    @property
    def sampling(self) -> SamplingTables:
        return self.state.sampling

    def admit(self, plan: StepPlan) -> None:
        """Write the rows of the sequences that the plan seats."""
        words = plan.admissions.view(np.int32)
        packed = upload(np.concatenate((words, plan.admitted_ids)), self.device)  # at once: a copy takes its time
        records, ids = packed[: len(words)].view(len(plan.admissions), -1), packed[len(words) :]
        if self.use_triton:
            self.admit_records(records, ids)
        else:
            admit_torch(self.state, records, ids, plan.admissions)

    def admit_records(self, records: torch.Tensor, ids: torch.Tensor) -> None:
        """`admit` on a GPU, by what is there already: ADMISSIONs as [admissions, words] int32, some of them to no slot
        (-1), and the ids of all of them."""
        admit_triton(self.state, records, ids)

    def set_blocks(self, updates: torch.Tensor) -> None:
        """Enter new KV blocks: [n, 3] int32 of slot, index in its block table, block (on the device)."""
        if self.use_triton:
            enter_blocks_triton(self.state, updates)
        else:
            slots, indices, blocks = updates.long().unbind(1)
            self.state.blocks[slots, indices] = blocks.int()

    def fetch(self, handover: Handover, shape: StepShape) -> StepWords:
        """Begin a step on a GPU: fetch the input that `shape` has filled the step's place with, and do what it tells of
        admissions and new blocks. Returns the input, on the device."""
        words = shape.split(handover.input)
        first_update = words.updates.storage_offset()
        fetch_triton(self.state, handover, shape.num_words, first_update, shape.max_updates)
        if shape.max_admissions:
            self.admit_records(words.admissions, words.ids)
        return words

    def prepare(self, slots: torch.Tensor, query_lens: torch.Tensor, bounds: StepBounds) -> tuple[StepInputs, Rows]:
        """Gather a step's inputs. `slots` and `query_lens`: [rows] int32, of at most `bounds.num_tokens` tokens."""
        if self.use_triton:
            made = prepare_triton(
                self.state, slots, query_lens, bounds.num_tokens, decode_only=bounds.max_chunk_rows == 0
            )
        else:
            made = prepare_torch(self.state, slots, query_lens, bounds.num_tokens)
        rows = Rows(slots, query_lens, made.pop("lengths"), made.pop("last_tokens"))
        inputs = StepInputs(
            **made,
            num_decode_rows=bounds.num_decode_rows,
            max_single_rows=bounds.max_single_rows,
            max_chunk_rows=bounds.max_chunk_rows,
            max_query_len=bounds.max_query_len,
            max_kv_len=bounds.max_kv_len,
        )
        return inputs, rows

    def retire(self, rows: Rows, drawn: torch.Tensor) -> torch.Tensor:
        """Write the drawn tokens ([rows] int32, -1 where the logits hold a NaN) back and advance the rows.

        Returns [rows] int32: the token, NO_TOKEN where the row drew none, BROKEN_ROW where it holds a NaN.
        """
        return retire_torch(self.state, rows.slots, rows.query_lens, drawn)

    def retire_to(self, handover: Handover, rows: Rows, drawn: torch.Tensor) -> None:
        """End a step on a GPU: `retire`, with what it returns left in the step's place."""
        retire_triton(
            self.state, rows.slots, rows.query_lens, drawn, handover, no_token=NO_TOKEN, broken_row=BROKEN_ROW
        )


def admit_torch(state: SlotState, records: torch.Tensor, ids: torch.Tensor, admissions: np.ndarray) -> None:
    """`SlotTables.admit`; `records` are the ADMISSIONs `admissions` as [admissions, words] int32."""
    as_type = {"<i4": records, "<f4": records.view(torch.float32), "<i8": records.view(torch.int64)}

    def column(name: str) -> torch.Tensor:
        dtype, offset = _FIELDS[name]
        width = dtype.shape[0] if dtype.shape else 1
        first = offset // dtype.base.itemsize
        columns = as_type[dtype.base.str][:, first : first + width]
        return columns if dtype.shape else columns[:, 0]

    slots = column("slot").long()
    state.computed[slots] = column("num_cached")
    state.length[slots] = column("num_ids")
    state.max_length[slots] = column("max_length")
    state.done.index_fill_(0, slots, False)
    for name in SAMPLING_COLUMNS:
        getattr(state.sampling, name)[slots] = column(name)
    offset = 0
    for record in admissions:
        slot, num_ids, num_prompt = (int(record[name]) for name in ("slot", "num_ids", "num_prompt"))
        own = ids[offset : offset + num_ids]
        offset += num_ids
        state.tokens[slot, :num_ids] = own
        if record["penalizes"]:
            counts = state.sampling.counts[slot]
            counts.zero_()
            output = own[num_prompt:].long()
            counts.index_add_(0, output, torch.full_like(output, 2, dtype=counts.dtype))
            counts[own[:num_prompt].long()] |= 1


def prepare_torch(
    state: SlotState, slots: torch.Tensor, query_lens: torch.Tensor, num_tokens: int
) -> dict[str, torch.Tensor]:
    """`SlotTables.prepare`: its tensors by their names in `StepInputs` and `Rows`."""
    device = slots.device
    live = ~state.done[slots] & (query_lens > 0)
    before = state.computed[slots]
    after = before + query_lens
    starts = torch.zeros(len(slots) + 1, dtype=torch.int32, device=device)
    torch.cumsum(query_lens, 0, dtype=torch.int32, out=starts[1:])
    row_of = torch.repeat_interleave(torch.arange(len(slots), device=device), query_lens)
    positions = before[row_of] + (torch.arange(len(row_of), dtype=torch.int32, device=device) - starts[row_of])
    token_slots = slots[row_of]
    block = state.blocks[token_slots, positions // state.block_size]
    kv_slots = torch.where(live[row_of], block.long() * state.block_size + positions % state.block_size, -1)
    unowned = (0, num_tokens - len(row_of))
    return {
        "token_ids": F.pad(state.tokens[token_slots, positions], unowned),
        "positions": F.pad(positions, unowned),
        "kv_slots": F.pad(kv_slots, unowned, value=-1),
        "query_starts": starts,
        "kv_lens": torch.where(live, after, 0),
        "block_tables": state.blocks[slots],
        "lengths": state.length[slots],
        "last_tokens": (starts[1:] - 1).clamp(min=0).long(),
    }


def retire_torch(state: SlotState, slots: torch.Tensor, query_lens: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """`SlotTables.retire`."""
    live = ~state.done[slots] & (query_lens > 0)
    length = state.length[slots]
    after = state.computed[slots] + query_lens
    samples = live & (after == length)
    valid, broken = samples & (drawn >= 0), samples & (drawn < 0)
    state.computed[slots[live]] = after[live]
    written, tokens = slots[valid], drawn[valid]
    state.tokens[written, length[valid]] = tokens
    state.sampling.counts[written, tokens] += 2
    state.length[written] = length[valid] + 1
    stopped = (tokens[:, None] == state.sampling.stop_ids[written]).any(1)
    state.done[written] = stopped | (length[valid] + 1 == state.max_length[written])
    state.done[slots[broken]] = True
    return torch.where(valid, drawn, torch.where(broken, BROKEN_ROW, NO_TOKEN)).int()


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy a host array to the device without waiting for it."""
    host = torch.from_numpy(np.array(array))  # a copy: the array may be a read-only view of a frame
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
