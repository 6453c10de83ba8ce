"""Norms, RoPE, storing and decode attention in one launch, against the same one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.attention import triton_backend
from model.kernels.attention import AttentionPlan, Splitting, paged_attention_torch, paged_decode_triton
from model.kernels.norm import rms_norm
from model.kernels.rope_kv import Projected, qk_norm_rope_store_torch
from tests.model.kernels.comparing import HOW_SPLIT, ON_GPU, ON_HOPPER, SPLIT_FAR, TOLERANCE, relative_error
from tests.model.kernels.test_attention import Batch, backend_for, make_batch, plan_of

MAX_POSITIONS = 1200
EPS = 1e-6
ROWS = [1, 0, 16, 64, 65, *([130, 1025] if ON_GPU else [150])]
"""Lengths, the newest key included: it alone, none, and at the beginnings and ends of blocks and of tiles."""

# heads, kv_heads, head_dim, block_size. Heads of 128 in 16 bits, in blocks of 64 or its multiples, are another kernel's
# on a Hopper.
SHAPES = [(4, 2, 64, 16), (3, 1, 24, 64)]
SHAPES += [(4, 2, 128, 64), (5, 1, 128, 128), (16, 1, 128, 64), (32, 4, 128, 256)] if ON_GPU else []


def make_projected(batch: Batch) -> Projected:
    tokens, heads, head_dim = batch.q.shape
    kv_heads, dtype, device = batch.key_cache.shape[2], batch.q.dtype, batch.q.device
    return Projected(
        qkv=torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(device, dtype),
        q_weight=torch.randn(head_dim).to(device, dtype),
        k_weight=torch.randn(head_dim).to(device, dtype),
        cos_sin=torch.randn(MAX_POSITIONS, head_dim).to(device),
        num_heads=heads,
        num_kv_heads=kv_heads,
        eps=EPS,
    )


def forget_newest(batch: Batch) -> torch.Tensor:
    """Poison where the newest keys will go; return these slots, -1 for rows without keys: [rows] int64."""
    block_size = batch.key_cache.shape[1]
    slots = torch.full((len(batch.kv_lens),), -1, device=batch.q.device)
    for row, kv_len in enumerate(batch.kv_lens.tolist()):
        if kv_len:
            block, offset = batch.block_tables[row, (kv_len - 1) // block_size], (kv_len - 1) % block_size
            batch.key_cache[block, offset] = batch.value_cache[block, offset] = torch.nan
            slots[row] = block * block_size + offset
    return slots


def one_after_the_other(batch: Batch, projected: Projected, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the output and both caches, as the reference leaves them."""
    caches = batch.key_cache.clone(), batch.value_cache.clone()
    positions = (batch.kv_lens - 1).clamp(min=0)
    weights = (projected.q_weight, projected.k_weight, projected.cos_sin)
    q = qk_norm_rope_store_torch(
        projected.qkv, *weights, positions, slots, *caches, projected.num_heads, projected.num_kv_heads, EPS
    )
    lengths = (batch.block_tables, batch.query_starts, batch.kv_lens)
    return paged_attention_torch(q, *caches, *lengths, batch.scale), *caches


def decode(batch: Batch, projected: Projected, splitting: Splitting = HOW_SPLIT) -> torch.Tensor:
    plan = plan_of(batch, max_chunk_rows=0, splitting=splitting)
    return paged_decode_triton(projected, batch.key_cache, batch.value_cache, batch.block_tables, batch.scale, plan)


@pytest.mark.parametrize(
    "splitting", [HOW_SPLIT, SPLIT_FAR, replace(SPLIT_FAR, min_keys=100)], ids=["few", "far", "odd"]
)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if ON_GPU else torch.float16], ids=str)
def test_equals_one_after_the_other(
    triton_device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    splitting: Splitting,
) -> None:
    batch = make_batch(
        [(1, kv_len) for kv_len in ROWS],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=triton_device,
    )
    projected, slots = make_projected(batch), forget_newest(batch)
    caches = batch.key_cache.clone(), batch.value_cache.clone()
    expected, *expected_caches = one_after_the_other(batch, projected, slots)
    out = decode(batch, projected, splitting)
    assert out.dtype is dtype
    assert not out[batch.kv_lens == 0].any()
    assert relative_error(out, expected) < 2 * TOLERANCE[dtype]
    written = torch.zeros(batch.key_cache.shape[:2], dtype=torch.bool, device=triton_device)
    written.view(-1)[slots[slots >= 0]] = True
    for cache, before, of_reference in zip((batch.key_cache, batch.value_cache), caches, expected_caches, strict=True):
        assert relative_error(cache[written], of_reference[written]) < TOLERANCE[dtype]
        torch.testing.assert_close(cache[~written], before[~written], rtol=0, atol=0, equal_nan=True)


def test_rows_of_no_program_are_not_followed(triton_device: torch.device) -> None:
    """A graph's padding rows have no keys, and table entries that point nowhere."""
    batch = make_batch([(1, 40), (1, 0), (1, 0)], device=triton_device)
    projected, slots = make_projected(batch), forget_newest(batch)
    batch.block_tables[1:] = 2**30
    expected, *_ = one_after_the_other(batch, projected, slots)
    assert relative_error(decode(batch, projected), expected) < TOLERANCE[torch.float32]


def test_rows_of_several_queries_are_refused(triton_device: torch.device) -> None:
    batch = make_batch([(3, 40)], device=triton_device)
    with pytest.raises(AssertionError, match="several queries"):
        paged_decode_triton(
            make_projected(batch), batch.key_cache, batch.value_cache, batch.block_tables, 1.0, plan_of(batch)
        )


@pytest.mark.parametrize(
    ("rows", "decodes", "without", "fused"),
    [(3, 3, "", True), (2, 2, "", True), (1, 1, "", False), (3, 2, "", False), (3, 3, "fused_decode", False)],
)
def test_which_steps_are_fused(
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    decodes: int,
    without: str,
    fused: bool,
) -> None:
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", without)
    batch = make_batch([(1, 40)] * rows, device=triton_device)
    projected = make_projected(batch)
    forget_newest(batch)
    inputs = batch.step_inputs(num_decode_rows=decodes)
    backend = backend_for(batch)
    inputs.attention_plan = backend.plan(inputs)
    assert isinstance(inputs.attention_plan, AttentionPlan)
    caches = (batch.key_cache, batch.value_cache)
    assert (backend.decode(projected, *caches, inputs) is not None) == fused
    monkeypatch.setattr(triton_backend, "_FEW_PROGRAMS", 2 * rows - 1)
    assert backend.decode(projected, *caches, inputs) is None


def test_newest_keys_are_not_read_from_the_cache(triton_device: torch.device) -> None:
    """It may be asked for before the projection has ended; whatever lies there then must not matter."""
    batch = make_batch([(1, 65), (1, 64)], device=triton_device)
    projected = make_projected(batch)
    forget_newest(batch)
    other = replace(batch, key_cache=batch.key_cache.clone(), value_cache=batch.value_cache.clone())
    for cache in (other.key_cache, other.value_cache):
        cache.masked_fill_(cache.isnan(), 7.0)
    assert torch.equal(decode(batch, projected), decode(other, projected))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper: elsewhere `_decode_kernel` serves, and fuses few rows only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_where_keys_stream_any_number_of_rows_is_fused(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(triton_backend, "_FEW_PROGRAMS", 0)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "block_size": 64}
    batch = make_batch([(1, 1 + 29 * row) for row in range(rows)], **shape, dtype=dtype, device=triton_device)
    projected, slots = make_projected(batch), forget_newest(batch)
    expected, *_ = one_after_the_other(batch, projected, slots)
    inputs, backend = batch.step_inputs(num_decode_rows=rows), backend_for(batch)
    inputs.attention_plan = backend.plan(inputs)
    out = backend.decode(projected, batch.key_cache, batch.value_cache, inputs)
    assert out is not None
    assert worst_error(out, expected) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 33, 34, 256])  # 264 units, of 33 rows, are one for each program
@pytest.mark.parametrize("splitting", [HOW_SPLIT, SPLIT_FAR], ids=["few", "far"])
def test_layers_follow_one_another(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, rows: int, splitting: Splitting
) -> None:
    """As in a step: one plan, and before each launch a dependent one that writes what it reads."""
    lens = [0 if row % 7 == 5 else 1 + (row * 389 + 299) % 500 for row in range(rows)]
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 64}
    batch = make_batch([(1, kv_len) for kv_len in lens], **shape, dtype=torch.bfloat16, device=triton_device)
    projected, slots = make_projected(batch), forget_newest(batch)
    sources = [torch.randn_like(projected.qkv) for _ in range(2)]
    ones = torch.ones_like(sources[0][0])
    plan = plan_of(batch, max_chunk_rows=0, splitting=splitting)
    caches = (batch.key_cache, batch.value_cache)

    def layers() -> list[torch.Tensor]:
        outs = []
        for source in sources * 2:
            of_layer = replace(projected, qkv=rms_norm(source, ones, EPS))
            outs.append(paged_decode_triton(of_layer, *caches, batch.block_tables, batch.scale, plan))
        return outs

    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "pdl")
    expected = layers()
    for source, out in zip(sources, expected, strict=False):
        of_layer = replace(projected, qkv=rms_norm(source, ones, EPS))
        assert worst_error(out, one_after_the_other(batch, of_layer, slots)[0]) < 2 * TOLERANCE[torch.bfloat16]
    monkeypatch.delenv("LIGHTQWEN_WITHOUT")
    layers()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = layers()
    for _ in range(10):
        forget_newest(batch)
        graph.replay()
        assert all(map(torch.equal, outs, expected))
    assert not plan.tickets.any()
    assert not plan.arrivals.any()


def worst_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of one head of one row [rows, heads, head_dim]: of all together, one does not show."""
    out, expected = out.double(), expected.double()
    return float(((out - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max())
