"""What the GPU tests share: a runner on a checkpoint, and a scheduler that drives it without a leader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from model.config import Qwen3Config
from model.inputs import StepInputs
from model.parallel import TensorParallel
from worker.config import EngineConfig
from worker.messages import SamplingParams, Submit, ids_to_bytes
from worker.runner import Runner, build_runner
from worker.runtime import resolve
from worker.scheduler import Scheduler, SchedulerLimits

MAX_LEN = 1024
BLOCK = 64


def make_runner(folder: Path, tp: TensorParallel | None = None, **options: object) -> tuple[Runner, Qwen3Config]:
    """A runner for one rank; all of it when `tp` is None."""
    tp = tp or TensorParallel.single()
    defaults: dict[str, object] = {
        "model": str(folder),
        "device": "cuda",
        "num_blocks": 256,
        "max_model_len": MAX_LEN,
        "max_running": 16,
        "max_batched_tokens": 512,
        "block_size": BLOCK,
    }
    config = EngineConfig.model_validate(defaults | options)
    shape = Qwen3Config.from_folder(folder)
    runtime = resolve(config, shape, tp.rank)
    return build_runner(config, shape, runtime, tp, lambda what, done, total: None), shape


def make_scheduler(runner: Runner, shape: Qwen3Config) -> Scheduler:
    limits = SchedulerLimits(
        vocab_size=shape.vocab_size,
        max_model_len=MAX_LEN,
        max_running=16,
        max_batched_tokens=512,
        max_mixed_tokens=512,
        block_size=BLOCK,
        num_blocks=runner.num_blocks,
        watermark_blocks=2,
        prefix_caching=False,
    )
    # Time stands still: where each rank has a scheduler of its own, whose turn it is must be the same on all.
    return Scheduler(limits, hash_key=b"k" * 32, clock=lambda: 0.0)


def generate(runner: Runner, shape: Qwen3Config, submits: list[Submit], *, run_ahead: int = 2) -> dict[int, list[int]]:
    """Run requests to their end; returns the output of each."""
    scheduler = make_scheduler(runner, shape)
    for submit in submits:
        scheduler.submit(0, submit)
    outputs: dict[int, list[int]] = {submit.request: [] for submit in submits}
    in_flight = []
    while scheduler.has_work:
        planned = scheduler.plan()
        if planned is not None:
            runner.launch(planned.plan)
            in_flight.append(planned)
        if planned is None or len(in_flight) >= run_ahead:
            retired = scheduler.retire(in_flight.pop(0), runner.collect())
            for number, token in zip(retired.numbers.tolist(), retired.tokens.tolist(), strict=True):
                outputs[number].append(token)
    scheduler.check_integrity()
    return outputs


def requests(count: int, temperature: float, lengths: tuple[int, int] = (1, 400), max_tokens: int = 48) -> list[Submit]:
    rng = np.random.default_rng(5)
    return [
        Submit(
            request=number,
            epoch=1,
            prompt=ids_to_bytes(rng.integers(0, 4099, rng.integers(*lengths))),
            sampling=SamplingParams(temperature=temperature, seed=number, top_k=20 * (number % 2), top_p=0.95),
            max_tokens=max_tokens,
        )
        for number in range(count)
    ]


def prompt_chunk(ids: torch.Tensor, first: int, device: torch.device) -> StepInputs:
    """One prefill row of the tokens `ids`, which follow `first` others of the prompt, on blocks in order."""
    count, length = len(ids), first + len(ids)
    positions = torch.arange(first, length, dtype=torch.int32, device=device)
    return StepInputs(
        token_ids=ids.int().to(device),
        positions=positions,
        kv_slots=positions.long(),
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        kv_lens=torch.tensor([length], dtype=torch.int32, device=device),
        block_tables=torch.arange(MAX_LEN // BLOCK, dtype=torch.int32, device=device)[None],
        num_decode_rows=0,
        max_single_rows=1,
        max_chunk_rows=1,
        max_query_len=count,
        max_kv_len=length,
    )
