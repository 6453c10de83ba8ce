"""What the server carries around a model that costs nothing: `python -m bench.null --json out.json`.

A real leader, in a process of its own, whose runner answers at once: every step, each running request gets a token.
Two ways from there, each with 1, 64 and 256 requests at a time:

- engine: scheduler, plan, socket, engine client, streams; no gRPC;
- gateway: the same, then the gateway's process (detokenizing, gRPC), or `--gateways` of them, and `lightqwen bench` as
  their client, with eight connections for each where they are several.

Tokens per second, and the CPU that each process spends for a token. The leader waits for nobody, so the gateway is
always behind and sends what has come meanwhile in one chunk: `chunks_s` is what it can do, `tokens_per_chunk` how far
behind it is. Where there are fewer cores than processes, these wait for each other, and CPU time says more than a rate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

import model.demo
from bench.provenance import json_file, provenance
from bench.workloads import Job, uniform
from service.config import ServeConfig
from service.ports import hold_port
from service.server import run_gateway
from worker.channel import GatewayChannel
from worker.client import EngineClient, EngineRequest
from worker.control import Stop, SupervisorEnd, Up
from worker.endpoint import EngineEndpoint, private_endpoint
from worker.leader import Leader
from worker.messages import EngineInfo, SamplingParams
from worker.plan import StepPlan
from worker.scheduler import Scheduler, SchedulerLimits

CHECKPOINT = Path(model.demo.__file__).parent
VOCAB_SIZE, MAX_MODEL_LEN, BLOCK_SIZE = 4096, 4096, 64  # the vocabulary is the checkpoint's
TOKEN = 300  # a word like any other
PROMPT_TOKENS = 128
READY_TIMEOUT_S = 60.0


class NullRunner:
    """A device that computes nothing (`worker.leader.StepRunner`)."""

    def __init__(self) -> None:
        self._rows: deque[int] = deque()

    def launch(self, plan: StepPlan) -> None:
        self._rows.append(plan.num_rows)

    def collect(self) -> np.ndarray:
        return np.full(self._rows.popleft(), TOKEN, np.int32)


def run_leader(endpoint: EngineEndpoint, rows: int) -> None:
    """Lead for ever."""
    num_blocks = rows * MAX_MODEL_LEN // BLOCK_SIZE
    limits = SchedulerLimits(
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        max_running=rows,
        max_batched_tokens=8192,
        max_mixed_tokens=8192,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        watermark_blocks=16,
        prefix_caching=True,
    )
    info = EngineInfo(
        epoch=1,
        model_path=str(CHECKPOINT),
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_running=rows,
        max_batched_tokens=8192,
        tensor_parallel_size=1,
        device="null",
        dtype="float32",
        attention_backend="null",
        prefix_caching=True,
    )
    scheduler = Scheduler(limits, hash_key=secrets.token_bytes(32), clock=time.monotonic)
    leader = Leader(scheduler, NullRunner(), GatewayChannel(endpoint), info, run_ahead=2, clock=time.monotonic)
    while True:
        leader.step()


@contextmanager
def started(target: Any, *arguments: Any) -> Iterator[BaseProcess]:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def cpu_seconds(process: BaseProcess) -> float:
    """CPU time of a running process (Linux)."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- without the gateway ---------------------------------------------------------------------------------------------


async def _drain(client: EngineClient, job: Job) -> None:
    ids = [token % VOCAB_SIZE for token in job.prompt_ids]
    request = EngineRequest(
        prompt_ids=ids, sampling=SamplingParams(), max_tokens=job.max_tokens, use_prefix_cache=False
    )
    stream = client.submit(request)
    while (await stream.next()).finished is None:
        pass


async def _drive(endpoint: EngineEndpoint, jobs: list[Job], leader: BaseProcess) -> dict[str, float]:
    client = EngineClient(endpoint)
    client.open()
    await client.wait_ready()
    tokens = sum(job.max_tokens for job in jobs)
    leader_before, client_before, began = cpu_seconds(leader), time.process_time(), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for job in jobs:
            group.create_task(_drain(client, job))
    seconds = time.perf_counter() - began
    result = {
        "tok_s": tokens / seconds,
        "leader_us_per_token": (cpu_seconds(leader) - leader_before) / tokens * 1e6,
        "client_us_per_token": (time.process_time() - client_before) / tokens * 1e6,
    }
    client.close()
    return result


def measure_engine(rows: int, output_tokens: int) -> dict[str, float]:
    endpoint = private_endpoint("null")
    with started(run_leader, endpoint, rows) as leader:
        return asyncio.run(_drive(endpoint, uniform(rows, PROMPT_TOKENS, output_tokens), leader))


# ---- with it ---------------------------------------------------------------------------------------------------------


def measure_gateway(rows: int, output_tokens: int, gateways: int) -> dict[str, float]:
    endpoint = private_endpoint("null")
    with ExitStack() as stack:
        leader = stack.enter_context(started(run_leader, endpoint, rows))
        port = stack.enter_context(hold_port("127.0.0.1", 0, "--port")) if gateways > 1 else 0
        config = ServeConfig(
            model=str(CHECKPOINT), port=port, gateways=gateways, metrics_port=-1, health_port=-1, log_level="error"
        )
        controls, processes = [], []
        for number in range(gateways):
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            run = partial(run_gateway, config, endpoint, theirs, number=number)
            processes.append(stack.enter_context(started(run)))
            controls.append(SupervisorEnd(ours))
        address, *_ = [_wait_up(control) for control in controls]  # the same of all
        leader_before, gateways_before = cpu_seconds(leader), sum(map(cpu_seconds, processes))
        result = _bench(address, rows, output_tokens, connections=8 * gateways if gateways > 1 else 1)
        tokens = result["output_tokens"]
        figures = {
            "tok_s": result["output_tokens_per_s"],
            "chunks_s": result["arrivals"] / result["duration_s"],
            "tokens_per_chunk": tokens / result["arrivals"],
            "ttft_ms_p50": result["ttft"]["p50"],
            "leader_us_per_token": (cpu_seconds(leader) - leader_before) / tokens * 1e6,
            "gateway_us_per_token": (sum(map(cpu_seconds, processes)) - gateways_before) / tokens * 1e6,
            "client_us_per_token": sum(result["client_cpu_shares"]) * result["duration_s"] / tokens * 1e6,
        }
        for control, process in zip(controls, processes, strict=True):
            control.send(Stop())
            process.join(5)
    return figures


def _wait_up(control: SupervisorEnd) -> str:
    give_up = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < give_up:
        for message in control.receive():
            if isinstance(message, Up):
                return str(message.facts["address"])
        time.sleep(0.01)
    raise RuntimeError("the gateway did not come up")


def _bench(address: str, rows: int, output_tokens: int, *, connections: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        load = ["--num-requests", str(rows), "--input-len", str(PROMPT_TOKENS), "--output-len", str(output_tokens)]
        command = [sys.executable, "-m", "service.cli", "bench", "--target", address, *load, "--warmup", "0"]
        command += ["--connections", str(connections)]
        subprocess.run(
            [*command, "--json", str(file)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256], help="requests at a time")
    parser.add_argument(
        "--tokens", type=int, default=200_000, help="output tokens of a measurement (default: %(default)s)"
    )
    parser.add_argument("--gateways", type=int, default=1, metavar="N", help="gateway processes (default: %(default)s)")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write the results here too")
    arguments = parser.parse_args()
    report = provenance("bench.null")
    for rows in arguments.rows:
        output_tokens = min(MAX_MODEL_LEN - PROMPT_TOKENS, max(1, arguments.tokens // rows))
        for name, measure in (
            ("engine", measure_engine),
            ("gateway", partial(measure_gateway, gateways=arguments.gateways)),
        ):
            figures = report[f"{name}_{rows}"] = measure(rows, output_tokens)
            print(f"{rows:4d} {name:8s}", *(f"{key} {value:,.1f}" for key, value in figures.items()), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
