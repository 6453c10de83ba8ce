"""What one process of `test_sample_share.py` does. A module of its own: it starts without transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from model.layers import ParallelLMHead
from model.parallel import TensorParallel
from model.sampler import SamplingTables, sample, sample_share

WORLD_SIZE = 4
SIZES = (1, 2, 4)
ROWS = (1, 2, 3, 5, 8)  # on four ranks, the last shares of 1, 2 and 5 rows hold nobody's
VOCABULARIES = (9, 101, 128)  # on four ranks: the last shard is empty, is padded, is full
DTYPES = (torch.float32, torch.bfloat16)
HIDDEN = 32
SLOTS = 16
BROKEN_ROW = 1  # its hidden states hold a NaN

Case = tuple[int, int, torch.dtype]
CASES: list[Case] = [(rows, vocab_size, dtype) for rows in ROWS for vocab_size in VOCABULARIES for dtype in DTYPES]


def tables_of(vocab_size: int) -> SamplingTables:
    """Slots of every kind: greedy or not, truncated, penalized, with stop ids that are banned."""
    generator = torch.Generator().manual_seed(vocab_size)
    tables = SamplingTables.allocate(SLOTS, vocab_size, 4, "cpu")
    slot = torch.arange(SLOTS)
    tables.temperature.copy_(slot % 4 * 0.6)
    tables.top_k.copy_(torch.where(slot % 3 == 0, 5, 0))
    tables.top_p.copy_(torch.where(slot % 5 == 1, 0.8, 1.0))
    tables.min_p.copy_(torch.where(slot % 7 == 2, 0.05, 0.0))
    tables.repetition.copy_(torch.where(slot % 2 == 0, 1.3, 1.0))
    tables.presence.copy_(torch.where(slot % 3 == 1, 0.7, 0.0))
    tables.frequency.copy_(torch.where(slot % 3 == 2, 0.2, 0.0))
    tables.seed.copy_(torch.randint(-(2**62), 2**62, (SLOTS,), generator=generator))
    tables.counts.copy_(torch.randint(0, 7, tables.counts.shape, generator=generator))
    tables.stop_ids[:, 0] = slot % vocab_size
    tables.min_length.copy_(torch.where(slot % 4 == 3, 1000, 0))
    return tables


def head_of(vocab_size: int, dtype: torch.dtype, tp: TensorParallel) -> ParallelLMHead:
    """The same head on any number of ranks; what pads its vocabulary would win wherever it were looked at."""
    weight = torch.randn(vocab_size, HIDDEN, generator=torch.Generator().manual_seed(1))
    head = ParallelLMHead(vocab_size, HIDDEN, tp=tp, dtype=dtype, device=torch.device("cpu"))
    head.weight.fill_(float("inf"))
    shard = head.shard("weight")
    shard.target.copy_(weight[shard.source])
    head.finish()
    return head


@torch.inference_mode()
def draw_both_ways(case: Case, tp: TensorParallel) -> dict[str, torch.Tensor]:
    """What every rank samples from all logits, and what it does from its share of them; and the logits."""
    rows, vocab_size, dtype = case
    hidden = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows)).to(dtype)
    if rows > BROKEN_ROW:
        hidden[BROKEN_ROW, 3] = float("nan")
    slots = (torch.arange(rows, dtype=torch.int32) * 5 + 3) % SLOTS
    lengths = torch.arange(rows, dtype=torch.int32) * 7 + 11
    head, tables = head_of(vocab_size, dtype, tp), tables_of(vocab_size)
    logits, share = head(hidden), head.forward_share(hidden)
    return {
        "logits": logits,
        "share": share,
        "whole": sample(logits, slots, lengths, tables),
        "shared": sample_share(share, slots, lengths, tables, tp),
    }


def main(rank: int, rendezvous: str, results: str) -> None:
    """Join the group; for each size, write what this rank draws in all cases to results/<size>-<rank>."""
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    try:
        for size in SIZES:
            group = dist.new_group(list(range(size)))
            if rank < size:
                tp = TensorParallel(rank, size, group) if size > 1 else TensorParallel.single()
                drawn = {
                    f"{number}-{name}": tensor
                    for number, case in enumerate(CASES)
                    for name, tensor in draw_both_ways(case, tp).items()
                }
                save_file(drawn, Path(results) / f"{size}-{rank}.safetensors")
        dist.barrier()
    finally:
        dist.destroy_process_group()
