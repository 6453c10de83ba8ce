"""What one process of `test_parallel.py` does. A module of its own: it starts without transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from safetensors.torch import save_file
from torch.distributed.distributed_c10d import _resolve_process_group

from model.one_shot import OneShotAllReduce
from model.parallel import TensorParallel
from tests.model.helpers import (
    TINY,
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


FEW_TOKENS = 3
"""Steps of no more are summed in one shot: the decode step, but no prefill."""


def logits_of(folder: Path, tp: TensorParallel, *, packed: bool = True) -> torch.Tensor:
    """Prefill two sequences, one in chunks, then decode both: the logits of all steps, [tokens, vocab].

    `packed` weights are for oneDNN alone, and what they give goes where it likes.
    """
    model = load(folder, tp=tp)
    if not packed:
        unpack(model)
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


class OneShots:
    """What stands for PyTorch's symmetric memory and its kernel, which are for GPUs, over gloo."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)
        self.written_in_place = 0
        self.calls = 0

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.memory = torch.full((numel,), float("nan"), dtype=dtype, device=device)
        return self.memory

    def mm(self, x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        self.written_in_place += out.data_ptr() == self.memory.data_ptr()
        return out.copy_(x @ weight)

    def sum(self, summand: torch.Tensor, operation: str, group_name: str) -> torch.Tensor:
        assert operation == "sum"
        assert summand.data_ptr() == self.memory.data_ptr()
        self.calls += 1
        total = summand.clone()
        dist.all_reduce(total, group=_resolve_process_group(group_name))
        self.memory.fill_(float("nan"))  # from now on it may be written to
        return total


def one_shot_logits_of(folder: Path, tp: TensorParallel) -> torch.Tensor:
    """As `logits_of`, with small sums in one shot."""
    double = OneShots()
    assert tp.group is not None
    with (
        patch.object(symmetric_memory, "empty", double.empty),
        patch.object(symmetric_memory, "rendezvous"),
        patch.object(torch.ops.symm_mem, "one_shot_all_reduce", double.sum),
        patch.object(torch, "mm", double.mm),
    ):
        numel = FEW_TOKENS * TINY["hidden_size"]
        one_shot = OneShotAllReduce(tp.group, numel=numel, dtype=torch.float32, device=torch.device("cpu"))
        logits = logits_of(folder, replace(tp, one_shot=one_shot), packed=False)
    layers = TINY["num_hidden_layers"]
    assert (double.calls, double.written_in_place) == (1 + 2 * layers, 2 * layers)  # the first is the embedding's
    return logits


def main(rank: int, rendezvous: str, folders: list[str], results: str) -> None:
    """Join the group; for each size and checkpoint, write this rank's logits to results/<size>-<checkpoint>-<rank>.

    Both those summed by gloo alone and those summed in one shot where that is for.
    """
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    try:
        for size in SIZES:
            group = dist.new_group(list(range(size)))
            if rank < size:
                for number, folder in enumerate(folders):
                    tp = TensorParallel(rank, size, group)
                    logits = {"logits": logits_of(Path(folder), tp), "one shot": one_shot_logits_of(Path(folder), tp)}
                    if interpreted():
                        with fused_launches():
                            logits["fused"] = logits_of(Path(folder), tp, packed=False)
                    save_file(logits, Path(results) / f"{size}-{number}-{rank}.safetensors")
        dist.barrier()
    finally:
        dist.destroy_process_group()
