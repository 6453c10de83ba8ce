"""What one process of `test_one_shot.py` does, on a GPU of its own. Every check that fails ends all of them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from model.one_shot import OneShotAllReduce, largest_numel, obstacle

SIZE = 2
SHAPES = ((1, 4096), (3, 1024), (64, 4096), (1, 8), (17, 5120), (512, 4096), (2, 2560), (1, 1024))
"""From one block of threads to as many as the kernel has; elements of the largest: what the memory has room for."""
DTYPES = (torch.bfloat16, torch.float32)


def summand(call: int, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers that are others for every call and rank, and whose sum bfloat16 holds exactly."""
    numbers = torch.arange(shape[0] * shape[1], device="cuda") * 7 + call * 13 + rank * 29
    return (numbers % 101).to(dtype).view(shape)


def total(call: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return sum((summand(call, rank, shape, dtype) for rank in range(1, SIZE)), summand(call, 0, shape, dtype))


def add_up(one_shot: OneShotAllReduce, x: torch.Tensor, *, in_place: bool) -> torch.Tensor:
    """The sum of `x`, which is copied to the shared memory, or written there by another kernel as a layer does."""
    if in_place:
        room = one_shot.room(x.shape, x.dtype)
        assert room is not None
        x = torch.add(x, 0, out=room)
    out = one_shot(x)
    assert out is not None
    return out


def check_rounding(one_shot: OneShotAllReduce, dtype: torch.dtype) -> None:
    """As near the exact sum as NCCL is, and the same bits on every rank."""
    for shape in SHAPES:
        x = torch.randn(shape, device="cuda").to(dtype)
        exact, by_nccl = x.double(), x.clone()
        dist.all_reduce(exact)
        dist.all_reduce(by_nccl)
        ours = add_up(one_shot, x, in_place=False)
        error, nccls = ((out.double() - exact).norm() / exact.norm() for out in (ours, by_nccl))
        assert error <= 1.1 * nccls + 1e-9, f"{shape} {dtype}: {error:.1e}, NCCL's is {nccls:.1e}"
        all_bits = [torch.empty_like(ours) for _ in range(SIZE)]
        dist.all_gather(all_bits, ours)
        assert all(torch.equal(all_bits[0], other) for other in all_bits[1:]), shape


def check_back_to_back(one_shot: OneShotAllReduce, rank: int, dtype: torch.dtype, rounds: int = 20) -> None:
    """Many calls of different sizes without a pause, now one rank late and now the other, each with inputs of its own.

    Whatever is read too early or overwritten too early gives a wrong sum.
    """
    for first in range(0, rounds * 100, 100):
        calls = [(call, SHAPES[call * 5 % len(SHAPES)]) for call in range(first, first + 100)]
        inputs = [summand(call, rank, shape, dtype) for call, shape in calls]
        torch.cuda.synchronize()
        sums = []
        for (call, _), x in zip(calls, inputs, strict=True):
            if (call + 3 * rank) % 7 == 0:
                torch.cuda._sleep(20_000)
            sums.append(add_up(one_shot, x, in_place=call % 3 == 0))
        for (call, shape), out in zip(calls, sums, strict=True):
            assert torch.equal(out, total(call, shape, dtype)), f"call {call}, {shape}, {dtype}"


def check_in_a_graph(one_shot: OneShotAllReduce, rank: int, dtype: torch.dtype) -> None:
    """A captured row of calls gives, at every replay, the sums of what its inputs then are."""
    inputs = [summand(0, rank, shape, dtype) for shape in SHAPES]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        sums = [add_up(one_shot, x, in_place=bool(index % 2)) for index, x in enumerate(inputs)]
    for replay in range(100):
        for x, shape in zip(inputs, SHAPES, strict=True):
            x.copy_(summand(replay, rank, shape, dtype))
        graph.replay()
        if replay % 10 == 0:  # something eager in between
            shape = SHAPES[replay // 10 % len(SHAPES)]
            out = add_up(one_shot, summand(-replay, rank, shape, dtype), in_place=True)
            assert torch.equal(out, total(-replay, shape, dtype)), f"after replay {replay}"
        for out, shape in zip(sums, SHAPES, strict=True):
            assert torch.equal(out, total(replay, shape, dtype)), f"replay {replay}, {shape}, {dtype}"


def join(rank: int, rendezvous: str) -> tuple[dist.ProcessGroup, torch.device]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.manual_seed(rank)
    store = dist.FileStore(rendezvous, SIZE)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=SIZE, device_id=device)
    group = dist.group.WORLD
    assert group is not None
    return group, device


def wait_for_ever(rank: int, rendezvous: str, waiting: str) -> None:
    """Rank 1 goes, and rank 0 waits for it in a sum. When it surely does, there is a file `waiting`."""
    group, device = join(rank, rendezvous)
    one_shot = OneShotAllReduce(group, numel=8, dtype=torch.float32, device=device)
    assert one_shot(torch.ones(8, device=device)) is not None
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 0:
        one_shot(torch.ones(8, device=device))
        time.sleep(2.0)
        assert not torch.cuda.current_stream().query()
        Path(waiting).touch()
        torch.cuda.synchronize()
    os._exit(0)


def main(rank: int, rendezvous: str) -> None:
    """Make all checks."""
    group, device = join(rank, rendezvous)
    largest = max(rows * width for rows, width in SHAPES)
    assert largest <= largest_numel(SIZE, torch.bfloat16)
    for dtype in DTYPES:
        assert obstacle(SIZE, dtype=dtype, device=device) == ""
        one_shot = OneShotAllReduce(group, numel=largest, dtype=dtype, device=device)
        assert symmetric_memory.rendezvous(one_shot._memory, group).multicast_ptr == 0
        assert one_shot(torch.zeros(largest + 8, dtype=dtype, device=device)) is None
        assert one_shot(torch.zeros(8, dtype=torch.float16, device=device)) is None
        with torch.inference_mode():
            check_rounding(one_shot, dtype)
            check_back_to_back(one_shot, rank, dtype)
            check_in_a_graph(one_shot, rank, dtype)
    dist.barrier()
    torch.cuda.synchronize()
    os._exit(0)  # the memory that is shared goes with the process, as it does when a supervisor ends a rank
