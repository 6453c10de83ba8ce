"""What the benchmarks ask for, the same for every engine that is compared."""

from __future__ import annotations

import random
from dataclasses import dataclass

VOCABULARY = 10_000  # prompts draw their ids below this


@dataclass(frozen=True, slots=True)
class Job:
    prompt_ids: list[int]
    max_tokens: int


def mixed_256() -> list[Job]:
    """256 requests at once, prompts and outputs of 100 to 1,024 tokens: 142,827 in, 133,966 out.

    The workload that small engines publish on (nano-vllm's and mini-sglang's offline benchmark): seed 0, lengths and
    ids from the standard library's generator, outputs drawn after all prompts.
    """
    rng = random.Random(0)
    prompts = [[rng.randint(0, VOCABULARY) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    return [Job(prompt, rng.randint(100, 1024)) for prompt in prompts]


def uniform(count: int, prompt_tokens: int, output_tokens: int, seed: int = 1) -> list[Job]:
    """`count` requests of the same lengths with different random prompts."""
    rng = random.Random(seed)
    return [Job([rng.randint(0, VOCABULARY) for _ in range(prompt_tokens)], output_tokens) for _ in range(count)]
