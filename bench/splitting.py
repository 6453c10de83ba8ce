"""How far decode attention should split rows on this GPU: `python -m bench.splitting --json out.json`.

Every combination of `Splitting`'s numbers is timed for every batch and context, as `bench.kernels` does it: launches
over rotated inputs in a CUDA graph, the median of its replays. Combinations that give a workload the same launch are
timed once. The last table tells, for each combination, how far it is behind the best one, workload by workload and in
the geometric mean.

Launches of attention that follow one another are not quite what a step has: with few units the next one begins where
multiprocessors have nothing to do, so that short contexts look better with fewer and longer splits than they are. What
is close here is to be measured in steps (`bench.profile`). With LIGHTQWEN_WITHOUT=pdl no launch begins before the last
one has ended.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

from bench.kernels import DTYPE, Shape, decode_attention_case, integers, time_case
from bench.provenance import json_file, provenance
from model.kernels.attention import SPLITTING, Splitting, plan_attention
from model.published import share

BATCHES = (1, 4, 7, 8, 12, 24, 64, 128)
CONTEXTS = (300, 500, 1100, 2000, 8353)
MIN_KEYS = (64, 128, 192, 256)
TURN_KEYS = (100.0, 140.0, 200.0)
MERGE_KEYS = (30.0, 56.0, 90.0)
UNEVEN = (0.2, 0.3, 0.5)
NUMBERS = "min, turn, merge, uneven"


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
    numbers = (splitting.min_keys, splitting.turn_keys, splitting.merge_keys, splitting.uneven)
    return "".join(f"{number:6g}" for number in numbers) + mark


def summary(results: Sequence[Result], workloads: Sequence[Workload]) -> Iterator[str]:
    """Yield a line for each combination, best first: microseconds over the best of the workload, in percent."""
    best = {w: min(result.us for result in results if result.workload == w) for w in workloads}
    behind: dict[Splitting, dict[Workload, float]] = {}
    for result in results:
        behind.setdefault(result.splitting, {})[result.workload] = result.us / best[result.workload]

    def mean(splitting: Splitting) -> float:
        return math.exp(sum(map(math.log, behind[splitting].values())) / len(workloads))

    yield f"{NUMBERS:26}{'mean':>7}" + "".join(f"{workload!s:>12}" for workload in workloads)
    for splitting in sorted(behind, key=mean):
        percents = "".join(f"{behind[splitting][workload] - 1:12.0%}" for workload in workloads)
        yield f"{name_of(splitting):26}{mean(splitting) - 1:7.1%}{percents}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(option: str, default: Sequence[float], what: str) -> None:
        kind, about = type(default[0]), f"{what} (default: %(default)s)"
        parser.add_argument(option, nargs="+", type=kind, default=default, metavar="N", help=about)

    parser.add_argument(
        "--size",
        type=share,
        default="0.6B",
        metavar="SIZE[/RANKS]",
        help="model shape, or that of one of several ranks (default: %(default)s)",
    )
    numbers("--batch", BATCHES, "rows")
    numbers("--context", CONTEXTS, "keys of each row")
    numbers("--min-keys", MIN_KEYS, "Splitting.min_keys")
    numbers("--turn-keys", TURN_KEYS, "Splitting.turn_keys")
    numbers("--merge-keys", MERGE_KEYS, "Splitting.merge_keys")
    numbers("--uneven", UNEVEN, "Splitting.uneven")
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
    axes = (arguments.min_keys, arguments.turn_keys, arguments.merge_keys, arguments.uneven)
    splittings = [
        Splitting(min_keys=min_keys, turn_keys=turn, merge_keys=merge, uneven=uneven)
        for min_keys, turn, merge, uneven in product(*axes)
    ]
    print(f"{'batch x context':18}{NUMBERS:28}{'splits':>7}{'us':>9}{'TB/s':>7}")
    results = []
    for result in measure(shape, workloads, splittings, arguments.block_size):
        results.append(result)
        print(
            f"{result.workload!s:18}{name_of(result.splitting):28}{result.splits:7}{result.us:9.2f}{result.tbps:7.2f}",
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
