"""How long an all-reduce takes on the GPUs of one machine: `python -m bench.all_reduce --json out.json`.

NCCL against the one-shot kernel (`model/one_shot.py`), each alone and with the residual addition and the norm that a
layer has behind it (for NCCL, in a kernel of their own); and PyTorch's one-shot and two-shot kernels. Each is captured
in a CUDA graph, many calls in a row, and timed by events around replays: the median per call, on the slowest rank.
Results are checked once, outside of the timing. Last comes, for each width, up to how many rows the one-shot kernel is
faster than NCCL. (What NCCL and two-shot sum in place grows until it overflows, which takes them no longer.)
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
from itertools import cycle
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from bench.provenance import json_file, provenance
from model.kernels.norm import add_rms_norm
from model.one_shot import MAX_PEER_BYTES, OneShotAllReduce, Place, obstacle

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WIDTHS = (1024, 4096, 5120)  # hidden sizes of 0.6B, 8B, 14B and 32B
DTYPE = torch.bfloat16
CALLS, REPLAYS = 50, 20
KINDS = ("nccl", "one_shot", "nccl, norm", "one_shot, norm", "torch one_shot", "torch two_shot")
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


class Calls:
    """What sums [rows, width], by KINDS; with a norm, the sum is the second result."""

    def __init__(self, x: torch.Tensor, one_shot: OneShotAllReduce, group: dist.ProcessGroup) -> None:
        self._one_shot, self._group = one_shot, group
        self._places = cycle((Place.ATTENTION, Place.MLP))
        self._symmetric = symmetric_memory.empty(x.shape, dtype=x.dtype, device=x.device)
        symmetric_memory.rendezvous(self._symmetric, group)
        self._nccl, self._total = torch.empty_like(x), torch.empty_like(x)
        self._residual, self._weight = torch.zeros_like(x), torch.ones_like(x[0])
        self.by_kind: dict[str, Call] = {
            "nccl": self._by_nccl,
            "one_shot": self._in_one_shot,
            "nccl, norm": self._by_nccl_with_norm,
            "one_shot, norm": self._in_one_shot_with_norm,
            "torch one_shot": lambda: torch.ops.symm_mem.one_shot_all_reduce(self._symmetric, "sum", group.group_name),
            "torch two_shot": lambda: torch.ops.symm_mem.two_shot_all_reduce_out(
                self._symmetric, "sum", group.group_name, self._total
            ),
        }

    def fill(self, x: torch.Tensor) -> None:
        """Make `x` this rank's summand, wherever the kinds look for it; none of them may be running on any rank."""
        for memory in (self._in(Place.ATTENTION, x), self._in(Place.MLP, x), self._symmetric, self._nccl):
            memory.copy_(x)

    def _in(self, place: Place, x: torch.Tensor) -> torch.Tensor:
        room = self._one_shot.room(x.shape, x.dtype, place)
        assert room is not None
        return room

    def _by_nccl(self) -> torch.Tensor:
        dist.all_reduce(self._nccl, group=self._group)
        return self._nccl

    def _by_nccl_with_norm(self) -> torch.Tensor:
        dist.all_reduce(self._nccl, group=self._group)
        return add_rms_norm(self._nccl, self._residual, self._weight, EPS)[1]

    def _in_one_shot(self) -> torch.Tensor:
        place = next(self._places)
        out = self._one_shot.sum(self._in(place, self._total), place)
        assert out is not None
        return out

    def _in_one_shot_with_norm(self) -> torch.Tensor:
        place = next(self._places)
        summand = self._in(place, self._total)
        out = self._one_shot.sum_add_rms_norm(summand, place, self._residual, self._weight, EPS)
        assert out is not None
        return out[1]


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


def measure(rows: int, width: int, one_shot: OneShotAllReduce, group: dist.ProcessGroup) -> Result:
    """Check and time every kind of sum of [rows, width]."""
    x = torch.randn(rows, width, device="cuda").to(DTYPE)
    exact = x.float()
    dist.all_reduce(exact, group=group)
    us = {}
    calls = Calls(x, one_shot, group)
    for kind, call in calls.by_kind.items():
        torch.cuda.synchronize()
        dist.barrier()  # nobody reads the memory any more
        calls.fill(x)
        torch.cuda.synchronize()
        dist.barrier()  # and all have written it
        error = (call().float() - exact).norm() / exact.norm()
        if not error <= 1e-2:
            raise RuntimeError(f"{kind} of {rows} x {width} is wrong by {error:.1e}")
        us[kind] = time_call(call)
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
    one_shot = OneShotAllReduce(group, numel=max(rows) * max(widths), dtype=DTYPE, device=device)
    results = []
    if rank == 0:
        print(f"{torch.cuda.get_device_name()} x {size}, torch {torch.__version__}, {DTYPE}; us per call")
        print(f"{'rows':>5} {'width':>6} {'KiB':>6} " + " ".join(f"{kind:>14}" for kind in KINDS), flush=True)
    for width in widths:
        for count in rows:
            result = measure(count, width, one_shot, group)
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
    """Say up to which number of rows the one-shot kernel wins, norm included. `results` are of one width, by rows."""
    won = 0
    while won < len(results) and results[won].us["one_shot, norm"] <= results[won].us["nccl, norm"]:
        won += 1
    width = results[0].width
    limit = f"MAX_PEER_BYTES allows {MAX_PEER_BYTES // (size - 1) // (width * DTYPE.itemsize)} rows"
    if not won:
        return f"width {width}: NCCL is faster from {results[0].rows} rows on; {limit}"
    last = results[won - 1]
    read = last.num_bytes * (size - 1)
    return f"width {width}: one-shot is faster up to {last.rows} rows ({read} bytes from all peers); {limit}"


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
