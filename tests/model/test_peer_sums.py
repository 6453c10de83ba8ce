"""Sums in one shot and two: on two GPUs against NCCL and exact sums, and why a rank may not be able to make them."""

from __future__ import annotations

import signal
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch

from model import peer_sums
from model.errors import ModelError
from tests.model import peer_sums_rank
from tests.model.helpers import interpreted
from tests.model.shared_files import shared_files
from tests.processes import until

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < peer_sums_rank.SIZE, reason="needs two GPUs")


@pytest.mark.slow
@pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("size", [2, 3])
def test_processes_sum_rightly_whatever_comes_before_and_after(tmp_path: Path, size: int) -> None:
    args = (size, str(tmp_path / "rendezvous"), str(tmp_path))
    torch.multiprocessing.spawn(peer_sums_rank.main_on_cpu, args=args, nprocs=size)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@two_gpus
def test_two_gpus_sum_rightly_whatever_comes_before_and_after(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(peer_sums_rank.main, args=(str(tmp_path / "rendezvous"),), nprocs=peer_sums_rank.SIZE)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@two_gpus
def test_a_rank_that_waits_for_a_lost_one_can_be_killed(tmp_path: Path) -> None:
    """Its kernel never ends; the supervisor must get rid of it all the same, and the GPU be of use to the next rank."""
    waiting = tmp_path / "waiting"
    ranks = torch.multiprocessing.spawn(
        peer_sums_rank.wait_for_ever,
        args=(str(tmp_path / "rendezvous"), str(waiting)),
        nprocs=peer_sums_rank.SIZE,
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
    cpu, rows = torch.device("cpu"), 2 * peer_sums.MAX_PROGRAMS  # of two ranks
    group = Mock(**{"rank.return_value": 1, "size.return_value": 2})
    with shared_files(tmp_path, 1), patch.object(torch.distributed, "barrier"):
        made, narrow = (
            peer_sums.PeerSums(group, limits, dtype=dtype, device=cpu)
            for limits, dtype in (
                (peer_sums.Limits(256, 384), torch.float32),
                (peer_sums.Limits(0, 2 * rows + 2), torch.bfloat16),
            )
        )

    def rooms(sums: peer_sums.PeerSums, shape: tuple[int, int], dtype: torch.dtype) -> list[peer_sums.Room | None]:
        return [sums.room(torch.Size(shape), dtype, place) for place in peer_sums.Place]

    inboxes = set()
    for room in rooms(made, (2, 128), torch.float32):
        assert room is not None and room.memory is None and room.push is not None  # noqa: PT018
        inboxes.add(int(room.push.inboxes[0]))
    assert len(inboxes) == len(peer_sums.Place), "each place has inboxes of its own"
    memories = set()
    for room in rooms(made, (3, 128), torch.float32):
        assert room is not None and room.memory is not None and room.push is None  # noqa: PT018
        assert room.memory.shape == (3, 128)
        memories.add(room.memory.data_ptr())
    assert len(memories) == 1, "two shots need no more than one"
    assert all(address % 256 == 0 for address in inboxes | memories)
    assert not inboxes & memories
    assert made.one_shot(torch.Size((2, 128)), torch.float32, peer_sums.Place.MLP) is not None
    assert made.one_shot(torch.Size((3, 128)), torch.float32, peer_sums.Place.MLP) is None
    assert rooms(made, (1, 385), torch.float32) == [None] * 3
    assert rooms(made, (1, 128), torch.bfloat16) == [None] * 3
    assert None not in rooms(narrow, (rows, 2), torch.bfloat16)
    assert rooms(narrow, (rows + 1, 2), torch.bfloat16) == [None] * 3, "programs without flags"


def test_what_stands_in_the_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)

    def obstacle() -> str:
        return peer_sums.obstacle(3, device=gpu)

    backend: str | None = None
    monkeypatch.setattr(torch.distributed._symmetric_memory, "get_backend", lambda device: backend)
    monkeypatch.setattr(peer_sums, "_reaches", lambda device, peer: peer != unreachable)
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
        peer_sums.PeerSums(
            Mock(**{"rank.return_value": 1, "size.return_value": 2}),
            peer_sums.Limits(8, 8),
            dtype=torch.bfloat16,
            device=torch.device("cuda", 1),
        )
    assert "\n" not in str(raised.value)


def test_more_than_two_ranks_take_small_tensors_only_in_one_shot() -> None:
    most = peer_sums.MAX_SUM_BYTES // 2
    for summand in (1000, most, most + 1):
        largest = min(summand, most)
        assert peer_sums.Limits.of(2, torch.bfloat16, summand=summand) == peer_sums.Limits(largest, 0)
        for size in (3, 4, 8):
            limits = peer_sums.Limits.of(size, torch.bfloat16, summand=summand)
            sent, small = limits.one_shot * 2 * (size - 1), peer_sums.MAX_ONE_SHOT_BYTES
            assert limits.one_shot == summand if summand == 1000 else small - 2 * size < sent <= small
            assert (limits.two_shots, limits.logits) == (largest, 0)


def test_no_more_memory_for_logits_than_they_need_or_may_have() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        most = peer_sums.MAX_LOGITS_BYTES // dtype.itemsize
        for needed in (12345, most, most + 1):
            assert peer_sums.Limits.of(2, dtype, summand=8, logits=needed).logits == min(needed, most)
