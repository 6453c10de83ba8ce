"""Whole steps by the Triton attention backend, in its interpreter, against those by the torch backend."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from model.attention import triton_backend
from model.attention.triton_backend import TritonAttention
from model.kernels.attention import paged_decode_triton
from model.qwen3 import Qwen3ForCausalLM
from tests.model.helpers import (
    CPU,
    PagedCache,
    PagedSequence,
    interpreted,
    load,
    random_ids,
    run,
    save_checkpoint,
)

LAYERS, BLOCK = 1, 16
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),  # most of a minute on a core that nobody else wants
    pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter; test_gpu.py has a GPU"),
]


def logits_of(model: Qwen3ForCausalLM) -> torch.Tensor:
    """Prefill three sequences, then decode, with a dead row among them and a prefill chunk beside them."""
    cache = PagedCache(model.config, block_size=BLOCK)
    first, second, third = (PagedSequence() for _ in range(3))
    token = iter(random_ids(100, seed=9))
    steps = [
        [(first, random_ids(BLOCK - 1, seed=1)), (second, random_ids(20, seed=2))],
        [(first, [next(token)]), (None, [0]), (second, [next(token)])],
        [(first, [next(token)]), (second, [next(token)]), (third, random_ids(5, seed=3))],
        [(first, [next(token)]), (second, [next(token)]), (third, [next(token)])],
    ]
    return torch.cat(
        [
            logits
            for rows in steps
            for (sequence, _), logits in zip(rows, run(model, cache, rows), strict=True)
            if sequence is not None
        ]
    )


def test_logits_are_those_of_the_torch_backend(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, num_hidden_layers=LAYERS)
    model = load(tmp_path, block_size=BLOCK)
    expected = logits_of(model)
    config = model.config
    attention = TritonAttention(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        block_size=BLOCK,
        device=CPU,
        dtype=torch.float32,
    )
    model._attention = attention
    for layer in model.model.layers:
        layer.self_attn.attn = attention
    with patch.object(triton_backend, "paged_decode_triton", wraps=paged_decode_triton) as fused:
        logits = logits_of(model)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert fused.call_count == 2 * LAYERS  # of four steps, two are of decodes alone
