"""The torch backend against the plain reference, and the choice of backends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from model.attention import make_attention, resolve_backend
from model.errors import ModelError
from model.inputs import StepInputs
from model.kernels.attention import paged_attention_torch
from tests.model.helpers import CPU

HEAD_DIM, BLOCK = 16, 8


def make(name: str = "torch", **options: Any) -> Any:
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": HEAD_DIM, "block_size": BLOCK}
    return make_attention(name, **{**shape, "scale": HEAD_DIM**-0.5, "device": CPU, "dtype": torch.float32, **options})


def make_step(
    query_lens: list[int], kv_lens: list[int], num_decode_rows: int, num_blocks: int, *, scattered: bool = True
) -> StepInputs:
    needed = [math.ceil(kv_len / BLOCK) for kv_len in kv_lens]
    blocks = iter(torch.randperm(num_blocks).tolist() if scattered else range(num_blocks))
    garbage = [2**31 - 1] * (max(needed) + 1)
    tables = [([next(blocks) for _ in range(count)] + garbage)[: max(needed) + 1] for count in needed]
    tokens = sum(query_lens)
    return StepInputs(
        token_ids=torch.zeros(tokens, dtype=torch.int32),
        positions=torch.zeros(tokens, dtype=torch.int32),
        kv_slots=torch.full((tokens,), -1),
        query_starts=torch.tensor([0, *query_lens]).cumsum(0, dtype=torch.int32),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        num_decode_rows=num_decode_rows,
        max_single_rows=query_lens.count(1),
        max_chunk_rows=len(query_lens) - num_decode_rows,
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scattered", [False, True])
def test_equals_reference(heads: int, kv_heads: int, dtype: torch.dtype, scattered: bool) -> None:
    torch.manual_seed(heads)
    query_lens, kv_lens = [1, 1, 1, 1, 7, 5, 1, 3, 16], [1, 0, 8, 37, 7, 30, 12, 0, 16]
    inputs = make_step(query_lens, kv_lens, num_decode_rows=4, num_blocks=32, scattered=scattered)
    keys, values = torch.randn(2, 32, BLOCK, kv_heads, HEAD_DIM, dtype=dtype)
    q = torch.randn(sum(query_lens), heads, HEAD_DIM, dtype=dtype)
    arguments = (inputs.block_tables, inputs.query_starts, inputs.kv_lens, HEAD_DIM**-0.5)
    expected = paged_attention_torch(q, keys, values, *arguments)
    backend = make(num_heads=heads, num_kv_heads=kv_heads, dtype=dtype)
    inputs.attention_plan = backend.plan(inputs)
    actual = backend.forward(q, keys, values, inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_result_survives_the_next_call() -> None:
    """The buffers that are kept between calls are never part of a result."""
    backend = make()
    keys, values = torch.randn(2, 8, BLOCK, 2, HEAD_DIM)
    q = torch.randn(1, 4, HEAD_DIM)
    inputs = make_step([1], [20], num_decode_rows=1, num_blocks=8)
    inputs.attention_plan = backend.plan(inputs)
    first = backend.forward(q, keys, values, inputs)
    kept = first.clone()
    backend.forward(q, keys + 1, values + 1, inputs)
    assert torch.equal(first, kept)


def test_resolve_backend() -> None:
    cuda = torch.device("cuda")
    assert resolve_backend("auto", CPU) == "torch"
    assert resolve_backend("auto", cuda) == "triton"
    assert resolve_backend("flash", cuda) == "flash"
    for name in ("triton", "flash"):
        with pytest.raises(ModelError, match=f"{name} needs a GPU, but the device is cpu; use torch"):
            resolve_backend(name, CPU)
    with pytest.raises(ModelError, match="unknown attention backend 'xformers'; there are auto, torch, triton, flash"):
        make("xformers")
