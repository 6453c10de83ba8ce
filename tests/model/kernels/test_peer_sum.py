"""The sum over ranks by one rank alone: its peers' memory is made up, with flags that are there already."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.kernels.norm import add_rms_norm_torch
from model.kernels.peer_sum import Peers, peer_sum, peer_sum_add_rms_norm
from tests.model.kernels.comparing import DTYPES, MATCH, ON_GPU, poisoned, relative_error

EPS = 1e-6
MAX_ROWS = 6
LAST_INT32 = 2**31 - 1


class Group:
    """All ranks' memory in one process; `rank` has begun `epoch` sums, of which its peers are one ahead."""

    def __init__(self, rank: int, size: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.epoch = LAST_INT32 - 1
        self.summands = [torch.randn(shape).to(device, dtype) for _ in range(size)]
        self.flags = [torch.zeros((size, MAX_ROWS), dtype=torch.int32, device=device) for _ in range(size)]
        self.flags[rank].fill_(-(2**31))  # the next but one after the last
        self.peers = Peers(
            rank,
            addresses(self.summands, device),
            addresses(self.flags, device),
            torch.full((MAX_ROWS,), self.epoch, dtype=torch.int32, device=device),
        )

    def check_told(self, rows: int) -> None:
        """This rank has told each of its peers, and nobody else, that it has begun one more sum of these rows."""
        rank = self.peers.rank
        for peer, flags in enumerate(self.flags):
            if peer != rank:
                assert flags[rank].tolist() == [LAST_INT32] * rows + [0] * (MAX_ROWS - rows)
                assert not flags[[other for other in range(len(self.flags)) if other != rank]].any()
        assert self.peers.epochs.tolist() == [LAST_INT32] * rows + [self.epoch] * (MAX_ROWS - rows)


def addresses(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("shape", [(1, 64), (3, 200), (MAX_ROWS, 256)])
def test_sum(triton_device: torch.device, dtype: torch.dtype, rank: int, size: int, shape: tuple[int, int]) -> None:
    group = Group(rank, size, shape, dtype, triton_device)
    out = peer_sum(torch.Size(shape), dtype, group.peers)
    expected = sum(summand.float() for summand in group.summands)
    assert out.dtype is dtype
    assert relative_error(out, expected.to(dtype)) < MATCH[dtype]
    group.check_told(shape[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (3, 4)])
@pytest.mark.parametrize("shape", [(1, 64), (3, 200)])
def test_with_residual_and_norm(
    triton_device: torch.device, dtype: torch.dtype, rank: int, size: int, shape: tuple[int, int]
) -> None:
    group = Group(rank, size, shape, dtype, triton_device)
    residual, weight = torch.randn(shape).to(triton_device, dtype), torch.randn(shape[1]).to(triton_device, dtype)
    before = residual.clone()
    normed, total = peer_sum_add_rms_norm(residual, weight, EPS, group.peers)
    x = sum(summand.float() for summand in group.summands).to(dtype)
    expected_normed, expected_total = add_rms_norm_torch(x, residual, weight, EPS)
    assert relative_error(total, expected_total) < 2 * MATCH[dtype]
    assert relative_error(normed, expected_normed) < 4 * MATCH[dtype]
    assert torch.equal(residual, before)
    group.check_told(shape[0])


def test_nothing_past_the_rows_is_read(triton_device: torch.device) -> None:
    group = Group(0, 2, (2, 200), torch.float32, triton_device)
    longer = [poisoned(3, 200, dtype=torch.float32, device=triton_device) for _ in group.summands]
    for memory, summand in zip(longer, group.summands, strict=True):
        memory[:2] = summand
    peers = replace(group.peers, summands=addresses(longer, triton_device))
    if ON_GPU:
        torch.cuda.synchronize()  # addresses are read early
    out = peer_sum(torch.Size((2, 200)), torch.float32, peers)
    assert torch.equal(out, group.summands[0] + group.summands[1])


def test_too_many_rows(triton_device: torch.device) -> None:
    group = Group(0, 2, (1, 8), torch.float32, triton_device)
    with pytest.raises(AssertionError, match="7 rows are more than the 6"):
        peer_sum(torch.Size((7, 8)), torch.float32, group.peers)
