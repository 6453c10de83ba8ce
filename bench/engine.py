"""Benchmark of the engine without the gateway: `python -m bench.engine --size 0.6B --json out.json`.

Starts the ranks as the server does and speaks to the leader through the same client as the gateway, so that what is
left out is gRPC, tokenizing and detokenizing. Definitions are those of the figures that it is compared with:

- mixed256: output tokens per second of the 256-request workload, all submitted at once;
- tpot_bN: N prompts of 128 tokens, (time for 289 outputs - time for 33 outputs) / 256;
- ttft_1k: one prompt of 1,024 tokens, one output;
- prefill_16x4k: prompt tokens per second of 16 prompts of 4,096 tokens, one output each;
- tpot_b8_ctx8k: as tpot, 8 prompts of 8,192 tokens.

Temperature 0.6, end-of-sequence ignored, prefix cache off, random weights unless --model names a checkpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from bench.provenance import json_file, provenance
from bench.workloads import Job, mixed_256, uniform
from model.published import SIZES, write_config
from worker.client import EngineClient, EngineRequest
from worker.config import ConfigError, EngineConfig, add_set_option, engine_config
from worker.control import ChildEnd, Drain, Progress, Stop, Up
from worker.endpoint import EngineEndpoint
from worker.messages import EngineInfo, SamplingParams
from worker.supervisor import Facts, serve

BATCHES = (1, 8, 64, 256)
REPEATS = 3
INTERRUPTED = 128 + 2  # what a shell reports after Ctrl-C


async def run_jobs(client: EngineClient, jobs: list[Job]) -> float:
    """Seconds from the first submit to the last token."""
    vocab_size = (await client.wait_ready()).vocab_size  # a small checkpoint knows fewer ids than the workload uses

    async def one(number: int, job: Job) -> None:
        request = EngineRequest(
            prompt_ids=[token % vocab_size for token in job.prompt_ids],
            sampling=SamplingParams(temperature=0.6, seed=number),
            max_tokens=job.max_tokens,
            use_prefix_cache=False,
        )
        stream = client.submit(request)
        received = 0
        while True:
            batch = await stream.next()
            received += len(batch.tokens)
            if batch.finished is not None:
                break
        if received != job.max_tokens:
            raise RuntimeError(f"job {number}: {received} tokens instead of {job.max_tokens}; {batch.finished.detail}")

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, job in enumerate(jobs):
            group.create_task(one(number, job))
    return time.perf_counter() - began


async def measure_tpot(client: EngineClient, batch: int, prompt_tokens: int) -> float:
    """Milliseconds per output token with `batch` running."""
    short = await run_jobs(client, uniform(batch, prompt_tokens, 33))
    long = await run_jobs(client, uniform(batch, prompt_tokens, 289))
    return (long - short) / 256 * 1e3


async def measure_all(client: EngineClient, wanted: list[str], report: Callable[[str, list[float]], None]) -> None:
    await run_jobs(client, uniform(4, 256, 64, seed=9))  # warm-up
    jobs = mixed_256()
    outputs = sum(job.max_tokens for job in jobs)

    async def measure(name: str) -> float:
        if name == "mixed256_tok_s":
            return outputs / await run_jobs(client, jobs)
        if name == "ttft_1k_ms":
            return await run_jobs(client, uniform(1, 1024, 1)) * 1e3
        if name == "prefill_16x4k_tok_s":
            return 16 * 4096 / await run_jobs(client, uniform(16, 4096, 1))
        if name == "tpot_b8_ctx8k_ms":
            return await measure_tpot(client, 8, 8192)
        return await measure_tpot(client, int(name.removeprefix("tpot_b").removesuffix("_ms")), 128)

    for name in wanted:
        report(name, [await measure(name) for _ in range(REPEATS)])


NAMES = (
    "mixed256_tok_s",
    *(f"tpot_b{batch}_ms" for batch in BATCHES),
    "ttft_1k_ms",
    "tpot_b8_ctx8k_ms",
    "prefill_16x4k_tok_s",
)


def drive(wanted: list[str], result_file: str, endpoint: EngineEndpoint, connection: Connection) -> None:
    """What runs in the gateway's place."""
    control = ChildEnd(connection)
    results: dict[str, object] = {}

    def report(name: str, values: list[float]) -> None:
        results[name] = {"median": statistics.median(values), "values": values}
        print(f"{name:22s} median {statistics.median(values):12.3f}   of {[round(v, 3) for v in values]}", flush=True)
        Path(result_file).write_text(json.dumps(results), encoding="utf-8")

    async def main() -> None:
        client = EngineClient(endpoint)
        client.open()
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        measuring: asyncio.Task[None] | None = None

        def on_control() -> None:
            if not isinstance(control.receive(), Drain | Stop):
                os._exit(3)  # the engine is lost: no figure is worth reporting
            ended.set()
            if measuring is not None:
                measuring.cancel()  # does nothing where all is measured

        loop.add_reader(control.fileno(), on_control)
        info: EngineInfo = await client.wait_ready()
        results["engine"] = {name: getattr(info, name) for name in info.__struct_fields__ if name != "model_path"}
        control.send(Up({"model": info.model_path, "blocks": info.num_blocks}))
        measuring = loop.create_task(measure_all(client, wanted, report))
        if ended.is_set():  # already
            measuring.cancel()
        await asyncio.wait({measuring})
        if not measuring.cancelled():
            measuring.result()
            os.kill(os.getppid(), signal.SIGTERM)  # done: the supervisor ends everything
        await ended.wait()
        client.close()

    asyncio.run(main())


class Phases:
    """What a start's time goes to, by what the first rank says it does; before it says anything, it starts."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._what = "starting"
        self.seconds: dict[str, float] = {}

    def note(self, process: str, progress: Progress) -> None:
        now = time.monotonic()
        self.seconds[self._what] = self.seconds.get(self._what, 0.0) + now - self._since
        self._since, self._what = now, progress.what

    def end(self) -> None:
        """Close the last phase."""
        self.note("", Progress(""))


def origin(config: EngineConfig) -> dict[str, object]:
    """Where and from what the figures come."""
    import torch

    return provenance("bench.engine") | {
        **({"hardware": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "torch": torch.__version__,
        "config": config.model_dump(mode="json", exclude_defaults=True, exclude={"model"}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="0.6B", help="shape of a published Qwen3, with random weights")
    parser.add_argument("--model", help="folder of a checkpoint to use instead")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="which figures")
    parser.add_argument(
        "--first-start", action="store_true", help="with an empty cache of kernels, as on a new machine"
    )
    parser.add_argument("--json", type=json_file, help="write the figures here")
    add_set_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.first_start:
            os.environ["TRITON_CACHE_DIR"] = str(Path(scratch) / "kernels")
        folder = arguments.model or str(write_config(arguments.size, Path(scratch) / "model"))
        options = {"model": folder, "load_format": "auto" if arguments.model else "random"}
        try:
            config = engine_config(options | dict(arguments.set))
        except ConfigError as error:
            parser.error(str(error))
        result_file = Path(scratch) / "results.json"
        ready: list[float] = []
        phases = Phases()

        def on_ready(facts: Facts, seconds: float) -> None:
            phases.end()
            ready.append(seconds)

        try:
            code = serve(
                config,
                [functools.partial(drive, arguments.only, str(result_file))],
                drain_timeout_s=5.0,
                on_progress=phases.note,
                on_ready=on_ready,
            )
        except ConfigError as error:
            print(f"bench.engine: {error}", file=sys.stderr)
            return 1
        results = json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else {}
        size = None if arguments.model else arguments.size
        results |= {"size": size, "ready_s": ready[0] if ready else None, "phases_s": phases.seconds}
        results |= origin(config)
    if ready:
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.seconds.items())
        print(f"ready after {ready[0]:.1f} s: {spent}")
    else:
        print("never ready")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    missing = [name for name in arguments.only if name not in results]
    if missing and code == 0:
        print(f"bench.engine: interrupted before {' '.join(missing)}", file=sys.stderr)
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
