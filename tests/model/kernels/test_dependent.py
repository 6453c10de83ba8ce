"""Dependent launches: where they are made, and with the results of launches that wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch

from model.kernels import dependent
from model.kernels.activation import silu_and_mul
from model.kernels.attention import paged_attention_triton, plan_attention
from model.kernels.norm import add_rms_norm
from model.kernels.rope_kv import qk_norm_rope_store

EPS = 1e-6


@pytest.mark.parametrize(
    ("without", "hopper", "options"),
    [
        ("", True, {"launch_pdl": True}),
        ("small_linear", True, {"launch_pdl": True}),
        ("", False, {}),
        ("pdl", True, {}),
    ],
)
def test_options(monkeypatch: pytest.MonkeyPatch, without: str, hopper: bool, options: dict[str, bool]) -> None:
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", without)
    monkeypatch.setattr(dependent, "is_hopper", lambda device: hopper)
    assert dependent.dependent_launch(torch.empty(1)) == options


@pytest.mark.gpu
def test_kernels_of_a_layer_in_a_row(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads what the one before wrote; a program that does not wait for it shows. Between them is one of torch."""
    tokens, heads, kv_heads, head_dim, length = 48, 8, 4, 128, 24
    width = (heads + 2 * kv_heads) * head_dim

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape).to(triton_device, dtype)

    x, weights, qk_weight = draw(tokens, width), draw(length, width), draw(head_dim)
    cos_sin = draw(tokens, head_dim, dtype=torch.float32)
    positions = torch.arange(tokens, dtype=torch.int32, device=triton_device)
    slots = torch.randperm(tokens).to(triton_device)
    caches = torch.empty(2, 1, tokens, kv_heads, head_dim, dtype=torch.bfloat16, device=triton_device)

    def chain() -> torch.Tensor:
        hidden, residual = x, x
        for weight in weights:
            hidden, residual = add_rms_norm(hidden, residual, weight, EPS)
            q = qk_norm_rope_store(
                hidden, qk_weight, qk_weight, cos_sin, positions, slots, caches[0], caches[1], heads, kv_heads, EPS
            )
            hidden = torch.cat((q.flatten(1), silu_and_mul(hidden)), dim=1)
        return hidden

    check_replays(chain, caches, torch.full_like(caches, torch.nan), monkeypatch)


@pytest.mark.gpu
def test_prompts_between_what_stores_and_what_reads(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention of a step's prompts waits for its queries, keys and values, and a norm for what it gives."""
    heads, kv_heads, head_dim, block_size, length = 8, 4, 128, 64, 24
    rows = [(1, 70), (100, 100), (30, 200), (300, 300)]  # queries, keys
    queries, keys = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))
    starts = torch.tensor([0, *queries.cumsum(0)], dtype=torch.int32)
    blocks = [-(-kv_len // block_size) for _, kv_len in rows]
    tables = torch.zeros(len(rows), max(blocks), dtype=torch.int32)
    for row, (first, own) in enumerate(zip(accumulate(blocks, initial=1), blocks, strict=False)):
        tables[row, :own] = torch.arange(first, first + own)
    row_of = torch.repeat_interleave(torch.arange(len(rows)), queries)
    positions = torch.cat([torch.arange(kv_len - new, kv_len) for new, kv_len in rows])
    slots = (tables[row_of, positions // block_size] * block_size + positions % block_size).to(triton_device)
    positions = positions.int().to(triton_device)
    starts, keys, tables = starts.to(triton_device), keys.to(triton_device), tables.to(triton_device)
    tokens = len(positions)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape).to(triton_device, dtype)

    x, weights, qk_weight = draw(tokens, heads * head_dim), draw(length, heads * head_dim), draw(head_dim)
    cos_sin = draw(int(keys.max()), head_dim, dtype=torch.float32)
    older = draw(2, 1 + sum(blocks), block_size, kv_heads, head_dim)
    caches = torch.empty_like(older)
    shape = {"num_tokens": tokens, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}

    def chain() -> torch.Tensor:
        plan = plan_attention(starts, keys, tables, block_size=block_size, dtype=x.dtype, **shape)
        normed, residual = x, x
        for weight in weights:
            q = qk_norm_rope_store(
                torch.cat((normed, residual), dim=1),
                *(qk_weight, qk_weight, cos_sin, positions, slots, caches[0], caches[1], heads, kv_heads, EPS),
            )
            attended = paged_attention_triton(q, caches[0], caches[1], tables, head_dim**-0.5, plan)
            normed, residual = add_rms_norm(attended.flatten(1), residual, weight, EPS)
        return normed

    check_replays(chain, caches, older, monkeypatch)


def check_replays(
    chain: Callable[[], torch.Tensor], caches: torch.Tensor, before: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `chain` returns, and leaves in `caches` where `before` was, is the same when its launches are dependent."""

    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "pdl")
    caches.copy_(before)
    expected, expected_caches = chain(), caches.clone()
    monkeypatch.delenv("LIGHTQWEN_WITHOUT")
    caches.copy_(before)
    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(10):
        out.fill_(torch.nan)
        caches.copy_(before)
        graph.replay()
        assert torch.equal(out, expected)
        assert torch.equal(caches, expected_caches)
