"""What ranks share, sampling and memory, and when they do not: in whole runners over gloo, and in what decides it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from model.parallel import TensorParallel
from model.peer_sums import Limits
from tests.worker import sharing_rank
from tests.worker.sharing_rank import AS_ON_GPUS, MIN_SHARED_ROWS, OBSTRUCTED, ON_CPU, WAYS, WITHOUT
from worker import runner

Outcome = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharing")
    torch.multiprocessing.spawn(
        sharing_rank.main,
        args=(str(root / "rendezvous"), str(tiny_checkpoint), str(root)),
        nprocs=sharing_rank.WORLD_SIZE,
    )
    return root


@pytest.fixture(params=sharing_rank.SIZES)
def outcomes(request: pytest.FixtureRequest, results: Path) -> list[Outcome]:
    """Of each rank."""
    return [json.loads((results / f"{request.param}-{rank}.json").read_text()) for rank in range(request.param)]


def test_sharing_the_sampling_changes_no_token(outcomes: list[Outcome]) -> None:
    expected = outcomes[0][WITHOUT]["tokens"]
    assert all(outcome[way]["tokens"] == expected for outcome in outcomes for way in WAYS)


def test_only_steps_of_many_rows_are_shared_out_and_none_on_a_cpu(outcomes: list[Outcome]) -> None:
    (exchanges,) = {outcome[AS_ON_GPUS]["exchanges"] for outcome in outcomes}
    tokens = outcomes[0][AS_ON_GPUS]["tokens"]
    assert 0 < exchanges < max(map(len, tokens))  # the last requests run alone
    assert sum(map(len, tokens)) >= exchanges * MIN_SHARED_ROWS
    assert {outcome[way]["exchanges"] for outcome in outcomes for way in (ON_CPU, WITHOUT)} == {0}


def test_all_ranks_leave_sums_to_the_group_where_one_cannot_share_memory(outcomes: list[Outcome]) -> None:
    for rank, outcome in enumerate(outcomes):
        reason = "its GPU is far away" if rank == OBSTRUCTED else "another rank has none"
        told = f"rank={rank} no sums and logits through shared memory: {reason}"
        assert outcome["memory"] == {"peer_sums": False, "log": [told]}


@pytest.mark.parametrize(("nodes", "on_gpu", "without"), [(2, True, ""), (1, False, ""), (1, True, "symmetric_memory")])
def test_no_memory_is_shared(nodes: int, on_gpu: bool, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do ranks talk about it, since another node may not."""
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", without)
    tp = TensorParallel(0, 2, Mock())
    agree = Mock()
    monkeypatch.setattr(runner, "_agree", agree)
    assert runner._with_peer_sums(tp, Mock(nodes=nodes), Mock(on_gpu=on_gpu), Mock()) is tp
    agree.assert_not_called()


def test_as_much_memory_is_shared_as_steps_need(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock()
    monkeypatch.setattr(runner, "PeerSums", made)
    monkeypatch.setattr(runner, "obstacle", lambda size, device: "")
    monkeypatch.setattr(runner, "_agree", lambda number, tp, device: number)
    tp = TensorParallel(0, 2, Mock(size=lambda: 2))
    runtime = Mock(on_gpu=True, dtype=torch.bfloat16, max_batched_tokens=300, max_running=10)
    changed = runner._with_peer_sums(tp, Mock(nodes=1), runtime, Mock(hidden_size=64, vocab_size=101))
    assert changed.peer_sums is made.return_value
    _, limits = made.call_args.args
    assert limits == Limits(one_shot=300 * 64, two_shots=0, logits=10 * 51)


@pytest.mark.parametrize(
    ("size", "on_gpu", "without", "wants"),
    [(2, True, "", True), (1, True, "", False), (2, False, "", False), (2, True, "sharded_sampling", False)],
)
def test_who_wants_to_share_the_sampling(
    size: int, on_gpu: bool, without: str, wants: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", without)
    tp = TensorParallel(0, size, Mock() if size > 1 else None)
    assert runner._wants_shared_sampling(tp, Mock(on_gpu=on_gpu)) is wants
