"""What one process of `test_parallel.py` does. A module of its own: it starts without transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from model import peer_logits as peer_logits_module
from model import peer_sums as peer_sums_module
from model.kernels import embedding as embedding_kernels
from model.kernels.peer_logits import peer_logits
from model.kernels.peer_sum import TwoShots, Way, peer_sum, peer_sum_add_rms_norm
from model.parallel import TensorParallel
from model.peer_sums import Limits, PeerSums, Place
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
from tests.model.shared_files import shared_files, stored_once

WORLD_SIZE = 4
SIZES = (2, 4)
PROMPT, NEIGHBOUR = random_ids(23, vocab_size=9), random_ids(11, vocab_size=9, seed=1)


FEW_TOKENS, MANY_TOKENS = 3, 9
"""Steps of no more are summed in one shot, and in two: the decode step, and the smaller prefill. Of the larger one, the
group sums, and then gathers the logits, for which there would be memory."""


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


def one_shot_logits_of(folder: Path, tp: TensorParallel, shared: Path) -> torch.Tensor:
    """As `logits_of`, with small sums in one shot, to which the embedding is pushed, and larger ones in two, and logits
    gathered as on GPUs; `shared`: a folder of the ranks' own."""
    assert tp.group is not None
    written = 0
    few, many = (tokens * TINY["hidden_size"] for tokens in (FEW_TOKENS, MANY_TOKENS))
    limits = Limits(few, many, logits=len(PROMPT + NEIGHBOUR) * TINY["vocab_size"])
    with shared_files(shared, tp.rank):
        sums_here = PeerSums(tp.group, limits, dtype=torch.float32, device=torch.device("cpu"))
    shapes = [torch.Size((tokens, TINY["hidden_size"])) for tokens in (FEW_TOKENS, MANY_TOKENS)]
    rooms = [sums_here.room(shape, torch.float32, place) for shape in shapes for place in Place]
    addresses = {room.memory.data_ptr() for room in rooms if room is not None and room.memory is not None}
    assert len(addresses) == 1

    def sum_add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, way: Way, *, pushed: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What no rank should need of the residual stream is NaN."""
        normed, total = peer_sum_add_rms_norm(x, residual, weight, eps, way, pushed=pushed)
        if isinstance(way, TwoShots):
            total[torch.arange(len(total)) % tp.size != tp.rank] = torch.nan
        return normed, total

    def count(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(*operands: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            nonlocal written
            written += out.data_ptr() in addresses
            return product(*operands, out=out)

        return counted

    with (
        patch.object(torch, "mm", count(torch.mm)),
        patch.object(torch, "addmm", count(torch.addmm)),
        patch.object(peer_sums_module, "peer_sum", wraps=peer_sum) as sums,
        patch.object(peer_sums_module, "peer_sum_add_rms_norm", side_effect=sum_add_rms_norm) as sums_with_norm,
        patch.object(sums_here, "_put", wraps=sums_here._put) as puts,
        patch.object(peer_logits_module, "peer_logits", wraps=peer_logits) as gathers,
        patch.object(embedding_kernels, "use_triton", lambda x: True),
        stored_once(),
    ):
        logits = logits_of(folder, replace(tp, peer_sums=sums_here), packed=False)
    places = [call.args[1] for call in puts.call_args_list]
    # Those of the larger prefill are too large, but sums as well. Another step would begin with the first place again.
    assert all(place is not other for place, other in pairwise([*places, places[0]])), places
    layers = TINY["num_hidden_layers"]
    done = (sums.call_count, sums_with_norm.call_count, written, gathers.call_count)
    assert done == (2, 4 * layers, 2 * layers, 2), done  # what is summed in one shot is written anywhere
    pushed = [call.kwargs["pushed"] for call in sums.call_args_list]
    assert pushed == [False, True], pushed
    return logits


def main(rank: int, rendezvous: str, folders: list[str], results: str) -> None:
    """Join the group; for each size and checkpoint, write this rank's logits to results/<size>-<checkpoint>-<rank>.

    Those summed by gloo alone and, in Triton's interpreter, those summed in one shot or two where that is for.
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
                    logits = {"logits": logits_of(Path(folder), tp)}
                    if interpreted():
                        shared = Path(results) / f"{size}-{number}"
                        logits["one shot"] = one_shot_logits_of(Path(folder), tp, shared)
                        with fused_launches():
                            logits["fused"] = logits_of(Path(folder), tp, packed=False)
                    save_file(logits, Path(results) / f"{size}-{number}-{rank}.safetensors")
        dist.barrier()
    finally:
        dist.destroy_process_group()
