"""Paged attention against attention in float64 over the keys laid out in order, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.attention.triton_backend import TritonAttention
from model.errors import ModelError
from model.inputs import StepInputs
from model.kernels import attention
from model.kernels.attention import (
    AttentionPlan,
    Splitting,
    paged_attention,
    paged_attention_torch,
    paged_attention_triton,
    plan_attention,
)
from model.kernels.decode_attention import MERGED
from model.kernels.runtime import is_hopper
from tests.model.kernels.comparing import (
    HOW_SPLIT,
    ON_GPU,
    ON_HOPPER,
    SPLIT_FAR,
    TOLERANCE,
    poisoned,
    relative_error,
)


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
            max_single_rows=len(self.kv_lens),
            max_chunk_rows=len(self.kv_lens) - num_decode_rows,
            max_query_len=int(self.query_starts.diff().max()),
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
    blocks = (1 + torch.randperm(sum(needed) + 2)).tolist()  # nobody has block 0, which stands for none in kernels
    shape = (len(blocks) + 1, block_size, kv_heads, head_dim)
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


def plan_of(
    batch: Batch,
    num_tokens: int | None = None,
    max_single_rows: int | None = None,
    max_chunk_rows: int | None = None,
    splitting: Splitting = HOW_SPLIT,
) -> AttentionPlan:
    return plan_attention(
        batch.query_starts,
        batch.kv_lens,
        batch.block_tables,
        block_size=batch.key_cache.shape[1],
        num_tokens=num_tokens or len(batch.q),
        num_heads=batch.q.shape[1],
        num_kv_heads=batch.key_cache.shape[2],
        head_dim=batch.q.shape[2],
        dtype=batch.q.dtype,
        max_single_rows=max_single_rows,
        max_chunk_rows=max_chunk_rows,
        splitting=splitting,
    )


def backend_for(batch: Batch) -> TritonAttention:
    _, block_size, kv_heads, head_dim = batch.key_cache.shape
    return TritonAttention(
        num_heads=batch.q.shape[1],
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=batch.scale,
        block_size=block_size,
        device=batch.q.device,
        dtype=batch.q.dtype,
    )


def attend(batch: Batch, plan: AttentionPlan | None = None) -> torch.Tensor:
    """By the kernels, into an output that is poisoned first."""
    out = torch.full_like(batch.q, torch.nan)
    tensors = (batch.q, batch.key_cache, batch.value_cache, batch.block_tables)
    assert paged_attention_triton(*tensors, batch.scale, plan or plan_of(batch), out) is out
    return out


def attend_by_reference(batch: Batch, implementation=paged_attention_torch) -> torch.Tensor:
    out = torch.full_like(batch.q, torch.nan)
    tensors = (batch.q, batch.key_cache, batch.value_cache, batch.block_tables, batch.query_starts, batch.kv_lens)
    assert implementation(*tensors, batch.scale, out=out) is out
    return out


def check(out: torch.Tensor, batch: Batch) -> None:
    assert relative_error(out, batch.expected) < TOLERANCE[batch.q.dtype]
    dead = batch.kv_lens.repeat_interleave(batch.query_starts.diff().long()) == 0
    assert (out[dead] == 0).all()


DECODE_ROWS = [(1, kv_len) for kv_len in (1, 0, 17, 64, 65, 300)]
PREFILL_ROWS = [(1, 1), (3, 3), (0, 0), (2, 0), (5, 70), (1, 33), (70, 70)]
MIXED_ROWS = [(1, 40), (5, 70), (1, 0), (1, 300), (0, 0), (33, 33), (1, 64)]
if ON_GPU:
    MIXED_ROWS += [(1, 8000), (700, 900), (1, 1)]
    DECODE_ROWS += [(1, kv_len) for kv_len in (513, 4097, 0, 2048, 7)]
    PREFILL_ROWS += [(300, 300), (129, 1000), (128, 128), (1, 4097)]

# heads, kv_heads, head_dim, block_size
SHAPES = [
    (2, 2, 64, 16),
    (4, 2, 64, 32),
    (4, 1, 128, 64),
    (8, 1, 64, 128),
    (6, 2, 48, 256),
    *([(32, 8, 128, 16), (2, 2, 128, 64), (16, 8, 128, 256), (40, 8, 128, 128), (64, 8, 128, 64)] if ON_GPU else []),
]
# Triton's interpreter multiplies no bfloat16 matrices: float16 stands in for it there. Heads of 128 in 16 bits, in
# blocks of 64 or its multiples, are another kernel's on a Hopper; it takes two heads at a time, and groups may be odd.
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [
    (shape, torch.bfloat16 if ON_GPU else torch.float16)
    for shape in (SHAPES if ON_GPU else [SHAPES[1], SHAPES[2], (2, 2, 8, 64)])
]


@pytest.mark.parametrize("implementation", [attend, attend_by_reference])
@pytest.mark.parametrize("rows", [DECODE_ROWS, PREFILL_ROWS, MIXED_ROWS], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_attention(
    triton_device: torch.device,
    implementation,
    rows: list[tuple[int, int]],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> None:
    heads, kv_heads, head_dim, block_size = shape
    batch = make_batch(
        rows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=triton_device,
    )
    check(implementation(batch), batch)


@pytest.mark.parametrize("min_keys", [64, 128, 10_000])
def test_decode_does_not_depend_on_how_keys_are_split(triton_device: torch.device, min_keys: int) -> None:
    batch = make_batch(DECODE_ROWS, device=triton_device)
    plan = plan_of(batch, splitting=replace(SPLIT_FAR, min_keys=min_keys))
    assert (int(plan.splits.firsts[-1]) > len(DECODE_ROWS)) == (min_keys < 10_000)
    first = attend(batch, plan)
    check(first, batch)
    assert not plan.arrivals.any()  # the second launch finds the counters as the first one did
    assert torch.equal(attend(batch, plan), first)


@pytest.mark.parametrize("num_splits", [1, 2, 7, 8, 9, 19])
@pytest.mark.parametrize("shape", [(2, 2, 64, 64), (6, 2, 48, 16)])
def test_merging_takes_any_number_of_splits(
    triton_device: torch.device, shape: tuple[int, int, int, int], num_splits: int
) -> None:
    """More than a merge loads at a time, too; and a last split of a single key."""
    heads, kv_heads, head_dim, block_size = shape
    rows = [(1, 64 * (num_splits - 1) + 1), (1, 0)]
    batch = make_batch(
        rows, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, device=triton_device
    )
    plan = plan_of(batch, splitting=SPLIT_FAR)
    assert plan.splits.firsts.tolist() == [0, num_splits, num_splits + 1]
    check(attend(batch, plan), batch)


def splits_of(
    lens: Sequence[int], kv_heads: int, device: torch.device, splitting: Splitting, chunks: Sequence[int] = ()
) -> list[int]:
    """Return how many splits a plan gives each row of one query, with `chunks` of more queries behind them."""
    plan = plan_attention(
        torch.tensor(
            [*range(len(lens) + 1), *(len(lens) + 2 * n + 2 for n in range(len(chunks)))], device=device
        ).int(),
        torch.tensor([*lens, *chunks], dtype=torch.int32, device=device),
        torch.zeros((len(lens) + len(chunks), -(-max(*lens, *chunks, 1) // 64)), dtype=torch.int32, device=device),
        block_size=64,
        num_tokens=len(lens) + 2 * len(chunks),
        num_heads=kv_heads,
        num_kv_heads=kv_heads,
        head_dim=16,
        dtype=torch.bfloat16,
        max_chunk_rows=len(chunks),
        splitting=splitting,
    )
    counts: list[int] = plan.splits.firsts.diff().tolist()
    assert counts[len(lens) :] == [0] * len(chunks)
    assert sum(counts) <= len(plan.splits.records)
    return counts[: len(lens)]


@pytest.mark.parametrize(
    ("rows", "kv_len", "splits"),
    [
        (1, 300, 1),
        (8, 300, 1),
        (64, 1100, 1),
        (128, 1100, 1),
        (16, 4200, 2),
        (8, 8353, 4),
        (4, 8353, 8),
        (1, 32768, 32),
    ],
)
def test_rows_are_split_as_is_the_fastest(triton_device: torch.device, rows: int, kv_len: int, splits: int) -> None:
    """In steps of 0.6B and 8B, with 8 KV heads, on an H200, which runs 264 programs at a time."""
    assert splits_of([kv_len] * rows, 8, triton_device, Splitting(programs=264)) == [splits] * rows


def test_a_row_of_few_heads_has_many_splits(triton_device: torch.device) -> None:
    """One KV head, for 264 programs: splits of 768 keys, which come of 16 + 16 x 16 parts, are the most that fit."""
    assert splits_of([200_000], 1, triton_device, Splitting(programs=264, merge_keys=0)) == [261]


def test_there_are_no_more_splits_than_have_room(triton_device: torch.device) -> None:
    splits = splits_of([8353, 0, 100, 8353], 2, triton_device, Splitting(programs=264, max_units=10))
    assert splits == [3, 1, 1, 3], "five more than rows with keys"


def test_rows_of_several_queries_are_not_split(triton_device: torch.device) -> None:
    assert splits_of([8353] * 8, 8, triton_device, Splitting(programs=264), chunks=[40_000, 300]) == [4] * 8


@given(
    data=st.data(), kv_heads=st.sampled_from([1, 2, 3, 8]), programs=st.integers(1, 300), max_units=st.integers(1, 400)
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_splits_are_those_that_are_estimated_to_be_the_fastest(
    triton_device: torch.device, data: st.DataObject, kv_heads: int, programs: int, max_units: int
) -> None:
    longest = data.draw(st.sampled_from([300, 3000, 40_000]))
    lens = data.draw(st.lists(st.integers(0, longest), min_size=1, max_size=20).filter(any))
    chunks = data.draw(st.lists(st.integers(2, 40_000), max_size=2))
    splitting = Splitting(programs=programs, max_units=max_units)
    counts = splits_of(lens, kv_heads, triton_device, splitting, chunks)
    room = sum(map(bool, lens)) + -(-max_units // kv_heads)
    assert sum(count for count, kv_len in zip(counts, lens, strict=True) if kv_len) <= room
    step = max(-(-(-(-programs // kv_heads) - 16) // 16), 1)
    tried = [*range(1, 17), *(16 + step * number for number in range(1, 17))]
    lengths = {64 * -(-max(-(-max(lens) // parts), splitting.min_keys) // 64) for parts in tried}
    best = min(
        estimate(lens, length, kv_heads, splitting)
        for length in lengths
        if sum(-(-kv_len // length) for kv_len in lens) <= room
    )
    chosen = [length for length in lengths if [max(1, -(-kv_len // length)) for kv_len in lens] == counts]
    assert min(estimate(lens, length, kv_heads, splitting) for length in chosen) <= best * (1 + 1e-5)


def estimate(lens: Sequence[int], length: int, kv_heads: int, splitting: Splitting) -> float:
    """Reckon when a launch with splits of up to so many keys ends, as `Splitting` says."""
    assert splitting.programs
    units, keys = kv_heads * sum(-(-kv_len // length) for kv_len in lens), min(length, max(lens))
    turns, share = math.ceil(units / splitting.programs), kv_heads * sum(lens) / splitting.programs
    merges = math.ceil(max(lens) / length)
    cost = splitting.turn_keys * turns + (splitting.merge_keys * math.ceil(merges / MERGED) if merges > 1 else 0)
    return min(turns * keys, share + splitting.uneven * keys) + cost


def test_plan_lists_every_unit_once(triton_device: torch.device) -> None:
    rows = [(1, 130), (1, 0), (17, 20), (0, 0), (1, 300), (33, 33), (2, 0), (1, 64), (0, 0)]
    batch = make_batch(rows, device=triton_device)
    plan = plan_of(batch, splitting=Splitting(programs=6, turn_keys=0, merge_keys=0, max_units=6))
    # 300 keys in 2 parts, in whole tiles: 192 keys a split.
    assert plan.splits.firsts.tolist() == [0, 1, 2, 2, 2, 4, 4, 4, 5, 5]
    assert plan.splits.records[:5, :6].tolist() == [
        # row, token, first key, end, the row's first split, its number of splits
        [0, 0, 0, 130, 0, 1],
        [1, 1, 0, 0, 1, 1],
        [4, 19, 0, 192, 2, 2],
        [4, 19, 192, 300, 2, 2],
        [7, 55, 0, 64, 4, 1],
    ]
    tables, block_size = batch.block_tables.tolist(), batch.key_cache.shape[1]
    assert [record[7] for record in plan.splits.records[:5].tolist()] == [
        tables[row][first // block_size] if first < end else 0
        for row, _, first, end, *_ in plan.splits.records[:5].tolist()
    ]
    assert len(plan.splits.records) == 12
    assert (plan.splits.records[5:, 0] == -1).all()
    assert (plan.splits.records[5:, 2] >= plan.splits.records[5:, 3]).all()  # no keys, and so nothing is read
    assert plan.tiles.firsts.tolist() == [0, 0, 0, 2, 2, 2, 5, 6, 6, 6]
    assert plan.tiles.records[:6, :5].tolist() == [
        # row, its first token, the tile's first query, the row's numbers of queries and of keys
        [2, 2, 16, 17, 20],
        [2, 2, 0, 17, 20],
        [5, 20, 32, 33, 33],
        [5, 20, 16, 33, 33],
        [5, 20, 0, 33, 33],
        [6, 53, 0, 2, 0],
    ]
    assert (plan.tiles.records[6:, 0] == -1).all()


def test_many_rows(triton_device: torch.device) -> None:
    """More rows and units than a pass of the plan holds."""
    lens = torch.randint(1, 40, (700,)).tolist()
    batch = make_batch([(1, kv_len) for kv_len in lens], heads=2, kv_heads=1, head_dim=16, device=triton_device)
    plan = plan_of(batch)
    records = plan.splits.records.tolist()
    assert [record[:6] for record in records[:700]] == [[row, row, 0, lens[row], row, 1] for row in range(700)]
    assert all(record[0] == -1 for record in records[700:])
    if ON_GPU:  # 700 programs take the interpreter too long
        check(attend(batch, plan), batch)


def test_many_tiles(triton_device: torch.device) -> None:
    """More than a pass of the plan holds: three of each second row, of 16 queries."""
    rows = [(33, 40) if row % 2 else (1, 5) for row in range(500)]
    batch = make_batch(rows, heads=2, kv_heads=1, head_dim=16, device=triton_device)
    tiles = plan_of(batch).tiles
    records = tiles.records[:, :5].tolist()
    assert tiles.firsts.tolist() == [row // 2 * 3 for row in range(501)]
    assert records[:750] == [
        [row, row // 2 * 34 + 1, first, 33, 40] for row in range(1, 500, 2) for first in (32, 16, 0)
    ]
    assert all(record[0] == -1 for record in records[750:])


def test_padding_changes_nothing(triton_device: torch.device) -> None:
    """A CUDA graph has more rows and tokens than the step, and bounds that no step reaches."""
    rows = [(1, 900), (1, 40), (20, 33)]
    alone = make_batch(rows, device=triton_device)
    assert int(plan_of(alone).splits.firsts[1]) > 1, "a row is split"
    padded = replace(
        alone,
        query_starts=torch.cat((alone.query_starts, alone.query_starts[-1:].repeat(5))),
        kv_lens=torch.cat((alone.kv_lens, torch.zeros_like(alone.kv_lens))),
        block_tables=torch.cat((alone.block_tables, torch.zeros_like(alone.block_tables))),
    )
    padded = replace(padded, query_starts=padded.query_starts[: len(padded.kv_lens) + 1])
    out = attend(padded, plan_of(padded, num_tokens=512, max_chunk_rows=2))
    assert torch.equal(out, attend(alone))
    check(out, alone)


def test_prompts_alone_need_nothing_of_decodes(triton_device: torch.device) -> None:
    batch = make_batch([(20, 33), (70, 70), (0, 0), (2, 90)], device=triton_device)
    plan = plan_of(batch, max_single_rows=0)
    assert len(plan.splits.records) == len(plan.partial_out) == 0
    out = attend(batch, plan)
    assert torch.equal(out, attend(batch))
    check(out, batch)


def test_bounds_are_room_for_what_they_allow(triton_device: torch.device) -> None:
    batch = make_batch([(1, 900), (1, 0), (20, 33), (1, 40)], device=triton_device)
    plan = plan_of(batch, max_single_rows=3, max_chunk_rows=1)
    assert int(plan.splits.firsts[1]) > 1, "a row is split"
    assert torch.equal(attend(batch, plan), attend(batch))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="programs take several units on a Hopper")
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (8, 1), (5, 1), (3, 3)])
def test_programs_take_one_unit_after_the_other(triton_device: torch.device, heads: int, kv_heads: int) -> None:
    """600 to 1,700 units, with decodes and rows of nothing between; each launch puts the tickets back."""
    rows = [(1, 500) if n % 5 == 1 else (0, 0) if n % 5 == 3 else (1 + n * 97 % 700, 700 + n % 3) for n in range(60)]
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": 128, "block_size": 64}
    batch = make_batch(rows, **shape, dtype=torch.bfloat16, device=triton_device)
    plan = plan_of(batch)
    first = attend(batch, plan)
    check(first, batch)
    for _ in range(3):
        assert not plan.tickets.any()
        assert torch.equal(attend(batch, plan), first)


def test_reference_takes_small_blocks() -> None:
    batch = make_batch(PREFILL_ROWS, block_size=4, device=torch.device("cpu"))
    check(attend_by_reference(batch), batch)


def test_prefill_in_chunks_is_prefill_in_one(triton_device: torch.device) -> None:
    whole = make_batch([(90, 90)], device=triton_device)
    out = attend(whole)
    for begin, end in ((0, 1), (1, 66), (66, 90)):
        chunk = replace(
            whole,
            q=whole.q[begin:end].clone(),
            query_starts=torch.tensor([0, end - begin], dtype=torch.int32, device=triton_device),
            kv_lens=torch.tensor([end], dtype=torch.int32, device=triton_device),
        )
        assert relative_error(attend(chunk), out[begin:end]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("without", ["", "tensor_descriptors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] if ON_GPU else [torch.float16], ids=str)
def test_prefill_with_and_without_descriptors(
    triton_device: torch.device, dtype: torch.dtype, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of a chunk begin anywhere, and so do the keys that only some of them see."""
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", without)
    overlapped = Mock(wraps=attention.overlapped_prefill)
    monkeypatch.setattr(attention, "overlapped_prefill", overlapped)
    rows = [*MIXED_ROWS, (20, 300), (40, 130), (130, 270), *([(64, 129), (65, 128), (200, 1000)] if ON_GPU else [])]
    batch = make_batch(rows, heads=4, kv_heads=2, head_dim=128, block_size=64, dtype=dtype, device=triton_device)
    check(attend(batch), batch)
    assert overlapped.called == (not without and is_hopper(triton_device))


@pytest.mark.parametrize("decodes", [0, 2, 4])
def test_backend_mixes_decode_and_prefill(triton_device: torch.device, decodes: int) -> None:
    rows = [(1, 40), (1, 0), (1, 7), (1, 65), *([(20, 33), (3, 3)] if decodes < 4 else [])]
    batch = make_batch(rows, device=triton_device)
    backend = backend_for(batch)
    inputs = batch.step_inputs(decodes)
    inputs.attention_plan = backend.plan(inputs)
    check(backend.forward(batch.q, batch.key_cache, batch.value_cache, inputs), batch)


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
    batch = make_batch(MIXED_ROWS, device=torch.device("cpu"))
    assert torch.equal(attend_by_reference(batch, paged_attention), attend_by_reference(batch))


@pytest.mark.gpu
def test_attention_in_a_cuda_graph(triton_device: torch.device) -> None:
    """Lengths that change between replays are followed, and dead rows stay zero."""
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 64}
    batch = make_batch(MIXED_ROWS, **shape, dtype=torch.bfloat16, device=triton_device)
    lens = batch.kv_lens.clone()
    attend(batch)
    graph = torch.cuda.CUDAGraph()
    out = torch.empty_like(batch.q)
    tensors = (batch.q, batch.key_cache, batch.value_cache, batch.block_tables)
    with torch.cuda.graph(graph):
        paged_attention_triton(*tensors, batch.scale, plan_of(batch), out)
    batch.kv_lens.zero_()
    graph.replay()
    assert (out == 0).all()
    batch.kv_lens.copy_(lens)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        check(out, batch)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 64])  # two kernels
def test_dependent_launches_give_the_same_bits(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    """Each launch reads what the one before it has just written, and uses the same scratch memory."""
    if not is_hopper(triton_device):
        pytest.skip("dependent launches need compute capability 9")
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": block_size}
    batch = make_batch(DECODE_ROWS, **shape, dtype=torch.bfloat16, device=triton_device)
    plan = plan_of(batch)

    def chain() -> torch.Tensor:
        q = batch.q
        for _ in range(16):
            q = attend(replace(batch, q=q), plan)
        return q

    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "pdl")
    expected = chain()
    monkeypatch.delenv("LIGHTQWEN_WITHOUT")
    for _ in range(20):
        assert torch.equal(chain(), expected)
