"""A device for tests: its tables are plain lists, its model is a checksum, and it knows what each KV entry should hold.

Its next token is a function of all tokens before it, so what a request must produce is known without any engine
(`expected_output`). Its KV cache remembers, per entry, by whom and after which tokens it was written; a row that
computes checks every entry before it. A block given away too early, a wrong prefix hit or a leak between salts shows
itself there.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from worker.messages import FinishReason, Submit, ids_from_bytes
from worker.plan import StepPlan
from worker.scheduler import BROKEN_ROW, NO_TOKEN, SchedulerLimits

NAN = -1
"""What a sampler draws from logits that hold a NaN."""


def draw(ids: Sequence[int], *, vocab_size: int, banned: Collection[int], nan_every: int = 0) -> int:
    """The token after `ids`; about every `nan_every`-th time the model breaks instead (0: never)."""
    digest = zlib.crc32(np.array(ids, np.int32).tobytes())
    if nan_every and digest % nan_every == 0:
        return NAN
    allowed = [token for token in range(vocab_size) if token not in banned]
    return allowed[(digest >> 8) % len(allowed)]


@dataclass(frozen=True, slots=True)
class Expected:
    """How a request must end."""

    tokens: list[int]
    reason: FinishReason
    stop_id: int = -1


def expected_output(request: Submit, limits: SchedulerLimits, nan_every: int = 0) -> Expected:
    """What the fake model makes of a request, computed alone and from the start; without what it had before."""
    ids = ids_from_bytes(request.prompt).tolist()
    num_prompt = len(ids)
    ids += ids_from_bytes(request.output).tolist()
    known = len(ids)
    stop_ids = {*request.eos_ids, *request.stop_ids}
    while True:
        banned = stop_ids if len(ids) - num_prompt < request.min_tokens else set()
        token = draw(ids, vocab_size=limits.vocab_size, banned=banned, nan_every=nan_every)
        if token == NAN:
            return Expected(ids[known:], FinishReason.BROKEN)
        ids.append(token)
        if token in stop_ids:
            reason = FinishReason.EOS if token in request.eos_ids else FinishReason.STOP_TOKEN
            return Expected(ids[known:], reason, token)
        if len(ids) - num_prompt == request.max_tokens:
            return Expected(ids[known:], FinishReason.MAX_TOKENS)
        if len(ids) == limits.max_model_len:
            return Expected(ids[known:], FinishReason.CONTEXT_FULL)


@dataclass(slots=True)
class Slot:
    """One row of the tables."""

    ids: list[int] = field(default_factory=list)
    computed: int = 0
    max_length: int = 0
    min_length: int = 0
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    penalizes: bool = False
    counts: Counter[int] = field(default_factory=Counter)
    done: bool = True
    blocks: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a step, as the tables had it when the step began."""

    slot: int
    live: bool
    positions: range
    samples: bool


class PlainTables:
    """What `worker.tables.SlotTables` must do, one slot after the other."""

    def __init__(self) -> None:
        self.slots: dict[int, Slot] = {}

    def slot(self, number: int) -> Slot:
        return self.slots.setdefault(number, Slot())

    def apply(self, plan: StepPlan) -> None:
        """Seat the plan's newcomers and enter its blocks."""
        offset = 0
        for record in plan.admissions:
            count, prompt = int(record["num_ids"]), int(record["num_prompt"])
            ids = plan.admitted_ids[offset : offset + count].tolist()
            offset += count
            counts = Counter({token: 2 * times for token, times in Counter(ids[prompt:]).items()})
            counts.update(set(ids[:prompt]))
            self.slots[int(record["slot"])] = Slot(
                ids=ids,
                computed=int(record["num_cached"]),
                max_length=int(record["max_length"]),
                min_length=int(record["min_length"]),
                stop_ids=frozenset(record["stop_ids"].tolist()) - {-1},
                seed=int(record["seed"]),
                penalizes=bool(record["penalizes"]),
                counts=counts,
                done=False,
                blocks=self.slot(int(record["slot"])).blocks,
            )
        for slot, index, block in plan.block_updates.tolist():
            self.slot(slot).blocks[index] = block

    def rows(self, plan: StepPlan) -> list[Row]:
        """The rows of the plan, before it runs."""
        rows = []
        for number, count in zip(plan.slots.tolist(), plan.query_lens.tolist(), strict=True):
            slot = self.slot(number)
            after = slot.computed + count
            rows.append(
                Row(number, not slot.done, range(slot.computed, after), not slot.done and after == len(slot.ids))
            )
        return rows

    def retire(self, rows: Sequence[Row], drawn: Sequence[int]) -> list[int]:
        """Take in what each row drew; returns what the host is told."""
        return [self._retire_row(row, token) for row, token in zip(rows, drawn, strict=True)]

    def _retire_row(self, row: Row, token: int) -> int:
        slot = self.slot(row.slot)
        if not row.live:
            return NO_TOKEN
        slot.computed = row.positions.stop
        if not row.samples:
            return NO_TOKEN
        if token == NAN:
            slot.done = True
            return BROKEN_ROW
        slot.ids.append(token)
        slot.counts[token] += 2
        slot.done = token in slot.stop_ids or len(slot.ids) == slot.max_length
        return token


class FakeDevice:
    """Runs plans in order, as a runner does, and checks each against `limits` and against its own KV cache.

    A request's seed says with whom it may share KV blocks: only with requests of the same seed.
    """

    def __init__(self, limits: SchedulerLimits, *, nan_every: int = 0) -> None:
        self.limits = limits
        self.nan_every = nan_every
        self.tables = PlainTables()
        self.num_steps = 0
        self.computed_tokens = 0
        self._written: dict[int, tuple[int, ...]] = {}  # by block * block_size + offset: who wrote it, after what
        self._results: deque[list[int]] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._results)

    def launch(self, plan: StepPlan) -> None:
        self._check_shape(plan)
        plan = StepPlan.decode(plan.encode())
        self.tables.apply(plan)
        rows = self.tables.rows(plan)
        live = [row for row in rows if row.live]
        for row in live:
            self._check_reads(row)
        self._write(live)
        self._results.append(self.tables.retire(rows, [self._draw(row) for row in rows]))

    def collect(self) -> np.ndarray:
        return np.array(self._results.popleft(), np.int32)

    def _check_shape(self, plan: StepPlan) -> None:
        limits = self.limits
        assert plan.step == self.num_steps, "steps are numbered in order"
        self.num_steps += 1
        assert 0 < plan.num_rows <= limits.max_running
        budget = limits.max_mixed_tokens if plan.num_decode_rows else limits.max_batched_tokens
        assert plan.num_tokens <= budget, "the token budget"
        assert len(set(plan.slots.tolist())) == plan.num_rows, "a slot is planned twice"
        assert set(plan.slots.tolist()) <= set(range(limits.max_running))
        assert set(plan.query_lens[: plan.num_decode_rows].tolist()) <= {1}
        assert plan.max_query_len == max(plan.query_lens[plan.num_decode_rows :].tolist(), default=1)
        entries = [(slot, index) for slot, index, _ in plan.block_updates.tolist()]
        # On a GPU the order of two writes to one entry is not defined.
        assert len(entries) == len(set(entries)), "a block table's entry is written twice in one step"
        assert set(plan.block_updates[:, 2].tolist()) <= set(range(limits.num_blocks))
        assert {int(slot) for slot in plan.admissions["slot"]} <= set(plan.slots.tolist()), "seated but not computed"
        if plan.is_decode:
            assert len(plan.block_updates) <= plan.num_rows, "a graph has room for one new block of each row"
        self._max_kv_len = plan.max_kv_len

    def _place(self, slot: Slot, position: int) -> int:
        block = slot.blocks[position // self.limits.block_size]
        return block * self.limits.block_size + position % self.limits.block_size

    def _fingerprints(self, slot: Slot) -> list[tuple[int, ...]]:
        """What each KV entry of the slot must hold: whom it may be shared with, and a checksum of all tokens so far."""
        fingerprints = []
        checksum = 0
        for token in slot.ids:
            checksum = zlib.crc32(token.to_bytes(4, "little"), checksum)
            fingerprints.append((slot.seed, checksum))
        return fingerprints

    def _check_reads(self, row: Row) -> None:
        slot = self.tables.slot(row.slot)
        assert row.positions.stop <= min(len(slot.ids), self._max_kv_len)
        fingerprints = self._fingerprints(slot)
        for position in range(row.positions.start):
            found = self._written.get(self._place(slot, position))
            assert found == fingerprints[position], f"slot {row.slot} reads something else at position {position}"

    def _write(self, rows: Sequence[Row]) -> None:
        places: list[int] = []
        for row in rows:
            slot = self.tables.slot(row.slot)
            fingerprints = self._fingerprints(slot)
            for position in row.positions:
                place = self._place(slot, position)
                places.append(place)
                self._written[place] = fingerprints[position]
        assert len(places) == len(set(places)), "two rows write the same KV entry"
        self.computed_tokens += len(places)

    def _draw(self, row: Row) -> int:
        if not row.samples:
            return 0  # as a real sampler does, it draws something for every row
        slot = self.tables.slot(row.slot)
        banned = slot.stop_ids if len(slot.ids) < slot.min_length else frozenset[int]()
        return draw(slot.ids, vocab_size=self.limits.vocab_size, banned=banned, nan_every=self.nan_every)
