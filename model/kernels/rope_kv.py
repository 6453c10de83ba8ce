"""Between the QKV projection and attention, in one pass: per-head RMSNorm of q and k, RoPE, and k, v into the cache."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead.)

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.kernels.dependent import begin_dependents, dependent_launch, wait
from model.kernels.norm import rms_norm_torch
from model.kernels.runtime import jit, tl, triton, use_triton

_HEADS_PER_PROGRAM = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Projected:
    """What the QKV projection gave, and what is to be done to it before attention: see `qk_norm_rope_store`."""

    qkv: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    cos_sin: torch.Tensor
    num_heads: int
    num_kv_heads: int
    eps: float

    def store(
        self, positions: torch.Tensor, kv_slots: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor
    ) -> torch.Tensor:
        """Do it: store keys and values and return the queries, [tokens, num_heads, head_dim]."""
        return qk_norm_rope_store(
            self.qkv,
            self.q_weight,
            self.k_weight,
            self.cos_sin,
            positions,
            kv_slots,
            key_cache,
            value_cache,
            self.num_heads,
            self.num_kv_heads,
            self.eps,
        )


def qk_norm_rope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> torch.Tensor:
    """Norm and rotate q and k per head, store k and v in the paged cache, return q.

    qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous: heads of q, then of k, then of v.
    q_weight, k_weight: [head_dim].
    cos_sin: [max_positions, head_dim] float32; a row holds head_dim / 2 cosines, then as many sines.
    positions: [tokens] int32. kv_slots: [tokens] int64, block * block_size + offset, or -1 to store nothing.
    key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous.
    Returns q: [tokens, num_heads, head_dim].

    The norms round as `rms_norm` does. The rotation pairs element i with i + head_dim / 2, as transformers does, and is
    computed in float32 and rounded once.
    """
    implementation = qk_norm_rope_store_triton if use_triton(qkv) else qk_norm_rope_store_torch
    return implementation(
        qkv, q_weight, k_weight, cos_sin, positions, kv_slots, key_cache, value_cache, num_heads, num_kv_heads, eps
    )


def qk_norm_rope_store_torch(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> torch.Tensor:
    head_dim = q_weight.shape[0]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    q = _rotate(rms_norm_torch(q, q_weight, eps), cos, sin)
    k = _rotate(rms_norm_torch(k, k_weight, eps), cos, sin)
    stored = kv_slots >= 0
    key_cache.view(-1, num_kv_heads, head_dim)[kv_slots[stored]] = k[stored]
    value_cache.view(-1, num_kv_heads, head_dim)[kv_slots[stored]] = v[stored]
    return q


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def qk_norm_rope_store_triton(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> torch.Tensor:
    tokens, head_dim = qkv.shape[0], q_weight.shape[0]
    assert all(x.is_contiguous() for x in (qkv, key_cache, value_cache)), "qkv and the caches are contiguous"
    q = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    launch = dependent_launch(qkv)
    grid = (tokens, triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS_PER_PROGRAM))
    _qk_norm_rope_store_kernel[grid](
        qkv,
        q_weight,
        k_weight,
        cos_sin,
        positions,
        kv_slots,
        key_cache,
        value_cache,
        q,
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        HEADS_PER_PROGRAM=_HEADS_PER_PROGRAM,
        PDL=bool(launch),
        num_warps=4,
        **launch,
    )
    return q


@jit
def _qk_norm_rope_store_kernel(
    qkv_ptr,  # [tokens, NUM_HEADS + 2 * NUM_KV_HEADS, 2 * HALF]
    q_weight_ptr,  # [2 * HALF]
    k_weight_ptr,  # [2 * HALF]
    cos_sin_ptr,  # [max_positions, 2 * HALF] float32
    positions_ptr,  # [tokens] int32
    kv_slots_ptr,  # [tokens] int64
    key_cache_ptr,  # [kv slots, NUM_KV_HEADS, 2 * HALF]
    value_cache_ptr,  # same
    q_ptr,  # [tokens, NUM_HEADS, 2 * HALF]
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    PDL: tl.constexpr,
):
    begin_dependents(PDL)
    HEAD_DIM: tl.constexpr = 2 * HALF
    ALL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_PER_PROGRAM + tl.arange(0, HEADS_PER_PROGRAM)
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < ALL_HEADS)
    column = tl.arange(0, BLOCK)
    in_half = column < HALF

    q_first = tl.load(q_weight_ptr + column, mask=in_half, other=0.0)
    q_second = tl.load(q_weight_ptr + HALF + column, mask=in_half, other=0.0)
    k_first = tl.load(k_weight_ptr + column, mask=in_half, other=0.0)
    k_second = tl.load(k_weight_ptr + HALF + column, mask=in_half, other=0.0)
    angle = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * HEAD_DIM + column
    cos = tl.load(angle, mask=in_half, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=in_half, other=0.0)[None, :]
    kv_slot = tl.load(kv_slots_ptr + token)
    wait(PDL)

    source = qkv_ptr + (token * ALL_HEADS + head[:, None]) * HEAD_DIM + column[None, :]
    mask = (head < ALL_HEADS)[:, None] & in_half[None, :]
    raw_first = tl.load(source, mask=mask, other=0.0)
    raw_second = tl.load(source + HALF, mask=mask, other=0.0)

    dtype = q_ptr.dtype.element_ty
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    mean = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / HEAD_DIM
    scale = tl.rsqrt(mean + eps)[:, None]
    first_weight = tl.where(is_q[:, None], q_first[None, :], k_first[None, :]).to(tl.float32)
    second_weight = tl.where(is_q[:, None], q_second[None, :], k_second[None, :]).to(tl.float32)
    first = ((first * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)

    rotated_first = (first * cos - second * sin).to(dtype)
    rotated_second = (second * cos + first * sin).to(dtype)

    q_out = q_ptr + (token * NUM_HEADS + head[:, None]) * HEAD_DIM + column[None, :]
    q_mask = is_q[:, None] & in_half[None, :]
    tl.store(q_out, rotated_first, mask=q_mask)
    tl.store(q_out + HALF, rotated_second, mask=q_mask)

    if kv_slot >= 0:
        k_mask = is_k[:, None] & in_half[None, :]
        k_head = kv_slot * NUM_KV_HEADS + head[:, None] - NUM_HEADS
        k_out = key_cache_ptr + k_head * HEAD_DIM + column[None, :]
        tl.store(k_out, rotated_first, mask=k_mask)
        tl.store(k_out + HALF, rotated_second, mask=k_mask)
        v_mask = is_v[:, None] & in_half[None, :]
        v_out = value_cache_ptr + (k_head - NUM_KV_HEADS) * HEAD_DIM + column[None, :]
        tl.store(v_out, raw_first, mask=v_mask)
        tl.store(v_out + HALF, raw_second, mask=v_mask)
