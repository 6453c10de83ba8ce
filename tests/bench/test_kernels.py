"""Which shapes the benchmarks of kernels are of."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.kernels import Shape
from bench.shapes import share


def test_a_rank_has_its_share(tmp_path: Path) -> None:
    whole, half = (Shape.of(size, tmp_path) for size in ("32B", "32B/2"))
    assert (whole.num_attention_heads, whole.num_key_value_heads) == (64, 8)
    assert (half.num_attention_heads, half.num_key_value_heads) == (32, 4)
    assert (half.intermediate_size, half.vocab_size) == (12800, 75968)
    assert (half.hidden_size, half.head_dim) == (whole.hidden_size, whole.head_dim)


@pytest.mark.parametrize("text", ["0.6B", "8B/2", "32B/8"])
def test_sizes(text: str) -> None:
    assert share(text) == text


@pytest.mark.parametrize("text", ["7B", "8B/", "8B/3", "8B/16", "8B/x", "/2"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is none of 0.6B, .*, nor such a one with /2, /4 or /8"):
        share(text)
