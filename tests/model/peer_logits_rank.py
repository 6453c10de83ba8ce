"""What one process of `test_peer_logits.py` does, mostly on a GPU of its own. A check that fails ends all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist

from model import peer_logits as peer_logits_module
from model.kernels import embedding as embedding_kernels
from model.kernels.peer_logits import peer_logits
from model.layers import ParallelLMHead, RMSNorm, VocabParallelEmbedding
from model.parallel import TensorParallel
from model.peer_sums import Limits, PeerSums, Place
from tests.model.peer_sums_rank import DTYPES, SIZE, be_late, join, on_gpu
from tests.model.shared_files import shared_files, stored_once

WIDTH = 1024
VOCABULARIES = (4099, 16384)
"""Of which two ranks' columns are aligned to nothing, and to much; the first is padded."""
ROWS = (1, 4, 8, 33)
LIMITS = Limits(8 * WIDTH, 256 * WIDTH, 256 * 75968)
"""Up to eight rows are summed in one shot, more in two. All logits are gathered."""
QWEN3 = 151_936
ON_CPU_WIDTH, ON_CPU_ROWS, ON_CPU_VOCABULARIES = 32, (1, 2, 5), (67, 48)
ON_CPU_LIMITS = Limits(ON_CPU_WIDTH, 4 * ON_CPU_WIDTH, 4 * 34)
"""One row is summed in one shot, two in two, and five, which are too many for any memory, by the group. On two ranks
four rows of logits are gathered of the larger vocabulary, and five of the smaller, where a sum lies between."""
LATE = ("embedding", "attention", "mlp", "head")


class Ends:
    """A model's two ends, with sums between them that leave everything as it is: what comes out is known exactly.

    Tables hold whole numbers, few of the head's are not zero, and those of padding would spoil all that they get to.
    """

    def __init__(self, vocab_size: int, width: int, tp: TensorParallel, dtype: torch.dtype) -> None:
        device = torch.get_default_device()
        generator = torch.Generator(device=device).manual_seed(vocab_size)
        table = torch.randint(-4, 5, (vocab_size, width), generator=generator)
        chosen = torch.rand((vocab_size, width), generator=generator) < 8 / width
        signs = torch.randint(0, 2, (vocab_size, width), generator=generator) * 2 - 1
        self._table, self._weight = table.to(dtype), (chosen * signs).to(dtype)
        del table, chosen, signs
        self.tp, self._dtype, self._vocab_size = tp, dtype, vocab_size
        self._share = (torch.arange(width) % tp.size == tp.rank).to(dtype)  # of the columns
        self._embedding = VocabParallelEmbedding(vocab_size, width, tp=tp, dtype=dtype, device=device)
        self._norm = RMSNorm(width, 1e-6, dtype=dtype, device=device)
        self._head = ParallelLMHead(vocab_size, width, tp=tp, dtype=dtype, device=device)
        for layer, values in ((self._embedding, self._table), (self._head, self._weight)):
            layer.weight.fill_(torch.nan)
            shard = layer.shard("weight")
            shard.target.copy_(values[shard.source])

    def step(self, ids: torch.Tensor, *, share: bool, late: str = "") -> torch.Tensor:
        """Logits of all rows, or of this rank's share. `late`: where it takes its time, one of LATE."""
        if late == "embedding":
            be_late()
        _, hidden = self._embedding(ids, self._norm)
        for place in (Place.ATTENTION, Place.MLP):
            room = self.tp.room_for_summand(hidden.shape, hidden.dtype, place)
            summand = torch.mul(hidden, self._share, out=None if room is None else room.memory)
            if late == place.name.lower():
                be_late()
            hidden = self.tp.all_reduce(summand, place)
        if late == "head":
            be_late()
        return self.head(hidden, share=share)

    def head(self, hidden: torch.Tensor, *, share: bool) -> torch.Tensor:
        return self._head.forward_share(hidden) if share else self._head(hidden)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return self._table[ids.long()]

    def expected(self, ids: torch.Tensor, *, share: bool) -> torch.Tensor:
        logits = (self.hidden(ids).float() @ self._weight.float().t()).to(self._dtype)
        if not share:
            return logits
        rows = -(-len(ids) // self.tp.size)
        padded = torch.cat((logits, logits.new_zeros((rows * self.tp.size - len(ids), self._vocab_size))))
        return padded[self.tp.rank * rows :][:rows]

    def ids(self, rows: int, seed: int) -> torch.Tensor:
        """The same on every rank; the vocabulary's first and last are among them."""
        generator = torch.Generator("cpu").manual_seed(seed)
        ids = torch.randint(0, self._vocab_size, (rows,), generator=generator, device="cpu")
        ids[seed % rows] = (0, self._vocab_size - 1, ids[0])[seed % 3]
        return ids.to(torch.get_default_device(), torch.int32)


def who_is_late(round: int, rank: int) -> str:
    """In one round of two the ranks take turns, now here and now there; in others nobody is late."""
    return LATE[round // 4 % len(LATE)] if round % 2 and round // 2 % 2 == rank % 2 else ""


def check_steps(ends: Ends, rows: Sequence[int], rounds: int) -> None:
    """Steps without a pause, each with ids of its own: what is read or overwritten too early gives wrong logits."""
    for share in (False, True):
        steps = [(round, ends.ids(rows[round % len(rows)], round)) for round in range(rounds)]
        made = [ends.step(ids, share=share, late=who_is_late(round, ends.tp.rank)) for round, ids in steps]
        for (round, ids), logits in zip(steps, made, strict=True):
            assert torch.equal(logits, ends.expected(ids, share=share)), f"round {round}: {len(ids)} rows, {share=}"


def check_in_a_graph(ends: Ends, rows: int, replays: int = 60) -> None:
    """Captured steps, whose ids change between replays that nothing waits for, with steps launched one by one among
    them: all logits are those of the ids at their time."""
    captured = (False, True, False)  # whether of a share
    buffers = [ends.ids(rows, 0) for _ in captured]
    graph = torch.cuda.CUDAGraph()
    ends.step(buffers[0], share=False)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        made = [
            ends.step(buffer, share=share, late=LATE[(number + 2 * ends.tp.rank) % len(LATE)] if number else "")
            for number, (buffer, share) in enumerate(zip(buffers, captured, strict=True))
        ]
    ids = [[ends.ids(rows, 7 * replay + number) for number in range(len(captured))] for replay in range(replays)]
    logits: list[list[torch.Tensor]] = []
    torch.cuda.synchronize()
    for replay, of_replay in enumerate(ids):
        for buffer, values in zip(buffers, of_replay, strict=True):
            buffer.copy_(values)
        if replay % 5 == 3 * ends.tp.rank:
            be_late()
        graph.replay()
        logits.append([out.clone() for out in made])
        if replay % 10 == 0:
            logits[-1][1] = ends.step(of_replay[1], share=True)
    for replay, (of_replay, outs) in enumerate(zip(ids, logits, strict=True)):
        for values, share, out in zip(of_replay, captured, outs, strict=True):
            assert torch.equal(out, ends.expected(values, share=share)), f"replay {replay}: {rows} rows, {share=}"


def check_without_a_sum(ends: Ends, rows: int) -> None:
    """A head right behind another one has no room, and leaves its columns to the group; a sum gives room again."""
    ids = ends.ids(rows, 1)
    hidden = ends.hidden(ids)
    shape = torch.Size((rows, ends._head.weight.shape[0]))
    with counted() as gathers:
        ends.step(ids, share=False)
        for share in (False, True):
            assert ends.tp.room_for_columns(shape, hidden.dtype) is None
            assert torch.equal(ends.head(hidden, share=share), ends.expected(ids, share=share))
        assert gathers.call_count == 1
        ends.step(ids, share=True)
        assert gathers.call_count == 2


@contextmanager
def counted() -> Iterator[Mock]:
    with patch.object(peer_logits_module, "peer_logits", wraps=peer_logits) as gathers:
        yield gathers


@torch.inference_mode()
def main_on_cpu(rank: int, size: int, rendezvous: str, shared: str) -> None:
    """Make those checks that need no GPU, in Triton's interpreter and through files that the ranks map."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(rendezvous, size), rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    for dtype in DTYPES:
        with shared_files(Path(shared) / str(dtype), rank):
            peer_sums = PeerSums(group, ON_CPU_LIMITS, dtype=dtype, device=torch.device("cpu"))
        tp = TensorParallel(rank, size, group, peer_sums)
        with patch.object(embedding_kernels, "use_triton", lambda x: True), stored_once():
            for vocab_size in ON_CPU_VOCABULARIES:
                ends = Ends(vocab_size, ON_CPU_WIDTH, tp, dtype)
                check_steps(ends, ON_CPU_ROWS, rounds=9)
                check_without_a_sum(ends, rows=2)
    dist.barrier()
    dist.destroy_process_group()


@torch.inference_mode()
def main(rank: int, rendezvous: str) -> None:
    """Make all checks."""
    group, device = join(rank, rendezvous)
    assert on_gpu()
    for dtype in DTYPES:
        tp = TensorParallel(rank, SIZE, group, PeerSums(group, LIMITS, dtype=dtype, device=device))
        with counted() as gathers:
            for vocab_size in VOCABULARIES:
                ends = Ends(vocab_size, WIDTH, tp, dtype)
                check_steps(ends, ROWS, rounds=100)
                for rows in ROWS:
                    check_in_a_graph(ends, rows)
            ends = Ends(QWEN3, WIDTH, tp, dtype)
            check_steps(ends, (256, 31, 64, 255), rounds=8)
            check_in_a_graph(ends, 64, replays=8)
            made = len(VOCABULARIES) * (200 + len(ROWS) * (4 + 6)) + 16 + 4 + 1
            assert gathers.call_count == made, "NCCL has gathered"
        check_without_a_sum(ends, rows=8)
    dist.barrier()
    torch.cuda.synchronize()
    os._exit(0)  # the memory that is shared goes with the process, as it does when a supervisor ends a rank
