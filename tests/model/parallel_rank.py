"""What one process of `test_parallel.py` does. A module of its own: it starts without transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from model.parallel import TensorParallel
from model.qwen3 import Qwen3ForCausalLM
from tests.model.helpers import (
    PagedCache,
    PagedSequence,
    fused_launches,
    interpreted,
    load,
    random_ids,
    run,
    unpack,
)

WORLD_SIZE = 4
SIZES = (2, 4)
PROMPT, NEIGHBOUR = random_ids(23, vocab_size=9), random_ids(11, vocab_size=9, seed=1)


def logits_of(folder: Path, tp: TensorParallel, *, fused: bool = False) -> torch.Tensor:
    """Prefill two sequences, one in chunks, then decode both: the logits of all steps, [tokens, vocab].

    `fused` computes linear layers of few rows, and what stands around them, in one launch of Triton's interpreter.
    """
    if fused:
        with fused_launches():
            return _logits_of(unpack(load(folder, tp=tp)), tp)
    return _logits_of(load(folder, tp=tp), tp)


def _logits_of(model: Qwen3ForCausalLM, tp: TensorParallel) -> torch.Tensor:
    cache = PagedCache(model.config, tp_size=tp.size)
    first, second = PagedSequence(), PagedSequence()
    steps = [
        [(first, PROMPT[:9])],
        [(first, PROMPT[9:-1]), (second, NEIGHBOUR[:-1])],
        [(first, PROMPT[-1:]), (None, [0]), (second, NEIGHBOUR[-1:])],
    ]
    return torch.cat(
        [
            part
            for rows in steps
            for (sequence, _), part in zip(rows, run(model, cache, rows), strict=True)
            if sequence is not None
        ]
    )


def main(rank: int, rendezvous: str, folders: list[str], results: str) -> None:
    """Join the group; for each size and checkpoint, write this rank's logits to results/<size>-<checkpoint>-<rank>."""
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    try:
        for size in SIZES:
            group = dist.new_group(list(range(size)))
            if rank < size:
                for number, folder in enumerate(folders):
                    tp = TensorParallel(rank, size, group)
                    logits = {"logits": logits_of(Path(folder), tp)}
                    if interpreted():
                        logits["fused"] = logits_of(Path(folder), tp, fused=True)
                    save_file(logits, Path(results) / f"{size}-{number}-{rank}.safetensors")
        dist.barrier()
    finally:
        dist.destroy_process_group()
