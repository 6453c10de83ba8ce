"""A model's two ends over several ranks, by memory that they share: in processes, and on two GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.kernels.peer_logits import Parts
from model.peer_logits import PeerLogits
from tests.model import peer_logits_rank
from tests.model.helpers import interpreted


@pytest.mark.slow
@pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("size", [2, 3])
def test_processes_embed_and_gather_rightly_step_by_step(tmp_path: Path, size: int) -> None:
    args = (size, str(tmp_path / "rendezvous"), str(tmp_path))
    torch.multiprocessing.spawn(peer_logits_rank.main_on_cpu, args=args, nprocs=size)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.device_count() < peer_logits_rank.SIZE, reason="needs two GPUs")
def test_two_gpus_embed_and_gather_rightly_step_by_step(tmp_path: Path) -> None:
    args = (str(tmp_path / "rendezvous"),)
    torch.multiprocessing.spawn(peer_logits_rank.main, args=args, nprocs=peer_logits_rank.SIZE)


def test_where_there_is_room() -> None:
    nothing = torch.zeros(2, dtype=torch.int64)
    memory = torch.zeros(24)
    logits = PeerLogits(memory, Parts(0, nothing, nothing, nothing.int()))
    room = logits.room(torch.Size((3, 8)), torch.float32)
    assert room is not None
    assert room.shape == (3, 8)
    assert room.data_ptr() == memory.data_ptr()
    assert logits.room(torch.Size((1, 25)), torch.float32) is None
    assert logits.room(torch.Size((1, 8)), torch.bfloat16) is None
    none = PeerLogits(memory[:0], Parts(0, nothing, nothing, nothing.int()))
    assert none.room(torch.Size((1, 1)), torch.float32) is None
    assert none.gather(torch.zeros((1, 1)), 1, share=False) is None
