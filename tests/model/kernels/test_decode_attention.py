"""Decode attention over a list of tiles, against attention in float64, with parts that end anywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.kernels import decode_attention as tiles
from model.kernels.decode_attention import TilePlan, decode_attention, plan_tiles
from tests.model.kernels.comparing import ON_GPU
from tests.model.kernels.test_attention import CASES, Batch, check, make_batch

LENS = [1, 0, 17, 64, 65, 130, 0, 700]
if ON_GPU:
    LENS += [513, 4097, 0, 2048, 7]


def plan_of(batch: Batch) -> TilePlan:
    return plan_tiles(
        batch.query_starts,
        batch.kv_lens,
        batch.block_tables,
        num_heads=batch.q.shape[1],
        num_kv_heads=batch.key_cache.shape[2],
        head_dim=batch.q.shape[2],
        block_size=batch.key_cache.shape[1],
    )


def attend(batch: Batch, plan: TilePlan | None = None) -> torch.Tensor:
    out = torch.full_like(batch.q, torch.nan)
    decode_attention(batch.q, batch.key_cache, batch.value_cache, batch.scale, plan or plan_of(batch), out)
    return out


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """(parts of two KV heads' tiles, tiles of a part at least)"""
    number, least = request.param
    monkeypatch.setattr(tiles, "_MULTIPROCESSORS", number)
    monkeypatch.setattr(tiles, "_PROGRAMS_EACH", 2)
    monkeypatch.setattr(tiles, "_LEAST_TILES", least)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_rows_of_any_length(triton_device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, block_size = shape
    batch = make_batch(
        [(1, kv_len) for kv_len in LENS],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=triton_device,
    )
    check(attend(batch), batch)


@pytest.mark.parametrize("parts", [(1, 1), (2, 1), (3, 1), (3, 3), (7, 1), (40, 1), (40, 50)], indirect=True)
@pytest.mark.parametrize("block_size", [16, 128])
def test_parts_end_anywhere(triton_device: torch.device, parts: None, block_size: int) -> None:
    batch = make_batch([(1, kv_len) for kv_len in LENS], block_size=block_size, device=triton_device)
    plan = plan_of(batch)
    for _ in range(2):  # the second launch finds the counters as the first one did
        check(attend(batch, plan), batch)
    assert not plan.arrivals.any()


@pytest.mark.parametrize("parts", [(1, 1)], indirect=True)
def test_more_rows_without_keys_than_parts(triton_device: torch.device, parts: None) -> None:
    batch = make_batch([(1, 0), (1, 5), (1, 0), (1, 0)], device=triton_device)
    check(attend(batch), batch)
    nothing = make_batch([(1, 0)] * 5, device=triton_device)
    check(attend(nothing), nothing)


def test_plan_lists_every_tile_once(triton_device: torch.device) -> None:
    rows = [(1, 130), (1, 0), (17, 20), (0, 0), (1, 300), (2, 0), (1, 64), (1, 0)]
    batch = make_batch(rows, block_size=64, device=triton_device)
    plan = plan_of(batch)
    assert plan.totals.tolist() == [9, 2]
    cache_rows, keys, tokens, listed, places, counts = plan.records[:11, :6].T.tolist()
    tables = batch.block_tables
    expected = [(row, place) for row, count in ((0, 3), (4, 5), (6, 1)) for place in range(count)]
    assert list(zip(listed, places, strict=True)) == [*expected, (1, 0), (7, 0)]
    assert cache_rows[:9] == [64 * int(tables[row, place]) for row, place in expected]
    assert keys == [64, 64, 2, 64, 64, 64, 64, 44, 64, 0, 0]
    assert tokens == [0, 0, 0, 19, 19, 19, 19, 19, 22, 1, 23]
    assert counts == [3, 3, 3, 5, 5, 5, 5, 5, 1, 1, 1]


def test_rows_of_other_kinds_are_left_alone(triton_device: torch.device) -> None:
    batch = make_batch([(3, 20), (1, 70), (0, 0), (2, 2)], device=triton_device)
    out = attend(batch)
    assert out[[0, 1, 2, 4, 5]].isnan().all()
    assert not out[3].isnan().any()


def test_padding_changes_nothing(triton_device: torch.device) -> None:
    """Neither dead decodes, as in a decode graph, nor rows of no query, as in a mixed one, move where parts end."""
    alone = make_batch([(1, 300), (1, 40), (1, 700)], device=triton_device)
    out = attend(alone)
    for queries in (0, 1):
        starts = torch.cat(
            (alone.query_starts, alone.query_starts[-1] + queries * torch.arange(1, 4).to(triton_device))
        )
        padded = replace(
            alone,
            q=torch.cat((alone.q, alone.q)),
            query_starts=starts.int(),
            kv_lens=torch.cat((alone.kv_lens, torch.zeros_like(alone.kv_lens))),
            block_tables=torch.cat((alone.block_tables, torch.zeros_like(alone.block_tables))),
        )
        assert torch.equal(attend(padded)[:3], out)


@pytest.mark.gpu
def test_in_a_cuda_graph(triton_device: torch.device) -> None:
    """Lengths that change between replays are followed, and dead rows are zero."""
    rows = [(1, kv_len) for kv_len in LENS]
    batch = make_batch(rows, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=triton_device)
    lens = batch.kv_lens.clone()
    attend(batch)
    graph = torch.cuda.CUDAGraph()
    out = torch.empty_like(batch.q)
    with torch.cuda.graph(graph):
        decode_attention(batch.q, batch.key_cache, batch.value_cache, batch.scale, plan_of(batch), out)
    batch.kv_lens.zero_()
    graph.replay()
    assert (out == 0).all()
    batch.kv_lens.copy_(lens)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        check(out, batch)
