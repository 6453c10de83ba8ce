"""The model with linear layers of few rows and what stands around them in one launch, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from model.errors import ModelError
from model.kernels import linear, runtime
from model.kernels.small_linear import small_linear_add_norm_triton, small_linear_triton
from model.qwen3 import Qwen3ForCausalLM
from tests.model.helpers import (
    TINY,
    PagedCache,
    PagedSequence,
    fused_launches,
    interpreted,
    load,
    random_ids,
    run,
    save_checkpoint,
    unpack,
)

LAYERS = 2
PLAIN, SCALED, SCALED_GATED, ADD_NORM = "plain", "scaled", "scaled gated", "add norm"
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter; test_gpu.py has a GPU")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each launch of a fused kernel is, beside a product."""
    made: list[str] = []

    def launch(*arguments: Any, scale: Any = None, gated: bool = False, **options: Any) -> torch.Tensor:
        made.append(" ".join(filter(None, ["scaled" if scale else "", "gated" if gated else ""])) or PLAIN)
        return small_linear_triton(*arguments, scale=scale, gated=gated, **options)

    def launch_add_norm(*arguments: Any, **options: Any) -> Any:
        made.append(ADD_NORM)
        return small_linear_add_norm_triton(*arguments, **options)

    monkeypatch.setattr(linear, "small_linear_triton", launch)
    monkeypatch.setattr(linear, "small_linear_add_norm_triton", launch_add_norm)
    return made


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied,bias"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, tie_word_embeddings=request.param, attention_bias=request.param, num_hidden_layers=LAYERS)
    return folder


def decode(model: Qwen3ForCausalLM, rows: int, launches: list[str]) -> torch.Tensor:
    """Prefill as many sequences as rows in a step of many tokens, then decode one token of each: [rows, vocab]."""
    cache = PagedCache(model.config)
    sequences = [PagedSequence() for _ in range(rows)]
    run(model, cache, [(sequence, random_ids(17 + row, seed=row)) for row, sequence in enumerate(sequences)])
    launches.clear()
    return torch.cat(run(model, cache, [(sequence, random_ids(1, seed=9)) for sequence in sequences]))


@needs_interpreter
@pytest.mark.parametrize("rows", [1, 2])
def test_logits_are_those_of_separate_operations(launches: list[str], folder: Path, rows: int) -> None:
    with fused_launches():
        logits = decode(unpack(load(folder)), rows, launches)
    later = [SCALED, ADD_NORM, SCALED_GATED, ADD_NORM] * (LAYERS - 1)
    assert launches == [PLAIN, ADD_NORM, SCALED_GATED, ADD_NORM, *later, PLAIN]
    torch.testing.assert_close(logits, decode(load(folder), rows, launches), rtol=1e-4, atol=1e-5)
    assert not launches


@needs_interpreter
@pytest.mark.parametrize("separate", ["column parallel", "row parallel"])
def test_either_side_of_a_norm_may_be_separate_operations(launches: list[str], folder: Path, separate: str) -> None:
    with fused_launches():
        tiling_for, hidden_size = linear.tiling_for, TINY["hidden_size"]

        def tiling(rows: int, n: int, k: int, **options: bool) -> Any:
            adds = n == hidden_size
            return None if adds == (separate == "row parallel") else tiling_for(rows, n, k, **options)

        with patch.object(linear, "tiling_for", tiling):
            logits = decode(unpack(load(folder)), 2, launches)
    assert launches == (
        [ADD_NORM] * 2 * LAYERS if separate == "column parallel" else [PLAIN, "gated"] * LAYERS + [PLAIN]
    )
    torch.testing.assert_close(logits, decode(load(folder), 2, launches), rtol=1e-4, atol=1e-5)


def test_what_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(dtype: torch.dtype, rows: int = 1) -> str | None:
        x, weight = torch.empty(rows, 64, dtype=dtype), torch.empty(128, 64, dtype=dtype)
        tiling = linear._tiling(x, weight)
        return tiling and tiling.form

    monkeypatch.setattr(linear, "use_triton", lambda x: True)
    monkeypatch.delenv("LIGHTQWEN_WITHOUT", raising=False)
    assert form(torch.bfloat16, rows=2) == "fma"
    assert form(torch.bfloat16, rows=3) is None, "a kernel for Hopper"
    monkeypatch.setattr(runtime, "is_hopper", lambda device: True)
    assert form(torch.bfloat16) == "fma"
    assert form(torch.bfloat16, rows=3) == "ring"
    assert form(torch.bfloat16, rows=64) == "ring"
    assert form(torch.bfloat16, rows=257) is None
    assert form(torch.float32) is form(torch.float32, rows=3) is None
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "tensor_descriptors")
    assert form(torch.bfloat16) == "fma"
    assert form(torch.bfloat16, rows=3) is None
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "pdl,small_linear")
    assert form(torch.bfloat16) is None
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "everything")
    with pytest.raises(ModelError, match="everything"):
        form(torch.bfloat16)
