"""Our Qwen3 against transformers' Qwen3ForCausalLM, in float32 on the CPU. Only tests import transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from model.qwen3 import Qwen3ForCausalLM
from tests.model.helpers import PagedCache, PagedSequence, load, random_ids, run, save_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "gqa 2": {},
    "gqa 1, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gqa 4, bias": {"num_key_value_heads": 1, "attention_bias": True},
    "gqa 8, one layer": {"num_attention_heads": 8, "num_key_value_heads": 1, "num_hidden_layers": 1},
    "gqa 8 of 2, wide heads": {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 32},
    "many shards, tied, bias": {"max_shard_size": "20KB", "tie_word_embeddings": True, "attention_bias": True},
    "deep, eps": {"num_hidden_layers": 5, "rms_norm_eps": 1e-2},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "dynamic": {
        "max_position_embeddings": 30,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 32,
        }
    },
}
LENGTH = 60


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Qwen3ForCausalLM]:
    folder = tmp_path_factory.mktemp("checkpoint")
    reference = save_checkpoint(folder, **SHAPES[request.param])
    # With dynamic NTK the base depends on the length that is served; transformers takes the sequence's.
    max_model_len = LENGTH if request.param == "dynamic" else 128
    return reference, load(folder, max_model_len=max_model_len)


def expected_logits(reference: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([ids])).logits[0]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= 1e-4, f"relative error {error:.2e}"


def test_whole_prefill_equals_transformers(pair: tuple[Any, Qwen3ForCausalLM]) -> None:
    reference, model = pair
    ids = random_ids(LENGTH)
    [logits] = run(model, PagedCache(model.config), [(PagedSequence(), ids)])
    assert_close(logits, expected_logits(reference, ids))


def test_chunks_then_decode_steps_equal_transformers(pair: tuple[Any, Qwen3ForCausalLM]) -> None:
    reference, model = pair
    ids = random_ids(LENGTH, seed=1)
    cache, sequence = PagedCache(model.config), PagedSequence()
    bounds = [0, 13, 16, 41, *range(42, LENGTH + 1)]
    parts = [run(model, cache, [(sequence, ids[start:end])])[0] for start, end in itertools.pairwise(bounds)]
    assert_close(torch.cat(parts), expected_logits(reference, ids))


def test_mixed_batch_equals_transformers(tiny_checkpoint: tuple[Path, Any]) -> None:
    """Decode rows, a dead row, prefill chunks with and without a past, in one step over shuffled blocks."""
    folder, reference = tiny_checkpoint
    model = load(folder)
    cache = PagedCache(model.config)
    ids = [random_ids(length, seed=length) for length in (9, 40, 27, 17, 33)]
    sequences = [PagedSequence() for _ in ids]
    for sequence, past in zip(sequences[:3], (ids[0][:-1], ids[1][:-1], ids[2][:20]), strict=True):
        run(model, cache, [(sequence, past)])
    rows = [
        (sequences[0], ids[0][-1:]),
        (None, [0]),
        (sequences[1], ids[1][-1:]),
        (sequences[2], ids[2][20:]),
        (None, [0, 0, 0]),
        (sequences[3], ids[3]),
        (sequences[4], ids[4][:5]),
    ]
    logits = run(model, cache, rows)
    live = [(0, ids[0]), (2, ids[1]), (3, ids[2]), (5, ids[3]), (6, ids[4][:5])]
    for row, sequence_ids in live:
        assert_close(logits[row], expected_logits(reference, sequence_ids)[-len(rows[row][1]) :])
    assert torch.isfinite(logits[1]).all()
    assert torch.isfinite(logits[4]).all()


def test_row_does_not_depend_on_its_neighbours(tiny_checkpoint: tuple[Path, Any]) -> None:
    folder, _ = tiny_checkpoint
    model = load(folder)
    past, token = random_ids(21), random_ids(1, seed=5)

    def decode(neighbours: int) -> torch.Tensor:
        cache = PagedCache(model.config, seed=neighbours)
        sequences = [PagedSequence() for _ in range(neighbours + 1)]
        for index, sequence in enumerate(sequences):
            run(model, cache, [(sequence, past if index == neighbours else random_ids(3 + 7 * index, seed=index))])
        return run(model, cache, [(sequence, token) for sequence in sequences])[-1]

    torch.testing.assert_close(decode(0), decode(5), rtol=1e-5, atol=1e-5)


def test_greedy_tokens_equal_transformers_generate(tiny_checkpoint: tuple[Path, Any]) -> None:
    folder, reference = tiny_checkpoint
    model = load(folder)
    ids = random_ids(12, seed=3)
    with torch.inference_mode():
        wanted = reference.generate(
            torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=[]
        )
    cache, sequence, tokens = PagedCache(model.config), PagedSequence(), list(ids)
    step = ids
    for _ in range(20):
        step = [int(run(model, cache, [(sequence, step)])[0][-1].argmax())]
        tokens += step
    assert tokens == wanted[0].tolist()


def test_tied_weights_are_the_same(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tie_word_embeddings=True)
    model = load(tmp_path)
    assert torch.equal(model.lm_head.weight.to_dense(), model.model.embed_tokens.weight), "a packed copy, on the CPU"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_bfloat16_is_as_near_as_transformers_own(tmp_path: Path) -> None:
    """The distance of our bf16 logits from float32 is at most a little more than that of transformers' bf16 logits."""
    reference = save_checkpoint(tmp_path)
    ids = random_ids(50)
    exact = expected_logits(reference, ids)
    model = load(tmp_path, dtype=torch.bfloat16)
    cache = PagedCache(model.config)
    cache.tensor = cache.tensor.bfloat16()
    [logits] = run(model, cache, [(PagedSequence(), ids)])
    assert logits.dtype == torch.bfloat16
    theirs = expected_logits(reference.bfloat16(), ids).float()
    assert (logits.float() - exact).norm() <= 1.25 * (theirs - exact).norm()
