"""Leader, scheduler and a real runner in one process, in fp32 on the CPU: the same tokens as transformers, whatever the
engine had to do on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import Qwen3Config
from model.parallel import TensorParallel
from tests.worker.conftest import VOCAB, Greedy
from worker.config import EngineConfig
from worker.leader import Leader
from worker.messages import (
    EngineInfo,
    EngineStats,
    Finished,
    FinishReason,
    Hello,
    Outputs,
    SamplingParams,
    Submit,
    ToGateway,
    ToLeader,
    ids_from_bytes,
    ids_to_bytes,
)
from worker.runner import Runner, build_runner
from worker.runtime import resolve
from worker.scheduler import Scheduler, SchedulerLimits

GREEDY = SamplingParams(temperature=0.0)
COUNT = 24


@dataclass
class Mailbox:
    """The one gateway's end, in process."""

    inbox: list[tuple[int, ToLeader]] = field(default_factory=list)
    outbox: list[ToGateway] = field(default_factory=list)

    def wait(self, timeout_s: float) -> bool:
        return False

    def receive(self) -> Iterator[tuple[int, ToLeader]]:
        messages, self.inbox = self.inbox, []
        yield from messages

    def send(self, gateway: int, message: ToGateway) -> bool:
        self.outbox.append(message)
        return True


@dataclass
class Engine:
    """A leader with a real runner."""

    leader: Leader
    scheduler: Scheduler
    mailbox: Mailbox
    runner: Runner

    def run(self, *requests: Submit) -> dict[int, list[int]]:
        """Run requests to their end; returns the tokens of each."""
        self.mailbox.outbox.clear()
        self.mailbox.inbox += [(0, request) for request in requests]
        for _ in range(3000):
            self.leader.step()
            self.scheduler.check_integrity()
            if not self.scheduler.has_work:
                break
        assert self.stats.blocks_used == 0
        tokens: dict[int, list[int]] = {request.request: [] for request in requests}
        for message in self.outputs:
            numbers = np.frombuffer(message.requests, "<i8").tolist()
            for number, token in zip(numbers, ids_from_bytes(message.tokens).tolist(), strict=True):
                tokens[number].append(token)
        return tokens

    @property
    def outputs(self) -> list[Outputs]:
        return [message for message in self.mailbox.outbox if isinstance(message, Outputs)]

    @property
    def finished(self) -> dict[int, Finished]:
        return {finished.request: finished for message in self.outputs for finished in message.finished}

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats()


Build = Callable[..., Engine]


@pytest.fixture(scope="module")
def build(tiny_checkpoint: Path) -> Build:
    """Make an engine on the tiny checkpoint. Runners are kept: whatever ran before must not matter."""
    runners: dict[tuple[int, int, int], Runner] = {}

    def build(
        *,
        num_blocks: int = 200,
        max_running: int = 16,
        max_batched_tokens: int = 512,
        run_ahead: int = 1,
        prefix_caching: bool = True,
        block_size: int = 8,
    ) -> Engine:
        config = EngineConfig(
            model=str(tiny_checkpoint),
            device="cpu",
            num_blocks=num_blocks,
            block_size=block_size,
            max_running=max_running,
            max_batched_tokens=max_batched_tokens,
        )
        shape = Qwen3Config.from_folder(tiny_checkpoint)
        runtime = resolve(config, shape, 0)
        key = num_blocks, block_size, max_running
        if key not in runners:
            runners[key] = build_runner(config, shape, runtime, TensorParallel.single(), lambda what, done, total: None)
        limits = SchedulerLimits(
            vocab_size=VOCAB,
            max_model_len=min(runtime.max_model_len, num_blocks * block_size),
            max_running=max_running,
            max_batched_tokens=max_batched_tokens,
            max_mixed_tokens=runtime.max_mixed_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            watermark_blocks=0,
            prefix_caching=prefix_caching,
        )
        info = EngineInfo(
            epoch=1,
            model_path=config.model,
            vocab_size=VOCAB,
            max_model_len=limits.max_model_len,
            block_size=block_size,
            num_blocks=num_blocks,
            max_running=max_running,
            max_batched_tokens=max_batched_tokens,
            tensor_parallel_size=1,
            device="cpu",
            dtype="float32",
            attention_backend="torch",
            prefix_caching=prefix_caching,
        )
        scheduler = Scheduler(limits, hash_key=b"key", clock=time.monotonic)
        mailbox = Mailbox([(0, Hello(secret=b""))])
        leader = Leader(scheduler, runners[key], mailbox, info, run_ahead=run_ahead, clock=time.monotonic)
        return Engine(leader, scheduler, mailbox, runners[key])

    return build


def prompts(count: int = 10) -> list[list[int]]:
    """Prompts of 1 to 90 tokens, two of them the same, some with a common beginning."""
    rng = np.random.default_rng(1)
    common = rng.integers(0, VOCAB, 40).tolist()
    made = [rng.integers(0, VOCAB, int(length)).tolist() for length in rng.integers(1, 90, count - 3)]
    return [*made, made[0], [*common, 3], [*common, 4, 5]]


def submits(sampling: SamplingParams = GREEDY, count: int = 10, **fields: object) -> list[Submit]:
    return [
        Submit(
            request=number,
            epoch=1,
            prompt=ids_to_bytes(prompt),
            sampling=sampling,
            max_tokens=COUNT,
            **fields,  # type: ignore[arg-type]
        )
        for number, prompt in enumerate(prompts(count))
    ]


@pytest.fixture(scope="module")
def expected(greedy: Greedy) -> dict[int, list[int]]:
    return {number: greedy(prompt, COUNT) for number, prompt in enumerate(prompts())}


@pytest.mark.parametrize("run_ahead", [1, 2])
@pytest.mark.parametrize("max_batched_tokens", [512, 16], ids=["whole", "chunked"])
@pytest.mark.parametrize("prefix_caching", [False, True], ids=["uncached", "cached"])
def test_greedy_tokens_are_transformers_own(
    build: Build, expected: dict[int, list[int]], prefix_caching: bool, max_batched_tokens: int, run_ahead: int
) -> None:
    engine = build(prefix_caching=prefix_caching, max_batched_tokens=max_batched_tokens, run_ahead=run_ahead)
    assert engine.run(*submits()) == expected
    missed = engine.stats
    assert engine.run(*submits()) == expected
    hits = engine.stats.prefix_hit_tokens - missed.prefix_hit_tokens
    computed = engine.stats.prompt_tokens - missed.prompt_tokens
    lengths = sum(len(prompt) for prompt in prompts())
    assert hits + computed == lengths
    # All but the last, incomplete block of each prompt; a prompt of full blocks computes its last one again.
    reusable = sum((len(prompt) - 1) // 8 * 8 for prompt in prompts())
    assert hits == (reusable if prefix_caching else 0)


@pytest.mark.parametrize("run_ahead", [1, 2])
@pytest.mark.parametrize("prefix_caching", [False, True], ids=["uncached", "cached"])
def test_preempted_requests_give_the_same_tokens(
    build: Build, expected: dict[int, list[int]], prefix_caching: bool, run_ahead: int
) -> None:
    engine = build(num_blocks=20, max_batched_tokens=64, prefix_caching=prefix_caching, run_ahead=run_ahead)
    assert engine.run(*submits()) == expected
    assert engine.stats.preemptions > 0
    started = [started for message in engine.outputs for started in message.started]
    assert sum(again.again for again in started) == engine.stats.preemptions


@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_the_block_size_changes_no_token(build: Build, expected: dict[int, list[int]], block_size: int) -> None:
    engine = build(block_size=block_size, num_blocks=1200 // block_size)
    assert engine.run(*submits()) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="what admits nobody is a kernel, which is interpreted on a CPU")
def test_warming_up_leaves_no_trace(build: Build, expected: dict[int, list[int]]) -> None:
    engine = build()
    assert engine.run(*submits()) == expected
    engine.runner.warm_up()
    hits = engine.stats.prefix_hit_tokens
    assert engine.run(*submits()) == expected
    assert engine.stats.prefix_hit_tokens > hits  # what the cache held before is still right


def test_seeded_sampling_does_not_depend_on_company(build: Build) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, min_p=0.01, seed=12345)
    requests = submits(sampling)
    together = build().run(*requests)
    assert len({tuple(tokens) for tokens in together.values()}) == len(requests) - 1  # two prompts are the same
    alone = build(max_running=1)
    backwards = build(max_running=3, max_batched_tokens=16, run_ahead=2)
    crowded = build(num_blocks=20)
    assert {n: t for request in requests for n, t in alone.run(request).items()} == together
    assert backwards.run(*reversed(requests)) == together
    assert crowded.run(*requests) == together
    assert crowded.stats.preemptions > 0


def test_another_seed_gives_other_tokens(build: Build) -> None:
    engine = build()
    first, second = (engine.run(*submits(SamplingParams(temperature=1.0, seed=seed))) for seed in (1, 2**64 - 1))
    assert all(first[number] != second[number] for number in first)


def test_a_resumed_request_goes_on_where_it_was(build: Build) -> None:
    sampling = SamplingParams(temperature=0.8, seed=7, repetition_penalty=1.3, frequency_penalty=0.2)
    whole = build().run(*submits(sampling))
    rest = build().run(
        *(
            Submit(
                request=request.request,
                epoch=1,
                prompt=request.prompt,
                output=ids_to_bytes(whole[request.request][: 2 * request.request]),
                sampling=sampling,
                max_tokens=COUNT,
            )
            for request in submits(sampling)
        )
    )
    assert rest == {number: tokens[2 * number :] for number, tokens in whole.items()}


def test_penalties_reach_the_sampler_and_survive_preemption(build: Build, expected: dict[int, list[int]]) -> None:
    """A presence penalty that outweighs every logit lets no token come twice."""
    sampling = SamplingParams(temperature=0.0, presence_penalty=1e6)
    ample, tight = build(), build(num_blocks=20)
    tokens = ample.run(*submits(sampling))
    assert all(len(set(output)) == COUNT for output in tokens.values())
    assert any(len(set(output)) < COUNT for output in expected.values())
    assert tight.run(*submits(sampling)) == tokens
    assert tight.stats.preemptions > 0


def test_a_repetition_penalty_looks_at_the_prompt_too(build: Build) -> None:
    """It makes way for others where the favourite is in the prompt, and changes nothing where it is not."""
    rng = np.random.default_rng(3)
    random_prompts = [rng.integers(0, VOCAB, 90).tolist() for _ in range(30)]

    def first_tokens(repetition_penalty: float) -> list[int]:
        sampling = SamplingParams(temperature=0.0, repetition_penalty=repetition_penalty)
        requests = [
            Submit(request=number, epoch=1, prompt=ids_to_bytes(prompt), sampling=sampling, max_tokens=1)
            for number, prompt in enumerate(random_prompts)
        ]
        return [token for (token,) in build().run(*requests).values()]

    favourites = first_tokens(1.0)
    kept = [token == favourite for token, favourite in zip(first_tokens(1e9), favourites, strict=True)]
    assert kept == [token not in prompt for token, prompt in zip(favourites, random_prompts, strict=True)]
    assert 0 < sum(kept) < len(kept)


def test_stop_ids_end_a_request_and_min_tokens_forbids_them(build: Build, expected: dict[int, list[int]]) -> None:
    engine = build(run_ahead=2)
    stops = {number: tokens[10] for number, tokens in expected.items()}
    ends = {number: expected[number].index(stop) + 1 for number, stop in stops.items()}

    def request(number: int, **fields: object) -> Submit:
        prompt = ids_to_bytes(prompts()[number])
        return Submit(request=number, epoch=1, prompt=prompt, sampling=GREEDY, max_tokens=COUNT, **fields)  # type: ignore[arg-type]

    tokens = engine.run(*(request(number, stop_ids=(stop,)) for number, stop in stops.items()))
    assert tokens == {number: output[: ends[number]] for number, output in expected.items()}
    assert {(f.reason, f.stop_id) for f in engine.finished.values()} == {
        (FinishReason.STOP_TOKEN, stop) for stop in stops.values()
    }
    engine.run(*(request(number, eos_ids=(stop,), stop_ids=(stop,)) for number, stop in stops.items()))
    assert {f.reason for f in engine.finished.values()} == {FinishReason.EOS}
    forbidden = engine.run(*(request(number, eos_ids=(stop,), min_tokens=20) for number, stop in stops.items()))
    for number, output in forbidden.items():
        assert stops[number] not in output[:20]
        assert len(output) >= 20
        assert output[: ends[number] - 1] == expected[number][: ends[number] - 1]


def test_a_request_may_fill_the_context(build: Build, greedy: Greedy) -> None:
    prompt = list(range(100)) + list(range(100))
    engine = build(num_blocks=32)
    request = Submit(request=0, epoch=1, prompt=ids_to_bytes(prompt), sampling=GREEDY, max_tokens=1000)
    assert engine.run(request)[0] == greedy(prompt, 56)
    assert engine.finished[0].reason is FinishReason.CONTEXT_FULL


def test_a_nan_breaks_one_request_and_no_other(
    build: Build, expected: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's last norm gives NaN for one request's rows, which leaves NaN in no KV block of the others."""
    engine = build(num_blocks=200, run_ahead=2)
    model = engine.leader._runner._model  # type: ignore[attr-defined]
    compute_logits = model.compute_logits
    steps = iter(range(1000))

    def sometimes_broken(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute_logits(hidden)
        if next(steps) == 3:
            logits[4] = float("nan")
        return logits

    monkeypatch.setattr(model, "compute_logits", sometimes_broken)
    tokens = engine.run(*submits())
    (broken,) = (f for f in engine.finished.values() if f.reason is FinishReason.BROKEN)
    assert tokens[broken.request] == expected[broken.request][:3]
    del tokens[broken.request]
    assert tokens == {number: output for number, output in expected.items() if number != broken.request}
