"""Which shapes the benchmarks of kernels are of."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import bench.kernels
from bench.kernels import BATCHES, LINEAR_ROWS, Shape, linear_cases
from model.published import share


def test_a_rank_has_its_share(tmp_path: Path) -> None:
    whole, half = (Shape.of(size, tmp_path) for size in ("32B", "32B/2"))
    assert (whole.num_attention_heads, whole.num_key_value_heads) == (64, 8)
    assert (half.num_attention_heads, half.num_key_value_heads) == (32, 4)
    assert (half.intermediate_size, half.vocab_size) == (12800, 75968)
    assert (half.hidden_size, half.head_dim) == (whole.hidden_size, whole.head_dim)


@pytest.mark.parametrize("ranks", [1, 2])
def test_linear_layers_are_those_of_a_model(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.kernels, "randn", lambda *shape: torch.randn(shape, dtype=torch.bfloat16))
    shape = Shape(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=160,
        ranks=ranks,
    )
    features = {"qkv": 128, "o": 32, "gate, up, SiLU": 48, "down": 32, "head": 160}
    flops = {"qkv": 128 * 32, "o": 64 * 32, "gate, up, SiLU": 96 * 32, "down": 48 * 32, "head": 160 * 32}
    # Weights, rows that are read, and rows that are written; with the norm behind it also the residual, twice.
    added = {"o": 2 * 32, "down": 2 * 32} if ranks == 1 else {}
    read = {"qkv": 32, "o": 64, "gate, up, SiLU": 32, "down": 48, "head": 32}
    seen = set()
    for case in linear_cases(shape):
        rows = int(case.workload.removeprefix("tokens "))
        seen.add((case.kernel, rows))
        assert case.flops == 2 * rows * flops[case.kernel]
        moved = read[case.kernel] + features[case.kernel] + added.get(case.kernel, 0)
        assert case.num_bytes == 2 * (flops[case.kernel] + rows * moved)
        if rows in (1, 64):
            out = case.make()()
            if case.kernel in added:
                normed, total = out
                assert normed.finish().shape == total.shape == (rows, 32)
            else:
                assert out.shape == (rows, features[case.kernel])
    assert seen == {(name, rows) for name in features for rows in LINEAR_ROWS if name != "head" or rows <= BATCHES[-1]}


@pytest.mark.parametrize("text", ["0.6B", "8B/2", "32B/8"])
def test_sizes(text: str) -> None:
    assert share(text) == text


@pytest.mark.parametrize("text", ["7B", "8B/", "8B/3", "8B/16", "8B/x", "/2"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is none of 0.6B, .*, nor such a one with /2, /4 or /8"):
        share(text)
