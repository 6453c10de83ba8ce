"""Benchmark of a running server over gRPC, streaming: `python -m bench.online --target localhost:50051`.

Requests go in and come out as token ids. Client processes share the streams, 32 each, so that the client is not what is
measured. Definitions: TTFT is from the call to the first delta; a gap is the time between two deltas of one stream;
throughput counts output tokens from the first call to the last message.

- mixed256: the 256-request workload, all at once;
- c1, c64: one stream after the other, or 64 at once, 128 tokens in and 256 out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import grpc.aio
import numpy as np

from bench.workloads import Job, mixed_256, uniform
from lightqwen.client import CHANNEL_OPTIONS, Client, build_request
from lightqwen.v1.generation_pb2_grpc import GenerationServiceStub

STREAMS_PER_CLIENT = 32
Trace = tuple[float, list[float], int]
"""When a call was made, when its deltas came (perf_counter), and how many tokens it got."""


async def _stream(stub: GenerationServiceStub, job: Job, seed: int, vocabulary: int) -> Trace:
    request = build_request(
        [token % vocabulary for token in job.prompt_ids],
        max_tokens=job.max_tokens,
        temperature=0.6,
        top_k=0,
        top_p=1.0,
        seed=seed,
        ignore_eos=True,
        text=False,
        token_ids=True,
    )
    request.cache.bypass_prefix_cache = True
    began = time.perf_counter()
    arrivals: list[float] = []
    tokens = 0
    async for response in stub.Generate(request):
        if response.WhichOneof("event") == "delta":
            arrivals.append(time.perf_counter())
            tokens = response.delta.output_tokens_total
    if tokens != job.max_tokens:
        raise RuntimeError(f"{tokens} tokens instead of {job.max_tokens}")
    return began, arrivals, tokens


async def _client(target: str, jobs: list[tuple[int, Job]], vocabulary: int, start_at: float) -> list[Trace]:
    async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        await channel.channel_ready()
        await asyncio.sleep(max(0.0, start_at - time.perf_counter()))
        stub = GenerationServiceStub(channel)
        return await asyncio.gather(*(_stream(stub, job, seed, vocabulary) for seed, job in jobs))


def _run_client(target: str, jobs: list[tuple[int, Job]], vocabulary: int, start_at: float) -> list[Trace]:
    return asyncio.run(_client(target, jobs, vocabulary, start_at))


def run(pool: ProcessPoolExecutor, clients: int, target: str, jobs: list[Job], vocabulary: int) -> dict[str, float]:
    """Run all jobs at once and summarise: tokens per second, and milliseconds."""
    numbered = list(enumerate(jobs))
    shares = [share for i in range(clients) if (share := numbered[i::clients])]
    start_at = time.perf_counter() + 1.0  # perf_counter is the same clock in every process of a Linux host
    futures = [pool.submit(_run_client, target, share, vocabulary, start_at) for share in shares]
    traces = [trace for future in futures for trace in future.result()]
    seconds = max(arrivals[-1] for _, arrivals, _ in traces) - min(began for began, _, _ in traces)
    ttft = np.array([arrivals[0] - began for began, arrivals, _ in traces]) * 1e3
    gaps = np.concatenate([np.diff(arrivals) for _, arrivals, _ in traces]) * 1e3
    return {
        "tok_s": sum(tokens for _, _, tokens in traces) / seconds,
        "ttft_ms_p50": float(np.percentile(ttft, 50)),
        "ttft_ms_p99": float(np.percentile(ttft, 99)),
        "gap_ms_p50": float(np.percentile(gaps, 50)),
        "gap_ms_p99": float(np.percentile(gaps, 99)),
        "gap_ms_max": float(gaps.max()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.online", description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", default="localhost:50051")
    parser.add_argument("--only", nargs="+", choices=("mixed256", "c1", "c64"), default=["mixed256", "c1", "c64"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with Client(arguments.target) as client:
        vocabulary = client.model().vocab_size
    results: dict[str, list[dict[str, float]]] = {}
    clients = 256 // STREAMS_PER_CLIENT
    with ProcessPoolExecutor(clients, multiprocessing.get_context("spawn")) as pool:
        run(pool, clients, arguments.target, uniform(64, 64, 16, seed=3), vocabulary)  # warm-up
        for name in arguments.only:
            results[name] = []
            for repeat in range(arguments.repeats):
                if name == "mixed256":
                    summary = run(pool, clients, arguments.target, mixed_256(), vocabulary)
                elif name == "c64":
                    summary = run(pool, 2, arguments.target, uniform(64, 128, 256, seed=repeat), vocabulary)
                else:
                    summary = run(pool, 1, arguments.target, uniform(1, 128, 256, seed=repeat), vocabulary)
                results[name].append(summary)
                print(f"{name:9s}", *(f"{key}={value:.2f}" for key, value in summary.items()), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
