"""How long an all-reduce takes on the GPUs of one machine: `python -m bench.all_reduce --json out.json`.

NCCL against our own kernels (`model/peer_sums.py`), in one shot, which pushes summands itself, and in two, with the
residual addition and the norm that a layer has behind it (for NCCL, in a kernel of their own) and, but for two shots,
without; and PyTorch's one-shot and two-shot kernels. Each is captured in a CUDA graph, many calls in a row, and timed
by events around replays: the median per call, on the slowest rank. Results are checked once, outside of the timing.
Last comes, for each width, from how many rows on which of them is the fastest with norm. (What NCCL and PyTorch's
two-shot kernel sum in place grows until it overflows, which takes them no longer.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, groupby
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from bench.provenance import json_file, provenance
from model.kernels.norm import add_rms_norm, rms_norm_torch
from model.peer_sums import MAX_PROGRAMS, MAX_SUM_BYTES, Limits, PeerSums, Place, obstacle

ROWS = (1, 8, 64, 128, 256, 512, 1024, 2048, 4096, 8448)
WIDTHS = (4096, 5120)  # hidden sizes of 8B, and of 14B and 32B
DTYPE = torch.bfloat16
CALLS, REPLAYS = 50, 20
WITH_NORM = ("nccl, norm", "one_shot, norm", "two_shot, norm")
KINDS = ("nccl", "one_shot", *WITH_NORM, "torch one_shot", "torch two_shot")
EPS = 1e-6

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Result:
    rows: int
    width: int
    us: dict[str, float]  # by KINDS

    @property
    def num_bytes(self) -> int:
        return self.rows * self.width * DTYPE.itemsize


class Memory:
    """What is shared between the ranks: made once, for the largest size.

    To free such memory is not allowed while a graph is being captured. So it must live longer than all of them.
    """

    def __init__(self, group: dist.ProcessGroup, *, numel: int, device: torch.device) -> None:
        self.group = group
        self.one_shot = PeerSums(group, Limits(numel, 0), dtype=DTYPE, device=device)
        self.two_shot = PeerSums(group, Limits(0, numel), dtype=DTYPE, device=device)
        self.torchs = symmetric_memory.empty((numel,), dtype=DTYPE, device=device)
        symmetric_memory.rendezvous(self.torchs, group)


class Sums:
    """Sums of [rows, width] by all of KINDS; with a norm, of the results it is the normed one."""

    def __init__(self, x: torch.Tensor, memory: Memory) -> None:
        self._memory = memory
        self._places = cycle((Place.ATTENTION, Place.MLP))
        self._torchs = memory.torchs[: x.numel()].view(x.shape)
        self._own, self._nccl, self._out = (torch.empty_like(x) for _ in range(3))
        self._residual, self._weight = torch.zeros_like(x), torch.ones_like(x[0])

    def fill(self, x: torch.Tensor) -> None:
        """Make `x` this rank's summand, wherever the kinds look for it; none of them may be running on any rank."""
        for summand in (self._own, self._room(self._memory.two_shot, Place.MLP), self._torchs, self._nccl):
            summand.copy_(x)

    def make(self, kind: str) -> torch.Tensor:
        group = self._memory.group
        match kind:
            case "nccl":
                dist.all_reduce(self._nccl, group=group)
                return self._nccl
            case "one_shot":
                place = next(self._places)
                out = self._memory.one_shot.sum(self._own, place)
                assert out is not None
                return out
            case "nccl, norm":
                dist.all_reduce(self._nccl, group=group)
                return add_rms_norm(self._nccl, self._residual, self._weight, EPS)[0]
            case "one_shot, norm":
                return self._with_norm(self._memory.one_shot)
            case "two_shot, norm":
                return self._with_norm(self._memory.two_shot)
            case "torch one_shot":
                return torch.ops.symm_mem.one_shot_all_reduce(self._torchs, "sum", group.group_name)
            case "torch two_shot":
                return torch.ops.symm_mem.two_shot_all_reduce_out(self._torchs, "sum", group.group_name, self._out)
        raise AssertionError(f"there is no kind {kind}")

    def _with_norm(self, all_reduce: PeerSums) -> torch.Tensor:
        place = next(self._places)
        summand = self._room(all_reduce, place)
        done = all_reduce.sum_add_rms_norm(summand, place, self._residual, self._weight, EPS)
        assert done is not None
        return done[0]

    def _room(self, all_reduce: PeerSums, place: Place) -> torch.Tensor:
        room = all_reduce.room(self._nccl.shape, DTYPE, place)
        assert room is not None
        return self._own if room.memory is None else room.memory


def time_call(call: Call) -> float:
    """Microseconds of a call among many in a CUDA graph, on the slowest rank."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for replay in range(REPLAYS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    slowest = torch.tensor([statistics.median(times)], device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def measure(rows: int, width: int, memory: Memory) -> Result:
    """Check and time every kind of sum of [rows, width]."""
    x = torch.randn(rows, width, device="cuda").to(DTYPE)
    exact = x.float()
    dist.all_reduce(exact, group=memory.group)
    normed = rms_norm_torch(exact, torch.ones_like(exact[0]), EPS)
    us = {}
    sums = Sums(x, memory)
    for kind in KINDS:
        torch.cuda.synchronize()
        dist.barrier()  # nobody reads the memory any more
        sums.fill(x)
        torch.cuda.synchronize()
        dist.barrier()  # and all have written it
        expected = normed if kind in WITH_NORM else exact
        error = (sums.make(kind).float() - expected).norm() / expected.norm()
        if not error <= 1e-2:
            raise RuntimeError(f"{kind} of {rows} x {width} is wrong by {error:.1e}")
        us[kind] = time_call(partial(sums.make, kind))
    return Result(rows, width, us)


def run_rank(rank: int, size: int, rendezvous: str, rows: Sequence[int], widths: Sequence[int], report: str) -> None:
    """Join the others and measure everything; rank 0 prints, and writes the results to `report`."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.manual_seed(rank)
    store = dist.FileStore(rendezvous, size)  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=rank, world_size=size, device_id=device)
    if reason := obstacle(size, device=device):
        raise RuntimeError(reason)
    group = dist.group.WORLD
    assert group is not None
    memory = Memory(group, numel=max(rows) * max(widths), device=device)
    results = []
    if rank == 0:
        print(f"{torch.cuda.get_device_name()} x {size}, torch {torch.__version__}, {DTYPE}; us per call")
        print(f"{'rows':>5} {'width':>6} {'KiB':>6} " + " ".join(f"{kind:>14}" for kind in KINDS), flush=True)
    for width in widths:
        for count in rows:
            result = measure(count, width, memory)
            results.append(result)
            if rank == 0:
                times = " ".join(f"{result.us[kind]:14.1f}" for kind in KINDS)
                print(f"{count:5} {width:6} {result.num_bytes / 1024:6.0f} {times}", flush=True)
    if rank == 0:
        for width in widths:
            print(crossover([result for result in results if result.width == width], size))
        made = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "size": size}
        Path(report).write_text(json.dumps(made | {"results": [asdict(result) for result in results]}))
    dist.barrier()
    torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(0)  # what graphs hold of NCCL's and of the shared memory goes with the process


def crossover(results: Sequence[Result], size: int) -> str:
    """Say which sum with norm is the fastest from how many rows on, and which is used.

    `results` are of one width, by rows.
    """
    fastest = groupby(results, key=lambda result: min(WITH_NORM, key=lambda kind: result.us[kind]))
    wins = ", ".join(f"{kind.removesuffix(', norm')} from {next(same).rows} on" for kind, same in fastest)
    width, limits = results[0].width, Limits.of(size, DTYPE, summand=MAX_SUM_BYTES // DTYPE.itemsize)
    two_shots = min(limits.two_shots // width, size * MAX_PROGRAMS)
    used = f"one_shot up to {limits.one_shot // width} rows"
    if two_shots:
        used += f", two_shot up to {two_shots}"
    pushed = "what layers push by themselves is not measured here"
    return f"width {width}: fastest with norm are {wins}; used are {used}, nccl beyond; {pushed}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4, 8), help="GPUs that take part (%(default)s)")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="(default: %(default)s)")
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS), help="(default: %(default)s)")
    parser.add_argument(
        "--json", type=json_file, metavar="FILE", help="write the results here, with where they come from"
    )
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    found = torch.cuda.device_count()
    if found < arguments.ranks:
        print(f"bench.all_reduce: {arguments.ranks} CUDA devices are needed, {found} found", file=sys.stderr)
        return 1
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        args = (arguments.ranks, f"{folder}/rendezvous", sorted(arguments.rows), arguments.widths, str(report))
        torch.multiprocessing.spawn(run_rank, args=args, nprocs=arguments.ranks)  # type: ignore[attr-defined]
        if arguments.json:
            whole = provenance("bench.all_reduce") | json.loads(report.read_text(encoding="utf-8"))
            arguments.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
