"""Where a step's time goes: `python -m bench.profile --size 0.6B --batches 1 8 64 256`.

A process holds scheduler and runner, without a gateway, and turns the loop as the leader does. Every figure is per
step: the wall time, the leader's CPU time for planning, launching and retiring, and, from a second pass under PyTorch's
profiler, how long the device is busy with each group of kernels, and how long it idles between which of them.
`--prefill` takes whole prompts of so many tokens instead, one step each, and `--mixed` so many requests that decode
while others' prompts fill the steps. Dependent launches begin while others run and
count from then on: groups then add up to more than the device is busy (LIGHTQWEN_WITHOUT=pdl keeps launches apart).

With `--tensor-parallel-size N` that process is the leader of N ranks, each on a GPU of its own, which join and follow
its plans as a server's do. Every figure is the leader's: sending a plan counts as launching, and waiting for another
rank within a collective as the collective.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.provenance import json_file, provenance, without
from model.config import Qwen3Config
from model.errors import ModelError
from model.published import SIZES, write_config
from worker.channel import PlanReceiver, PlanSender
from worker.children import RankSpec
from worker.config import ConfigError, EngineConfig, add_set_option, engine_config
from worker.endpoint import private_endpoint
from worker.follower import Follower
from worker.messages import EngineStats, SamplingParams, Submit, ids_to_bytes
from worker.rank import join
from worker.runner import Runner, build_runner
from worker.runtime import RuntimeConfig, resolve
from worker.scheduler import PlannedStep, Scheduler, SchedulerLimits

GROUPS = (
    ("attention", r"decode_kernel|prefill_kernel|_plan_kernel|flash"),
    ("rope + kv write", r"_qk_norm_rope"),
    ("embedding", r"_embed_"),
    ("norm", r"_rms_norm"),
    ("activation", r"_silu"),
    ("sampling", r"_score_kernel|_choose_kernel"),
    ("tables", r"_fetch_kernel|_prepare_kernel|_retire_kernel|_admit_kernel|_enter_blocks_kernel"),
    ("linear", r"gemm|gemv|nvjet|cutlass|splitK|_fma_kernel|ring_kernel|cluster_linear|gated_linear"),
    ("collectives", r"nccl|all_reduce|_one_shot_kernel|_two_shots_kernel|_peer_logits_kernel"),
    ("copies", r"Memcpy|Memset"),
)
"""Kernel groups by what their names hold, the first that fits; others are 'torch'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One workload, in microseconds per step."""

    workload: str
    steps: int
    wall: float
    plan: float
    launch: float
    retire: float
    busy: float
    groups: dict[str, float]
    kernels: dict[str, tuple[float, float]]  # name: launches and microseconds per step
    gaps: dict[str, float]  # between which kernels the device idles: microseconds per step

    def lines(self) -> Iterator[str]:
        host = self.plan + self.launch + self.retire
        idle = max(0.0, 1 - self.busy / self.wall)
        yield (
            f"{self.workload}: wall {self.wall:.0f} us a step; device busy {self.busy:.0f}, idle {100 * idle:.0f} %; "
            f"leader's CPU {host:.0f} (plan {self.plan:.0f}, launch {self.launch:.0f}, retire {self.retire:.0f})"
        )
        for name, us in sorted(self.groups.items(), key=lambda item: -item[1]):
            yield f"    {name:18s} {us:9.1f} us {100 * us / self.busy:5.1f} %"
        for name, (count, us) in sorted(self.kernels.items(), key=lambda item: -item[1][1])[:12]:
            yield f"        {us:9.1f} us  {count:6.1f} x {us / count:8.2f}  {name[:90]}"
        for where, us in sorted(self.gaps.items(), key=lambda item: -item[1])[:4]:
            yield f"    idle {us:6.1f} us  {where}"


class Engine:
    """Scheduler and runner in this process; `plans` leads to the followers, where there are any."""

    def __init__(
        self, runner: Runner, limits: SchedulerLimits, *, run_ahead: int, plans: PlanSender | None = None
    ) -> None:
        self.limits = limits
        self._runner = runner
        self._run_ahead = run_ahead
        self._plans = plans
        self._scheduler = self._fresh()
        self._in_flight: list[PlannedStep] = []
        self._numbers = itertools.count()  # of requests
        self.sampling = SamplingParams(temperature=0.6)  # of each request, with a seed of its own
        self.only_decodes = False  # in the step that was planned last
        self.times: dict[str, list[float]] = defaultdict(list)

    def _fresh(self) -> Scheduler:
        return Scheduler(self.limits, hash_key=b"k" * 32, clock=time.monotonic)

    def submit(self, count: int, prompt_tokens: int, max_tokens: int) -> None:
        rng = np.random.default_rng(0)
        for number in itertools.islice(self._numbers, count):
            self._scheduler.submit(
                0,
                Submit(
                    request=number,
                    epoch=1,
                    prompt=ids_to_bytes(rng.integers(0, min(10_000, self.limits.vocab_size), prompt_tokens)),
                    sampling=msgspec.structs.replace(self.sampling, seed=number),
                    max_tokens=max_tokens,
                ),
            )

    def turn(self) -> bool:
        """One turn of the leader's loop; returns whether anything happened."""
        clock = time.thread_time
        began = clock()
        planned = self._scheduler.plan()
        after_plan = clock()
        if planned is not None:
            if self._plans is not None:
                self._plans.send(planned.plan.encode())
            self._runner.launch(planned.plan)
            self._in_flight.append(planned)
            self.only_decodes = planned.plan.is_decode
        after_launch = clock()
        self.times["plan"].append(after_plan - began)
        self.times["launch"].append(after_launch - after_plan)
        if self._in_flight and (planned is None or len(self._in_flight) >= self._run_ahead):
            tokens = self._runner.collect()
            after_collect = clock()
            self._scheduler.retire(self._in_flight.pop(0), tokens)
            self._scheduler.take_notices()
            self.times["retire"].append(clock() - after_collect)
        return planned is not None or bool(self._in_flight)

    def reset(self) -> None:
        """Let everything end that runs, and begin with an empty scheduler."""
        while self._in_flight:
            self._runner.collect()
            self._in_flight.pop(0)
        self._scheduler = self._fresh()
        self.only_decodes = False

    @property
    def stats(self) -> EngineStats:
        return self._scheduler.stats()


def _limits(config: EngineConfig, shape: Qwen3Config, runtime: RuntimeConfig, num_blocks: int) -> SchedulerLimits:
    return SchedulerLimits(
        vocab_size=shape.vocab_size,
        max_model_len=min(runtime.max_model_len, num_blocks * runtime.block_size),
        max_running=runtime.max_running,
        max_batched_tokens=runtime.max_batched_tokens,
        max_mixed_tokens=runtime.max_mixed_tokens,
        block_size=runtime.block_size,
        num_blocks=num_blocks,
        watermark_blocks=int(config.admission_watermark * num_blocks),
        prefix_caching=False,
    )


def run_ranks(config: EngineConfig, work: Callable[[Engine], None]) -> None:
    """Start a process for each rank, let the leader do `work`, and end them all.

    Args:
        work: is sent to the leader's process, so it must be a function of a module, or a `partial` of one.

    Raises:
        torch.multiprocessing.ProcessExitedException: a rank failed or was killed. If it could, it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        plans, meeting = private_endpoint("plans"), f"file://{folder}/rendezvous"
        specs = [
            RankSpec(rank=rank, epoch=1, config=config, gateways=None, plans=plans, rendezvous=meeting)
            for rank in range(config.tensor_parallel_size)
        ]
        ranks = torch.multiprocessing.spawn(  # type: ignore[attr-defined]
            run_rank, args=(specs, work), nprocs=len(specs), join=False, daemon=True
        )
        try:
            ranks.join()  # until one ends: the leader, or one that failed
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()


def run_rank(rank: int, specs: list[RankSpec], work: Callable[[Engine], None]) -> None:
    """Be one rank: the leader until `work` is done, a follower until it is ended, both until something fails."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it even while it waits within a collective
    code = 0
    try:
        _lead_or_follow(specs[rank], work)
    except ConfigError as error:
        print(f"bench.profile: {error}", file=sys.stderr, flush=True)
        code = 1
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    # At once: what graphs hold of NCCL's goes with the process, and no failure that follows from this one overtakes it.
    os._exit(code)


def _lead_or_follow(spec: RankSpec, work: Callable[[Engine], None]) -> None:
    shape = Qwen3Config.from_folder(spec.config.model)
    runtime = resolve(spec.config, shape, spec.rank)
    tp, plans = join(spec, runtime)
    runner = build_runner(spec.config, shape, runtime, tp, lambda *_: None)
    if isinstance(plans, PlanReceiver):
        follower = Follower(runner, plans, run_ahead=runtime.run_ahead, heartbeat=lambda _: None)
        while True:
            follower.step()
    if plans is not None:
        plans.gather()
    limits = _limits(spec.config, shape, runtime, runner.num_blocks)
    work(Engine(runner, limits, run_ahead=runtime.run_ahead, plans=plans))


def decode(engine: Engine, batch: int, context: int, steps: int) -> Profile:
    """`batch` requests whose prompts have `context` tokens, and their output some more.

    Raises:
        ConfigError: see `start_decodes`.
    """
    outputs = 0.0

    def start() -> None:
        nonlocal outputs
        outputs = start_decodes(engine, batch, context, steps)

    def run() -> int:
        for _ in range(steps):
            engine.turn()
        return steps

    measured = _measure(engine, f"decode batch {batch} context {context}", start, run)
    return replace(measured, workload=f"{measured.workload} + {outputs + steps / 2:.0f}")


def start_decodes(engine: Engine, batch: int, context: int, steps: int) -> float:
    """Let `batch` requests of `context` tokens begin, and return when steps have been of decodes alone for a while.

    They go on for `steps` at least. Returns how many tokens of output they have, on average.

    Raises:
        ConfigError: they cannot all decode at a time.
    """
    # As long as some are prefilled, the others decode beside them, of which none may end.
    room = max(1, engine.limits.max_mixed_tokens - batch)
    engine.reset()
    engine.submit(batch, context, 1 + batch * context // room + 4 * steps)
    while not engine.only_decodes and engine.turn():
        pass
    for _ in range(steps // 2):
        engine.turn()
    stats = engine.stats
    if stats.running != batch or not engine.only_decodes:
        raise ConfigError(
            f"{stats.running} requests of {context} tokens decode at a time here, not {batch}: "
            "max_running, max_model_len and the KV cache bound them"
        )
    return stats.generated_tokens / batch


def mixed(engine: Engine, batch: int, context: int, prompt: int, steps: int) -> Profile:
    """`batch` requests decode in steps that prompts of `prompt` tokens fill up.

    Raises:
        ConfigError: see `start_decodes`.
    """

    def run() -> int:
        for _ in range(steps):
            engine.turn()
        return steps

    start = functools.partial(start_mixed, engine, batch, context, prompt, steps)
    most = engine.limits.max_mixed_tokens
    workload = f"{batch} decode at context {context}, prompts of {prompt}, {most} tokens a step"
    return _measure(engine, workload, start, run)


def start_mixed(engine: Engine, batch: int, context: int, prompt: int, steps: int) -> None:
    """Let `batch` requests of `context` tokens decode while prompts of `prompt` tokens, of which nothing is wanted but
    a first token, are computed beside them for `steps` at least.

    Raises:
        ConfigError: see `start_decodes`; or no prompt begins beside them.
    """
    start_decodes(engine, batch, context, steps)
    engine.submit(1 + (steps + 4) * engine.limits.max_mixed_tokens // prompt, prompt, 1)
    for _ in range(2):
        engine.turn()
    if engine.only_decodes:
        raise ConfigError(
            f"no prompt of {prompt} tokens begins beside {batch} requests that decode: "
            "max_running, max_model_len and the KV cache bound them"
        )


def prefill(engine: Engine, tokens: int, steps: int) -> Profile:
    """Prompts of `tokens`, one after the other."""

    def run() -> int:
        for _ in range(steps):
            engine.submit(1, tokens, 1)
            while engine.turn():
                pass
        return steps

    run()
    return _measure(engine, f"prefill of {tokens} tokens", engine.reset, run)


def _measure(engine: Engine, workload: str, start: Callable[[], None], run: Callable[[], int]) -> Profile:
    """Run twice from a fresh start, the second time under the profiler; `run` returns how many steps it made."""
    start()
    torch.cuda.synchronize()
    engine.times.clear()
    began = time.perf_counter()
    steps = run()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - began) / steps * 1e6
    # Of all turns, since a step may take several: one that launches it, one that waits for it.
    host = {name: sum(values) / steps * 1e6 for name, values in engine.times.items()}
    start()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(list)
    spans = []
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:  # type: ignore[attr-defined]
            kernels[event.name].append(event.time_range.elapsed_us())
            spans.append(Span(event.time_range.start, event.time_range.end, event.name))
    busy, gaps = _busy_and_idle(spans)
    groups: dict[str, float] = defaultdict(float)
    for name, durations in kernels.items():
        groups[group_of(name)] += sum(durations) / steps
    return Profile(
        workload=workload,
        steps=steps,
        wall=wall,
        plan=host.get("plan", 0.0),
        launch=host.get("launch", 0.0),
        retire=host.get("retire", 0.0),
        busy=busy / steps,
        groups=dict(groups),
        kernels={name: (len(durations) / steps, sum(durations) / steps) for name, durations in kernels.items()},
        gaps={where: us / steps for where, us in gaps.items()},
    )


def group_of(kernel: str) -> str:
    """The group of a kernel of this name."""
    return next((group for group, pattern in GROUPS if re.search(pattern, kernel)), "torch")


class Span(NamedTuple):
    """When a kernel ran, in microseconds."""

    begin: float
    end: float
    kernel: str


def _busy_and_idle(spans: list[Span]) -> tuple[float, dict[str, float]]:
    """How long at least one kernel ran, and how long none did, by the kernels before and after; microseconds."""
    busy, last = 0.0, Span(float("-inf"), float("-inf"), "")
    gaps: dict[str, float] = defaultdict(float)
    for span in sorted(spans):
        if last.kernel and span.begin > last.end:
            gaps[f"{last.kernel[:40]} -> {span.kernel[:40]}"] += span.begin - last.end
        busy += max(0.0, span.end - max(span.begin, last.end))
        last = max(last, span, key=lambda one: one.end)
    return busy, gaps


def report(arguments: argparse.Namespace, tensor_parallel_size: int, engine: Engine) -> None:
    """Measure what was asked for; print it, and write it where it was asked to be."""
    engine.sampling = arguments.sampling
    profiles = [decode(engine, batch, arguments.context, arguments.steps) for batch in arguments.batches]
    profiles += [prefill(engine, tokens, 8) for tokens in arguments.prefill]
    profiles += [mixed(engine, batch, arguments.context, arguments.mixed_prompt, 16) for batch in arguments.mixed]
    device = torch.cuda.get_device_name()
    print(f"{arguments.size} on {device} x {tensor_parallel_size}, without: {without() or 'nothing'}")
    for one in profiles:
        print("\n".join(one.lines()))
    if arguments.json is not None:
        made = {"hardware": device, "torch": torch.__version__, "tensor_parallel_size": tensor_parallel_size}
        whole = provenance("bench.profile") | made | {"profiles": [asdict(one) for one in profiles]}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def check(config: EngineConfig) -> None:
    """See that there are GPUs enough for this, which the shape can be divided among.

    Raises:
        ConfigError, ModelError: what is wrong, in one line.
    """
    shape = Qwen3Config.from_folder(config.model)
    shape.check_parallel(config.tensor_parallel_size)
    if not resolve(config, shape, 0).on_gpu:
        raise ConfigError("needs a CUDA GPU: there is no device to profile here")


def sampling_params(text: str) -> SamplingParams:
    """Read `--sampling NAME=VALUE,...`, for argparse: all but the seed, of which each request has its own."""
    given = dict(option.partition("=")[::2] for option in text.split(","))
    known = [name for name in SamplingParams.__struct_fields__ if name != "seed"]
    if unknown := given.keys() - set(known):
        message = f"no {', '.join(sorted(unknown))} in sampling; there are {', '.join(known)}"
        raise argparse.ArgumentTypeError(message)
    try:
        return msgspec.convert(given, SamplingParams, strict=False)
    except msgspec.ValidationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="0.6B", help="shape of a published Qwen3, with random weights")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks, each on a GPU of its own (default: 1)"
    )
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64, 256], help="decode with so many requests")
    parser.add_argument(
        "--context",
        type=int,
        default=300,
        help="tokens of each prompt, to which output adds what a figure's name tells (default: 300)",
    )
    parser.add_argument("--prefill", type=int, nargs="*", default=[], help="prefill prompts of so many tokens")
    parser.add_argument(
        "--mixed",
        type=int,
        nargs="*",
        default=[],
        help="decode with so many requests beside prompts that fill the step",
    )
    parser.add_argument(
        "--mixed-prompt", type=int, default=560, metavar="TOKENS", help="of each such prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--sampling",
        type=sampling_params,
        default="temperature=0.6",
        metavar="NAME=VALUE,...",
        help="of all requests (default: %(default)s; Qwen3's own: temperature=0.6,top_k=20,top_p=0.95)",
    )
    parser.add_argument("--steps", type=int, default=64, help="steps of each pass (default: 64)")
    parser.add_argument("--json", type=json_file, help="write the figures here")
    add_set_option(parser)
    arguments = parser.parse_args()
    numbers = (*arguments.batches, *arguments.prefill, *arguments.mixed)
    if min(*numbers, arguments.mixed_prompt, arguments.context, arguments.steps) < 1:
        parser.error("--batches, --context, --prefill, --mixed, --mixed-prompt and --steps are 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        options: dict[str, object] = {
            "model": str(write_config(arguments.size, Path(scratch))),
            "load_format": "random",
            "tensor_parallel_size": arguments.tensor_parallel_size,
        }
        try:
            config = engine_config(options | dict(arguments.set))
            check(config)
        except (ConfigError, ModelError) as error:
            parser.error(str(error))
        try:
            run_ranks(config, functools.partial(report, arguments, config.tensor_parallel_size))
        except torch.multiprocessing.ProcessExitedException as error:  # type: ignore[attr-defined]
            print(f"bench.profile: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
