"""Gathering logits by one rank alone: its peers' memory is made up, with flags that are there already."""

from __future__ import annotations

import pytest
import torch

from model.kernels.peer_logits import Parts, peer_logits
from tests.model.kernels.test_peer_sum import INTEGERS, LAST_INT32, MAX_PROGRAMS, addresses

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [(0, 2), (1, 2), (1, 3), (0, 4), (2, 4), (3, 4)]
FIRST_INT32 = -(2**31)


class Group:
    """All ranks' columns in one process; `rank` has come to as many meetings as there are numbers above zero, and its
    peers to one more, or to the one after that, whose number is below zero."""

    def __init__(self, rank: int, size: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        width = -(-columns // size)
        integer = torch.iinfo(INTEGERS[dtype])
        # Any bits, NaNs too, and more rows than there are.
        self.memory = [
            torch.randint(integer.min, integer.max, (rows + size, width)).to(device, INTEGERS[dtype]).view(dtype)
            for _ in range(size)
        ]
        self.flags = [torch.zeros((size, MAX_PROGRAMS), dtype=torch.int32, device=device) for _ in range(size)]
        self.flags[rank].fill_(LAST_INT32)
        self.flags[rank][:, 1::2] = FIRST_INT32
        self.parts = Parts(
            rank,
            addresses(self.memory, device),
            addresses(self.flags, device),
            torch.full((MAX_PROGRAMS,), LAST_INT32 - 1, dtype=torch.int32, device=device),
        )
        self.rows, self.width, self.columns, self.dtype = rows, width, columns, dtype

    def put(self) -> None:
        """Let this rank have come to no more meetings than at the beginning."""
        self.parts.meetings.fill_(LAST_INT32 - 1)

    def gather(self, *, share: bool) -> torch.Tensor:
        return peer_logits(self.rows, self.width, self.columns, self.dtype, self.parts, share=share)

    def side_by_side(self) -> torch.Tensor:
        return torch.cat([part[: self.rows] for part in self.memory], dim=1)[:, : self.columns]

    def check_told(self, programs: int) -> None:
        """So many programs of this rank have told each of its peers, and nobody else, that they have come."""
        rank, rest = self.parts.rank, MAX_PROGRAMS - programs
        for peer, flags in enumerate(self.flags):
            if peer != rank:
                assert flags[rank].tolist() == [LAST_INT32] * programs + [0] * rest
                assert not flags[[other for other in range(len(self.flags)) if other != rank]].any()
        assert self.parts.meetings.tolist() == [LAST_INT32] * programs + [LAST_INT32 - 1] * rest


def same_bits(out: torch.Tensor, expected: torch.Tensor) -> bool:
    assert out.dtype is expected.dtype
    assert out.is_contiguous()
    return torch.equal(out.view(INTEGERS[out.dtype]), expected.contiguous().view(INTEGERS[out.dtype]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), RANKS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 96), (3, 101), (7, 128), (2, 9)])  # of 9, a fourth rank has none
def test_all_columns_of_all_rows(
    triton_device: torch.device, dtype: torch.dtype, rank: int, size: int, rows: int, columns: int
) -> None:
    group = Group(rank, size, rows, columns, dtype, triton_device)
    out = group.gather(share=False)
    assert same_bits(out, group.side_by_side())
    group.check_told(min(rows, MAX_PROGRAMS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), RANKS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 101), (5, 96), (8, 9)])
def test_all_columns_of_a_share_of_the_rows(
    triton_device: torch.device, dtype: torch.dtype, rank: int, size: int, rows: int, columns: int
) -> None:
    """Where nobody has asked for a row it is of zeros, whatever lies behind the rows."""
    group = Group(rank, size, rows, columns, dtype, triton_device)
    share = -(-rows // size)
    expected = torch.zeros((share * size, columns), dtype=dtype, device=triton_device)
    expected[:rows] = group.side_by_side()
    out = group.gather(share=True)
    assert same_bits(out, expected[rank * share : (rank + 1) * share])
    group.check_told(min(share, MAX_PROGRAMS))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("columns", [9000, 9001, 8192])
def test_programs_go_on_with_what_is_left(triton_device: torch.device, columns: int, share: bool) -> None:
    """A row is of several pieces, and there are more of these than programs."""
    group = Group(1, 2, 7, columns, torch.float32, triton_device)
    expected = group.side_by_side()
    if share:
        expected = torch.cat((expected[4:], torch.zeros_like(expected[:1])))
    assert same_bits(group.gather(share=share), expected)
    group.check_told(MAX_PROGRAMS)


def test_more_columns_than_there_are(triton_device: torch.device) -> None:
    group = Group(0, 2, 1, 64, torch.float32, triton_device)
    group.columns = 65
    with pytest.raises(AssertionError, match="2 ranks have 64 columns, fewer than 65"):
        group.gather(share=False)
