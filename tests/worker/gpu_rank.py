"""What one process of the two-GPU test does. A module of its own: it starts without transformers."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from model.config import Qwen3Config
from model.parallel import TensorParallel
from model.weights import empty_model, load_model
from tests.worker.gpu_engine import BLOCK, MAX_LEN, generate, make_runner, prompt_chunk, requests
from worker import runner as runner_module

SIZE = 2


def logits_of(folder: Path, tp: TensorParallel, ids: torch.Tensor, step: int | None = None) -> torch.Tensor:
    """bf16 logits of a prompt, computed whole or in steps of so many tokens: [tokens, vocab]."""
    shape = Qwen3Config.from_folder(folder)
    device = torch.device("cuda", tp.rank)
    empty = empty_model(
        shape,
        tp=tp,
        device=device,
        dtype=torch.bfloat16,
        attention_backend="triton",
        block_size=BLOCK,
        max_model_len=MAX_LEN,
    )
    model = load_model(empty, folder, device=device)
    cache_shape = (shape.num_hidden_layers, 2, MAX_LEN // BLOCK, BLOCK, shape.kv_heads_per_rank(tp.size), 128)
    cache = torch.zeros(cache_shape, dtype=torch.bfloat16, device=device)
    chunks = ids.split(step or len(ids))
    with torch.inference_mode():
        return torch.cat(
            [
                model.compute_logits(model(prompt_chunk(chunk, number * len(chunks[0]), device), cache))
                for number, chunk in enumerate(chunks)
            ]
        )


def main(rank: int, rendezvous: str, folder: str, results: str, without: str) -> None:
    """Join over NCCL; write logits in bf16, and greedy tokens of both dtypes by captured steps, without `without`."""
    os.environ["LIGHTQWEN_WITHOUT"] = without
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", store=dist.FileStore(rendezvous, SIZE), rank=rank, world_size=SIZE, device_id=device
    )
    tp = TensorParallel(rank, SIZE, dist.group.WORLD)
    ids = torch.randint(0, 4099, (700,), generator=torch.Generator().manual_seed(1))
    half, shape = make_runner(Path(folder), tp, dtype="bfloat16", tensor_parallel_size=SIZE)
    logits = {
        "whole": logits_of(Path(folder), half._tp, ids),
        "few tokens a step": logits_of(Path(folder), half._tp, ids[:60], 3),
    }
    save_file({name: of.cpu() for name, of in logits.items()}, Path(results) / f"logits-{rank}.safetensors")
    rounded = generate(half, shape, requests(8, temperature=0.0))
    (Path(results) / f"rounded-{rank}.json").write_text(json.dumps(rounded))
    with patch.object(runner_module, "_MIN_SHARED_ROWS", 4):  # fewer than the 8 requests
        runner, shape = make_runner(Path(folder), tp, dtype="float32", tensor_parallel_size=SIZE)
        assert (runner._tp.peer_sums is None) == ("symmetric_memory" in without), "see the log for why"
        assert runner._share_sampling == ("sharded_sampling" not in without)
        tokens = generate(runner, shape, requests(8, temperature=0.0))
    (Path(results) / f"tokens-{rank}.json").write_text(json.dumps(tokens))
    dist.barrier()
    torch.cuda.synchronize()
    if runner._tp.peer_sums is not None:
        os._exit(0)  # the memory that is shared goes with the process, as it does when a supervisor ends a rank
    del runner, half  # NCCL does not let a communicator go while a captured graph uses it
    gc.collect()
    dist.destroy_process_group()
