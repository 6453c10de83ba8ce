"""The bundled checkpoint behind a real server: how well it answers, and that no way of serving changes an answer.

Held-out questions, asked over gRPC, answered greedily in fp32. `python -m model.demo.evaluate` asks more of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest

from model.demo.evaluate import ask_all
from model.demo.scoring import Task, score, table, tasks, wrong_answers
from tests.processes import Serve

pytestmark = pytest.mark.timeout(600)

MANY = tasks(20)
FEW = tasks(6)
"""Of each skill, the first of those above."""
SHORT = [task for task in FEW if task.question.skill not in ("long passages", "backward questions")]


@contextmanager
def served(*options: str) -> Iterator[Serve]:
    """The bundled checkpoint, which is the default, with room for all questions unless the options say otherwise."""
    server = Serve.start("--model", "", "--port", "0", "--metrics-port", "0", "--num-blocks", "2048", *options)
    try:
        assert server.wait_ready()["model"] == "lightqwen-demo"
        assert server.facts["dtype"] == "float32"
        yield server
        server.process.terminate()
        assert server.exit_code(30) == 0
    finally:
        server.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Serve]:
    with served() as server:
        yield server


@pytest.fixture(scope="module")
def answers(server: Serve) -> dict[str, str]:
    """What it says to each prompt when 64 are asked at the same time."""
    texts = asyncio.run(ask_all(server.address, MANY, 64))
    return {task.prompt: text for task, text in zip(MANY, texts, strict=True)}


def changed(
    server: Serve, answers: Mapping[str, str], asked: Sequence[Task] = FEW, concurrency: int = 64
) -> list[tuple[str, str, str]]:
    """The questions that this server answers in other words, with what was expected and what came."""
    texts = asyncio.run(ask_all(server.address, asked, concurrency))
    return [
        (task.prompt[-200:], answers[task.prompt], text)
        for task, text in zip(asked, texts, strict=True)
        if text != answers[task.prompt]
    ]


def test_every_skill_reaches_its_threshold(answers: dict[str, str]) -> None:
    texts = [answers[task.prompt] for task in MANY]
    scores = score(MANY, texts)
    assert all(row.passed for row in scores), "\n".join([*wrong_answers(MANY, texts, 3), table(scores)])


def test_one_at_a_time_and_out_of_the_prefix_cache(server: Serve, answers: dict[str, str]) -> None:
    hits = server.metric("prefix_cache_hit_tokens_total")
    assert changed(server, answers, concurrency=1) == []
    assert server.metric("prefix_cache_hit_tokens_total") > hits


def test_without_a_prefix_cache(answers: dict[str, str]) -> None:
    with served("--no-prefix-caching") as server:
        assert changed(server, answers) == []
        assert server.metric("prefix_cache_hit_tokens_total") == 0


def test_on_two_ranks(answers: dict[str, str]) -> None:
    with served("--tensor-parallel-size", "2") as server:
        assert server.facts["tensor_parallel_size"] == "2"
        assert changed(server, answers) == []


def test_in_a_pool_so_small_that_requests_are_preempted(answers: dict[str, str]) -> None:
    with served("--num-blocks", "48") as server:  # 768 tokens, for 64 prompts of up to some hundred and their answers
        assert changed(server, answers, SHORT) == []
        assert server.metric("preemptions_total") > 0
