"""Tensor parallelism over gloo processes on the CPU: every rank has the logits of one process alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.parallel import TensorParallel
from tests.model import parallel_rank
from tests.model.helpers import interpreted, save_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "kv heads replicated on 4, vocabulary padded": {},
    "tied, bias": {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4},
    "one kv head for all, last shard empty": {"num_key_value_heads": 1, "vocab_size": 9, "eos_token_id": None},
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """Run all ranks once, for all checkpoints and sizes."""
    root = tmp_path_factory.mktemp("parallel")
    folders = [root / str(number) for number in range(len(SHAPES))]
    for folder, shape in zip(folders, SHAPES.values(), strict=True):
        save_checkpoint(folder, **shape)
    results = root / "results"
    results.mkdir()
    torch.multiprocessing.spawn(
        parallel_rank.main,
        args=(str(root / "rendezvous"), [str(folder) for folder in folders], str(results)),
        nprocs=parallel_rank.WORLD_SIZE,
    )
    return folders, results


@pytest.mark.parametrize(
    "launches",
    [
        "logits",
        pytest.param("fused", marks=pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")),
    ],
)
@pytest.mark.parametrize("size", parallel_rank.SIZES)
@pytest.mark.parametrize("number", range(len(SHAPES)), ids=[name.replace(" ", "-") for name in SHAPES])
def test_equals_one_process(outcome: tuple[list[Path], Path], number: int, size: int, launches: str) -> None:
    folders, results = outcome
    alone = parallel_rank.logits_of(folders[number], TensorParallel.single())
    ranks = [load_file(results / f"{size}-{number}-{rank}.safetensors")[launches] for rank in range(size)]
    error = (ranks[0] - alone).abs().max() / alone.abs().max()
    assert error <= 1e-4
    assert torch.equal(ranks[0].argmax(-1), alone.argmax(-1))
    assert all(torch.equal(ranks[0], other) for other in ranks[1:])


@pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("size", parallel_rank.SIZES)
@pytest.mark.parametrize("number", range(len(SHAPES)), ids=[name.replace(" ", "-") for name in SHAPES])
def test_a_sum_in_one_shot_or_two_is_the_same_sum(outcome: tuple[list[Path], Path], number: int, size: int) -> None:
    _, results = outcome
    for rank in range(size):
        logits = load_file(results / f"{size}-{number}-{rank}.safetensors")
        error = (logits["one shot"] - logits["logits"]).abs().max() / logits["logits"].abs().max()
        assert error <= 1e-5
        first = load_file(results / f"{size}-{number}-0.safetensors")
        assert torch.equal(logits["one shot"], first["one shot"])
