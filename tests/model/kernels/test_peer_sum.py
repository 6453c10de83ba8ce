"""The sum over ranks by one rank alone: its peers' memory is made up, with flags that are there already."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.kernels.norm import add_rms_norm_torch, rms_norm_torch
from model.kernels.peer_sum import EMPTY, Outputs, Peers, Push, Pushed, peer_sum, peer_sum_add_rms_norm
from tests.model.kernels.comparing import DTYPES, MATCH, ON_GPU, poisoned, relative_error

EPS = 1e-6
MAX_PROGRAMS = 6
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
FIRST_INT32, LAST_INT32 = -(2**31), 2**31 - 1


class Group:
    """All ranks' memory in one process; `rank` has come to `begun` meetings, and its peers to three more.

    With the next sum's first meeting the numbers end, and start anew below zero.
    """

    begun = LAST_INT32 - 1

    def __init__(
        self,
        rank: int,
        size: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        two_shots: bool = False,
    ) -> None:
        self.summands = [torch.randn(shape).to(device, dtype) for _ in range(size)]
        self.flags = [torch.zeros((size, MAX_PROGRAMS), dtype=torch.int32, device=device) for _ in range(size)]
        self.flags[rank].fill_(FIRST_INT32 + 1)
        self.outputs = [poisoned(*shape, dtype=dtype, device=device) for _ in range(size)]
        self.peers = Peers(
            rank,
            addresses(self.summands, device),
            addresses(self.flags, device),
            torch.full((MAX_PROGRAMS,), self.begun, dtype=torch.int32, device=device),
            Outputs(self.outputs[rank].view(-1), addresses(self.outputs, device)) if two_shots else None,
        )

    def check_told(self, programs: int, come_to: int = LAST_INT32) -> None:
        """So many programs of this rank have told each of its peers, and nobody else, that they have come so far."""
        rank, rest = self.peers.rank, MAX_PROGRAMS - programs
        for peer, flags in enumerate(self.flags):
            if peer != rank:
                assert flags[rank].tolist() == [come_to] * programs + [0] * rest
                assert not flags[[other for other in range(len(self.flags)) if other != rank]].any()
        assert self.peers.meetings.tolist() == [come_to] * programs + [self.begun] * rest

    def check_outputs(self, expected: torch.Tensor) -> None:
        """This rank has written its own rows of `expected` to all, and nothing else to any."""
        rank, size = self.peers.rank, len(self.flags)
        for output in self.outputs:
            assert torch.equal(output[rank::size], expected[rank::size])
            assert output[[row for row in range(len(output)) if row % size != rank]].isnan().all()


def addresses(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("shape", [(1, 64), (3, 200), (MAX_PROGRAMS, 256)])
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("shape", [(1, 64), (4, 200), (5, 256)])
def test_two_shots_give_own_rows_to_all(
    triton_device: torch.device, dtype: torch.dtype, rank: int, size: int, shape: tuple[int, int]
) -> None:
    group = Group(rank, size, shape, dtype, triton_device, two_shots=True)
    residual, weight = torch.randn(shape).to(triton_device, dtype), torch.randn(shape[1]).to(triton_device, dtype)
    other_group = Group(rank, size, shape, dtype, triton_device)  # with flags of its own
    in_one = replace(other_group.peers, summands=group.peers.summands)
    expected_sum = peer_sum(torch.Size(shape), dtype, in_one)
    expected_normed, expected_total = peer_sum_add_rms_norm(residual, weight, EPS, in_one)

    out = peer_sum(torch.Size(shape), dtype, group.peers)
    assert out.shape == shape
    assert out.data_ptr() == group.outputs[rank].data_ptr()
    group.check_outputs(expected_sum)
    programs = -(-shape[0] // size)
    group.check_told(programs, come_to=FIRST_INT32)

    for output in group.outputs:
        output.fill_(torch.nan)
    group.peers.meetings.fill_(group.begun)
    residual[[row for row in range(shape[0]) if row % size != rank]] = torch.nan
    before = residual.clone()
    normed, total = peer_sum_add_rms_norm(residual, weight, EPS, group.peers)
    assert normed.data_ptr() == out.data_ptr()
    group.check_outputs(expected_normed)
    assert torch.equal(total[rank::size], expected_total[rank::size])
    assert torch.equal(residual.nan_to_num(7.0), before.nan_to_num(7.0))


def test_the_residual_of_two_shots_may_lie_where_the_result_goes(triton_device: torch.device) -> None:
    group = Group(0, 2, (3, 200), torch.float32, triton_device, two_shots=True)
    weight = torch.ones(200, device=triton_device)
    residual = group.outputs[0]
    residual.copy_(torch.randn(3, 200))
    expected_total = sum(group.summands, residual)
    normed, total = peer_sum_add_rms_norm(residual, weight, EPS, group.peers)
    assert relative_error(total[::2], expected_total[::2]) < MATCH[torch.float32]
    assert relative_error(normed[::2], rms_norm_torch(expected_total, weight, EPS)[::2]) < 4 * MATCH[torch.float32]


def pushed(group: Group, capacity: int) -> Peers:
    """What all others have pushed, and nothing of this rank's summand to itself."""
    rank, summand = group.peers.rank, group.summands[0]
    inboxes = torch.empty((len(group.summands), capacity), dtype=summand.dtype, device=summand.device)
    inboxes.view(INTEGERS[summand.dtype]).fill_(EMPTY)
    for other, theirs in enumerate(group.summands):
        if other != rank:
            inboxes[other, : theirs.numel()] = theirs.flatten()
    nowhere = torch.zeros(len(group.summands), dtype=torch.int64, device=summand.device)
    return replace(group.peers, pushed=Pushed(inboxes, Push(rank, nowhere)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("shape", [(1, 64), (3, 200), (7, 256)])
def test_what_was_pushed_is_summed_as_if_it_had_been_read(
    triton_device: torch.device, dtype: torch.dtype, rank: int, size: int, shape: tuple[int, int]
) -> None:
    group = Group(rank, size, (min(shape[0], MAX_PROGRAMS), shape[1]), dtype, triton_device)
    rows, width = group.summands[0].shape
    residual, weight = torch.randn(rows, width).to(triton_device, dtype), torch.randn(width).to(triton_device, dtype)
    peers = pushed(group, rows * width + 24)
    assert peers.pushed is not None
    normed, total = peer_sum_add_rms_norm(residual, weight, EPS, peers)
    group.check_told(0)  # they do not meet
    assert (peers.pushed.inboxes.view(INTEGERS[dtype]) == EMPTY).all(), "not emptied"
    expected_normed, expected_total = peer_sum_add_rms_norm(residual, weight, EPS, group.peers)
    assert torch.equal(normed, expected_normed)
    assert torch.equal(total, expected_total)


def test_a_nan_that_was_pushed_has_come(triton_device: torch.device) -> None:
    """As float32 is rounded to it here, one by one and many at a time, and on GPUs."""
    group = Group(0, 2, (1, 64), torch.bfloat16, triton_device)
    group.summands[1].fill_(torch.nan)
    group.summands[1][0, :32] = torch.full((32,), torch.nan, device=triton_device).bfloat16()
    group.summands[1].view(torch.int16)[0, 60:] = 0x7FFF
    out = peer_sum(torch.Size((1, 64)), torch.bfloat16, pushed(group, 64))
    assert out.isnan().all()


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


@pytest.mark.parametrize(("two_shots", "rows"), [(False, 7), (True, 13)])
def test_too_many_programs(triton_device: torch.device, two_shots: bool, rows: int) -> None:
    group = Group(0, 2, (rows, 8), torch.float32, triton_device, two_shots=two_shots)
    with pytest.raises(AssertionError, match="7 programs are more than the 6"):
        peer_sum(torch.Size((rows, 8)), torch.float32, group.peers)
