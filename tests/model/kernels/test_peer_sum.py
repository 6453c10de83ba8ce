"""The sum over ranks by one rank alone: its peers' memory is made up, with summands or flags that are there already."""

from __future__ import annotations

import pytest
import torch

from model.kernels.norm import add_rms_norm_torch, rms_norm_torch
from model.kernels.peer_sum import EMPTY, OneShot, Push, TwoShots, peer_sum, peer_sum_add_rms_norm
from tests.model.kernels.comparing import DTYPES, MATCH, poisoned, relative_error

EPS = 1e-6
MAX_PROGRAMS = 6
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
FIRST_INT32, LAST_INT32 = -(2**31), 2**31 - 1


class Inboxes:
    """One shot: what all others have pushed, and nothing of this rank's summand to itself; and the others' inboxes."""

    def __init__(self, rank: int, size: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.summands = [torch.randn(shape).to(device, dtype) for _ in range(size)]
        numel = shape[0] * shape[1]
        # Of each rank, for each other; this one writes to one of each.
        self.of_ranks = [torch.empty((size - 1, numel + 24), dtype=dtype, device=device) for _ in range(size)]
        for inboxes in self.of_ranks:
            bits(inboxes).fill_(EMPTY)
        self.rank, self.numel, self.x = rank, numel, self.summands[rank]
        self.put()
        nothing = torch.empty(0, dtype=dtype, device=device)
        theirs = [nothing if owner == rank else self.inbox(owner, rank) for owner in range(size)]
        self.way = OneShot(self.of_ranks[rank], Push(rank, addresses(theirs, device)))

    def inbox(self, owner: int, sender: int) -> torch.Tensor:
        return self.of_ranks[owner][sender - (sender > owner)]

    def put(self) -> None:
        """Let all others push."""
        for other, summand in enumerate(self.summands):
            if other != self.rank:
                self.inbox(self.rank, other)[: self.numel] = summand.flatten()

    def check(self, *, pushed: torch.Tensor | None) -> None:
        """This rank's inboxes are empty again, and each other's for this rank has what this one has pushed, and no
        other has anything."""
        for owner in range(len(self.of_ranks)):
            for sender in range(len(self.of_ranks)):
                if sender != owner:
                    expected = torch.full_like(bits(self.inbox(owner, sender)), EMPTY)
                    if sender == self.rank and pushed is not None:
                        expected[: self.numel] = bits(pushed).flatten()
                    assert torch.equal(bits(self.inbox(owner, sender)), expected), f"{owner}'s for {sender}"


class Group:
    """Two shots: all ranks' memory in one process; `rank` has come to `begun` meetings, and its peers to three more.

    With the next sum's first meeting the numbers end, and start anew below zero.
    """

    begun = LAST_INT32 - 1

    def __init__(self, rank: int, size: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.summands = [torch.randn(shape).to(device, dtype) for _ in range(size)]
        self.flags = [torch.zeros((size, MAX_PROGRAMS), dtype=torch.int32, device=device) for _ in range(size)]
        self.flags[rank].fill_(FIRST_INT32 + 1)
        self.outputs = [poisoned(*shape, dtype=dtype, device=device) for _ in range(size)]
        self.x = self.summands[rank]
        self.way = TwoShots(
            rank,
            self.x.view(-1),
            addresses(self.summands, device),
            self.outputs[rank].view(-1),
            addresses(self.outputs, device),
            addresses(self.flags, device),
            torch.full((MAX_PROGRAMS,), self.begun, dtype=torch.int32, device=device),
        )

    def put(self) -> None:
        """Let this rank have come to no more meetings than at the beginning."""
        self.way.meetings.fill_(self.begun)

    def check_told(self, programs: int) -> None:
        """So many programs of this rank have told each of its peers, and nobody else, that they have come twice."""
        rank, rest = self.way.rank, MAX_PROGRAMS - programs
        for peer, flags in enumerate(self.flags):
            if peer != rank:
                assert flags[rank].tolist() == [FIRST_INT32] * programs + [0] * rest
                assert not flags[[other for other in range(len(self.flags)) if other != rank]].any()
        assert self.way.meetings.tolist() == [FIRST_INT32] * programs + [self.begun] * rest

    def check_outputs(self, expected: torch.Tensor) -> None:
        """This rank has written its own rows of `expected` to all, and nothing else to any."""
        rank, size = self.way.rank, len(self.flags)
        for output in self.outputs:
            assert torch.equal(output[rank::size], expected[rank::size])
            assert output[[row for row in range(len(output)) if row % size != rank]].isnan().all()


def addresses(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], device=device)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGERS[tensor.dtype])


@pytest.mark.parametrize("pushed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("shape", [(1, 64), (3, 200), (7, 256)])
def test_one_shot(
    triton_device: torch.device, dtype: torch.dtype, rank: int, size: int, shape: tuple[int, int], pushed: bool
) -> None:
    group = Inboxes(rank, size, shape, dtype, triton_device)
    out = peer_sum(group.x, group.way, pushed=pushed)
    expected = sum(summand.float() for summand in group.summands)
    assert out.dtype is dtype
    assert relative_error(out, expected.to(dtype)) < MATCH[dtype]
    group.check(pushed=None if pushed else group.x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (3, 4)])
@pytest.mark.parametrize("shape", [(1, 64), (3, 200)])
def test_one_shot_with_residual_and_norm(
    triton_device: torch.device, dtype: torch.dtype, rank: int, size: int, shape: tuple[int, int]
) -> None:
    group = Inboxes(rank, size, shape, dtype, triton_device)
    residual, weight = torch.randn(shape).to(triton_device, dtype), torch.randn(shape[1]).to(triton_device, dtype)
    before = residual.clone()
    normed, total = peer_sum_add_rms_norm(group.x, residual, weight, EPS, group.way)
    x = sum(summand.float() for summand in group.summands).to(dtype)
    expected_normed, expected_total = add_rms_norm_torch(x, residual, weight, EPS)
    assert relative_error(total, expected_total) < 2 * MATCH[dtype]
    assert relative_error(normed, expected_normed) < 4 * MATCH[dtype]
    assert torch.equal(residual, before)
    group.check(pushed=group.x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_nan_that_says_empty_is_pushed_as_another(triton_device: torch.device, dtype: torch.dtype) -> None:
    group = Inboxes(1, 2, (2, 64), dtype, triton_device)
    bits(group.x)[1, 7] = EMPTY
    out = peer_sum(group.x, group.way)
    assert out.isnan().nonzero().tolist() == [[1, 7]]
    expected = group.x.clone()
    bits(expected)[1, 7] = 0x7FFF if dtype.itemsize == 2 else 0x7FFFFFFF
    group.check(pushed=expected)


def test_a_nan_that_was_pushed_has_come(triton_device: torch.device) -> None:
    """As float32 is rounded to it here, one by one and many at a time, and on GPUs."""
    group = Inboxes(0, 2, (1, 64), torch.bfloat16, triton_device)
    group.summands[1].fill_(torch.nan)
    group.summands[1][0, :32] = torch.full((32,), torch.nan, device=triton_device).bfloat16()
    bits(group.summands[1])[0, 60:] = 0x7FFF
    group.put()
    assert peer_sum(group.x, group.way, pushed=True).isnan().all()


def test_more_than_inboxes_have_room_for(triton_device: torch.device) -> None:
    group = Inboxes(0, 2, (3, 64), torch.float32, triton_device)
    with pytest.raises(AssertionError, match="256 elements are more than the 216"):
        peer_sum(torch.zeros((4, 64), device=triton_device), group.way)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("shape", [(1, 64), (4, 200), (5, 256)])
def test_two_shots_give_own_rows_to_all(
    triton_device: torch.device, dtype: torch.dtype, rank: int, size: int, shape: tuple[int, int]
) -> None:
    group, other_group = (
        Group(rank, size, shape, dtype, triton_device),
        Inboxes(rank, size, shape, dtype, triton_device),
    )
    residual, weight = torch.randn(shape).to(triton_device, dtype), torch.randn(shape[1]).to(triton_device, dtype)
    other_group.summands = group.summands
    other_group.put()
    expected_sum = peer_sum(group.x, other_group.way, pushed=True)
    other_group.put()
    expected_normed, expected_total = peer_sum_add_rms_norm(
        group.x, residual, weight, EPS, other_group.way, pushed=True
    )

    out = peer_sum(group.x, group.way)
    assert out.shape == shape
    assert out.data_ptr() == group.outputs[rank].data_ptr()
    group.check_outputs(expected_sum)
    group.check_told(-(-shape[0] // size))

    for output in group.outputs:
        output.fill_(torch.nan)
    group.way.meetings.fill_(group.begun)
    residual[[row for row in range(shape[0]) if row % size != rank]] = torch.nan
    before = residual.clone()
    normed, total = peer_sum_add_rms_norm(group.x, residual, weight, EPS, group.way)
    assert normed.data_ptr() == out.data_ptr()
    group.check_outputs(expected_normed)
    assert torch.equal(total[rank::size], expected_total[rank::size])
    assert torch.equal(residual.nan_to_num(7.0), before.nan_to_num(7.0))


def test_the_residual_of_two_shots_may_lie_where_the_result_goes(triton_device: torch.device) -> None:
    group = Group(0, 2, (3, 200), torch.float32, triton_device)
    weight = torch.ones(200, device=triton_device)
    residual = group.outputs[0]
    residual.copy_(torch.randn(3, 200))
    expected_total = sum(group.summands, residual)
    normed, total = peer_sum_add_rms_norm(group.x, residual, weight, EPS, group.way)
    assert relative_error(total[::2], expected_total[::2]) < MATCH[torch.float32]
    assert relative_error(normed[::2], rms_norm_torch(expected_total, weight, EPS)[::2]) < 4 * MATCH[torch.float32]


def test_nothing_past_the_rows_is_read(triton_device: torch.device) -> None:
    group = Group(0, 2, (3, 200), torch.float32, triton_device)
    for summand in group.summands:
        summand[2:] = torch.nan
    out = peer_sum(group.x[:2], group.way)
    assert torch.equal(out[:1], (group.summands[0] + group.summands[1])[:1])
    assert group.outputs[0][2].isnan().all(), "written past the rows"


def test_too_many_programs(triton_device: torch.device) -> None:
    group = Group(0, 2, (13, 8), torch.float32, triton_device)
    with pytest.raises(AssertionError, match="7 programs are more than the 6"):
        peer_sum(group.x, group.way)
