"""What one process of `test_trials.py` does. A module of its own: it starts without transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from model.parallel import TensorParallel
from tests.worker.gpu_engine import generate, make_runner
from worker.messages import SamplingParams, Submit, ids_to_bytes
from worker.runner import logger

WORLD_SIZE = 4
SIZES = (2, 4)
TRIALS = ("", "sharded_sampling", "symmetric_memory,sharded_sampling")  # symmetric memory cannot be had on a CPU
VOCAB = 131

SAMPLING = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=1, top_k=20),
    SamplingParams(temperature=1.3, seed=2**64 - 1, top_p=0.9, presence_penalty=0.5),
    SamplingParams(temperature=0.7, seed=3, min_p=0.02, repetition_penalty=1.2),
    SamplingParams(temperature=0.0, frequency_penalty=0.4),
)


def submits() -> list[Submit]:
    """Nine requests that end one after the other, so that steps of every number of rows come."""
    rng = np.random.default_rng(2)
    return [
        Submit(
            request=number,
            epoch=1,
            prompt=ids_to_bytes(rng.integers(0, VOCAB, int(rng.integers(1, 60)))),
            sampling=SAMPLING[number % len(SAMPLING)],
            max_tokens=8 + 2 * number,
            min_tokens=4,
            stop_ids=(5, 77),
        )
        for number in range(9)
    ]


def main(rank: int, rendezvous: str, folder: str, results: str) -> None:
    """Join over gloo; for each size and trial, write the tokens, the number of exchanges of rows, and the warnings."""
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    for size in SIZES:
        group = dist.new_group(list(range(size)))
        for trial in TRIALS:
            if rank >= size:
                continue
            os.environ["LIGHTQWEN_TRIALS"] = trial
            with (
                patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange,
                patch.object(logger, "warning") as warning,
            ):
                runner, shape = make_runner(
                    Path(folder),
                    TensorParallel(rank, size, group),
                    device="cpu",
                    max_model_len=256,
                    tensor_parallel_size=size,
                )
                tokens = generate(runner, shape, submits(), run_ahead=1)
            outcome = {
                "tokens": list(tokens.values()),
                "exchanges": exchange.call_count,
                "warnings": [call.args[0] % call.args[1:] for call in warning.call_args_list],
            }
            (Path(results) / f"{size}-{trial}-{rank}.json").write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()
