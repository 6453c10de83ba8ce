"""How long prompts wait for one another: `python -m bench.turns`, without a GPU.

The server's scheduler, with a clock of its own, and in the place of a device a model of how long a step takes on an
H200. Each workload runs twice: with prompts in the order in which they came, and by turns (`worker/scheduler.py`),
where short ones pass long ones within bounds. What comes out is reckoned, not measured: milliseconds from a request's
arrival until its first token, of all, of those of up to 1,000 prompt tokens and of longer ones.

- mixed256: the 256-request workload, which comes within 80 ms;
- some_long: at --rates requests a second (Poisson), prompts of 100 to 500 tokens, one in ten of 4,000 to 8,000; 32 out;
- few_very_long: likewise, but one in a hundred of 20,000 to 36,000; 64 out.

The model: a step computes a token in --us-per-token (8B: 19.1), but takes as long as it reads the weights at least
(--weights-ms, 8B: 3.4, and 12 us a row in steps of up to 256 tokens), and reads keys and values of --kv-bytes a token
(8B: 147,456) at 4.4 TB/s; 0.3 ms of other things, and 1.5 in larger steps. For the mixed workload it gives 10.8k output
tokens a second, where 8B makes 10.7k.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.provenance import json_file, provenance
from bench.workloads import Job, mixed_256
from worker.messages import SamplingParams, Submit, ids_to_bytes
from worker.scheduler import YIELD_S_PER_TOKEN, PlannedStep, Scheduler, SchedulerLimits

LIMITS = SchedulerLimits(
    vocab_size=151_936,
    max_model_len=40_960,
    max_running=256,
    max_batched_tokens=8448,
    max_mixed_tokens=2048,
    block_size=64,
    num_blocks=12_000,
    watermark_blocks=120,
    prefix_caching=False,
)
ORDERS = {"as they came": 0.0, "by turns": YIELD_S_PER_TOKEN}
BURST_S = 0.08
REQUESTS = 1500
SHORT_TOKENS = 1000
FEW_ROWS, ROW_S = 256, 12e-6
OTHER_S, OTHER_LARGE_S = 0.3e-3, 1.5e-3
BYTES_PER_S = 4.4e12

Arrivals = Sequence[tuple[float, Job]]
"""Seconds, and what comes then."""


@dataclass(frozen=True, slots=True)
class Device:
    """How long steps take."""

    s_per_token: float
    weights_s: float
    kv_bytes: float  # of a token

    def seconds(self, planned: PlannedStep) -> float:
        tokens = planned.plan.num_tokens
        reading = float(planned.computed_after.sum()) * self.kv_bytes / BYTES_PER_S
        if tokens <= FEW_ROWS:
            return self.weights_s + tokens * ROW_S + reading + OTHER_S
        return max(self.weights_s, tokens * self.s_per_token) + reading + OTHER_LARGE_S


@dataclass(frozen=True, slots=True)
class Outcome:
    tokens_per_s: float
    short: list[float]  # seconds until the first token, sorted
    long: list[float]

    def report(self) -> dict[str, float]:
        every = sorted(self.short + self.long)
        figures = {"tok_s": self.tokens_per_s, "mean_ms": statistics.mean(every) * 1e3}
        for name, waits in (("", every), ("short_", self.short), ("long_", self.long)):
            if waits:
                at = {share: waits[min(len(waits) - 1, len(waits) * share // 100)] for share in (50, 90, 99)}
                figures |= {f"{name}p{share}_ms": seconds * 1e3 for share, seconds in at.items()}
        return {name: float(f"{value:.4g}") for name, value in figures.items()}


def burst() -> Arrivals:
    jobs = mixed_256()
    return [(number * BURST_S / len(jobs), job) for number, job in enumerate(jobs)]


def poisson(rate: float, *, one_in: int, long: tuple[int, int], output: int) -> Arrivals:
    """So many requests a second, one in so many of which has a prompt of a length between these."""
    rng = random.Random(0)
    arrivals, now = [], 0.0
    for _ in range(REQUESTS):
        tokens = rng.randint(*long) if rng.random() * one_in < 1 else rng.randint(100, 500)
        now += rng.expovariate(rate)
        arrivals.append((now, Job([1] * tokens, output)))
    return arrivals


def reckon(arrivals: Arrivals, device: Device, yield_s_per_token: float) -> Outcome:
    """Run a workload to its end."""
    now = 0.0
    scheduler = Scheduler(LIMITS, hash_key=b"k" * 32, clock=lambda: now, yield_s_per_token=yield_s_per_token)
    coming: Iterator[tuple[int, tuple[float, Job]]] = iter(enumerate(arrivals))
    following = next(coming, None)
    first: dict[int, float] = {}
    tokens = 0
    while following is not None or scheduler.has_work:
        while following is not None and following[1][0] <= now:
            number, (_, job) = following
            prompt = ids_to_bytes(job.prompt_ids)
            scheduler.submit(
                0, Submit(request=number, epoch=1, prompt=prompt, sampling=SamplingParams(), max_tokens=job.max_tokens)
            )
            following = next(coming, None)
        planned = scheduler.plan()
        if planned is None:
            if following is None:
                break
            now = following[1][0]
            continue
        now += device.seconds(planned)
        retired = scheduler.retire(planned, np.full(planned.plan.num_rows, 7, np.int32))
        tokens += len(retired.tokens)
        for number in retired.numbers.tolist():
            first.setdefault(number, now - arrivals[number][0])
    waits: tuple[list[float], list[float]] = ([], [])
    for number, seconds in first.items():
        waits[len(arrivals[number][1].prompt_ids) > SHORT_TOKENS].append(seconds)
    return Outcome(tokens / now, *map(sorted, waits))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.turns", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[20, 30, 40], help="requests a second (%(default)s)")
    parser.add_argument("--us-per-token", type=float, default=19.1)
    parser.add_argument("--weights-ms", type=float, default=3.4)
    parser.add_argument("--kv-bytes", type=float, default=147_456)
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write the figures here, too")
    arguments = parser.parse_args()
    device = Device(arguments.us_per_token * 1e-6, arguments.weights_ms * 1e-3, arguments.kv_bytes)
    workloads = {"mixed256": burst()}
    for rate in arguments.rates:
        workloads[f"some_long, {rate:g}/s"] = poisson(rate, one_in=10, long=(4000, 8000), output=32)
    for rate in arguments.rates:
        workloads[f"few_very_long, {rate:g}/s"] = poisson(rate, one_in=100, long=(20_000, 36_000), output=64)
    report = provenance("bench.turns")
    for name, arrivals in workloads.items():
        report[name] = {}
        for order, yields in ORDERS.items():
            figures = report[name][order] = reckon(arrivals, device, yields).report()
            print(f"{name:22s} {order:13s}", *(f"{what} {value:,.5g}" for what, value in figures.items()), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
