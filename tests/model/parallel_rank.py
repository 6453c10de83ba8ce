"""What one process of `test_parallel.py` does. A module of its own: it starts without transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from model.parallel import TensorParallel
from tests.model.helpers import PagedCache, PagedSequence, load, random_ids, run

WORLD_SIZE = 4
SIZES = (2, 4)
PROMPT, NEIGHBOUR = random_ids(23, vocab_size=9), random_ids(11, vocab_size=9, seed=1)


def logits_of(folder: Path, tp: TensorParallel) -> torch.Tensor:
    """Prefill two sequences, one in chunks, then decode both: the logits of all steps, [tokens, vocab]."""
    model = load(folder, tp=tp)
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
                    logits = logits_of(Path(folder), TensorParallel(rank, size, group))
                    save_file({"logits": logits}, Path(results) / f"{size}-{number}-{rank}.safetensors")
        dist.barrier()
    finally:
        dist.destroy_process_group()
