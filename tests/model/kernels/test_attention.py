"""Paged decode and prefill against attention in float64 over the keys laid out in order, one row at a time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from model.attention.triton_backend import TritonAttention
from model.errors import ModelError
from model.inputs import StepInputs
from model.kernels import attention
from model.kernels.attention import (
    paged_decode,
    paged_decode_torch,
    paged_decode_triton,
    paged_prefill,
    paged_prefill_torch,
    paged_prefill_triton,
)
from tests.model.kernels.comparing import ON_GPU, TOLERANCE, poisoned, relative_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows over a paged cache whose unused places hold NaN, as do table entries past kv_len point nowhere."""

    q: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    kv_lens: torch.Tensor
    expected: torch.Tensor  # float64
    scale: float

    @property
    def max_query_len(self) -> int:
        return int(self.query_starts.diff().max())

    def step_inputs(self, num_decode_rows: int) -> StepInputs:
        tokens = len(self.q)
        unused = torch.zeros(tokens, dtype=torch.int32, device=self.q.device)
        return StepInputs(
            token_ids=unused,
            positions=unused,
            kv_slots=unused.long(),
            query_starts=self.query_starts,
            kv_lens=self.kv_lens,
            block_tables=self.block_tables,
            num_decode_rows=num_decode_rows,
            max_query_len=self.max_query_len,
            max_kv_len=int(self.kv_lens.max()),
        )


def make_batch(
    rows: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
) -> Batch:
    """Lay out rows of (queries, kv_len) over blocks in random order."""
    scale = head_dim**-0.5
    needed = [-(-kv_len // block_size) for _, kv_len in rows]
    blocks = torch.randperm(sum(needed) + 3).tolist()
    shape = (len(blocks), block_size, kv_heads, head_dim)
    key_cache, value_cache = (poisoned(*shape, dtype=dtype, device=torch.device("cpu")) for _ in range(2))
    block_tables = torch.full((len(rows), max(needed) + 2), 2**30, dtype=torch.int32)
    q = torch.randn(sum(queries for queries, _ in rows), heads, head_dim).to(dtype)
    expected = torch.zeros(q.shape, dtype=torch.float64)
    token = 0
    for row, (queries, kv_len) in enumerate(rows):
        keys, values = torch.randn(2, kv_len, kv_heads, head_dim).to(dtype)
        for position in range(0, kv_len, block_size):
            block = blocks.pop()
            block_tables[row, position // block_size] = block
            taken = slice(position, min(position + block_size, kv_len))
            key_cache[block, : taken.stop - position] = keys[taken]
            value_cache[block, : taken.stop - position] = values[taken]
        for query in range(queries if kv_len else 0):
            seen = kv_len - queries + query + 1
            for head in range(heads):
                shared = head // (heads // kv_heads)
                scores = keys[:seen, shared].double() @ q[token + query, head].double() * scale
                expected[token + query, head] = scores.softmax(0) @ values[:seen, shared].double()
        token += queries
    starts = torch.tensor([0, *(queries for queries, _ in rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Batch(
        q=q.to(device),
        key_cache=key_cache.to(device),
        value_cache=value_cache.to(device),
        block_tables=block_tables.to(device),
        query_starts=starts.to(device),
        kv_lens=torch.tensor([kv_len for _, kv_len in rows], dtype=torch.int32, device=device),
        expected=expected,
        scale=scale,
    )


def decode(batch: Batch, implementation=paged_decode_triton, max_kv_len: int | None = None) -> torch.Tensor:
    out = torch.full_like(batch.q, torch.nan)
    bound = max_kv_len or int(batch.kv_lens.max())
    returned = implementation(
        batch.q,
        batch.key_cache,
        batch.value_cache,
        batch.block_tables,
        batch.kv_lens,
        batch.scale,
        bound,
        out,
    )
    assert returned is out
    return out


def prefill(batch: Batch, implementation=paged_prefill_triton) -> torch.Tensor:
    out = torch.full_like(batch.q, torch.nan)
    returned = implementation(
        batch.q,
        batch.key_cache,
        batch.value_cache,
        batch.block_tables,
        batch.query_starts,
        batch.kv_lens,
        batch.scale,
        batch.max_query_len,
        out,
    )
    assert returned is out
    return out


def check(out: torch.Tensor, batch: Batch) -> None:
    assert relative_error(out, batch.expected) < TOLERANCE[batch.q.dtype]
    dead = batch.kv_lens.repeat_interleave(batch.query_starts.diff().long()) == 0
    assert (out[dead] == 0).all()


DECODE_ROWS = [(1, kv_len) for kv_len in (1, 0, 17, 64, 65, 130)]
PREFILL_ROWS = [(1, 1), (3, 3), (0, 0), (2, 0), (5, 70), (1, 33), (70, 70)]
if ON_GPU:
    DECODE_ROWS += [(1, kv_len) for kv_len in (513, 4097, 0, 2048, 7)]
    PREFILL_ROWS += [(300, 300), (129, 1000), (128, 128), (1, 4097)]

# heads, kv_heads, head_dim, block_size
SHAPES = [
    (2, 2, 64, 16),
    (4, 2, 64, 32),
    (4, 1, 128, 64),
    (8, 1, 64, 128),
    (6, 2, 48, 256),
    *([(32, 8, 128, 16), (16, 8, 128, 256), (40, 8, 128, 128), (64, 8, 128, 64)] if ON_GPU else []),
]
# Triton's interpreter multiplies no bfloat16 matrices: float16 stands in for it there.
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(shape, torch.bfloat16) for shape in SHAPES] if ON_GPU else [(SHAPES[2], torch.float16)]


@pytest.mark.parametrize("implementation", [paged_decode_triton, paged_decode_torch])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_decode(
    triton_device: torch.device, implementation, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    heads, kv_heads, head_dim, block_size = shape
    batch = make_batch(
        DECODE_ROWS,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=triton_device,
    )
    check(decode(batch, implementation), batch)


@pytest.mark.parametrize("implementation", [paged_prefill_triton, paged_prefill_torch])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_prefill(
    triton_device: torch.device, implementation, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    heads, kv_heads, head_dim, block_size = shape
    batch = make_batch(
        PREFILL_ROWS,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=triton_device,
    )
    check(prefill(batch, implementation), batch)


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_decode_does_not_depend_on_how_keys_are_split(
    triton_device: torch.device, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(DECODE_ROWS, device=triton_device)
    monkeypatch.setattr(attention, "_num_splits", lambda programs, max_kv_len: splits)
    check(decode(batch), batch)


def test_decode_under_the_bound_of_a_graph(triton_device: torch.device) -> None:
    """The bound decides how many programs there are, not what they compute."""
    batch = make_batch([(1, 70), (1, 0)], device=triton_device)
    check(decode(batch, max_kv_len=40_960), batch)


@pytest.mark.parametrize(
    ("programs", "max_kv_len", "splits"),
    [(8, 40_960, 64), (8, 64, 1), (8, 65, 2), (64, 40_960, 9), (527, 40_960, 2), (528, 40_960, 1), (0, 40_960, 64)],
)
def test_splits_fill_the_gpu(programs: int, max_kv_len: int, splits: int, triton_device: torch.device) -> None:
    assert attention._num_splits(programs, max_kv_len) == splits


def test_references_take_small_blocks() -> None:
    batch = make_batch(PREFILL_ROWS, block_size=4, device=torch.device("cpu"))
    check(prefill(batch, paged_prefill_torch), batch)


def test_prefill_in_chunks_is_prefill_in_one(triton_device: torch.device) -> None:
    whole = make_batch([(90, 90)], device=triton_device)
    out = prefill(whole)
    for begin, end in ((0, 1), (1, 66), (66, 90)):
        chunk = paged_prefill_triton(
            whole.q[begin:end].clone(),
            whole.key_cache,
            whole.value_cache,
            whole.block_tables,
            torch.tensor([0, end - begin], dtype=torch.int32, device=triton_device),
            torch.tensor([end], dtype=torch.int32, device=triton_device),
            whole.scale,
            end - begin,
        )
        assert relative_error(chunk, out[begin:end]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("decodes", [0, 2, 4])
def test_backend_mixes_decode_and_prefill(triton_device: torch.device, decodes: int) -> None:
    rows = [(1, 40), (1, 0), (1, 7), (1, 65), *([(20, 33), (3, 3)] if decodes < 4 else [])]
    batch = make_batch(rows, device=triton_device)
    backend = TritonAttention(
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        scale=batch.scale,
        block_size=16,
        device=triton_device,
        dtype=torch.float32,
    )
    check(backend.forward(batch.q, batch.key_cache, batch.value_cache, batch.step_inputs(decodes)), batch)


@pytest.mark.parametrize("block_size", [0, 8, 24])
def test_backend_refuses_block_size(block_size: int) -> None:
    with pytest.raises(ModelError, match=f"not {block_size}"):
        TritonAttention(
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            scale=1.0,
            block_size=block_size,
            device=torch.device("cuda"),
            dtype=torch.bfloat16,
        )


def test_dispatch_takes_the_reference_on_cpu() -> None:
    batch = make_batch(DECODE_ROWS, device=torch.device("cpu"))
    assert torch.equal(decode(batch, paged_decode), decode(batch, paged_decode_torch))
    batch = make_batch(PREFILL_ROWS, device=torch.device("cpu"))
    assert torch.equal(prefill(batch, paged_prefill), prefill(batch, paged_prefill_torch))


@pytest.mark.gpu
def test_decode_in_a_cuda_graph(triton_device: torch.device) -> None:
    """Lengths that change between replays are followed, and dead rows stay zero."""
    batch = make_batch(DECODE_ROWS, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=triton_device)
    lens = batch.kv_lens.clone()
    decode(batch, max_kv_len=40_960)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode_triton(
            batch.q, batch.key_cache, batch.value_cache, batch.block_tables, batch.kv_lens, batch.scale, 40_960
        )
    batch.kv_lens.zero_()
    graph.replay()
    assert (out == 0).all()
    batch.kv_lens.copy_(lens)
    graph.replay()
    check(out, batch)
