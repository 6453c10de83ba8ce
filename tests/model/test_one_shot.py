"""Sums in one shot: on two GPUs against NCCL and exact sums, and why a rank may not be able to make them."""

from __future__ import annotations

import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from model import one_shot
from model.errors import ModelError
from tests.model import one_shot_rank
from tests.model.helpers import interpreted
from tests.model.shared_files import shared_files
from tests.processes import until

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < one_shot_rank.SIZE, reason="needs two GPUs")


@pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
def test_two_processes_sum_rightly_whatever_comes_before_and_after(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(
        one_shot_rank.main_on_cpu, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=one_shot_rank.SIZE
    )


@pytest.mark.gpu
@pytest.mark.timeout(600)
@two_gpus
def test_two_gpus_sum_rightly_whatever_comes_before_and_after(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_shot_rank.main, args=(str(tmp_path / "rendezvous"),), nprocs=one_shot_rank.SIZE)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@two_gpus
def test_a_rank_that_waits_for_a_lost_one_can_be_killed(tmp_path: Path) -> None:
    """Its kernel never ends; the supervisor must get rid of it all the same, and the GPU be of use to the next rank."""
    waiting = tmp_path / "waiting"
    ranks = torch.multiprocessing.spawn(
        one_shot_rank.wait_for_ever,
        args=(str(tmp_path / "rendezvous"), str(waiting)),
        nprocs=one_shot_rank.SIZE,
        join=False,
    )
    first, second = ranks.processes
    until(waiting.exists, 120.0, "rank 0 does not wait")
    second.join(30.0)
    assert second.exitcode == 0
    assert first.is_alive()
    first.kill()
    first.join(30.0)
    assert first.exitcode == -signal.SIGKILL
    assert torch.ones(8, device="cuda:0").sum().item() == 8


def test_where_there_is_room(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with shared_files(tmp_path, 0):
            made = one_shot.OneShotAllReduce(torch.distributed.group.WORLD, numel=13, dtype=torch.float32, device=cpu)
            rows = one_shot.MAX_ROWS
            narrow = one_shot.OneShotAllReduce(
                torch.distributed.group.WORLD, numel=2 * rows + 2, dtype=torch.bfloat16, device=cpu
            )
    finally:
        torch.distributed.destroy_process_group()
    rooms = [made.room(torch.Size((1, 13)), torch.float32, place) for place in one_shot.Place]
    assert all(room is not None and room.data_ptr() % 16 == 0 for room in rooms)
    assert made.room(torch.Size((1, 17)), torch.float32, one_shot.Place.MLP) is None
    assert made.room(torch.Size((1, 13)), torch.bfloat16, one_shot.Place.MLP) is None
    assert narrow.room(torch.Size((rows, 2)), torch.bfloat16, one_shot.Place.MLP) is not None
    assert narrow.room(torch.Size((rows + 1, 2)), torch.bfloat16, one_shot.Place.MLP) is None


def test_what_stands_in_the_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)

    def obstacle() -> str:
        return one_shot.obstacle(3, device=gpu)

    backend: str | None = None
    monkeypatch.setattr(torch.distributed._symmetric_memory, "get_backend", lambda device: backend)
    monkeypatch.setattr(one_shot, "_reaches", lambda device, peer: peer != unreachable)
    unreachable = 2
    assert "not built" in obstacle()
    backend = "NVSHMEM"
    assert "is NVSHMEM here" in obstacle()
    backend = "CUDA"
    assert obstacle() == "GPU 1 does not reach the memory of GPU 2 as over NVLink"
    unreachable = 3  # no such peer
    assert obstacle() == ""


def test_a_failure_names_the_way_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("pidfd_getfd: Operation not permitted\nfrom here and there")

    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "")  # which is changed, and so put back
    monkeypatch.setattr(torch.distributed._symmetric_memory, "empty", fail)
    with pytest.raises(ModelError, match="not permitted; set LIGHTQWEN_WITHOUT=symmetric_memory") as raised:
        one_shot.OneShotAllReduce(Mock(), numel=8, dtype=torch.bfloat16, device=torch.device("cuda", 1))
    assert "\n" not in str(raised.value)


def test_more_ranks_take_smaller_tensors() -> None:
    for size in (2, 4, 8):
        read = one_shot.largest_numel(size, torch.bfloat16) * 2 * (size - 1)
        assert one_shot.MAX_PEER_BYTES - 2 * size < read <= one_shot.MAX_PEER_BYTES
