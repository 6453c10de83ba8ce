"""What one process of `test_sharing.py` does. A module of its own: it starts without transformers."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import torch
import torch.distributed as dist

from model.kernels.runtime import wanted
from model.parallel import TensorParallel
from tests.worker.gpu_engine import generate, make_runner
from worker import runner as runner_module
from worker.messages import SamplingParams, Submit, ids_to_bytes

WORLD_SIZE = 4
SIZES = (2, 4)
MIN_SHARED_ROWS = 4
ON_CPU, AS_ON_GPUS, WITHOUT = WAYS = ("on a CPU", "as on GPUs", "as on GPUs, without it")
OBSTRUCTED = 1  # the rank that cannot share memory
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


def run_requests(folder: Path, tp: TensorParallel, way: str) -> dict[str, object]:
    """Return every request's tokens, and how often ranks exchanged rows of logits."""
    os.environ["LIGHTQWEN_WITHOUT"] = "sharded_sampling" if way == WITHOUT else ""
    with ExitStack() as patches:
        exchange = patches.enter_context(patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single))
        patches.enter_context(patch.object(runner_module, "_MIN_SHARED_ROWS", MIN_SHARED_ROWS))
        if way != ON_CPU:
            as_on_gpus = Mock(side_effect=lambda tp, runtime: wanted("sharded_sampling"))
            patches.enter_context(patch.object(runner_module, "_wants_shared_sampling", as_on_gpus))
        runner, shape = make_runner(folder, tp, device="cpu", max_model_len=256, tensor_parallel_size=tp.size)
        tokens = generate(runner, shape, submits(), run_ahead=1)
    return {"tokens": list(tokens.values()), "exchanges": exchange.call_count}


def share_memory(tp: TensorParallel) -> dict[str, object]:
    """Return whether this rank is to sum in one shot, where one cannot, and what its log says."""
    runtime = Mock(on_gpu=True, dtype=torch.bfloat16, device=torch.device("cpu"))
    reason = "its GPU is far away" if tp.rank == OBSTRUCTED else ""
    with (
        patch.object(runner_module, "obstacle", return_value=reason),
        patch.object(runner_module.logger, "info") as log,
    ):
        changed = runner_module._with_peer_sums(tp, Mock(nodes=1), runtime, Mock())
    return {
        "peer_sums": changed.peer_sums is not None,
        "log": [call.args[0] % call.args[1:] for call in log.mock_calls],
    }


def main(rank: int, rendezvous: str, folder: str, results: str) -> None:
    """Join over gloo; for each size, write what the requests gave in each way, and what came of sharing memory."""
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    for size in SIZES:
        group = dist.new_group(list(range(size)))
        if rank < size:
            tp = TensorParallel(rank, size, group)
            outcome = {way: run_requests(Path(folder), tp, way) for way in WAYS} | {"memory": share_memory(tp)}
            (Path(results) / f"{size}-{rank}.json").write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()
