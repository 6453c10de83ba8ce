"""The scheduler against a device whose every answer is known, with plans made before earlier steps have retired."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.worker.fake_device import Expected, FakeDevice, expected_output
from worker.messages import Finished, FinishReason, SamplingParams, Submit, ids_to_bytes
from worker.plan import StepPlan
from worker.scheduler import MOST_YIELD_S, NO_TOKEN, YIELD_S_PER_TOKEN, Phase, PlannedStep, Scheduler, SchedulerLimits

LIMITS = SchedulerLimits(
    vocab_size=13,
    max_model_len=24,
    max_running=4,
    max_batched_tokens=8,
    max_mixed_tokens=8,
    block_size=4,
    num_blocks=12,
    watermark_blocks=1,
    prefix_caching=True,
)

Key = tuple[int, int]


class Simulation:
    """A scheduler, a fake device, steps in flight between them, and what everybody has heard."""

    def __init__(self, limits: SchedulerLimits, *, run_ahead: int = 1, nan_every: int = 0) -> None:
        self.limits = limits
        self.run_ahead = run_ahead
        self.nan_every = nan_every
        self.now = 0.0
        self.scheduler = Scheduler(limits, hash_key=b"key", clock=lambda: self.now)
        self.device = FakeDevice(limits, nan_every=nan_every)
        self.in_flight: deque[PlannedStep] = deque()
        self.requests: dict[Key, Submit] = {}
        self.tokens: dict[Key, list[int]] = {}
        self.finished: dict[Key, Finished] = {}
        self.cancelled: set[Key] = set()
        self.came: dict[Key, float] = {}
        self.started: list[Key] = []
        self.seated: list[Key] = []  # started, or again
        self.restarts = 0

    # -- operations ----------------------------------------------------------------------------------------------------

    def submit(self, request: Submit, owner: int = 0) -> None:
        key = owner, request.request
        assert key not in self.requests
        self.requests[key] = request
        self.tokens[key] = []
        self.came[key] = self.now
        self.scheduler.submit(owner, request)
        self.listen()

    def abort(self, number: int, owner: int = 0) -> None:
        self.scheduler.abort(owner, number)
        self.cancelled.add((owner, number))
        self.listen()

    def vanish(self, owner: int) -> None:
        self.scheduler.abort_owner(owner)
        self.cancelled |= {key for key in self.requests if key[0] == owner}
        self.listen()

    def launch(self) -> bool:
        """Plan a step and start it; whether there was one to plan."""
        others_ran = bool(len(self.scheduler._running))
        planned = self.scheduler.plan()
        self.listen()
        if planned is None:
            return False
        if len(planned.plan.admissions):
            self._check_admissions(planned.plan, others_ran)
        self.device.launch(planned.plan)
        self.in_flight.append(planned)
        return True

    def retire(self) -> None:
        retired = self.scheduler.retire(self.in_flight.popleft(), self.device.collect())
        for owner, number, token in zip(retired.owners, retired.numbers, retired.tokens, strict=True):
            key = int(owner), int(number)
            assert key not in self.finished, "a token after the end"
            assert key not in self.cancelled, "a token after the abort"
            self.tokens[key].append(int(token))
        self.listen()

    def turn(self) -> None:
        """One turn of the leader's loop."""
        launched = self.launch()
        if self.in_flight and (not launched or len(self.in_flight) >= self.run_ahead):
            self.retire()

    def run(self) -> None:
        """Turn until all is done. Every step that is not a stall computes something, so the number is bounded."""
        tokens = sum(len(request.prompt) // 4 + request.max_tokens for request in self.requests.values())
        for _ in range(100 + 10 * tokens):
            if not self.scheduler.has_work:
                break
            self.turn()
            self.check()
        assert not self.scheduler.has_work, "no progress"
        while self.in_flight:
            self.retire()

    # -- what must hold ------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        notices = self.scheduler.take_notices()
        for owner, started in notices.started:
            key = owner, started.request
            assert started.again == (key in self.started), "started twice"
            assert started.scheduled_at == self.now
            request = self.requests[key]
            known = len(request.prompt) // 4 + len(request.output) // 4 + started.again * len(self.tokens[key])
            assert started.cached_tokens < known
            self.seated.append(key)
            if started.again:
                self.restarts += 1
            else:
                self.started.append(key)
        for owner, finished in notices.finished:
            key = owner, finished.request
            assert key not in self.finished, "finished twice"
            self.finished[key] = finished

    def check(self) -> None:
        self.scheduler.check_integrity()
        pool = self.scheduler._pool
        for planned in self.in_flight:
            plan = planned.plan
            for slot, after in zip(plan.slots.tolist(), planned.computed_after.tolist(), strict=True):
                blocks = self.device.tables.slot(slot).blocks
                used = [blocks[index] for index in range(-(-after // self.limits.block_size))]
                assert all(pool.is_held(block) for block in used), "a block of a step in flight is free"
                assert self.scheduler._sequence_in[slot] is not None, "a slot of a step in flight is free"
        stats = self.scheduler.stats()
        assert stats.blocks_used == pool.num_held
        assert stats.blocks_used + stats.blocks_cached <= stats.blocks_total == self.limits.num_blocks
        assert stats.running <= self.limits.max_running

    def _check_admissions(self, plan: StepPlan, others_ran: bool) -> None:
        scheduler = self.scheduler
        if others_ran:
            assert scheduler._pool.num_free >= self.limits.watermark_blocks, "the watermark"
        seated = [scheduler._in_slot(slot) for slot in plan.admissions["slot"].tolist()]
        waiting = [s for s in scheduler._sequences.values() if s.phase is Phase.WAITING]
        places = [s.place for s in seated]
        assert places == sorted(places)
        assert not waiting or places[-1] < min(s.place for s in waiting), "it was another one's turn"

    def check_outcome(self) -> None:
        """At the end: everybody got exactly what the model makes of the request alone, and nothing is left behind."""
        for key, request in self.requests.items():
            assert key in self.finished, f"{key} never ended"
            expected = self.expected(request)
            finished = self.finished[key]
            if finished.reason is FinishReason.ABORTED:
                assert key in self.cancelled
                assert self.tokens[key] == expected.tokens[: len(self.tokens[key])]
            else:
                assert self.tokens[key] == expected.tokens, key
                assert (finished.reason, finished.stop_id) == (expected.reason, expected.stop_id)
        latest = -math.inf
        for key in self.started:
            request = self.requests[key]
            tokens = (len(request.prompt) + len(request.output)) // 4
            yields = min(YIELD_S_PER_TOKEN * tokens, MOST_YIELD_S)
            assert latest <= self.came[key] + yields + 1e-9, "somebody came later than that and was first"
            latest = max(latest, self.came[key])
        self.check_idle()

    def check_idle(self) -> None:
        self.scheduler.check_integrity()
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.waiting_tokens, stats.blocks_used) == (0, 0, 0, 0)
        assert len(self.scheduler._free_slots) == self.limits.max_running
        assert stats.generated_tokens == sum(len(tokens) for tokens in self.tokens.values())
        assert stats.preemptions >= self.restarts, "some may have ended, or been aborted, before they went on"
        if self.limits.prefix_caching is False:
            assert (stats.blocks_cached, stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (0, 0, 0)

    def expected(self, request: Submit) -> Expected:
        return expected_output(request, self.limits, self.nan_every)


def make_submit(
    number: int, prompt: list[int], max_tokens: int, *, salt: int = 0, shares: bool = True, **fields: object
) -> Submit:
    """A request whose seed tells the fake device with whom it may share KV blocks."""
    return Submit(
        request=number,
        epoch=1,
        prompt=ids_to_bytes(prompt),
        sampling=SamplingParams(seed=salt if shares else 1000 + number),
        max_tokens=max_tokens,
        cache_salt=bytes([salt]),
        use_prefix_cache=shares,
        **fields,  # type: ignore[arg-type]
    )


@st.composite
def submits(draw: st.DrawFn, number: int, limits: SchedulerLimits, nan_every: int) -> Submit:
    """Requests of which many share prefixes, some were begun before a restart, and some cannot fit the context."""
    length = draw(st.integers(1, limits.max_model_len - 1))
    shared = draw(st.integers(0, length))
    family = draw(st.integers(0, 1))
    rng = np.random.default_rng(draw(st.integers(0, 3)))
    prompt = [(family + 3 * index) % limits.vocab_size for index in range(shared)]
    prompt += rng.integers(0, limits.vocab_size, length - shared).tolist()
    max_tokens = draw(st.integers(1, 2 * limits.max_model_len if draw(st.booleans()) else 4))
    stops = draw(st.lists(st.integers(0, limits.vocab_size - 1), max_size=3, unique=True))
    cut = draw(st.integers(0, len(stops)))
    request = make_submit(
        number,
        prompt,
        max_tokens,
        salt=draw(st.integers(0, 1)),
        shares=draw(st.integers(0, 4)) > 0,
        min_tokens=draw(st.integers(0, max_tokens)) if draw(st.booleans()) else 0,
        eos_ids=tuple(stops[:cut]),
        stop_ids=tuple(stops[cut:]),
    )
    whole = expected_output(request, limits, nan_every).tokens
    if len(whole) > 1 and draw(st.integers(0, 3)) == 0:
        produced = draw(st.integers(1, len(whole) - 1))
        fields = {name: getattr(request, name) for name in request.__struct_fields__}
        request = Submit(**(fields | {"output": ids_to_bytes(whole[:produced])}))
    return request


class SchedulerMachine(RuleBasedStateMachine):
    """Anything that gateways and the device may do to a scheduler, in any order."""

    @initialize(
        spare_blocks=st.integers(0, 8),
        block_size=st.sampled_from([1, 2, 4]),
        max_running=st.integers(1, 5),
        spare_budget=st.integers(0, 12),
        mixed_share=st.sampled_from([1, 2, 100]),
        watermark_blocks=st.integers(0, 3),
        prefix_caching=st.booleans(),
        run_ahead=st.integers(1, 3),
        nan_every=st.sampled_from([0, 0, 40]),
    )
    def build(
        self,
        spare_blocks: int,
        block_size: int,
        max_running: int,
        spare_budget: int,
        mixed_share: int,
        watermark_blocks: int,
        prefix_caching: bool,
        run_ahead: int,
        nan_every: int,
    ) -> None:
        limits = replace(
            LIMITS,
            block_size=block_size,
            num_blocks=-(-LIMITS.max_model_len // block_size) + spare_blocks,
            max_running=max_running,
            max_batched_tokens=max_running + spare_budget,
            max_mixed_tokens=max_running + spare_budget // mixed_share,
            watermark_blocks=watermark_blocks,
            prefix_caching=prefix_caching,
        )
        self.simulation = Simulation(limits, run_ahead=run_ahead, nan_every=nan_every)
        self.next_number = 0

    @rule(data=st.data(), owner=st.integers(0, 2), count=st.integers(1, 4))
    def submit(self, data: st.DataObject, owner: int, count: int) -> None:
        for _ in range(count):
            simulation = self.simulation
            request = data.draw(submits(self.next_number, simulation.limits, simulation.nan_every))
            self.next_number += 1
            simulation.submit(request, owner)

    @rule(count=st.integers(1, 12))
    def turn(self, count: int) -> None:
        for _ in range(count):
            self.simulation.turn()
            self.simulation.check()

    @precondition(lambda self: len(self.simulation.in_flight) < 4)
    @rule()
    def launch(self) -> None:
        self.simulation.launch()

    @precondition(lambda self: self.simulation.in_flight)
    @rule()
    def retire(self) -> None:
        self.simulation.retire()

    @precondition(lambda self: self.simulation.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        owner, number = data.draw(st.sampled_from(sorted(self.simulation.requests)))
        self.simulation.abort(number, owner)

    @rule(seconds=st.sampled_from([1e-4, 1e-3, 1e-2, 0.4]))
    def let_time_pass(self, seconds: float) -> None:
        self.simulation.now += seconds

    @rule()
    def abort_nobody(self) -> None:
        self.simulation.scheduler.abort(7, 7)

    @rule(owner=st.integers(0, 2))
    def vanish(self, owner: int) -> None:
        self.simulation.vanish(owner)

    @rule()
    def flush(self) -> None:
        self.simulation.scheduler.flush_cache()
        assert self.simulation.scheduler.stats().blocks_cached == 0

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.run()
            self.simulation.check_outcome()


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def episode(seed: int, **limits: object) -> Simulation:
    """Run many requests of two gateways through a small engine, with aborts and flushes on the way."""
    rng = np.random.default_rng(seed)
    simulation = Simulation(replace(LIMITS, **limits), run_ahead=1 + seed % 3, nan_every=50 * (seed % 2))
    for number in range(20):
        shared, own = rng.integers(1, 12, 2)
        request = make_submit(
            number,
            [3 * index % 13 for index in range(shared)] + rng.integers(0, 13, own).tolist(),
            int(rng.integers(1, 30)),
            salt=number % 2,
            shares=number % 5 > 0,
            eos_ids=(5,) * int(rng.integers(0, 2)),
        )
        simulation.submit(request, owner=number % 2)
        for _ in range(int(rng.integers(0, 8))):
            simulation.turn()
            simulation.check()
        if number % 4 == 0:
            victim = int(rng.integers(0, number + 1))
            simulation.abort(victim, owner=victim % 2)
        if number % 9 == 0:
            simulation.scheduler.flush_cache()
    simulation.run()
    simulation.check_outcome()
    return simulation


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("room", ["tight", "ample"])
def test_outputs_are_the_models_however_little_memory_there_is(
    room: str, prefix_caching: bool, block_size: int
) -> None:
    """`check_outcome` compares every output; what is left to see is that all this really happened on the way."""
    longest = LIMITS.max_model_len // block_size
    limits = {
        "num_blocks": longest if room == "tight" else LIMITS.max_running * longest,
        "watermark_blocks": 0,
        "prefix_caching": prefix_caching,
        "block_size": block_size,
    }
    stats = [episode(seed, **limits).scheduler.stats() for seed in range(9)]
    assert (sum(stat.preemptions for stat in stats) > 10) == (room == "tight")
    assert (sum(stat.prefix_hit_tokens for stat in stats) > 100) == prefix_caching


def test_prompts_leave_room_for_the_next_tokens_of_others() -> None:
    """Alone a prompt fills a step; beside a decode, whose token waits for the step, it gets less."""
    scheduler = Scheduler(
        replace(LIMITS, max_batched_tokens=8, max_mixed_tokens=5, prefix_caching=False),
        hash_key=b"k" * 32,
        clock=lambda: 0.0,
    )

    def submit(number: int) -> None:
        prompt = ids_to_bytes(np.arange(12) % LIMITS.vocab_size)
        scheduler.submit(0, Submit(request=number, epoch=1, prompt=prompt, sampling=SamplingParams(), max_tokens=8))

    def step() -> list[int]:
        planned = scheduler.plan()
        assert planned is not None
        scheduler.retire(planned, np.where(planned.samples, 1, NO_TOKEN).astype(np.int32))
        return planned.plan.query_lens.tolist()

    submit(0)
    assert [step(), step()] == [[8], [4]]
    submit(1)
    assert [step(), step(), step(), step()] == [[1, 4], [1, 4], [1, 4], [1, 1]]


def order_of(requests: list[tuple[float, list[int]]], *, before: Submit | None = None, **limits: object) -> list[int]:
    """Return the numbers of requests that come at these seconds with these prompts, as they are started: one at a time.
    `before` has ended when they come."""
    simulation = Simulation(replace(LIMITS, max_running=1, max_model_len=8192, num_blocks=8192, **limits))
    if before is not None:
        simulation.submit(before)
        simulation.run()
    simulation.submit(make_submit(100, [1], 3))  # keeps the slot until all have come
    simulation.turn()
    for number, (seconds, prompt) in enumerate(requests):
        simulation.now = seconds
        simulation.submit(make_submit(number, prompt, 1))
    while simulation.scheduler.has_work or simulation.in_flight:
        simulation.turn()
    return [number for _, number in simulation.started if number < 100]


def test_of_those_that_come_at_once_the_shortest_are_first() -> None:
    assert order_of([(0.0, [1] * 30), (0.0, [1] * 10), (0.0, [2] * 20), (0.0, [3] * 10)]) == [1, 3, 2, 0]


def test_who_comes_much_later_is_not_first_however_short() -> None:
    """A tenth of a second is what 500 tokens yield."""
    assert order_of([(0.0, [1] * 501), (0.099, [1])]) == [1, 0]
    assert order_of([(0.0, [1] * 501), (0.101, [1])]) == [0, 1]
    assert order_of([(0.0, [1] * 8000), (0.999, [1])]) == [1, 0]
    assert order_of([(0.0, [1] * 8000), (1.001, [1])]) == [0, 1]


def test_who_is_short_passes_a_long_prompt_that_has_begun() -> None:
    limits = replace(LIMITS, max_running=3, max_model_len=8192, num_blocks=8192, max_batched_tokens=100)
    simulation = Simulation(replace(limits, max_mixed_tokens=100, prefix_caching=False))

    def submit(number: int, seconds: float, tokens: int) -> None:
        simulation.now = seconds
        simulation.submit(make_submit(number, [1] * tokens, 1))

    def step() -> dict[int, int]:
        planned = simulation.scheduler.plan()
        assert planned is not None
        numbers = [simulation.scheduler._in_slot(slot).number for slot in planned.plan.slots.tolist()]
        simulation.listen()
        simulation.device.launch(planned.plan)
        simulation.in_flight.append(planned)
        simulation.retire()
        return dict(zip(numbers, planned.plan.query_lens.tolist(), strict=True))

    submit(0, 0.0, 500)
    assert step() == {0: 100}
    submit(1, 0.05, 30)
    assert step() == {1: 30, 0: 70}
    submit(2, 0.11, 30)  # too late
    assert [step(), step(), step(), step()] == [{0: 100}, {0: 100}, {0: 100}, {0: 30, 2: 30}]
    simulation.check_outcome()


def test_a_prompt_counts_for_what_is_not_cached() -> None:
    long = [3 * index % 13 for index in range(40)]
    assert order_of([(0.0, [2] * 20), (0.0, [*long, 1])], before=make_submit(101, long, 1)) == [1, 0]
    before = make_submit(101, long, 1)
    assert order_of([(0.0, [2] * 20), (0.0, [*long, 1])], before=before, prefix_caching=False) == [0, 1]


def test_who_was_preempted_goes_on_first() -> None:
    """Though somebody shorter has come before."""
    limits = replace(LIMITS, max_running=2, num_blocks=6, watermark_blocks=0, prefix_caching=False)
    simulation = Simulation(limits)
    simulation.submit(make_submit(0, [1] * 8, 12))
    simulation.submit(make_submit(1, [2] * 8, 12))
    for _ in range(2):
        simulation.turn()
    simulation.submit(make_submit(2, [3], 1))
    simulation.run()
    assert simulation.seated == [(0, 0), (0, 1), (0, 1), (0, 2)]
