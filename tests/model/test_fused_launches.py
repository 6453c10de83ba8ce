"""The model with linear layers of few rows and what stands around them in one launch, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import ModelError
from model.kernels import linear
from model.kernels.small_linear import small_linear_triton
from model.qwen3 import Qwen3ForCausalLM
from tests.model.helpers import (
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
NORM, ADD_NORM, ADD_NORM_GATED = {"norm"}, {"norm", "residual"}, {"norm", "residual", "gated"}
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter; test_gpu.py has a GPU")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What each launch of a fused kernel is given beside x and a weight."""
    made: list[set[str]] = []

    def launch(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made.append({name for name, value in options.items() if name in ADD_NORM and value is not None})
        made[-1].update({"gated"} if options["gated"] else ())
        return small_linear_triton(*arguments, **options)

    monkeypatch.setattr(linear, "small_linear_triton", launch)
    return made


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied,bias"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, tie_word_embeddings=request.param, attention_bias=request.param, num_hidden_layers=LAYERS)
    return folder


def decode(model: Qwen3ForCausalLM, rows: int, launches: list[set[str]]) -> torch.Tensor:
    """Prefill as many sequences as rows in a step of many tokens, then decode one token of each: [rows, vocab]."""
    cache = PagedCache(model.config)
    sequences = [PagedSequence() for _ in range(rows)]
    run(model, cache, [(sequence, random_ids(17 + row, seed=row)) for row, sequence in enumerate(sequences)])
    launches.clear()
    return torch.cat(run(model, cache, [(sequence, random_ids(1, seed=9)) for sequence in sequences]))


@needs_interpreter
@pytest.mark.parametrize("rows", [1, 2])
def test_logits_are_those_of_separate_operations(launches: list[set[str]], folder: Path, rows: int) -> None:
    with fused_launches():
        logits = decode(unpack(load(folder)), rows, launches)
    later = [ADD_NORM, set(), ADD_NORM_GATED, set()] * (LAYERS - 1)
    assert launches == [NORM, set(), ADD_NORM_GATED, set(), *later, set()]
    torch.testing.assert_close(logits, decode(load(folder), rows, launches), rtol=1e-4, atol=1e-5)
    assert not launches


@needs_interpreter
@pytest.mark.parametrize("rows", [3, 7])
def test_with_more_rows_the_norm_is_a_launch_of_its_own(launches: list[set[str]], folder: Path, rows: int) -> None:
    with fused_launches():
        logits = decode(unpack(load(folder)), rows, launches)
    assert launches == [*[set(), set(), {"gated"}, set()] * LAYERS, set()]
    torch.testing.assert_close(logits, decode(load(folder), rows, launches), rtol=1e-4, atol=1e-5)


def test_what_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiling(dtype: torch.dtype, rows: int = 1) -> object:
        x, weight = torch.empty(rows, 64, dtype=dtype), torch.empty(128, 64, dtype=dtype)
        return linear._tiling(x, weight, norm=False, gated=False)

    monkeypatch.setattr(linear, "use_triton", lambda x: True)
    monkeypatch.delenv("LIGHTQWEN_WITHOUT", raising=False)
    assert tiling(torch.bfloat16) is not None
    assert tiling(torch.bfloat16, rows=4) is not None
    assert tiling(torch.bfloat16, rows=5) is None
    monkeypatch.setattr(linear, "dependent_launch", lambda x: {"launch_pdl": True})
    assert tiling(torch.bfloat16, rows=5) is not None
    assert tiling(torch.bfloat16, rows=9) is None
    assert tiling(torch.float32) is None
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "pdl,small_linear")
    assert tiling(torch.bfloat16) is None
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "everything")
    with pytest.raises(ModelError, match="everything"):
        tiling(torch.bfloat16)
