"""The leader's loop, turned by hand: what it hears, in which order it acts, and who is told what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.worker.fake_device import FakeDevice, expected_output
from worker.leader import REPORT_S, Leader
from worker.messages import (
    MAX_STOP_IDS,
    Abort,
    CacheFlushed,
    EngineInfo,
    EngineStats,
    Finished,
    FinishReason,
    FlushCache,
    Goodbye,
    Hello,
    Outputs,
    Ready,
    SamplingParams,
    Started,
    Submit,
    ToGateway,
    ToLeader,
    ids_from_bytes,
    ids_to_bytes,
)
from worker.plan import StepPlan
from worker.scheduler import Scheduler, SchedulerLimits

LIMITS = SchedulerLimits(
    vocab_size=50,
    max_model_len=40,
    max_running=4,
    max_batched_tokens=16,
    max_mixed_tokens=16,
    block_size=4,
    num_blocks=30,
    watermark_blocks=1,
    prefix_caching=True,
)
EPOCH = 3


class FakeChannel:
    """Gateways that say what a test puts into `inbox`, and what they are told. Those in `gone` cannot be told."""

    def __init__(self) -> None:
        self.inbox: list[tuple[int, ToLeader]] = []
        self.outbox: list[tuple[int, ToGateway]] = []
        self.gone: set[int] = set()
        self.waits: list[float] = []

    def wait(self, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        return bool(self.inbox)

    def receive(self) -> Iterator[tuple[int, ToLeader]]:
        while self.inbox:
            yield self.inbox.pop(0)

    def send(self, gateway: int, message: ToGateway) -> bool:
        if gateway not in self.gone:
            self.outbox.append((gateway, message))
        return gateway not in self.gone


class Bench:
    """A leader with a fake for everything around it."""

    def __init__(
        self, limits: SchedulerLimits = LIMITS, *, run_ahead: int = 1, gateways: int = 1, linger_s: float = 0.0
    ) -> None:
        self.limits = limits
        self.now = 100.0
        self.device = FakeDevice(limits)
        self.channel = FakeChannel()
        self.frames: list[bytes] = []
        self.beats: list[int] = []
        self.scheduler = Scheduler(limits, hash_key=b"key", clock=lambda: self.now)
        self.info = EngineInfo(
            epoch=EPOCH,
            model_path="somewhere",
            vocab_size=limits.vocab_size,
            max_model_len=limits.max_model_len,
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
            max_running=limits.max_running,
            max_batched_tokens=limits.max_batched_tokens,
            tensor_parallel_size=2,
            device="cpu",
            dtype="float32",
            attention_backend="torch",
            prefix_caching=limits.prefix_caching,
        )
        self.leader = Leader(
            self.scheduler,
            self.device,
            self.channel,
            self.info,
            run_ahead=run_ahead,
            clock=lambda: self.now,
            broadcast=self.frames.append,
            heartbeat=self.beats.append,
            linger_s=linger_s,
        )
        self.say(*((gateway, Hello(secret=b"")) for gateway in range(gateways)))
        self.turn()
        self.channel.outbox.clear()

    def say(self, *messages: tuple[int, ToLeader]) -> None:
        self.channel.inbox += messages

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.leader.step()
            self.scheduler.check_integrity()

    def run(self) -> None:
        for _ in range(500):
            if not self.scheduler.has_work and not self.channel.inbox:
                return
            self.turn()
        raise AssertionError("no progress")

    def outputs(self, gateway: int = 0) -> list[Outputs]:
        return [m for to, m in self.channel.outbox if to == gateway and isinstance(m, Outputs)]

    def tokens(self, number: int, gateway: int = 0) -> list[int]:
        pairs = []
        for message in self.outputs(gateway):
            numbers = np.frombuffer(message.requests, "<i8").tolist()
            pairs += zip(numbers, ids_from_bytes(message.tokens).tolist(), strict=True)
        return [token for to, token in pairs if to == number]

    def started(self, gateway: int = 0) -> list[Started]:
        return [started for message in self.outputs(gateway) for started in message.started]

    def finished(self, gateway: int = 0) -> list[Finished]:
        return [finished for message in self.outputs(gateway) for finished in message.finished]


def submit(number: int, prompt: list[int] | None = None, max_tokens: int = 5, **fields: object) -> Submit:
    defaults: dict[str, object] = {"epoch": EPOCH, "sampling": SamplingParams()}
    prompt = prompt if prompt is not None else [1, 2, 3 + number]
    return Submit(request=number, prompt=ids_to_bytes(prompt), max_tokens=max_tokens, **(defaults | fields))  # type: ignore[arg-type]


def test_a_greeting_is_answered_with_what_the_engine_is() -> None:
    bench = Bench()
    bench.say((5, Hello(secret=b"")))
    bench.turn()
    assert bench.channel.outbox == [(5, Ready(bench.info, EngineStats(blocks_total=LIMITS.num_blocks)))]


def test_several_gateways_get_their_own_and_one_message_a_step() -> None:
    bench = Bench(gateways=2)
    requests = {(0, 1): submit(1), (0, 2): submit(2, [9]), (1, 1): submit(1, [7, 7, 7], 3)}
    bench.say(*((gateway, request) for (gateway, _), request in requests.items()))
    for _ in range(5):
        bench.channel.outbox.clear()
        bench.turn()
        assert len(bench.outputs(0)) == 1
    bench = Bench(gateways=2)
    bench.say(*((gateway, request) for (gateway, _), request in requests.items()))
    bench.run()
    for (gateway, number), request in requests.items():
        assert bench.tokens(number, gateway) == expected_output(request, LIMITS).tokens
    assert [finished.request for finished in bench.finished(0)] == [1, 2]
    assert bench.finished(1) == [Finished(1, FinishReason.MAX_TOKENS)]
    assert len(bench.outputs(1)) == 3


def test_the_first_message_says_when_a_request_started_and_what_was_cached() -> None:
    bench = Bench()
    prompt = list(range(10))
    bench.say((0, submit(1, prompt)))
    bench.run()
    bench.now += 0.25
    bench.say((0, submit(2, prompt)))
    bench.run()
    assert bench.started() == [Started(1, 0, 100.0), Started(2, 8, 100.25)]
    first = next(message for message in bench.outputs() if message.started)
    assert len(first.tokens) == 4


def test_an_abort_is_heard_before_the_tokens_of_a_step_are_handed_out() -> None:
    bench = Bench()
    bench.say((0, submit(1, max_tokens=30)), (0, submit(2, [9], max_tokens=30)))
    bench.turn(3)
    told = bench.tokens(1)
    assert len(told) == 3
    bench.say((0, Abort([1])))
    bench.turn(4)
    assert bench.tokens(1) == told
    assert len(bench.tokens(2)) == 7
    assert bench.finished() == [Finished(1, FinishReason.ABORTED)]


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_an_abort_frees_blocks_within_two_steps(run_ahead: int) -> None:
    bench = Bench(run_ahead=run_ahead)
    bench.say((0, submit(1, list(range(14)), max_tokens=25)), (0, submit(2, [9], max_tokens=30)))
    bench.turn(6)
    before = bench.scheduler.stats()
    bench.say((0, Abort([1])))
    bench.turn(2)
    after = bench.scheduler.stats()
    assert after.step - before.step == 2
    assert after.blocks_used <= before.blocks_used - 4
    assert bench.finished() == [Finished(1, FinishReason.ABORTED)]


def test_what_is_aborted_before_it_ran_never_runs() -> None:
    bench = Bench()
    bench.say((0, submit(1)), (0, Abort([1, 77])))
    bench.turn()
    assert bench.finished() == [Finished(1, FinishReason.ABORTED)]
    assert bench.frames == []


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_run_ahead_fills_before_the_oldest_step_is_read_back(run_ahead: int) -> None:
    bench = Bench(run_ahead=run_ahead)
    bench.say((0, submit(1, max_tokens=20)))
    depths = []
    for _ in range(6):
        bench.turn()
        depths.append(bench.device.num_in_flight)
    assert depths == [min(turn, run_ahead - 1) for turn in range(1, 7)]
    assert len(bench.tokens(1)) == 7 - run_ahead
    assert bench.beats[-1] == 7 - run_ahead
    bench.run()
    assert bench.tokens(1) == expected_output(submit(1, max_tokens=20), LIMITS).tokens
    assert bench.device.num_in_flight == 0


def test_followers_get_every_plan_before_it_runs_here() -> None:
    bench = Bench()
    launch, order = bench.device.launch, []
    bench.device.launch = lambda plan: (order.append(len(bench.frames)), launch(plan))[1]  # type: ignore[method-assign]
    bench.say((0, submit(1)), (0, submit(2)))
    bench.run()
    assert order == list(range(1, bench.device.num_steps + 1))
    assert [StepPlan.decode(frame).step for frame in bench.frames] == list(range(bench.device.num_steps))


def test_what_is_meant_for_another_epoch_is_dropped() -> None:
    bench = Bench()
    bench.say((0, submit(1, epoch=EPOCH - 1)), (0, submit(2, epoch=EPOCH + 1)))
    bench.turn()
    assert not bench.scheduler.has_work
    assert bench.channel.outbox == []


def test_a_gateway_that_leaves_takes_its_requests_along() -> None:
    bench = Bench(gateways=2)
    bench.say((0, submit(1, max_tokens=30)), (1, submit(1, max_tokens=30)))
    bench.turn(2)
    bench.say((0, Goodbye()))
    bench.turn(2)
    stats = bench.scheduler.stats()
    assert (stats.running, stats.blocks_used) == (1, 2)
    assert len(bench.tokens(1, 1)) == 4


def test_a_gateway_that_cannot_be_told_is_forgotten() -> None:
    bench = Bench(gateways=2)
    bench.say((0, submit(1, max_tokens=30)), (1, submit(1, max_tokens=3)))
    bench.turn()
    bench.channel.gone = {0}
    bench.run()
    assert bench.scheduler.stats().blocks_used == 0
    assert bench.device.num_steps < 6
    assert len(bench.tokens(1, 1)) == 3
    bench.channel.outbox.clear()
    bench.now += 2 * REPORT_S
    bench.channel.gone = set()
    bench.turn()
    assert [to for to, _ in bench.channel.outbox] == [1], "only gateways that are known hear of an idle engine"


def test_an_idle_leader_sleeps_and_reports_from_time_to_time() -> None:
    bench = Bench()
    bench.say((0, submit(1)))
    bench.run()
    bench.channel.outbox.clear()
    bench.channel.waits.clear()
    bench.now += 0.6 * REPORT_S
    bench.turn()
    assert bench.outputs() == []
    bench.now += 0.6 * REPORT_S
    bench.turn()
    (report,) = bench.outputs()
    assert (report.requests, report.tokens, report.started, report.finished) == (b"", b"", [], [])
    assert (report.stats.step_rows, report.stats.step_seconds) == (0, 0.0)
    assert report.stats.generated_tokens == 5
    assert bench.channel.waits == [REPORT_S] * 2
    assert len(bench.beats) > len(bench.frames)


def test_a_leader_that_lingers_stays_awake_for_a_while() -> None:
    bench = Bench(linger_s=0.25)
    bench.now += 1
    bench.say((0, submit(1)))
    bench.run()
    bench.channel.waits.clear()
    bench.turn(2)
    bench.now += 0.125
    bench.turn()
    bench.now += 0.125
    bench.turn()
    assert bench.channel.waits == [0.0] * 3 + [REPORT_S]


def test_an_idle_gateway_hears_of_an_engine_that_others_keep_busy() -> None:
    bench = Bench(gateways=2)
    bench.say((0, submit(1, max_tokens=30)))
    for _ in range(20):
        bench.now += 0.125 * REPORT_S
        bench.turn()
    assert [message.stats.running for message in bench.outputs(1)] == [1, 1]
    assert len(bench.outputs(0)) == 20


def test_a_busy_leader_does_not_sleep_and_says_what_a_step_was() -> None:
    bench = Bench()
    bench.channel.waits.clear()
    bench.say((0, submit(1)), (0, submit(2, list(range(9)))))
    collect = bench.device.collect

    def slow() -> np.ndarray:
        bench.now += 0.125
        return collect()

    bench.device.collect = slow  # type: ignore[method-assign]
    bench.turn(2)
    assert bench.channel.waits == []
    stats = [message.stats for message in bench.outputs()]
    assert [(s.step, s.step_rows, s.step_tokens, s.step_seconds) for s in stats] == [
        (1, 2, 12, 0.125),
        (2, 2, 2, 0.125),
    ]
    assert (stats[0].prompt_tokens, stats[1].generated_tokens, stats[1].running) == (12, 4, 2)


def test_what_a_step_was_is_told_to_one_gateway_only() -> None:
    bench = Bench(gateways=2)
    bench.say((0, submit(1)), (1, submit(2)), (1, submit(3)))
    bench.run()
    told = [message.stats for gateway in (0, 1) for message in bench.outputs(gateway)]
    assert all(stats.generated_tokens for stats in told), "what has been until now, everybody hears"
    steps = [stats.step for stats in told if stats.step_rows]
    assert sorted(steps) == list(range(1, len(bench.frames) + 1)), "each once"
    assert sum(stats.step_rows for stats in told) == 3 * 5


def test_flushing_answers_with_the_number_of_blocks() -> None:
    bench = Bench()
    prompt = list(range(10))
    bench.say((0, submit(1, prompt, max_tokens=1)))
    bench.run()
    bench.say((0, FlushCache(ticket=9)), (0, submit(2, prompt, max_tokens=1)))
    bench.run()
    assert (0, CacheFlushed(9, 2)) in bench.channel.outbox
    assert [started.cached_tokens for started in bench.started()] == [0, 0]


def test_broken_logits_fail_one_request_and_are_not_found_again() -> None:
    bench = Bench()
    bench.device.nan_every = 1
    prompt = list(range(10))
    bench.say((0, submit(1, prompt)))
    bench.run()
    (finished,) = bench.finished()
    assert finished.reason is FinishReason.BROKEN
    assert "not a number" in finished.detail
    assert bench.scheduler.stats().blocks_cached == 0
    bench.device.nan_every = 0
    bench.say((0, submit(2, prompt)))
    bench.run()
    assert bench.tokens(2) == expected_output(submit(2, prompt), LIMITS).tokens


BAD = {
    "no prompt": (submit(1, []), "prompt is empty"),
    "prompt outside the vocabulary": (submit(1, [1, 50]), "prompt token id is outside"),
    "negative token": (submit(1, [-1]), "prompt token id is outside"),
    "output outside the vocabulary": (submit(1, output=ids_to_bytes([99])), "output token id is outside"),
    "stop id outside the vocabulary": (submit(1, stop_ids=(50,)), "stop token id is outside"),
    "stop id beyond 64 bits": (submit(1, eos_ids=(1 << 63,)), "stop token id is outside"),
    "too many stop ids": (submit(1, stop_ids=tuple(range(MAX_STOP_IDS + 1))), "stop ids"),
    "prompt too long": (submit(1, [1] * 40), "leaves no room"),
    "output fills the context": (submit(1, [1] * 30, 20, output=ids_to_bytes([1] * 10)), "fills the context"),
    "nothing to do": (submit(1, max_tokens=0), "max_tokens"),
    "nothing left to do": (submit(1, max_tokens=2, output=ids_to_bytes([1, 2])), "max_tokens"),
    "min above max": (submit(1, max_tokens=2, min_tokens=3), "min_tokens"),
    "negative min": (submit(1, min_tokens=-1), "min_tokens"),
    "number too large": (submit(1 << 63, [1]), "request number"),
    "nan": (submit(1, sampling=SamplingParams(presence_penalty=float("nan"))), "not finite"),
    "infinity": (submit(1, sampling=SamplingParams(temperature=float("inf"))), "not finite"),
    "negative temperature": (submit(1, sampling=SamplingParams(temperature=-0.1)), "temperature"),
    "no repetition penalty": (submit(1, sampling=SamplingParams(repetition_penalty=0.0)), "repetition_penalty"),
    "seed too large": (submit(1, sampling=SamplingParams(seed=1 << 64)), "seed"),
    "negative seed": (submit(1, sampling=SamplingParams(seed=-1)), "seed"),
    "top_p of nothing": (submit(1, sampling=SamplingParams(top_p=0.0)), "top_p"),
    "top_p above one": (submit(1, sampling=SamplingParams(top_p=1.1)), "top_p"),
    "negative min_p": (submit(1, sampling=SamplingParams(min_p=-0.1)), "min_p"),
    "min_p above one": (submit(1, sampling=SamplingParams(min_p=1.1)), "min_p"),
    "negative top_k": (submit(1, sampling=SamplingParams(top_k=-1)), "top_k"),
    "top_k too large": (submit(1, sampling=SamplingParams(top_k=1 << 31)), "top_k"),
}


@pytest.mark.parametrize("request_and_reason", BAD.values(), ids=BAD.keys())
def test_the_door_refuses_what_would_break_a_step_and_others_do_not_notice(
    request_and_reason: tuple[Submit, str],
) -> None:
    request, reason = request_and_reason
    bench = Bench()
    bench.say((0, submit(20)), (0, request), (0, submit(21)))
    bench.run()
    refused = next(finished for finished in bench.finished() if finished.request == request.request)
    assert refused.reason is FinishReason.REJECTED
    assert reason in refused.detail
    assert bench.tokens(request.request) == []
    for number in (20, 21):
        assert bench.tokens(number) == expected_output(submit(number), LIMITS).tokens


def test_the_door_refuses_a_number_that_runs_already() -> None:
    bench = Bench(gateways=2)
    bench.say((0, submit(1)), (1, submit(1)), (0, submit(1, [9])))
    bench.run()
    first, second = bench.finished(0)
    assert (first.reason, first.detail) == (FinishReason.REJECTED, "request number 1 is running already")
    assert second.reason is FinishReason.MAX_TOKENS
    assert bench.tokens(1) == expected_output(submit(1), LIMITS).tokens


def test_the_largest_numbers_that_the_door_lets_in_break_nothing() -> None:
    bench = Bench()
    sampling = SamplingParams(temperature=1e30, top_k=(1 << 31) - 1, seed=(1 << 64) - 1)
    request = submit((1 << 63) - 1, [49] * 39, max_tokens=1 << 60, min_tokens=1 << 60, sampling=sampling)
    bench.say((0, request))
    bench.run()
    assert bench.finished() == [Finished((1 << 63) - 1, FinishReason.CONTEXT_FULL)]


def test_requests_run_in_turn_when_there_are_more_than_slots() -> None:
    limits = replace(LIMITS, max_running=2)
    bench = Bench(limits, run_ahead=2)
    bench.say(*((0, submit(number, max_tokens=4)) for number in range(6)))
    bench.turn()
    stats = bench.scheduler.stats()
    assert (stats.running, stats.waiting, stats.waiting_tokens) == (2, 4, 12)
    bench.run()
    assert [started.request for started in bench.started()] == list(range(6))
    assert [finished.request for finished in bench.finished()] == list(range(6))
