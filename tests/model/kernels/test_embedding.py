"""The embedding's summand of one rank: against PyTorch, and what is pushed to peers that are made up."""

from __future__ import annotations

import pytest
import torch

from model.kernels.embedding import can_push, embed, embed_rms_norm_triton, embed_torch, embed_triton
from model.kernels.norm import rms_norm_triton
from model.kernels.peer_sum import EMPTY, Push
from tests.model.kernels.comparing import ON_GPU, poisoned
from tests.model.kernels.test_peer_sum import INTEGERS, addresses

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIRST, COUNT = 7, 5
PADDED = 6  # rows of the table: the last belongs to no id
IDS = [7, 0, 11, 6, 12, 9, 2**31 - 1, 8, -1]
"""The first and the last that the table has, those next to them, others, and what no vocabulary has."""


def make(width: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.randn(PADDED, width).to(device, dtype)
    table[COUNT:] = torch.nan
    return torch.tensor(IDS, dtype=torch.int32, device=device), table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 200, 2560])
def test_rows_of_the_table_and_zeros(triton_device: torch.device, dtype: torch.dtype, width: int) -> None:
    ids, table = make(width, dtype, triton_device)
    expected = torch.stack([table[i - FIRST] if 0 <= i - FIRST < COUNT else torch.zeros_like(table[0]) for i in IDS])
    for token_ids in (ids, ids.long()):
        assert torch.equal(embed_torch(token_ids, table, FIRST, COUNT), expected)
        assert torch.equal(embed_triton(token_ids, table, FIRST, COUNT), expected)
    memory = [poisoned(len(IDS), width, dtype=dtype, device=triton_device) for _ in range(2)]
    for made, out in zip((embed_torch, embed_triton), memory, strict=True):
        assert made(ids, table, FIRST, COUNT, out=out).data_ptr() == out.data_ptr()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 200, 2560])
def test_whole_tables_rows_are_normed_as_by_the_norms_own_kernel(
    triton_device: torch.device, dtype: torch.dtype, width: int
) -> None:
    table, weight = (torch.randn(shape).to(triton_device, dtype) for shape in ((PADDED, width), (width,)))
    ids = torch.tensor([5, 0, 3, 3, 1, 4, 2], dtype=torch.int32, device=triton_device)
    for token_ids in (ids, ids.long()):
        normed, rows = embed_rms_norm_triton(token_ids, table, weight, 1e-6)
        assert torch.equal(rows, table[ids.long()])
        assert torch.equal(normed, rms_norm_triton(rows, weight, 1e-6))


@pytest.mark.parametrize("embedding", [embed_torch, embed_triton])
def test_no_id_gets_another_ones_nan(triton_device: torch.device, embedding: object) -> None:
    ids, table = make(64, torch.float32, triton_device)
    table[0] = torch.inf
    assert callable(embedding)
    out = embedding(ids, table, FIRST, COUNT)
    assert not out[1].any()
    assert out[0].isinf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("width", [200, 2560])
def test_it_is_pushed_to_all_others(
    triton_device: torch.device, dtype: torch.dtype, rank: int, size: int, width: int
) -> None:
    ids, table = make(width, dtype, triton_device)
    inboxes = [poisoned(len(IDS) + 1, width, dtype=dtype, device=triton_device) for _ in range(size)]
    room = poisoned(len(IDS), width, dtype=dtype, device=triton_device)
    out = embed_triton(ids, table, FIRST, COUNT, out=room, push=Push(rank, addresses(inboxes, triton_device)))
    assert out.data_ptr() == room.data_ptr()
    assert torch.equal(out, embed_torch(ids, table, FIRST, COUNT))
    for peer, inbox in enumerate(inboxes):
        if peer == rank:
            assert inbox.isnan().all(), "nothing goes to this rank's own"
        else:
            assert torch.equal(inbox[:-1], out)
            assert inbox[-1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_says_that_nothing_has_come_is_not_put_out(triton_device: torch.device, dtype: torch.dtype) -> None:
    """It comes as another NaN; all other bits come as they are."""
    ids, table = make(64, dtype, triton_device)
    bits = table.view(INTEGERS[dtype])
    bits[0] = torch.arange(EMPTY - 32, EMPTY + 32)
    bits[1] = EMPTY
    inboxes = [torch.zeros((len(IDS), 64), dtype=dtype, device=triton_device) for _ in range(2)]
    out = embed_triton(ids, table, FIRST, COUNT, push=Push(0, addresses(inboxes, triton_device)))
    for made in (out, inboxes[1]):
        came = made.view(INTEGERS[dtype])
        assert not (came == EMPTY).any()
        assert made[IDS.index(FIRST + 1)].isnan().all()
        first = came[IDS.index(FIRST)]
        assert (first != bits[0]).nonzero().tolist() == [[32]]
        assert made[IDS.index(FIRST), 32].isnan()


def test_where_it_is_torchs() -> None:
    ids, table = make(64, torch.float32, torch.device("cpu"))
    assert not can_push(table)
    assert torch.equal(embed(ids, table, FIRST, COUNT), embed_torch(ids, table, FIRST, COUNT))
    with pytest.raises(AssertionError, match="only the kernel pushes"):
        embed(ids, table, FIRST, COUNT, push=Push(0, torch.zeros(2, dtype=torch.int64)))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.gpu
def test_on_a_gpu_it_can_push() -> None:
    assert can_push(torch.zeros(1, device="cuda"))
