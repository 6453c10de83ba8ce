"""A tiny random checkpoint, and what transformers makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB = 131  # does not divide by any number of ranks

Greedy = Callable[[Sequence[int], int], list[int]]
"""The tokens that follow a prompt, so many of them."""


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 2 layers, 4 query heads on 2 KV heads and 256 positions, in float32."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.5,  # far from uniform, so that the highest logit stands out
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def greedy(tiny_checkpoint: Path) -> Greedy:
    """What transformers generates greedily from the tiny checkpoint, whatever ids would end it."""
    model = Qwen3ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)

    def generate(prompt: Sequence[int], count: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()

    return generate
