"""The fused q/k norm, RoPE and KV write: the kernel, its reference, and transformers' own parts put together."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from model.kernels.rope_kv import qk_norm_rope_store, qk_norm_rope_store_torch, qk_norm_rope_store_triton
from tests.model.kernels.comparing import DTYPES, ON_GPU, TOLERANCE, poisoned, relative_error

EPS = 1e-6
MAX_POSITIONS = 4096


class Case(NamedTuple):
    qkv: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    cos_sin: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor


def make_case(
    tokens: int, heads: int, kv_heads: int, head_dim: int, slots: int, dtype: torch.dtype, device: torch.device
) -> Case:
    angles = torch.arange(MAX_POSITIONS)[:, None] * 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    kv_slots = torch.randperm(slots)[:tokens]
    kv_slots[1::3] = -1
    return Case(
        qkv=(2 * torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)).to(device, dtype),
        q_weight=torch.randn(head_dim).to(device, dtype),
        k_weight=torch.randn(head_dim).to(device, dtype),
        cos_sin=torch.cat((angles.cos(), angles.sin()), dim=-1).float().to(device),
        positions=torch.randint(0, MAX_POSITIONS, (tokens,), dtype=torch.int32, device=device),
        kv_slots=kv_slots.to(device),
    )


def compose_transformers(case: Case, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k, v [tokens, heads, head_dim] by the parts of transformers' Qwen3Attention, in float64."""
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight.double() * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()

    head_dim = case.q_weight.shape[0]
    heads_first = case.qkv.double().view(len(case.qkv), -1, head_dim)
    q, k, v = heads_first.split([heads, kv_heads, kv_heads], dim=1)
    half_cos, half_sin = case.cos_sin[case.positions.long()].double().chunk(2, dim=-1)
    cos, sin = half_cos.repeat(1, 2), half_sin.repeat(1, 2)
    q, k = apply_rotary_pos_emb(norm(q, case.q_weight), norm(k, case.k_weight), cos, sin, unsqueeze_dim=1)
    return q, k, v


SHAPES = [
    # tokens, heads, kv_heads, head_dim
    (1, 2, 1, 64),
    (7, 4, 4, 128),
    (5, 16, 2, 64),
    (3, 18, 3, 16),  # of which two programs have a part, one of q, k and v
    (4, 6, 2, 48),  # neither the heads nor the halves fill a power of two
    *([(300, 32, 8, 128), (33, 5, 1, 128)] if ON_GPU else []),
]


@pytest.mark.parametrize("implementation", [qk_norm_rope_store_triton, qk_norm_rope_store_torch])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_transformers(
    triton_device: torch.device, implementation, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    tokens, heads, kv_heads, head_dim = shape
    num_blocks, block_size = 2 + tokens // 16, 16
    slots = num_blocks * block_size
    case = make_case(tokens, heads, kv_heads, head_dim, slots, dtype, triton_device)
    caches = [poisoned(num_blocks, block_size, kv_heads, head_dim, dtype=dtype, device=triton_device) for _ in range(2)]
    q = implementation(*case, *caches, heads, kv_heads, EPS)
    expected_q, expected_k, expected_v = compose_transformers(case, heads, kv_heads)

    assert q.shape == (tokens, heads, head_dim)
    assert relative_error(q, expected_q) < TOLERANCE[dtype]
    stored = case.kv_slots >= 0
    for cache, expected in zip(caches, (expected_k, expected_v), strict=True):
        rows = cache.view(slots, kv_heads, head_dim)
        assert relative_error(rows[case.kv_slots[stored]], expected[stored]) < TOLERANCE[dtype]
        untouched = torch.ones(slots, dtype=torch.bool, device=triton_device)
        untouched[case.kv_slots[stored]] = False
        assert rows[untouched].isnan().all()
    assert torch.equal(
        caches[1].view(slots, -1)[case.kv_slots[stored]], case.qkv[stored][:, (heads + kv_heads) * head_dim :]
    )


def test_dispatch_takes_the_reference_on_cpu() -> None:
    case = make_case(3, 4, 2, 64, 32, torch.float32, torch.device("cpu"))
    caches = torch.zeros(2, 2, 2, 16, 2, 64)
    ours = qk_norm_rope_store(*case, *caches[0], 4, 2, EPS)
    reference = qk_norm_rope_store_torch(*case, *caches[1], 4, 2, EPS)
    assert torch.equal(ours, reference)
    assert torch.equal(caches[0], caches[1])


@pytest.mark.gpu
def test_cache_beyond_32_bit_offsets(triton_device: torch.device) -> None:
    """A cache of more than 2**31 elements: its last block is written where it should be."""
    block_size, kv_heads, head_dim = 256, 8, 128
    num_blocks = 2**31 // (block_size * kv_heads * head_dim) + 2
    case = make_case(1, 8, kv_heads, head_dim, 16, torch.bfloat16, triton_device)
    last = torch.tensor([num_blocks * block_size - 1], device=triton_device)
    case = case._replace(kv_slots=last)
    key_cache, value_cache = torch.zeros(
        2, num_blocks, block_size, kv_heads, head_dim, dtype=torch.bfloat16, device=triton_device
    )
    qk_norm_rope_store_triton(*case, key_cache, value_cache, 8, kv_heads, EPS)
    assert torch.equal(value_cache[-1, -1].flatten(), case.qkv[0, -kv_heads * head_dim :])
    assert key_cache[-1, -1].count_nonzero() == kv_heads * head_dim
    assert value_cache[:-1].count_nonzero() == 0
