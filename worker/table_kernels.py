"""The Triton half of `worker/tables.py`, which says what these operations mean and holds their torch references.

A step turns to the tables three times, each with one launch: its input and new blocks, what the model needs, what was
drawn. In torch operations that is some fifty launches, which a decode step of a small model has no time for. The first
and the last of them reach into the host's memory (`worker/handover.py`), so that nothing else passes between the two.

All but the first are dependent launches (`model/kernels/dependent.py`), and read nothing before they wait. The first is
not: it changes the turn, which the last kernel of the step before must have read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead.)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.kernels.dependent import begin_dependents, dependent_launch, wait
from model.kernels.runtime import constexpr, jit, jit_once, tl, triton
from worker.handover import FETCHED_WORDS
from worker.plan import ADMISSION

if TYPE_CHECKING:
    from worker.handover import Handover
    from worker.tables import SlotState

_UPDATES = 256  # block updates of one program
_WIDTH = 1024  # tokens that a program copies at a time

# Where each field of an ADMISSION begins, in words of four bytes, for the kernel to read: in the order of the fields.
(
    _SLOT,
    _NUM_IDS,
    _NUM_PROMPT,
    _NUM_CACHED,
    _MAX_LENGTH,
    _MIN_LENGTH,
    _TOP_K,
    _PENALIZES,
    _SEED,
    _TEMPERATURE,
    _TOP_P,
    _MIN_P,
    _PRESENCE,
    _FREQUENCY,
    _REPETITION,
    _STOPS,
) = (constexpr(ADMISSION.fields[name][1] // 4) for name in ADMISSION.names or () if ADMISSION.fields)


def fetch_triton(state: SlotState, handover: Handover, num_words: int, first_update: int, num_updates: int) -> None:
    """Begin a step: fetch its input of `num_words`, and enter the new blocks that are told from word `first_update` on,
    three words each."""
    pieces = triton.cdiv(num_words, FETCHED_WORDS)
    _fetch_kernel[(pieces + triton.cdiv(num_updates, _UPDATES),)](
        handover.inputs,
        handover.turn,
        handover.input,
        state.blocks,
        pieces,
        first_update,
        num_updates,
        handover.inputs.shape[1],
        state.blocks.shape[1],
        WORDS=FETCHED_WORDS,
        UPDATES=_UPDATES,
        PDL=bool(dependent_launch(handover.input)),
        num_warps=4,
    )


def enter_blocks_triton(state: SlotState, updates: torch.Tensor) -> None:
    """Compute `SlotTables.set_blocks`."""
    count = updates.shape[0]
    _enter_blocks_kernel[(triton.cdiv(count, _UPDATES),)](
        updates, state.blocks, count, state.blocks.shape[1], UPDATES=_UPDATES, num_warps=4
    )


def admit_triton(state: SlotState, records: torch.Tensor, ids: torch.Tensor) -> None:
    """Compute `SlotTables.admit` from ADMISSION records as words, [admissions, words] int32, and [ids] int32."""
    count, words = records.shape
    sampling = state.sampling
    launch = dependent_launch(records)
    _admit_kernel[(count,)](
        records,
        ids,
        state.tokens,
        state.computed,
        state.length,
        state.max_length,
        state.done,
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.presence,
        sampling.frequency,
        sampling.repetition,
        sampling.top_k,
        sampling.seed,
        sampling.stop_ids,
        sampling.min_length,
        sampling.counts,
        count,
        state.tokens.shape[1],
        sampling.counts.shape[1],
        WORDS=words,
        STOP_IDS=sampling.stop_ids.shape[1],
        STOP_BLOCK=triton.next_power_of_2(sampling.stop_ids.shape[1]),
        RECORDS=max(256, triton.next_power_of_2(count)),
        WIDTH=_WIDTH,
        PDL=bool(launch),
        num_warps=4,
        **launch,
    )


def prepare_triton(
    state: SlotState, slots: torch.Tensor, query_lens: torch.Tensor, num_tokens: int, *, decode_only: bool
) -> dict[str, torch.Tensor]:
    """Compute the tensors of `SlotTables.prepare`, by their names in `StepInputs` and `Rows`."""
    rows, device = slots.shape[0], slots.device

    def empty(*shape: int, of: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device=device)

    made = {
        "token_ids": empty(num_tokens),
        "positions": empty(num_tokens),
        "kv_slots": empty(num_tokens, of=torch.int64),
        "query_starts": empty(rows + 1),
        "kv_lens": empty(rows),
        "block_tables": empty(rows, state.blocks.shape[1]),
        "lengths": empty(rows),
        "last_tokens": empty(rows, of=torch.int64),
    }
    launch = dependent_launch(slots)
    _prepare_kernel[(rows + 1,)](
        slots,
        query_lens,
        state.tokens,
        state.blocks,
        state.computed,
        state.length,
        state.done,
        *made.values(),
        rows,
        num_tokens,
        state.tokens.shape[1],
        state.blocks.shape[1],
        BLOCK_SIZE=state.block_size,
        ROWS=max(256, triton.next_power_of_2(rows)),
        WIDTH=32 if decode_only else _WIDTH,
        BLOCKS=64,
        PDL=bool(launch),
        num_warps=1 if decode_only else 4,
        **launch,
    )
    return made


def retire_triton(
    state: SlotState,
    slots: torch.Tensor,
    query_lens: torch.Tensor,
    drawn: torch.Tensor,
    handover: Handover,
    *,
    no_token: int,
    broken_row: int,
) -> None:
    """Compute `SlotTables.retire`, with its results in the step's place on the host, and pass the turn on."""
    places, width = handover.tokens.shape
    stop_ids = state.sampling.stop_ids
    launch = dependent_launch(drawn)
    _retire_kernel[(slots.shape[0],)](
        slots,
        query_lens,
        drawn,
        state.tokens,
        state.computed,
        state.length,
        state.max_length,
        state.done,
        stop_ids,
        state.sampling.counts,
        handover.tokens,
        handover.turn,
        state.tokens.shape[1],
        state.sampling.counts.shape[1],
        width,
        PLACES=places,
        STOP_IDS=stop_ids.shape[1],
        STOP_BLOCK=triton.next_power_of_2(stop_ids.shape[1]),
        NO_TOKEN=no_token,
        BROKEN_ROW=broken_row,
        PDL=bool(launch),
        num_warps=1,
        **launch,
    )


@jit_once("pieces", "first_update", "num_updates")
def _fetch_kernel(
    inputs_ptr,  # [places, width] int32, on the host
    turn_ptr,  # [2] int32: `Handover.turn`
    input_ptr,  # [width] int32
    blocks_ptr,  # [slots, max_blocks] int32
    pieces,
    first_update,
    num_updates,
    width,
    max_blocks,
    WORDS: tl.constexpr,
    UPDATES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs for a piece of the input each, and behind them programs for UPDATES new blocks each.

    The host writes between steps what is read here: volatile reads do not find it in a cache.
    """
    begin_dependents(PDL)
    program = tl.program_id(0)
    place = tl.load(turn_ptr)
    if program == 0:
        tl.store(turn_ptr + 1, place)
    words = inputs_ptr + place.to(tl.int64) * width
    if program < pieces:
        word = program * WORDS + tl.arange(0, WORDS)
        tl.store(input_ptr + word, tl.load(words + word, volatile=True))
    else:
        _enter(words + first_update, (program - pieces) * UPDATES, num_updates, blocks_ptr, max_blocks, UPDATES)


@jit_once("updates_ptr", "count")
def _enter_blocks_kernel(
    updates_ptr,  # [count, 3] int32
    blocks_ptr,  # [slots, max_blocks] int32
    count,
    max_blocks,
    UPDATES: tl.constexpr,
):
    _enter(updates_ptr, tl.program_id(0) * UPDATES, count, blocks_ptr, max_blocks, UPDATES)


@jit
def _enter(updates, first, count, blocks, max_blocks, UPDATES: tl.constexpr):
    """Enter up to UPDATES new blocks, from the one of number `first` on."""
    update = first + tl.arange(0, UPDATES)
    mask = update < count
    slot = tl.load(updates + 3 * update, mask=mask, other=0, volatile=True).to(tl.int64)
    index = tl.load(updates + 3 * update + 1, mask=mask, other=0, volatile=True)
    block = tl.load(updates + 3 * update + 2, mask=mask, other=0, volatile=True)
    tl.store(blocks + slot * max_blocks + index, block, mask=mask)


@jit_once("records_ptr", "ids_ptr", "count")
def _admit_kernel(
    records_ptr,  # [count, WORDS] int32
    ids_ptr,  # [all ids] int32, one record's after the other's
    tokens_ptr,  # [slots, max_model_len] int32
    computed_ptr,  # [slots] int32
    length_ptr,  # [slots] int32
    max_length_ptr,  # [slots] int32
    done_ptr,  # [slots] bool
    temperature_ptr,  # [slots] float32, as all down to repetition
    top_p_ptr,
    min_p_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    top_k_ptr,  # [slots] int32
    seed_ptr,  # [slots] int64
    stop_ids_ptr,  # [slots, STOP_IDS] int32
    min_length_ptr,  # [slots] int32
    counts_ptr,  # [slots, vocab_size] int32
    count,
    max_model_len,
    vocab_size,
    WORDS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    STOP_BLOCK: tl.constexpr,
    RECORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one record; nothing is done for one without a slot (-1)."""
    begin_dependents(PDL)
    wait(PDL)
    number = tl.program_id(0)
    record = records_ptr + number * WORDS
    slot = tl.load(record + _SLOT).to(tl.int64)
    if slot < 0:
        return
    num_ids = tl.load(record + _NUM_IDS)
    num_prompt = tl.load(record + _NUM_PROMPT)
    tl.store(computed_ptr + slot, tl.load(record + _NUM_CACHED))
    tl.store(length_ptr + slot, num_ids)
    tl.store(max_length_ptr + slot, tl.load(record + _MAX_LENGTH))
    tl.store(min_length_ptr + slot, tl.load(record + _MIN_LENGTH))
    tl.store(top_k_ptr + slot, tl.load(record + _TOP_K))
    tl.store(temperature_ptr + slot, tl.load(record + _TEMPERATURE).to(tl.float32, bitcast=True))
    tl.store(top_p_ptr + slot, tl.load(record + _TOP_P).to(tl.float32, bitcast=True))
    tl.store(min_p_ptr + slot, tl.load(record + _MIN_P).to(tl.float32, bitcast=True))
    tl.store(presence_ptr + slot, tl.load(record + _PRESENCE).to(tl.float32, bitcast=True))
    tl.store(frequency_ptr + slot, tl.load(record + _FREQUENCY).to(tl.float32, bitcast=True))
    tl.store(repetition_ptr + slot, tl.load(record + _REPETITION).to(tl.float32, bitcast=True))
    low = tl.load(record + _SEED).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(record + _SEED + 1).to(tl.int64)
    tl.store(seed_ptr + slot, (high << 32) | low)
    stop = tl.arange(0, STOP_BLOCK)
    stop_mask = stop < STOP_IDS
    tl.store(
        stop_ids_ptr + slot * STOP_IDS + stop, tl.load(record + _STOPS + stop, mask=stop_mask, other=-1), mask=stop_mask
    )

    other = tl.arange(0, RECORDS)
    earlier = (other < number) & (other < count)
    first_id = tl.sum(tl.load(records_ptr + other * WORDS + _NUM_IDS, mask=earlier, other=0).to(tl.int64), axis=0)
    place = tl.arange(0, WIDTH)
    for begin in range(0, num_ids, WIDTH):
        mask = begin + place < num_ids
        token = tl.load(ids_ptr + first_id + begin + place, mask=mask, other=0)
        tl.store(tokens_ptr + slot * max_model_len + begin + place, token, mask=mask)
    if tl.load(record + _PENALIZES) != 0:
        counts = counts_ptr + slot * vocab_size
        for begin in range(0, vocab_size, WIDTH):
            tl.store(counts + begin + place, tl.zeros([WIDTH], tl.int32), mask=begin + place < vocab_size)
        tl.debug_barrier()  # other threads of this program write to the same counts next
        for begin in range(0, num_prompt, WIDTH):
            mask = begin + place < num_prompt
            token = tl.load(ids_ptr + first_id + begin + place, mask=mask, other=0)
            tl.store(counts + token, tl.full([WIDTH], 1, tl.int32), mask=mask)
        tl.debug_barrier()
        for begin in range(num_prompt, num_ids, WIDTH):
            mask = begin + place < num_ids
            token = tl.load(ids_ptr + first_id + begin + place, mask=mask, other=0)
            tl.atomic_add(counts + token, tl.full([WIDTH], 2, tl.int32), mask=mask)
    tl.store(done_ptr + slot, tl.zeros([], tl.int1))


@jit_once("slots_ptr", "query_lens_ptr", "num_rows", "num_tokens")
def _prepare_kernel(
    slots_ptr,  # [num_rows] int32
    query_lens_ptr,  # [num_rows] int32
    tokens_ptr,  # [slots, max_model_len] int32
    blocks_ptr,  # [slots, max_blocks] int32
    computed_ptr,  # [slots] int32
    length_ptr,  # [slots] int32
    done_ptr,  # [slots] bool
    token_ids_ptr,  # [num_tokens] int32
    positions_ptr,  # [num_tokens] int32
    kv_slots_ptr,  # [num_tokens] int64
    query_starts_ptr,  # [num_rows + 1] int32
    kv_lens_ptr,  # [num_rows] int32
    block_tables_ptr,  # [num_rows, max_blocks] int32, written up to the row's last block
    lengths_ptr,  # [num_rows] int32
    last_tokens_ptr,  # [num_rows] int64
    num_rows,
    num_tokens,
    max_model_len,
    max_blocks,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one row; the last one, behind all rows: the tokens that belong to none."""
    begin_dependents(PDL)
    wait(PDL)
    row = tl.program_id(0)
    other = tl.arange(0, ROWS)
    start = tl.sum(tl.load(query_lens_ptr + other, mask=other < row, other=0), axis=0)
    tl.store(query_starts_ptr + row, start)
    place = tl.arange(0, WIDTH)
    if row == num_rows:
        for begin in range(start, num_tokens, WIDTH):
            mask = begin + place < num_tokens
            tl.store(token_ids_ptr + begin + place, tl.zeros([WIDTH], tl.int32), mask=mask)
            tl.store(positions_ptr + begin + place, tl.zeros([WIDTH], tl.int32), mask=mask)
            tl.store(kv_slots_ptr + begin + place, tl.full([WIDTH], -1, tl.int64), mask=mask)
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        query_len = tl.load(query_lens_ptr + row)
        live = (tl.load(done_ptr + slot) == 0) & (query_len > 0)
        before = tl.load(computed_ptr + slot)
        after = before + query_len
        tl.store(kv_lens_ptr + row, tl.where(live, after, 0))
        tl.store(lengths_ptr + row, tl.load(length_ptr + slot))
        tl.store(last_tokens_ptr + row, tl.maximum(start + query_len - 1, 0).to(tl.int64))
        for begin in range(0, query_len, WIDTH):
            mask = begin + place < query_len
            position = before + begin + place
            token = tl.load(tokens_ptr + slot * max_model_len + position, mask=mask, other=0)
            block = tl.load(blocks_ptr + slot * max_blocks + position // BLOCK_SIZE, mask=mask, other=0)
            kv_slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
            tl.store(token_ids_ptr + start + begin + place, token, mask=mask)
            tl.store(positions_ptr + start + begin + place, position, mask=mask)
            tl.store(kv_slots_ptr + start + begin + place, tl.where(live, kv_slot, -1), mask=mask)
        num_blocks = tl.where(live, tl.cdiv(after, BLOCK_SIZE), 0)
        index = tl.arange(0, BLOCKS)
        for begin in range(0, num_blocks, BLOCKS):
            mask = begin + index < num_blocks
            block = tl.load(blocks_ptr + slot * max_blocks + begin + index, mask=mask, other=0)
            tl.store(block_tables_ptr + row.to(tl.int64) * max_blocks + begin + index, block, mask=mask)


@jit_once("slots_ptr", "query_lens_ptr")
def _retire_kernel(
    slots_ptr,  # [rows] int32
    query_lens_ptr,  # [rows] int32
    drawn_ptr,  # [rows] int32
    tokens_ptr,  # [slots, max_model_len] int32
    computed_ptr,  # [slots] int32
    length_ptr,  # [slots] int32
    max_length_ptr,  # [slots] int32
    done_ptr,  # [slots] bool
    stop_ids_ptr,  # [slots, STOP_IDS] int32
    counts_ptr,  # [slots, vocab_size] int32
    told_ptr,  # [PLACES, width] int32, on the host
    turn_ptr,  # [2] int32: `Handover.turn`
    max_model_len,
    vocab_size,
    width,
    PLACES: tl.constexpr,
    STOP_IDS: tl.constexpr,
    STOP_BLOCK: tl.constexpr,
    NO_TOKEN: tl.constexpr,
    BROKEN_ROW: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one row. Dead rows write nothing, so that several may share the scratch slot."""
    wait(PDL)
    row = tl.program_id(0)
    place = tl.load(turn_ptr + 1)
    if row == 0:
        tl.store(turn_ptr, (place + 1) % PLACES)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    query_len = tl.load(query_lens_ptr + row)
    told = tl.full([], NO_TOKEN, tl.int32)
    if (tl.load(done_ptr + slot) == 0) & (query_len > 0):
        after = tl.load(computed_ptr + slot) + query_len
        length = tl.load(length_ptr + slot)
        tl.store(computed_ptr + slot, after)
        if after == length:
            token = tl.load(drawn_ptr + row)
            if token < 0:
                told = tl.full([], BROKEN_ROW, tl.int32)
                tl.store(done_ptr + slot, tl.full([], 1, tl.int1))
            else:
                told = token
                tl.store(tokens_ptr + slot * max_model_len + length, token)
                tl.store(length_ptr + slot, length + 1)
                count_ptr = counts_ptr + slot * vocab_size + token
                tl.store(count_ptr, tl.load(count_ptr) + 2)
                stop = tl.arange(0, STOP_BLOCK)
                stops = tl.load(stop_ids_ptr + slot * STOP_IDS + stop, mask=stop < STOP_IDS, other=-1)
                stopped = tl.max((stops == token).to(tl.int32), axis=0) > 0
                done = stopped | (length + 1 == tl.load(max_length_ptr + slot))
                tl.store(done_ptr + slot, done)
    tl.store(told_ptr + place.to(tl.int64) * width + row, told)
