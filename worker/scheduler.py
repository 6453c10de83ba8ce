"""Which sequences run, in which slot, on which blocks, and what the next step computes.

The scheduler runs ahead: it plans step s+1 while step s is on the device, so it counts on tokens that it has not seen.
Three lengths of a slot keep that straight:

- `length`: tokens that exist once every planned step has run (the device knows them, the host may not yet),
- `known`: tokens that the host has seen (steps that have retired),
- `computed`: tokens whose keys and values are in the KV cache once every planned step has run.

A sequence goes waiting -> running -> leaving -> gone. *Leaving* (finished, aborted or preempted) it runs no more but
keeps its slot and blocks until the last step that was planned with it has retired; a preempted one then waits again.
Nothing here touches a device, a socket or a clock that was not passed in.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from worker.blocks import BlockHasher, BlockId, BlockPool
from worker.messages import (
    MAX_STOP_IDS,
    EngineStats,
    Finished,
    FinishReason,
    SamplingParams,
    Started,
    Submit,
    ids_from_bytes,
)
from worker.plan import ADMISSION, StepPlan

_NO_UPDATES = np.empty((0, 3), np.int32)
_NO_ADMISSIONS = np.empty(0, ADMISSION)
_NO_IDS = np.empty(0, np.int32)

YIELD_S_PER_TOKEN = 2e-4
MOST_YIELD_S = 1.0
"""Prompts are computed in the order in which they came, as if each had come later by so many seconds for every token
that is to be computed before its first new one, and by so many at most. So of those that come at once the shortest are
first, a long one that has begun lets short ones pass, and nobody is kept waiting by who comes later than that."""

NO_TOKEN = -1  # a row that samples nothing, or that was done before the step
BROKEN_ROW = -2  # a row whose logits hold a NaN


class RejectedError(Exception):
    """The engine's door refuses a request; the message names what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What the engine was built for."""

    vocab_size: int
    max_model_len: int
    max_running: int
    max_batched_tokens: int
    max_mixed_tokens: int  # the same where sequences decode; at least max_running, so that every one of them can
    block_size: int
    num_blocks: int  # at least enough for one sequence of max_model_len
    watermark_blocks: int
    prefix_caching: bool


class Phase(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    LEAVING = enum.auto()
    GONE = enum.auto()


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request inside the engine. While it has a slot, its tokens are in the scheduler's tables."""

    owner: int  # the gateway
    number: int  # the gateway's name for it
    arrival: int
    turn: float = 0.0  # in seconds: of those that wait, or have begun, the one with the earliest is first
    ids: np.ndarray  # [known tokens] int32, as of the last time that it began to wait
    num_prompt: int
    max_length: int
    min_length: int
    full_reason: FinishReason  # what reaching max_length means
    sampling: SamplingParams
    eos_ids: frozenset[int]
    stop_ids: tuple[int, ...]  # all ids that end it, eos_ids included
    salt_digest: bytes
    shares_blocks: bool
    phase: Phase = Phase.WAITING
    slot: int = -1
    blocks: list[BlockId] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of its first full blocks
    started: bool = False
    requeue: bool = False  # leaving to wait again
    farewell: Finished | None = None  # to be said when its blocks are free

    @property
    def place(self) -> tuple[float, int]:
        """Among those whose prompts are to be computed: the smallest is first."""
        return self.turn, self.arrival


@dataclass(slots=True, kw_only=True)
class PlannedStep:
    """A plan, and what the scheduler must remember of it until it retires."""

    plan: StepPlan
    slots: np.ndarray  # [rows] intp
    samples: np.ndarray  # [rows] bool: the row draws a token
    computed_after: np.ndarray  # [rows] int32


@dataclass(slots=True, kw_only=True)
class RetiredStep:
    """The tokens of a step that somebody waits for: parallel arrays."""

    owners: np.ndarray  # [n] int32
    numbers: np.ndarray  # [n] int64
    tokens: np.ndarray  # [n] int32


@dataclass(slots=True)
class Notices:
    """What happened to sequences since the leader last asked, with their owners."""

    started: list[tuple[int, Started]] = field(default_factory=list)
    finished: list[tuple[int, Finished]] = field(default_factory=list)


class Scheduler:
    """All of the above. With `yield_s_per_token` of 0 prompts are computed just in the order in which they came."""

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        hash_key: bytes,
        clock: Callable[[], float],
        yield_s_per_token: float = YIELD_S_PER_TOKEN,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._yield_s_per_token = yield_s_per_token
        self._hasher = BlockHasher(hash_key)
        self._pool = BlockPool(limits.num_blocks)
        self._sequences: dict[tuple[int, int], Sequence] = {}
        # A heap by turn, then by arrival; sequences that are GONE are skipped.
        self._waiting: list[tuple[float, int, Sequence]] = []
        self._leaving: list[Sequence] = []
        self._arrivals = 0
        self._num_waiting = 0
        self._waiting_tokens = 0
        self._notices = Notices()

        slots = limits.max_running
        self._sequence_in: list[Sequence | None] = [None] * slots
        self._free_slots = list(range(slots - 1, -1, -1))
        # Slots of the running sequences, in order of arrival; of the type that numpy indexes with fastest.
        self._running = np.empty(0, np.intp)
        self._computed = np.zeros(slots, np.int32)
        self._length = np.zeros(slots, np.int32)
        self._known = np.zeros(slots, np.int32)
        self._max_length = np.zeros(slots, np.int32)
        self._capacity = np.zeros(slots, np.int32)  # tokens that the slot's blocks hold
        self._register_at = np.zeros(slots, np.int32)  # computed tokens at which its next full block is entered
        self._stop_width = 1  # columns of _stop_ids that are in use
        self._last_step = np.full(slots, -1, np.int64)  # the last one planned with the slot
        self._listening = np.zeros(slots, np.bool_)  # somebody wants the slot's tokens
        self._owner = np.zeros(slots, np.int32)
        self._number = np.zeros(slots, np.int64)
        self._stop_ids = np.full((slots, MAX_STOP_IDS), -1, np.int32)
        self._ids = np.zeros((slots, limits.max_model_len), np.int32)

        self._next_step = 0
        self._retired_step = -1
        self._preemptions = 0
        self._prefix_queried = 0
        self._prefix_hits = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(self, owner: int, request: Submit) -> None:
        """Let a request wait for its turn; one that the engine's door refuses gets its `Finished` at once."""
        prompt, output = ids_from_bytes(request.prompt), ids_from_bytes(request.output)
        try:
            self._check(owner, request, prompt, output)
        except RejectedError as error:
            refused = Finished(request.request, FinishReason.REJECTED, detail=str(error))
            self._notices.finished.append((owner, refused))
            return
        wanted = len(prompt) + request.max_tokens
        max_length = min(wanted, self.limits.max_model_len)
        sequence = Sequence(
            owner=owner,
            number=request.request,
            arrival=self._arrivals,
            ids=np.concatenate((prompt, output)),
            num_prompt=len(prompt),
            max_length=max_length,
            min_length=min(len(prompt) + request.min_tokens, max_length),
            full_reason=FinishReason.MAX_TOKENS if wanted == max_length else FinishReason.CONTEXT_FULL,
            sampling=request.sampling,
            eos_ids=frozenset(request.eos_ids),
            stop_ids=tuple(dict.fromkeys((*request.eos_ids, *request.stop_ids))),
            salt_digest=self._hasher.root(request.cache_salt),
            shares_blocks=request.use_prefix_cache and self.limits.prefix_caching,
        )
        self._arrivals += 1
        self._sequences[owner, sequence.number] = sequence
        self._wait(sequence)

    def abort(self, owner: int, number: int) -> None:
        """Give a request up in whatever state it is. Its `Finished` follows when its blocks are free."""
        sequence = self._sequences.get((owner, number))
        if sequence is None:
            return
        farewell = Finished(number, FinishReason.ABORTED)
        if sequence.phase is Phase.WAITING:
            self._stop_waiting(sequence)
            sequence.phase = Phase.GONE
            sequence.ids = sequence.ids[:0].copy()  # its place in the heap may outlive it for long
            sequence.digests.clear()
            del self._sequences[owner, number]
            self._notices.finished.append((owner, farewell))
        elif sequence.phase is Phase.RUNNING or sequence.requeue:
            self._leave(sequence, requeue=False)
            sequence.farewell = farewell
            self._listening[sequence.slot] = False

    def abort_owner(self, owner: int) -> None:
        """Give up everything that one gateway asked for."""
        for number in [s.number for s in self._sequences.values() if s.owner == owner]:
            self.abort(owner, number)

    def flush_cache(self) -> int:
        """Forget the prefix cache; returns the number of blocks forgotten."""
        return self._pool.flush()

    @property
    def has_work(self) -> bool:
        """Whether a step may be planned now or after a retirement."""
        return bool(self._sequences)

    def take_notices(self) -> Notices:
        notices, self._notices = self._notices, Notices()
        return notices

    def stats(self) -> EngineStats:
        return EngineStats(
            step=self._retired_step + 1,
            running=len(self._running),
            waiting=self._num_waiting,
            waiting_tokens=self._waiting_tokens,
            blocks_used=self._pool.num_held,
            blocks_cached=self._pool.num_cached,
            blocks_total=self._pool.num_blocks,
            preemptions=self._preemptions,
            prefix_queried_tokens=self._prefix_queried,
            prefix_hit_tokens=self._prefix_hits,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    # -- planning ------------------------------------------------------------------------------------------------------

    def plan(self) -> PlannedStep | None:
        """Decide the next step: every decode that has room, then prompts, begun or new, by their turn, within the
        budget."""
        self._release_left()
        updates: list[tuple[int, int, int]] = []
        singles, longer = self._due()
        decodes = self._grow(singles, updates)
        limit = self.limits.max_mixed_tokens if len(decodes) else self.limits.max_batched_tokens
        budget = limit - len(decodes)
        chunk_slots: list[int] = []
        chunk_lens: list[int] = []
        begun = [self._in_slot(slot) for slot in longer if self._is_running(slot)]  # others made room for a decode
        begun.sort(key=lambda sequence: sequence.place, reverse=True)
        admitted: list[Sequence] = []
        while budget > 0:
            sequence = self._admit(updates, before=begun[-1] if begun else None)
            if sequence is not None:
                admitted.append(sequence)
            elif begun:
                sequence = begun.pop()
            else:
                break
            chunk_slots.append(sequence.slot)
            chunk_lens.append(min(int(self._length[sequence.slot] - self._computed[sequence.slot]), budget))
            budget -= chunk_lens[-1]
        if len(decodes) + len(chunk_slots) == 0:
            return None
        return self._commit_plan(decodes, chunk_slots, chunk_lens, updates, admitted)

    def _due(self) -> tuple[np.ndarray, list[int]]:
        """Running slots with exactly one token to compute, and those with more."""
        running = self._running
        computed = self._computed[running]
        remaining = self._length[running] - computed
        remaining[computed >= self._max_length[running] - 1] = 0  # its last token needs no keys: nobody will see them
        return running[remaining == 1], running[remaining > 1].tolist()

    def _commit_plan(
        self,
        decodes: np.ndarray,
        chunk_slots: list[int],
        chunk_lens: list[int],
        updates: list[tuple[int, int, int]],
        admitted: list[Sequence],
    ) -> PlannedStep:
        slots, query_lens = decodes, np.ones(len(decodes), np.int32)
        if chunk_slots:
            slots = np.concatenate((decodes, np.array(chunk_slots, np.intp)))
            query_lens = np.concatenate((query_lens, np.array(chunk_lens, np.int32)))
        computed_after = self._computed[slots] + query_lens
        samples = computed_after == self._length[slots]
        self._computed[slots] = computed_after
        self._length[slots] += samples
        step = self._next_step
        self._next_step += 1
        self._last_step[slots] = step
        plan = StepPlan(
            step=step,
            slots=slots.astype(np.int32),
            query_lens=query_lens,
            num_decode_rows=len(decodes),
            max_query_len=max(chunk_lens, default=1),
            max_kv_len=int(computed_after.max()),
            block_updates=np.array(updates, np.int32).reshape(-1, 3) if updates else _NO_UPDATES,
            admissions=np.array([self._admission(s) for s in admitted], ADMISSION) if admitted else _NO_ADMISSIONS,
            admitted_ids=np.concatenate([s.ids for s in admitted]) if admitted else _NO_IDS,
        )
        return PlannedStep(plan=plan, slots=slots, samples=samples, computed_after=computed_after)

    def _grow(self, slots: np.ndarray, updates: list[tuple[int, int, int]]) -> np.ndarray:
        """Give a block to each slot whose next token needs one, preempting where none is left.

        Returns the slots that can run now. With steps in flight a victim's blocks come free only when these have
        retired, so a slot may have to sit out a step.
        """
        needy = slots[self._computed[slots] >= self._capacity[slots]]
        short = [slot for slot in needy.tolist() if not self._append_block(slot, updates)]
        if not short:
            return slots
        while short and len(self._running) > 1 and self._num_blocks_coming() < len(short):
            victim = int(self._running[np.argmin(self._computed[self._running])])
            self._preempt(victim)
            # Its slot and blocks may go to others in this very step: a block table's entry is written once a step.
            updates[:] = [update for update in updates if update[0] != victim]
            self._release_left()
            short = [s for s in short if self._is_running(s) and not self._append_block(s, updates)]
        return slots[np.isin(slots, self._running) & ~np.isin(slots, np.array(short, np.intp))]

    def _append_block(self, slot: int, updates: list[tuple[int, int, int]]) -> bool:
        if self._pool.num_free == 0:
            return False
        sequence = self._in_slot(slot)
        (block,) = self._pool.allocate(1)
        updates.append((slot, len(sequence.blocks), block))
        sequence.blocks.append(block)
        self._capacity[slot] += self.limits.block_size
        return True

    def _num_blocks_coming(self) -> int:
        return sum(len(sequence.blocks) for sequence in self._leaving)

    def _preempt(self, slot: int) -> None:
        sequence = self._in_slot(slot)
        self._preemptions += 1
        self._leave(sequence, requeue=True)

    def _admit(self, updates: list[tuple[int, int, int]], before: Sequence | None) -> Sequence | None:
        """Give the waiting sequence whose turn it is, if that is earlier than `before`'s, a slot and the blocks for all
        its tokens, if both are there."""
        while self._waiting and self._waiting[0][-1].phase is not Phase.WAITING:
            heapq.heappop(self._waiting)
        if not self._waiting or not self._free_slots:
            return None
        sequence = self._waiting[0][-1]
        if before is not None and before.place < sequence.place:
            return None
        cached = self._pool.find(sequence.digests) if sequence.shares_blocks else []
        missing = math.ceil(len(sequence.ids) / self.limits.block_size) - len(cached)
        left = self._pool.num_free - self._pool.count_cached(cached) - missing
        if left < (self.limits.watermark_blocks if len(self._running) else 0):
            return None
        heapq.heappop(self._waiting)
        self._stop_waiting(sequence)
        self._pool.hold(cached)
        sequence.blocks = cached + self._pool.allocate(missing)
        self._seat(sequence, num_cached=len(cached) * self.limits.block_size)
        updates.extend((sequence.slot, index, block) for index, block in enumerate(sequence.blocks))
        return sequence

    def _seat(self, sequence: Sequence, num_cached: int) -> None:
        """Put a sequence into a slot, with its first `num_cached` tokens computed."""
        slot = sequence.slot = self._free_slots.pop()
        known = len(sequence.ids)
        self._sequence_in[slot] = sequence
        self._computed[slot] = num_cached
        self._length[slot] = self._known[slot] = known
        self._max_length[slot] = sequence.max_length
        self._capacity[slot] = len(sequence.blocks) * self.limits.block_size
        self._register_at[slot] = num_cached + self.limits.block_size
        self._last_step[slot] = -1
        self._listening[slot] = True
        self._owner[slot], self._number[slot] = sequence.owner, sequence.number
        self._stop_ids[slot] = -1
        self._stop_ids[slot, : len(sequence.stop_ids)] = sequence.stop_ids
        self._stop_width = max(self._stop_width, len(sequence.stop_ids))
        self._ids[slot, :known] = sequence.ids
        sequence.phase = Phase.RUNNING
        self._set_running()
        if sequence.shares_blocks:
            self._prefix_queried += known
            self._prefix_hits += num_cached
        self._prompt_tokens += known - num_cached
        started = Started(sequence.number, num_cached, self._clock(), again=sequence.started)
        self._notices.started.append((sequence.owner, started))
        sequence.started = True

    def _admission(self, sequence: Sequence) -> tuple[object, ...]:
        sampling = sequence.sampling
        stop_ids = sequence.stop_ids + (-1,) * (MAX_STOP_IDS - len(sequence.stop_ids))
        return (
            sequence.slot,
            len(sequence.ids),
            sequence.num_prompt,
            int(self._register_at[sequence.slot]) - self.limits.block_size,  # nothing is entered yet but what was found
            sequence.max_length,
            sequence.min_length,
            sampling.top_k,
            int(sampling.penalizes),
            sampling.seed - (1 << 64) if sampling.seed >= 1 << 63 else sampling.seed,  # the same 64 bits, signed
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.repetition_penalty,
            stop_ids,
        )

    # -- retiring ------------------------------------------------------------------------------------------------------

    def retire(self, planned: PlannedStep, tokens: np.ndarray) -> RetiredStep:
        """Take in what a step produced: tokens [rows] int32, NO_TOKEN or BROKEN_ROW where there is none."""
        slots = planned.slots
        listening = self._listening[slots]
        filled = listening & (planned.computed_after >= self._register_at[slots])
        for slot, computed in zip(slots[filled].tolist(), planned.computed_after[filled].tolist(), strict=True):
            self._register_blocks(slot, computed)
        drawn = listening & planned.samples & (tokens >= 0)
        heard, new = slots[drawn], tokens[drawn]
        known = self._known[heard]
        self._ids[heard, known] = new
        known += 1
        self._known[heard] = known
        self._generated_tokens += len(new)
        retired = RetiredStep(owners=self._owner[heard], numbers=self._number[heard], tokens=new)
        stopped = (new[:, None] == self._stop_ids[:, : self._stop_width][heard]).any(axis=1)
        for i in np.flatnonzero(stopped | (known == self._max_length[heard])).tolist():
            self._finish_with_token(self._in_slot(int(heard[i])), int(new[i]), stopped=bool(stopped[i]))
        for slot in slots[listening & planned.samples & (tokens == BROKEN_ROW)].tolist():
            sequence = self._in_slot(slot)
            self._pool.forget(sequence.blocks)  # whoever shared them would be broken too
            self._finish(sequence, FinishReason.BROKEN, detail="the model's output for this request is not a number")
        self._retired_step = planned.plan.step
        self._release_left()
        return retired

    def _register_blocks(self, slot: int, computed: int) -> None:
        """Enter the blocks that retired steps have filled up to `computed` tokens into the prefix index."""
        size = self.limits.block_size
        sequence = self._in_slot(slot)
        first, last = int(self._register_at[slot]) // size - 1, computed // size
        self._register_at[slot] = (last + 1) * size
        if not sequence.shares_blocks:
            return
        self._extend_digests(sequence, self._ids[slot, : last * size])
        for index in range(first, last):
            self._pool.register(sequence.blocks[index], sequence.digests[index])

    def _finish_with_token(self, sequence: Sequence, token: int, *, stopped: bool) -> None:
        if not stopped:
            self._finish(sequence, sequence.full_reason)
        elif token in sequence.eos_ids:
            self._finish(sequence, FinishReason.EOS, stop_id=token)
        else:
            self._finish(sequence, FinishReason.STOP_TOKEN, stop_id=token)

    def _finish(self, sequence: Sequence, reason: FinishReason, *, stop_id: int = -1, detail: str = "") -> None:
        finished = Finished(sequence.number, reason, stop_id=stop_id, detail=detail)
        self._notices.finished.append((sequence.owner, finished))
        self._listening[sequence.slot] = False
        self._leave(sequence, requeue=False)

    # -- waiting, leaving ----------------------------------------------------------------------------------------------

    def _wait(self, sequence: Sequence) -> None:
        sequence.phase = Phase.WAITING
        sequence.requeue = False
        sequence.slot = -1
        if sequence.shares_blocks:
            # The last token must be computed even if all before it are cached: its logits are wanted.
            self._extend_digests(sequence, sequence.ids[:-1])
        sequence.turn = -math.inf if sequence.started else self._clock() + self._yield_of(sequence)
        heapq.heappush(self._waiting, (*sequence.place, sequence))
        self._num_waiting += 1
        self._waiting_tokens += len(sequence.ids)

    def _yield_of(self, sequence: Sequence) -> float:
        """Return by how many seconds later it counts as having come."""
        cached = self._pool.find(sequence.digests) if sequence.shares_blocks else []
        tokens = len(sequence.ids) - len(cached) * self.limits.block_size
        return min(self._yield_s_per_token * tokens, MOST_YIELD_S)

    def _stop_waiting(self, sequence: Sequence) -> None:
        self._num_waiting -= 1
        self._waiting_tokens -= len(sequence.ids)

    def _leave(self, sequence: Sequence, *, requeue: bool) -> None:
        sequence.requeue = requeue
        if sequence.phase is Phase.RUNNING:
            sequence.phase = Phase.LEAVING
            self._leaving.append(sequence)
            self._set_running()

    def _release_left(self) -> None:
        """Free the slots and blocks of those whose last step has retired."""
        still: list[Sequence] = []
        left, self._leaving = self._leaving, still
        for sequence in left:
            slot = sequence.slot
            if self._last_step[slot] > self._retired_step:
                still.append(sequence)
                continue
            self._pool.release(sequence.blocks)
            sequence.blocks = []
            self._sequence_in[slot] = None
            self._listening[slot] = False
            self._free_slots.append(slot)
            if sequence.requeue:
                sequence.ids = self._ids[slot, : self._known[slot]].copy()
                self._wait(sequence)
                continue
            sequence.phase = Phase.GONE
            del self._sequences[sequence.owner, sequence.number]
            if sequence.farewell is not None:
                self._notices.finished.append((sequence.owner, sequence.farewell))

    def _set_running(self) -> None:
        running = [s for s in self._sequence_in if s is not None and s.phase is Phase.RUNNING]
        running.sort(key=lambda sequence: sequence.arrival)
        self._running = np.array([sequence.slot for sequence in running], np.intp)

    def _is_running(self, slot: int) -> bool:
        sequence = self._sequence_in[slot]
        return sequence is not None and sequence.phase is Phase.RUNNING

    def _in_slot(self, slot: int) -> Sequence:
        sequence = self._sequence_in[slot]
        if sequence is None:
            raise AssertionError(f"slot {slot} is empty")
        return sequence

    def _extend_digests(self, sequence: Sequence, ids: np.ndarray) -> None:
        """Make `digests` cover every full block of `ids`, the sequence's first tokens."""
        size = self.limits.block_size
        digests = sequence.digests
        for index in range(len(digests), len(ids) // size):
            parent = digests[-1] if digests else sequence.salt_digest
            digests.append(self._hasher.extend(parent, ids[index * size : (index + 1) * size]))

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check(self, owner: int, request: Submit, prompt: np.ndarray, output: np.ndarray) -> None:
        """The engine's door: what would break a step if a gateway let it through."""
        if (owner, request.request) in self._sequences:
            raise RejectedError(f"request number {request.request} is running already")
        if not 0 <= request.request < 1 << 63:
            raise RejectedError(f"request number {request.request} is out of range")
        vocab = self.limits.vocab_size
        sampling = request.sampling
        stop_ids = (*request.eos_ids, *request.stop_ids)
        for ids, what in ((prompt, "prompt"), (output, "output")):
            if len(ids) and (ids.min() < 0 or ids.max() >= vocab):
                raise RejectedError(f"a {what} token id is outside the vocabulary of {vocab}")
        if any(not 0 <= token < vocab for token in stop_ids):
            raise RejectedError(f"a stop token id is outside the vocabulary of {vocab}")
        if len(prompt) == 0:
            raise RejectedError("the prompt is empty")
        if len(prompt) >= self.limits.max_model_len:
            raise RejectedError(f"a prompt of {len(prompt)} tokens leaves no room in {self.limits.max_model_len}")
        if not (0 <= request.min_tokens <= request.max_tokens and request.max_tokens > len(output)):
            raise RejectedError("max_tokens or min_tokens contradict each other or the output so far")
        if len(prompt) + len(output) >= self.limits.max_model_len:
            raise RejectedError("the output so far fills the context")
        if len(set(stop_ids)) > MAX_STOP_IDS:
            raise RejectedError(f"more than {MAX_STOP_IDS} stop ids")
        floats = (
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.repetition_penalty,
        )
        if not all(math.isfinite(value) for value in floats):
            raise RejectedError("a sampling parameter is not finite")
        if sampling.temperature < 0 or sampling.repetition_penalty <= 0 or not 0 <= sampling.seed < 1 << 64:
            raise RejectedError("temperature, repetition_penalty or seed is out of range")
        if not (0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1 and 0 <= sampling.top_k < 1 << 31):
            raise RejectedError("top_p, min_p or top_k is out of range")

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, slots and phases agree with each other. For tests and idle moments."""
        seated = [s for s in self._sequence_in if s is not None]
        self._pool.check(block for s in seated for block in s.blocks)
        if len(seated) + len(self._free_slots) != self.limits.max_running:
            raise AssertionError("a slot is lost or given twice")
        if {id(s) for s in seated if s.phase is Phase.LEAVING} != {id(s) for s in self._leaving}:
            raise AssertionError("a leaving sequence is lost")
        waiting = [s for s in self._sequences.values() if s.phase is Phase.WAITING]
        if len(waiting) + len(seated) != len(self._sequences) or len(waiting) != self._num_waiting:
            raise AssertionError("a sequence is lost")
        if sum(len(s.ids) for s in waiting) != self._waiting_tokens:
            raise AssertionError("waiting tokens are miscounted")
