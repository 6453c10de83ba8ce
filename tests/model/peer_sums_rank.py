"""What one process of `test_peer_sums.py` does, mostly on a GPU of its own. A check that fails ends all of them."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from model.kernels.linear import can_push, can_sum, linear, linear_sum_add_norm, norm_linear
from model.kernels.norm import Normed, add_rms_norm_triton
from model.kernels.tilings import MAX_SUMMED_ROWS
from model.parallel import TensorParallel
from model.peer_sums import MAX_SUM_BYTES, Limits, PeerSums, Place, obstacle
from tests.model.shared_files import shared_files, store, stored_once

Shapes = tuple[tuple[int, int], ...]

SIZE = 2
SHAPES = (
    *((1, 4096), (3, 1024), (64, 4096), (1, 8), (17, 5120), (512, 4096), (2, 2560), (1, 1024)),
    *((5, 1024), (301, 4096), (2048, 5120)),
)
"""Of one row and many; elements of the largest: what the memory has room for."""
LIMITS = Limits(17 * 5120, 2048 * 5120)
"""Four of these are summed in two shots, of an even and an odd number of rows."""
FEW_ROWS = tuple(shape for shape in SHAPES if shape[0] <= 5)
FEW_ROWS_LIMITS = Limits(3 * 1024, 5 * 1024)
"""Three of these are summed in two shots: of one row, as many as there are ranks, and more."""
LARGEST = (8448, 5120)
"""The largest that a model has summed here."""
DTYPES = (torch.bfloat16, torch.float32)
EPS = 1e-6
places = itertools.cycle(Place)
"""As in a step, no two sums in a row are of one place; so a captured row of calls begins with another than it ends."""


def summand(call: int, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers that are others for every call and rank, and whose sum bfloat16 holds exactly."""
    numbers = torch.arange(shape[0] * shape[1]) * 7 + call * 13 + rank * 29
    return (numbers % 101).to(dtype).view(shape)


def total(call: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Rounded once; with more than two ranks, bfloat16 does not hold all of the numbers."""
    summands = [summand(call, rank, shape, torch.float32) for rank in range(dist.get_world_size())]
    return torch.stack(summands).sum(0).to(dtype)


def add_up(
    peer_sums: PeerSums, x: torch.Tensor, *, in_place: bool, push: bool = False, place: Place | None = None
) -> torch.Tensor:
    """The sum of `x`, or of what another kernel has written as a layer does, where it is to be, and pushed if that is
    wanted and possible.

    What it is read from holds NaN afterwards, as it may until the next sum writes there.
    """
    place = next(places) if place is None else place
    pushed = False
    if in_place:
        x, pushed = put_and_push(peer_sums, x, place) if push else (put(peer_sums, x, place), False)
    out = peer_sums.sum(x, place, pushed=pushed)
    assert out is not None
    return moved(out)


def moved(out: torch.Tensor) -> torch.Tensor:
    """Return a copy of a result, of which nothing is left: its memory may be the next sum's."""
    copy = out.clone()
    out.fill_(torch.nan)
    return copy


def put(peer_sums: PeerSums, x: torch.Tensor, place: Place) -> torch.Tensor:
    room = peer_sums.room(x.shape, x.dtype, place)
    assert room is not None
    return torch.add(x, 0, out=room.memory)


def put_and_push(peer_sums: PeerSums, x: torch.Tensor, place: Place) -> tuple[torch.Tensor, bool]:
    """As `put`, and to the other ranks too, if the memory and the layer that stands for it allow; tell whether."""
    room = peer_sums.room(x.shape, x.dtype, place)
    assert room is not None
    if room.push is None:
        return put(peer_sums, x, place), False
    if not on_gpu():
        written = put(peer_sums, x, place)
        elements = x.flatten().view(torch.uint16 if x.itemsize == 2 else torch.uint32).numpy()
        for rank, address in enumerate(room.push.inboxes.tolist()):
            if rank != room.push.rank:
                store(range(address, address + x.nbytes, x.itemsize), elements)
        return written, True
    width = x.shape[1]
    if width not in identities:
        identities[width] = torch.eye(width, dtype=torch.bfloat16)
    if x.dtype is not torch.bfloat16 or width < 1024 or not can_push(x, identities[width]):
        return put(peer_sums, x, place), False
    return linear(x.contiguous(), identities[width], out=room.memory, push=room.push), True


identities: dict[int, torch.Tensor] = {}
"""By width, weights of layers that put out what they are given."""


def check_norm(peer_sums: PeerSums, rank: int, dtype: torch.dtype, shapes: Shapes = SHAPES) -> None:
    """The sum, the residual addition and the norm in one kernel give the bits of one after the other."""
    torch.manual_seed(7)  # residual and weight are the same on every rank
    for call, shape in enumerate(shapes):
        residual, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
        place = next(places)
        x = put(peer_sums, summand(call, rank, shape, dtype), place)
        done = peer_sums.sum_add_rms_norm(x, place, residual, weight, EPS)
        assert done is not None
        expected = add_rms_norm_triton(total(call, shape, dtype), residual, weight, EPS)
        own = own_rows(peer_sums, rank, shape, dtype)
        assert torch.equal(done[0], expected[0]), f"{shape} {dtype}"
        assert torch.equal(done[1][own], expected[1][own]), f"{shape} {dtype}"


def own_rows(peer_sums: PeerSums, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> slice:
    """Which rows of the residual stream this rank has behind a sum of this shape."""
    room = peer_sums.room(torch.Size(shape), dtype, Place.MLP)
    assert room is not None
    in_one_shot = room.push is not None
    return slice(None) if in_one_shot else slice(rank, None, dist.get_world_size())


def check_step(peer_sums: PeerSums, rank: int, dtype: torch.dtype, shapes: Shapes = SHAPES) -> None:
    """Sums as a step makes them, in steps of all shapes: no rank needs other rows of the residual stream than its own.

    The other ones are NaN; so is what a sum has put out, once the next summand is made of it. The first residual is the
    embedding's sum itself.
    """
    tp = TensorParallel(rank, dist.get_world_size(), dist.group.WORLD, peer_sums)
    if on_gpu():
        torch.cuda.synchronize()
    dist.barrier()  # all sums have ended on all ranks, so that the first one may be of the place of the one before
    torch.manual_seed(9)  # what is random is the same on every rank
    for shape in shapes:
        own = own_rows(peer_sums, rank, shape, dtype)
        others = torch.ones((shape[0], 1), dtype=torch.bool)
        others[own] = False
        share = (torch.arange(shape[1]) % tp.size == rank).to(dtype)  # of the columns
        embedding = torch.randn(shape).to(dtype)
        expected = expected_residual = embedding
        hidden = residual = tp.all_reduce(put(peer_sums, embedding * share, Place.EMBEDDING), Place.EMBEDDING)
        for step in range(6):
            place = (Place.ATTENTION, Place.MLP)[step % 2]
            weight = torch.randn(shape[1]).to(dtype)
            summand = put(peer_sums, hidden * share, place)
            if step > 0:
                hidden.fill_(torch.nan)
            residual.masked_fill_(others, torch.nan)
            if (step + 3 * rank) % 5 == 0:
                be_late()
            hidden, residual = tp.all_reduce_add_rms_norm(summand, place, residual, weight, EPS)
            expected, expected_residual = add_rms_norm_triton(expected, expected_residual, weight, EPS)
        assert torch.equal(hidden, expected), f"{shape} {dtype}"
        assert torch.equal(residual[own], expected_residual[own]), f"{shape} {dtype}"


def check_kinds(
    group: dist.ProcessGroup, rank: int, dtype: torch.dtype, device: torch.device, shapes: Shapes = SHAPES
) -> None:
    """One shot and two give the same bits, also where numbers are such that the order of adding tells."""
    largest = max(rows * width for rows, width in shapes)
    one, two = (
        PeerSums(group, limits, dtype=dtype, device=device) for limits in (Limits(largest, 0), Limits(0, largest))
    )
    for shape in shapes:
        torch.manual_seed(13)
        residual, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
        torch.manual_seed(17 + rank)
        x = torch.randn(shape).to(dtype)
        assert torch.equal(add_up(one, x, in_place=False), add_up(two, x, in_place=False)), f"{shape} {dtype}"
        place = next(places)
        in_one, in_two = (kind.sum_add_rms_norm(x, place, residual, weight, EPS) for kind in (one, two))
        assert in_one is not None
        assert in_two is not None
        assert torch.equal(in_one[0], in_two[0]), f"{shape} {dtype}"
        own = own_rows(two, rank, shape, dtype)
        assert own != slice(None)
        assert torch.equal(in_one[1][own], in_two[1][own]), f"{shape} {dtype}"


def on_gpu() -> bool:
    """Tensors are made on this process's GPU, if it has one."""
    return torch.get_default_device().type == "cuda"


def be_late() -> None:
    if on_gpu():
        torch.cuda._sleep(20_000)
    else:
        time.sleep(0.002)


def check_rounding(peer_sums: PeerSums, dtype: torch.dtype) -> None:
    """As near the exact sum as NCCL is, and the same bits on every rank."""
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        exact, by_nccl = x.double(), x.clone()
        dist.all_reduce(exact)
        dist.all_reduce(by_nccl)
        ours = add_up(peer_sums, x, in_place=False)
        error, nccls = ((out.double() - exact).norm() / exact.norm() for out in (ours, by_nccl))
        assert error <= 1.1 * nccls + 1e-9, f"{shape} {dtype}: {error:.1e}, NCCL's is {nccls:.1e}"
        all_bits = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
        dist.all_gather(all_bits, ours)
        assert all(torch.equal(all_bits[0], other) for other in all_bits[1:]), shape


def check_back_to_back(
    peer_sums: PeerSums, rank: int, dtype: torch.dtype, rounds: int, shapes: Shapes = SHAPES
) -> None:
    """Many calls of different sizes without a pause, now one rank late and now the other, each with inputs of its own.

    Whatever is read too early or overwritten too early gives a wrong sum. What a layer pushes on one rank, the sum's
    kernel may push on another.
    """
    for first in range(0, rounds * 100, 100):
        calls = [(call, shapes[call * 7 % len(shapes)]) for call in range(first, first + 100)]
        inputs = [summand(call, rank, shape, dtype) for call, shape in calls]
        if on_gpu():
            torch.cuda.synchronize()
        sums = []
        for (call, _), x in zip(calls, inputs, strict=True):
            if (call + 3 * rank) % 7 == 0:
                be_late()
            sums.append(add_up(peer_sums, x, in_place=call % 3 < 2, push=(call // 3 + rank) % 3 > 0))
        for (call, shape), out in zip(calls, sums, strict=True):
            assert torch.equal(out, total(call, shape, dtype)), f"call {call}, {shape}, {dtype}"


def check_in_a_graph(peer_sums: PeerSums, rank: int, dtype: torch.dtype) -> None:
    """A captured row of calls gives, at every replay, the sums of what its inputs then are."""
    inputs = [summand(0, rank, shape, dtype) for shape in SHAPES]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    assert len(SHAPES) % len(Place) == 2
    with torch.cuda.graph(graph):
        sums = [
            add_up(peer_sums, x, in_place=bool(index % 3), push=(index + rank) % 3 == 2)
            for index, x in enumerate(inputs)
        ]
    between = next(places)
    for replay in range(100):
        for x, shape in zip(inputs, SHAPES, strict=True):
            x.copy_(summand(replay, rank, shape, dtype))
        graph.replay()
        if replay % 10 == 0:  # something eager in between
            shape = SHAPES[replay // 10 % len(SHAPES)]
            x = summand(-replay, rank, shape, dtype)
            out = add_up(peer_sums, x, in_place=True, push=replay % 20 == 0, place=between)
            assert torch.equal(out, total(-replay, shape, dtype)), f"after replay {replay}"
        for out, shape in zip(sums, SHAPES, strict=True):
            assert torch.equal(out, total(replay, shape, dtype)), f"replay {replay}, {shape}, {dtype}"


def check_layers(peer_sums: PeerSums, rank: int, *, pushed: tuple[int, ...], not_pushed: tuple[int, ...] = ()) -> None:
    """Products are pushed, or written where others read, as dependent launches, behind sums and before them: no step is
    too early.

    The same launches one at a time, with the device idle between them, tell what has to come out. So many rows are
    pushed to the other rank by every layer, and then by two of three, another one on each rank; of the third, and of
    other rows, in one shot, the sum's kernel pushes.
    """
    width, steps = 1024, 24
    torch.manual_seed(11 + rank)
    weights = [(torch.randn(width, width) / 32).to(torch.bfloat16) for _ in range(steps)]
    torch.manual_seed(12)
    norm = torch.randn(width).to(torch.bfloat16)
    for rows, mixed in itertools.product(pushed + not_pushed, (False, True)):
        if mixed and rows in not_pushed:
            continue
        x = torch.randn(rows, width).to(torch.bfloat16)

        def chain(x: torch.Tensor, *, late: int = -1, one_at_a_time: bool = False, mixed: bool = mixed) -> torch.Tensor:
            hidden = residual = x
            for step, weight in enumerate(weights):
                place = (Place.ATTENTION, Place.MLP)[step % 2]
                room = peer_sums.room(hidden.shape, hidden.dtype, place)
                assert room is not None
                pushes = room.push is not None and can_push(hidden, weight)
                assert pushes == (len(hidden) in pushed), f"{len(hidden)} rows"
                push = room.push if pushes and not (mixed and (step + rank) % 3 == 0) else None
                summand = linear(hidden, weight, out=room.memory, push=push)
                if one_at_a_time:
                    torch.cuda.synchronize()
                if step % 7 == late:
                    be_late()
                done = peer_sums.sum_add_rms_norm(summand, place, residual, norm, EPS, pushed=push is not None)
                assert done is not None
                hidden, residual = done
                if one_at_a_time:
                    torch.cuda.synchronize()
            return hidden.clone()

        expected = chain(x, one_at_a_time=True)
        assert expected.isfinite().all()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = chain(x, late=3 * rank)
        for _ in range(50):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, expected), f"{rows} rows"
        assert torch.equal(chain(x, late=3 - 3 * rank), expected), f"{rows} rows, eager"
        every = [torch.empty_like(expected) for _ in range(SIZE)]
        dist.all_gather(every, expected)
        assert all(torch.equal(every[0], other) for other in every[1:])


def check_layers_that_sum(peer_sums: PeerSums, rank: int, rows: int) -> None:
    """As `check_layers`, of layers that add up by themselves what ranks have, all of them and then two of three, the
    same on both ranks and then others."""
    width, steps = 1024, 24
    torch.manual_seed(21 + rank)
    weights = [(torch.randn(width, width) / 32).to(torch.bfloat16) for _ in range(2 * steps)]
    torch.manual_seed(22)
    gain = torch.randn(width).to(torch.bfloat16)
    x = torch.randn(rows, width).to(torch.bfloat16)

    def chain(by_themselves: int, apart: int, *, late: int = -1, one_at_a_time: bool = False) -> torch.Tensor:
        """Every so manieth layer leaves it to a kernel for sums, another one on each rank if these are `apart`; with 1,
        all do."""
        normed, residual = Normed(x), x
        for step, (into, back) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
            place = (Place.ATTENTION, Place.MLP)[step % 2]
            hidden = norm_linear(normed, into)
            if one_at_a_time:
                torch.cuda.synchronize()
            if step % 7 == late:
                be_late()
            if (step + 1 + apart * rank) % by_themselves:
                assert can_sum(hidden, back)
                one_shot = peer_sums.one_shot(residual.shape, residual.dtype, place)
                assert one_shot is not None
                normed, residual = linear_sum_add_norm(hidden, back, residual, gain, EPS, one_shot)
            else:
                room = peer_sums.room(residual.shape, residual.dtype, place)
                assert room is not None and room.push is not None  # noqa: PT018
                summand = linear(hidden, back, out=room.memory, push=room.push)
                done = peer_sums.sum_add_rms_norm(summand, place, residual, gain, EPS, pushed=True)
                assert done is not None
                normed, residual = Normed(done[0]), done[1]
            if one_at_a_time:
                torch.cuda.synchronize()
        return torch.cat((normed.finish(), residual))

    separate = chain(1, 0, one_at_a_time=True)
    for way in ((steps + 1, 0), (3, 0), (3, 1)):
        expected = chain(*way, one_at_a_time=True)
        error = (expected - separate).float().norm() / separate.float().norm()
        assert error < 0.03, f"{rows} rows: {error}"
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = chain(*way, late=3 * rank)
        for _ in range(50):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, expected), f"{rows} rows"
        assert torch.equal(chain(*way, late=3 - 3 * rank), expected), f"{rows} rows, eager"
        if way[1]:  # then ranks norm in other ways, with other roundings
            expected = expected[rows:]
        every = [torch.empty_like(expected) for _ in range(SIZE)]
        dist.all_gather(every, expected)
        assert all(torch.equal(every[0], other) for other in every[1:])


def check_largest(group: dist.ProcessGroup, rank: int, device: torch.device) -> None:
    """In one shot, with a program for every row, and in two, with one for every two; and a rank is late."""
    dtype = torch.bfloat16
    largest = Limits.of(SIZE, dtype, summand=MAX_SUM_BYTES // dtype.itemsize)
    assert largest == Limits(LARGEST[0] * LARGEST[1], 0)
    for limits in (largest, Limits(0, largest.one_shot)):
        peer_sums = PeerSums(group, limits, dtype=dtype, device=device)
        for call, rows in enumerate((LARGEST[0], LARGEST[0] - 1, 4096)):
            shape = (rows, LARGEST[1])
            for repeat in range(3):
                x = summand(7 * call + repeat, rank, shape, dtype)
                if repeat == rank:
                    be_late()
                assert torch.equal(add_up(peer_sums, x, in_place=repeat > 0), total(7 * call + repeat, shape, dtype))
        assert peer_sums.sum(torch.zeros((LARGEST[0] + 1, LARGEST[1]), dtype=dtype, device=device), Place.MLP) is None


def join(rank: int, rendezvous: str) -> tuple[dist.ProcessGroup, torch.device]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.set_default_device(device)
    torch.manual_seed(rank)
    store = dist.FileStore(rendezvous, SIZE)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=SIZE, device_id=device)
    group = dist.group.WORLD
    assert group is not None
    return group, device


def main_on_cpu(rank: int, size: int, rendezvous: str, shared: str) -> None:
    """Make those checks that need no GPU, in Triton's interpreter and through files that the ranks map."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(rendezvous, size), rank=rank, world_size=size)
    group, cpu = dist.group.WORLD, torch.device("cpu")
    assert group is not None
    for dtype in DTYPES:
        with stored_once():
            with shared_files(Path(shared) / str(dtype), rank):
                peer_sums = PeerSums(group, FEW_ROWS_LIMITS, dtype=dtype, device=cpu)
                check_kinds(group, rank, dtype, cpu, FEW_ROWS)
            check_norm(peer_sums, rank, dtype, FEW_ROWS)
            check_step(peer_sums, rank, dtype, FEW_ROWS)
            check_back_to_back(peer_sums, rank, dtype, rounds=1, shapes=FEW_ROWS)
    dist.barrier()
    dist.destroy_process_group()


def wait_for_ever(rank: int, rendezvous: str, waiting: str) -> None:
    """Rank 1 goes, and rank 0 waits for it in a sum. When it surely does, there is a file `waiting`."""
    group, device = join(rank, rendezvous)
    peer_sums = PeerSums(group, Limits(8, 0), dtype=torch.float32, device=device)
    add_up(peer_sums, torch.ones((1, 8), device=device), in_place=False)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 0:
        add_up(peer_sums, torch.ones((1, 8), device=device), in_place=False)
        time.sleep(2.0)
        assert not torch.cuda.current_stream().query()
        Path(waiting).touch()
        torch.cuda.synchronize()
    os._exit(0)


def main(rank: int, rendezvous: str) -> None:
    """Make all checks."""
    group, device = join(rank, rendezvous)
    assert LIMITS.two_shots == max(rows * width for rows, width in SHAPES)
    for dtype in DTYPES:
        assert obstacle(SIZE, device=device) == ""
        peer_sums = PeerSums(group, LIMITS, dtype=dtype, device=device)
        assert symmetric_memory.rendezvous(peer_sums._memory, group).multicast_ptr == 0
        assert peer_sums.sum(torch.zeros((1, LIMITS.two_shots + 8), dtype=dtype, device=device), Place.MLP) is None
        assert peer_sums.sum(torch.zeros((1, 8), dtype=torch.float16, device=device), Place.MLP) is None
        with torch.inference_mode():
            check_rounding(peer_sums, dtype)
            check_norm(peer_sums, rank, dtype)
            check_step(peer_sums, rank, dtype)
            check_kinds(group, rank, dtype, device)
            check_back_to_back(peer_sums, rank, dtype, rounds=20)
            check_in_a_graph(peer_sums, rank, dtype)
            if dtype is torch.bfloat16:
                check_layers(peer_sums, rank, pushed=(1, 4, 5, 33, 64), not_pushed=(80, 511))  # the last in two shots
                for rows in sorted({1, 2, 5, MAX_SUMMED_ROWS}):
                    check_layers_that_sum(peer_sums, rank, rows)
                check_largest(group, rank, device)
    dist.barrier()
    torch.cuda.synchronize()
    os._exit(0)  # the memory that is shared goes with the process, as it does when a supervisor ends a rank
