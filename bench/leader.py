"""What the leader costs the CPU in one decode step: `python -m bench.leader [--rows 256]`.

A scheduler at its full batch, with a device that answers at once: plan, encode, retire, and the letters to one gateway,
each timed alone. Medians in microseconds; the budget for all of it at 256 rows is 100 on the H200's host.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict

import msgspec
import numpy as np

from worker.messages import Outputs, SamplingParams, Submit, ids_to_bytes
from worker.scheduler import Scheduler, SchedulerLimits


def full_scheduler(rows: int) -> Scheduler:
    """A scheduler with `rows` requests that are about to decode for long."""
    limits = SchedulerLimits(
        vocab_size=151_936,
        max_model_len=4096,
        max_running=rows,
        max_batched_tokens=max(8192, rows),
        max_mixed_tokens=max(8192, rows),
        block_size=64,
        num_blocks=rows * 64,
        watermark_blocks=16,
        prefix_caching=True,
    )
    scheduler = Scheduler(limits, hash_key=b"k" * 32, clock=time.monotonic)
    rng = np.random.default_rng(0)
    for number in range(rows):
        prompt = ids_to_bytes(rng.integers(0, 10_000, rng.integers(100, 1024)))
        scheduler.submit(
            0,
            Submit(
                request=number, epoch=1, prompt=prompt, sampling=SamplingParams(), max_tokens=3000, eos_ids=(151_645,)
            ),
        )
    return scheduler


def measure(rows: int, steps: int) -> dict[str, float]:
    """Median microseconds of each part of a turn."""
    scheduler = full_scheduler(rows)
    encode = msgspec.msgpack.Encoder().encode
    times: dict[str, list[float]] = defaultdict(list)
    tokens = np.full(rows, 7, np.int32)
    clock = time.perf_counter
    for _ in range(steps):
        began = clock()
        planned = scheduler.plan()
        if planned is None:
            break
        after_plan = clock()
        planned.plan.encode()
        after_encode = clock()
        retired = scheduler.retire(planned, tokens[: planned.plan.num_rows])
        after_retire = clock()
        notices = scheduler.take_notices()
        encode(
            Outputs(
                requests=retired.numbers.tobytes(),
                tokens=retired.tokens.tobytes(),
                started=[started for _, started in notices.started],
                finished=[finished for _, finished in notices.finished],
                stats=scheduler.stats(),
            )
        )
        done = clock()
        if planned.plan.is_decode and planned.plan.num_rows == rows:
            times["plan"].append(after_plan - began)
            times["encode the plan"].append(after_encode - after_plan)
            times["retire"].append(after_retire - after_encode)
            times["letters"].append(done - after_retire)
            times["all"].append(done - began)
    return {name: float(np.median(values)) * 1e6 for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.leader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256], help="requests that decode together")
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    for rows in arguments.rows:
        print(f"{rows:4d} rows  " + "  ".join(f"{k} {v:.1f} us" for k, v in measure(rows, arguments.steps).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
