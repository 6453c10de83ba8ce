"""The device tables against the same tables in plain Python, over plans of every kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.inputs import StepInputs
from tests.worker.fake_device import NAN, PlainTables, Row
from worker.handover import Handover, Place
from worker.messages import MAX_STOP_IDS
from worker.plan import ADMISSION, StepPlan
from worker.scheduler import BROKEN_ROW, NO_TOKEN
from worker.shapes import StepShape, input_words
from worker.tables import Rows, SlotTables

SLOTS = 4
MAX_LEN = 20
BLOCK_SIZE = 4
VOCAB = 9
MAX_ROWS = SLOTS + 4  # with those that have no tokens
UNWRITTEN = 2**30
CPU = torch.device("cpu")


def make_tables(device: torch.device = CPU, triton: bool = False) -> SlotTables:
    tables = SlotTables(num_slots=SLOTS, max_model_len=MAX_LEN, block_size=BLOCK_SIZE, vocab_size=VOCAB, device=device)
    tables.use_triton = triton
    return tables


class Pair:
    """Both kinds of tables, told the same, and compared after every step."""

    def __init__(
        self, rng: np.random.Generator, tables: SlotTables | None = None, *, shape: StepShape | None = None
    ) -> None:
        self.rng = rng
        self.plain = PlainTables()
        self.tables = tables or make_tables()
        self.outcomes: set[str] = set()
        self.shape = shape  # of a graph; else each step has its own
        self.handover = Handover(
            num_places=3,
            num_words=input_words([shape] if shape else [], MAX_ROWS),
            num_rows=MAX_ROWS,
            device=self.tables.device,
        )
        self.handover.inputs.fill_(UNWRITTEN)

    def step(self) -> None:
        """Plan something that is allowed, run it through both, and compare."""
        plan = self._plan()
        place = self._tell_kernels(plan) if self.tables.use_triton else self._tell(plan)
        self.plain.apply(plan)
        expected = self.plain.rows(plan)
        # As in a mixed step's graph: rows without tokens behind the others, and tokens without a row.
        empty_rows, empty_tokens = (0, 0) if plan.is_decode else self.rng.integers(0, 3, 2).tolist()
        inputs, rows = self.tables.prepare(
            self._upload(np.concatenate((plan.slots, np.full(empty_rows, SLOTS, np.int32)))),
            self._upload(np.concatenate((plan.query_lens, np.zeros(empty_rows, np.int32)))),
            replace(plan.bounds, num_tokens=plan.num_tokens + empty_tokens),
        )
        self._compare_inputs(plan, expected, inputs, rows)
        drawn = self._draw(expected)
        told = self._retire(rows, self._upload(np.array(drawn + [0] * empty_rows, np.int32)), place)
        assert told[len(expected) :] == [NO_TOKEN] * empty_rows
        told = told[: len(expected)]
        assert told == self.plain.retire(expected, drawn)
        self._note(expected, told)
        self._compare_tables()

    def _tell(self, plan: StepPlan) -> None:
        if len(plan.admissions):
            self.tables.admit(plan)
        if len(plan.block_updates):
            self.tables.set_blocks(self._upload(plan.block_updates))

    def _tell_kernels(self, plan: StepPlan) -> Place:
        """Hand the plan over, and check that it arrives."""
        shape = self.shape or StepShape.of(plan, MAX_ROWS)
        if len(plan.admissions) and not shape.admits(plan):
            self.tables.admit(plan)
        if len(plan.admissions):
            self.outcomes.add("admitted in a graph" if shape.admits(plan) else "admitted before it")
        if not shape.enters(plan):
            self.tables.set_blocks(self._upload(plan.block_updates))
            self.outcomes.add("entered before it")
        place = self.handover.take_place()
        shape.fill(place.input.numpy(), plan, SLOTS)
        words = self.tables.fetch(self.handover, shape)
        assert words.slots[: plan.num_rows].tolist() == plan.slots.tolist()
        assert words.query_lens[: plan.num_rows].tolist() == plan.query_lens.tolist()
        entered = plan.block_updates if shape.enters(plan) else plan.block_updates[:0]
        assert words.updates[: len(entered)].tolist() == entered.tolist()
        return place

    def _retire(self, rows: Rows, drawn: torch.Tensor, place: Place | None) -> list[int]:
        if place is None:
            return self.tables.retire(rows, drawn).tolist()
        self.handover.tokens.fill_(UNWRITTEN)
        self.tables.retire_to(self.handover, rows, drawn)
        if drawn.is_cuda:
            torch.cuda.synchronize()
        told = place.tokens[: len(drawn)].tolist()
        place.tokens[: len(drawn)] = UNWRITTEN
        assert (self.handover.tokens == UNWRITTEN).all(), "nothing else is written, of this place or another"
        return told

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(self.tables.device)

    def _plan(self) -> StepPlan:
        slots = [int(slot) for slot in self.rng.permutation(SLOTS)[: self.rng.integers(1, SLOTS + 1)]]
        newcomers = [slot for slot in slots if slot not in self.plain.slots or self.rng.random() < 0.25]
        records = [self._record(slot) for slot in newcomers]
        remaining = {slot: len(self.plain.slot(slot).ids) - self.plain.slot(slot).computed for slot in slots}
        remaining |= {int(record["slot"]): int(record["num_ids"] - record["num_cached"]) for record in records}
        decodes = [slot for slot in slots if slot not in newcomers and (remaining[slot] <= 1 or self._done(slot))]
        chunks = [slot for slot in slots if slot not in decodes]
        padding = [SLOTS] * int(self.rng.integers(0, 3)) if not chunks else []
        lens = [1] * (len(decodes) + len(padding)) + [int(self.rng.integers(1, remaining[s] + 1)) for s in chunks]
        rows = decodes + padding + chunks
        blocks = self.rng.permutation(100)[: len(slots)]
        ids = [self.rng.integers(0, VOCAB, int(record["num_ids"])) for record in records]
        return StepPlan(
            step=0,
            slots=np.array(rows, np.int32),
            query_lens=np.array(lens, np.int32),
            num_decode_rows=len(decodes) + len(padding),
            max_query_len=max(lens),
            max_kv_len=MAX_LEN,
            block_updates=np.array(
                [
                    (slot, self.rng.integers(0, MAX_LEN // BLOCK_SIZE), block)
                    for slot, block in zip(slots, blocks, strict=True)
                ],
                np.int32,
            ),
            admissions=np.array(records, ADMISSION),
            admitted_ids=np.concatenate([*ids, np.empty(0)]).astype(np.int32),
        )

    def _done(self, slot: int) -> bool:
        return self.plain.slot(slot).done

    def _record(self, slot: int) -> np.void:
        record = np.zeros(1, ADMISSION)[0]
        num_ids = int(self.rng.integers(1, MAX_LEN))
        record["slot"] = slot
        record["num_ids"] = num_ids
        record["num_prompt"] = self.rng.integers(1, num_ids + 1)
        record["num_cached"] = self.rng.integers(0, num_ids)
        record["max_length"] = self.rng.integers(num_ids + 1, MAX_LEN + 1)
        record["min_length"] = self.rng.integers(0, MAX_LEN)
        record["penalizes"] = self.rng.integers(0, 2)
        record["top_k"] = self.rng.integers(0, 100)
        record["seed"] = self.rng.integers(-(2**63), 2**63 - 1)
        for name in ("temperature", "top_p", "min_p", "presence", "frequency", "repetition"):
            record[name] = self.rng.random()
        record["stop_ids"] = -1
        stops = self.rng.permutation(VOCAB)[: self.rng.integers(0, 3)]
        record["stop_ids"][: len(stops)] = stops
        return record

    def _draw(self, rows: list[Row]) -> list[int]:
        """A sampler draws something for every row; where nothing is sampled it means nothing, and may be NaN too."""
        return [NAN if self.rng.random() < 0.1 else int(self.rng.integers(0, VOCAB)) for _ in rows]

    def _compare_inputs(self, plan: StepPlan, expected: list[Row], inputs: StepInputs, rows: Rows) -> None:
        starts = [0, *np.cumsum(plan.query_lens).tolist()]
        count, tokens = len(expected), plan.num_tokens
        assert inputs.query_starts.tolist() == starts + [tokens] * (inputs.num_rows - count)
        assert rows.last_tokens.tolist()[:count] == [start - 1 for start in starts[1:]]
        assert all(0 <= token < inputs.num_tokens for token in rows.last_tokens.tolist())
        lengths = [len(self.plain.slot(row.slot).ids) for row in expected if row.slot != SLOTS]
        assert [length for length, row in zip(rows.lengths.tolist(), expected, strict=False) if row.slot != SLOTS] == (
            lengths
        )
        assert inputs.kv_lens.tolist()[:count] == [row.positions.stop if row.live else 0 for row in expected]
        assert inputs.kv_lens.tolist()[count:] == [0] * (inputs.num_rows - count)
        assert inputs.kv_slots.tolist()[tokens:] == [-1] * (inputs.num_tokens - tokens)
        assert (inputs.num_decode_rows, inputs.max_single_rows, inputs.max_chunk_rows) == (
            plan.num_decode_rows,
            plan.query_lens.tolist().count(1),
            plan.num_rows - plan.num_decode_rows,
        )
        assert (inputs.max_query_len, inputs.max_kv_len) == (plan.max_query_len, plan.max_kv_len)
        # What dead rows read is never used, but it must be readable: an id of the vocabulary at a position that exists.
        assert all(0 <= token < VOCAB for token in inputs.token_ids.tolist())
        assert all(0 <= position < MAX_LEN for position in inputs.positions.tolist())
        for row, start, stop in zip(expected, starts, starts[1:], strict=False):
            if not row.live:
                assert inputs.kv_slots[start:stop].tolist() == [-1] * (stop - start)
                continue
            slot = self.plain.slot(row.slot)
            places = [
                slot.blocks.get(position // BLOCK_SIZE, 0) * BLOCK_SIZE + position % BLOCK_SIZE
                for position in row.positions
            ]
            assert inputs.kv_slots[start:stop].tolist() == places
            assert inputs.positions[start:stop].tolist() == list(row.positions)
            assert inputs.token_ids[start:stop].tolist() == slot.ids[row.positions.start : row.positions.stop]
        for row, table in zip(expected, inputs.block_tables.tolist(), strict=False):
            if row.live:
                blocks = self.plain.slot(row.slot).blocks
                used = -(-row.positions.stop // BLOCK_SIZE)
                assert table[:used] == [blocks.get(index, 0) for index in range(used)]

    def _compare_tables(self) -> None:
        for number, slot in self.plain.slots.items():
            if number == SLOTS:
                continue
            assert self.tables.state.tokens[number, : len(slot.ids)].tolist() == slot.ids
            assert bool(self.tables.state.done[number]) == slot.done
            assert int(self.tables.state.length[number]) == len(slot.ids)
            assert int(self.tables.state.computed[number]) == slot.computed
            if slot.penalizes:
                expected = [slot.counts[token] for token in range(VOCAB)]
                assert self.tables.sampling.counts[number].tolist() == expected
        assert bool(self.tables.state.done[SLOTS]), "the scratch row is always done"

    def _note(self, rows: list[Row], told: list[int]) -> None:
        for row, token in zip(rows, told, strict=True):
            if not row.live:
                self.outcomes.add("padding" if row.slot == SLOTS else "dead")
            elif not row.samples:
                self.outcomes.add("chunk")
            elif token == BROKEN_ROW:
                self.outcomes.add("broken")
            elif token in self.plain.slot(row.slot).stop_ids:
                self.outcomes.add("stopped")
            elif self._done(row.slot):
                self.outcomes.add("full")
            else:
                self.outcomes.add("token")


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_tables_do_what_plain_tables_do(seed: int) -> None:
    pair = Pair(np.random.default_rng(seed))
    for _ in range(12):
        pair.step()


@pytest.mark.parametrize("in_graphs", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_kernels_do_what_plain_tables_do(triton_device: torch.device, seed: int, in_graphs: bool) -> None:
    # With room for fewer new blocks than some steps have.
    shape = replace(StepShape.mixed(12, SLOTS + 2, MAX_LEN), max_updates=SLOTS - 1) if in_graphs else None
    pair = Pair(np.random.default_rng(seed), make_tables(triton_device, triton=True), shape=shape)
    for _ in range(200 if triton_device.type == "cuda" else 12):
        pair.step()
    assert "admitted before it" in pair.outcomes
    assert in_graphs == ("admitted in a graph" in pair.outcomes) == ("entered before it" in pair.outcomes)


def test_every_kind_of_row_occurs() -> None:
    """Keeps the test above honest."""
    pair = Pair(np.random.default_rng(0))
    for _ in range(120):
        pair.step()
    assert pair.outcomes == {"padding", "dead", "chunk", "broken", "stopped", "full", "token"}


def admission(**fields: object) -> StepPlan:
    record = np.zeros(1, ADMISSION)
    record["stop_ids"] = -1
    for name, value in ({"slot": 2, "num_ids": 3, "num_prompt": 3, "max_length": MAX_LEN} | fields).items():
        record[name] = value
    return StepPlan(
        step=0,
        slots=np.array([2], np.int32),
        query_lens=np.array([3], np.int32),
        num_decode_rows=0,
        max_query_len=3,
        max_kv_len=3,
        block_updates=np.empty((0, 3), np.int32),
        admissions=record,
        admitted_ids=np.array([4, 5, 4], np.int32),
    )


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("through_a_frame", [False, True])
def test_sampling_parameters_arrive_bit_for_bit(
    through_a_frame: bool, triton: bool, triton_device: torch.device
) -> None:
    values: dict[str, object] = {
        "temperature": 0.1,
        "top_p": 0.2,
        "min_p": 0.3,
        "presence": -0.4,
        "frequency": 0.5,
        "repetition": 1.6,
        "top_k": 7,
        "seed": -(2**63) + 12345,
        "min_length": 8,
        "stop_ids": [8, 1] + [-1] * (MAX_STOP_IDS - 2),
    }
    plan = admission(**values)
    tables = make_tables(triton_device, triton) if triton else make_tables()
    tables.admit(StepPlan.decode(plan.encode()) if through_a_frame else plan)
    for name in values:
        column = getattr(tables.sampling, name)[2].cpu().numpy()
        assert column.tobytes() == plan.admissions[name][0].tobytes(), name


@pytest.mark.parametrize("triton", [False, True])
def test_a_resumed_sequence_counts_its_prompt_and_its_output_apart(triton: bool, triton_device: torch.device) -> None:
    tables = make_tables(triton_device, triton) if triton else make_tables()
    tables.sampling.counts.fill_(9)  # of whoever had the slot before
    tables.admit(admission(penalizes=1, num_prompt=1))
    assert tables.sampling.counts[2].tolist() == [0, 0, 0, 0, 3, 2, 0, 0, 0]


def test_a_row_that_draws_nothing_is_told_so() -> None:
    tables = make_tables()
    plan = admission(num_ids=3)
    tables.admit(plan)
    slots, query_lens = torch.tensor([[2, 3], [2, 1]], dtype=torch.int32).unbind(0)
    _, rows = tables.prepare(slots, query_lens, plan.bounds)
    assert tables.retire(rows, torch.tensor([NAN, NAN], dtype=torch.int32)).tolist() == [NO_TOKEN, NO_TOKEN]
