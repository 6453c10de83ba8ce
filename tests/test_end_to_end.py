"""The whole of it: `lightqwen serve` on random weights, real clients, TP 1 and 2, against transformers.

Random prompts and random weights reach what text does not; how the trained checkpoint answers is for
`model/demo/test_served.py`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightqwen.client import AsyncClient, Delta, Finished, FinishReason, LightqwenError
from service.terminal import read_ready_line

pytestmark = pytest.mark.timeout(180)

# A pool of 768 tokens for 64 requests of up to 130 (and of 500, for those that are cut off): somebody is always
# preempted. Prompts are computed in chunks of at most 96 tokens together.
SMALL = ["--block-size", "16", "--num-blocks", "48", "--max-model-len", "512"]
CHUNKED = ["--max-running", "48", "--max-batched-tokens", "96"]


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    metrics: str

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(self.metrics, timeout=5) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"lightqwen_{name}{{"))


def start(checkpoint: Path, *options: str) -> Server:
    command = [sys.executable, "-m", "service.cli", "serve", "--model", str(checkpoint), "--device", "cpu"]
    command += ["--port", "0", "--metrics-port", "0"]
    # A process group of its own, as a terminal or a process manager makes it.
    process = subprocess.Popen(
        [*command, "--log-level", "error", *options], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    facts = read_ready_line(process.stdout.readline())
    assert facts is not None
    return Server(process, facts["address"], facts["metrics"])


def end(server: Server) -> None:
    server.process.terminate()
    assert server.process.wait(30) == 0
    assert server.process.stdout is not None
    server.process.stdout.close()


@pytest.fixture(params=[1, 2], ids=["tp1", "tp2"])
def server(request: pytest.FixtureRequest, endless_checkpoint: Path) -> Iterator[Server]:
    server = start(endless_checkpoint, "--tensor-parallel-size", str(request.param), *SMALL, *CHUNKED)
    yield server
    end(server)


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    max_tokens: int


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """64 prompts of mixed lengths, half of them with one of four beginnings in common."""
    rng = random.Random(11)
    beginnings = [rng.choices(range(300, 1000), k=40) for _ in range(4)]
    return [
        Question(
            (beginnings[n % 4] if n % 2 else []) + rng.choices(range(300, 1000), k=rng.randint(1, 60)),
            rng.randint(1, 30),
        )
        for n in range(64)
    ]


@pytest.fixture(scope="module")
def answers(questions: list[Question], endless_checkpoint: Path) -> list[list[int]]:
    """What transformers says, greedily."""
    model = AutoModelForCausalLM.from_pretrained(endless_checkpoint, dtype=torch.float32)
    outputs = []
    for question in questions:
        prompt = torch.tensor([question.prompt])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=question.max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(output[0, len(question.prompt) :].tolist())
    return outputs


async def answer(client: AsyncClient, question: Question) -> tuple[list[int], Finished]:
    generation = client.generate(
        question.prompt, max_tokens=question.max_tokens, temperature=0, ignore_eos=True, token_ids=True, text=False
    )
    ids: list[int] = []
    async for event in generation:
        if isinstance(event, Delta):
            ids += event.token_ids
    assert generation.finished is not None
    return ids, generation.finished


async def walk_away(client: AsyncClient, question: Question, after: int) -> None:
    """Cancel after so many deltas."""
    generation = client.generate(question.prompt, max_tokens=300, temperature=0, ignore_eos=True)
    deltas = 0
    async for event in generation:
        deltas += isinstance(event, Delta)
        if deltas >= after:
            generation.cancel()


async def run_out_of_time(client: AsyncClient, question: Question, seconds: float) -> None:
    with pytest.raises(LightqwenError, match="DEADLINE_EXCEEDED"):
        async for _ in client.generate(
            question.prompt, max_tokens=400, temperature=0, ignore_eos=True, timeout=seconds
        ):
            pass


async def all_blocks_are_free(client: AsyncClient) -> bool:
    for _ in range(50):
        load = await client.load()
        if (load.kv_blocks_used, load.running, load.waiting, load.streams) == (0, 0, 0, 0):
            return True
        await asyncio.sleep(0.1)
    return False


async def test_64_streams_with_cancels_and_deadlines_among_them(
    server: Server, questions: list[Question], answers: list[list[int]]
) -> None:
    async with AsyncClient(server.address) as client:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(answer(client, question)) for question in questions[:40]]
            for n, question in enumerate(questions[40:52]):
                group.create_task(walk_away(client, question, after=n))
            for n, question in enumerate(questions[52:]):
                group.create_task(run_out_of_time(client, question, 0.05 * (n + 1)))
        for task, expected, question in zip(asked, answers, questions, strict=False):
            ids, finished = task.result()
            assert ids == expected
            assert finished.finish_reason == FinishReason.FINISH_REASON_MAX_TOKENS
            assert finished.usage.prompt_tokens == len(question.prompt)
            assert finished.usage.output_tokens == question.max_tokens
        assert await all_blocks_are_free(client)
        assert server.metric("preemptions_total") > 0
        # Again, now that prefixes are cached: the same tokens.
        hits = (await client.load()).cache_hit_tokens
        again = await asyncio.gather(*(answer(client, question) for question in questions[:40]))
        assert [ids for ids, _ in again] == answers[:40]
        assert (await client.load()).cache_hit_tokens > hits
        assert await all_blocks_are_free(client)


async def test_a_sigterm_to_the_whole_process_group_loses_no_stream(
    questions: list[Question], answers: list[list[int]], endless_checkpoint: Path
) -> None:
    """Some process managers signal every process of a group, not only the first.

    What is still on its way when the signal comes is taken up during the withdrawal.
    """
    server = start(endless_checkpoint, *SMALL, *CHUNKED, "--withdrawal-s", "2")
    try:
        async with AsyncClient(server.address) as client:
            asked = [asyncio.create_task(answer(client, question)) for question in questions]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            began = time.monotonic()
            os.killpg(server.process.pid, signal.SIGTERM)
            results = await asyncio.gather(*asked)
        assert [ids for ids, _ in results] == answers
        assert await asyncio.to_thread(server.process.wait, 30) == 0
        assert time.monotonic() - began < 30
    finally:
        server.process.kill()
        server.process.communicate()
