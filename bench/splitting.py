"""How far decode attention should split rows on this GPU: `python -m bench.splitting --json out.json`.

Every combination of `Splitting`'s five numbers is timed for every batch and context, as `bench.kernels` does it:
launches over rotated inputs in a CUDA graph, the median of its replays. Combinations that give a workload the same
launch are timed once. The last table tells, for each combination, how far it is behind the best one, workload by
workload and in the geometric mean. With LIGHTQWEN_WITHOUT=pdl no launch begins before the last one has ended. One to
two minutes for the defaults.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import product
from pathlib import Path

import torch

from bench.kernels import DTYPE, Shape, decode_attention_case, integers, time_case
from bench.provenance import json_file, provenance
from bench.shapes import share
from model.kernels.attention import SPLITTING, Splitting, plan_attention

BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXTS = (128, 300, 1024, 8192)
PROGRAMS = (264, 528)
MIN_KEYS = (64, 128)
MAX_WHOLE = (0, 256, 384, 512)
LONG_KEYS = (256, 512, 1024)
MAX_PROGRAMS = (264, 528, 1056)
NUMBERS = "programs, min, whole, long, max"


@dataclass(frozen=True, slots=True)
class Workload:
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.context}"


@dataclass(frozen=True, slots=True)
class Result:
    workload: Workload
    splitting: Splitting
    splits: int  # of each row
    us: float
    tbps: float


def launch_of(shape: Shape, workload: Workload, splitting: Splitting) -> tuple[int, int]:
    """Return how many programs a launch has for each KV head, and how many of them have work: one for each split."""
    plan = plan_attention(
        integers(list(range(workload.batch + 1))),
        integers([workload.context] * workload.batch),
        torch.zeros((workload.batch, workload.context), dtype=torch.int32, device="cuda"),
        block_size=64,
        num_tokens=workload.batch,
        num_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        dtype=DTYPE,
        max_chunk_rows=0,
        splitting=splitting,
    )
    return len(plan.splits.records), int(plan.splits.firsts[-1])


def measure(
    shape: Shape, workloads: Sequence[Workload], splittings: Sequence[Splitting], block_size: int
) -> Iterator[Result]:
    for workload in workloads:
        timed: dict[tuple[int, int], float] = {}
        for splitting in splittings:
            case = decode_attention_case(shape, workload.batch, workload.context, block_size, splitting)
            launch = launch_of(shape, workload, splitting)
            if launch not in timed:
                timed[launch] = time_case(case)
                torch.cuda.empty_cache()
            us = timed[launch]
            yield Result(workload, splitting, launch[1] // workload.batch, us, case.num_bytes / us / 1e6)


def name_of(splitting: Splitting) -> str:
    mark = "*" if splitting == SPLITTING else ""
    return "".join(f"{number:5}" for number in astuple(splitting)) + mark


def summary(results: Sequence[Result], workloads: Sequence[Workload]) -> Iterator[str]:
    """Yield a line for each combination, best first: microseconds over the best of the workload, in percent."""
    best = {w: min(result.us for result in results if result.workload == w) for w in workloads}
    behind: dict[Splitting, dict[Workload, float]] = {}
    for result in results:
        behind.setdefault(result.splitting, {})[result.workload] = result.us / best[result.workload]

    def mean(splitting: Splitting) -> float:
        return math.exp(sum(map(math.log, behind[splitting].values())) / len(workloads))

    yield f"{NUMBERS:32}{'mean':>7}" + "".join(f"{workload!s:>12}" for workload in workloads)
    for splitting in sorted(behind, key=mean):
        percents = "".join(f"{behind[splitting][workload] - 1:12.0%}" for workload in workloads)
        yield f"{name_of(splitting):32}{mean(splitting) - 1:7.1%}{percents}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(option: str, default: Sequence[int], what: str) -> None:
        parser.add_argument(
            option, nargs="+", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )

    parser.add_argument(
        "--size",
        type=share,
        default="0.6B",
        metavar="SIZE[/RANKS]",
        help="model shape, or that of one of several ranks (default: %(default)s)",
    )
    numbers("--batch", BATCHES, "rows")
    numbers("--context", CONTEXTS, "keys of each row")
    numbers("--programs", PROGRAMS, "Splitting.programs")
    numbers("--min-keys", MIN_KEYS, "Splitting.min_keys")
    numbers("--max-whole", MAX_WHOLE, "Splitting.max_whole")
    numbers("--long-keys", LONG_KEYS, "Splitting.long_keys")
    numbers("--max-programs", MAX_PROGRAMS, "Splitting.max_programs")
    parser.add_argument("--block-size", type=int, default=64, help="tokens of a KV block (default: %(default)s)")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write the results here too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.splitting: no CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        shape = Shape.of(arguments.size, Path(folder))
    workloads = [Workload(*pair) for pair in product(arguments.batch, arguments.context)]
    axes = (
        arguments.programs,
        arguments.min_keys,
        arguments.max_whole,
        arguments.long_keys,
        arguments.max_programs,
    )
    splittings = [
        Splitting(programs=programs, min_keys=min_keys, max_whole=max_whole, long_keys=long, max_programs=most)
        for programs, min_keys, max_whole, long, most in product(*axes)
        if most > programs or long == max(arguments.long_keys)  # else it makes no difference
    ]
    print(f"{'batch x context':18}{NUMBERS:34}{'splits':>7}{'us':>9}{'TB/s':>7}")
    results = []
    for result in measure(shape, workloads, splittings, arguments.block_size):
        results.append(result)
        print(
            f"{result.workload!s:18}{name_of(result.splitting):34}{result.splits:7}{result.us:9.2f}{result.tbps:7.2f}",
            flush=True,
        )
    print(*summary(results, workloads), sep="\n")
    if arguments.json:
        report = provenance("bench.splitting") | {
            "hardware": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "size": arguments.size,
            "block_size": arguments.block_size,
            "results": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
