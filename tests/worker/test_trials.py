"""What is on trial for several ranks, in whole runners over gloo: the same tokens as without it, on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.worker import trial_rank


@pytest.fixture(scope="module")
def results(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trials")
    torch.multiprocessing.spawn(
        trial_rank.main,
        args=(str(root / "rendezvous"), str(tiny_checkpoint), str(root)),
        nprocs=trial_rank.WORLD_SIZE,
    )
    return root


@pytest.mark.parametrize("size", trial_rank.SIZES)
def test_trials_change_no_token(results: Path, size: int) -> None:
    outcomes = {
        trial: [json.loads((results / f"{size}-{trial}-{rank}.json").read_text()) for rank in range(size)]
        for trial in trial_rank.TRIALS
    }
    expected = outcomes[""][0]["tokens"]
    assert all(outcome["tokens"] == expected for ranks in outcomes.values() for outcome in ranks)
    assert {outcome["exchanges"] for outcome in outcomes[""]} == {0}
    (exchanges,) = {outcome["exchanges"] for trial in trial_rank.TRIALS[1:] for outcome in outcomes[trial]}
    steps = max(map(len, expected))
    assert 0 < exchanges < steps  # the last requests run with fewer rows than ranks, which are not shared out
    for trial in trial_rank.TRIALS:
        for rank, outcome in enumerate(outcomes[trial]):
            told = [f"rank={rank} no one-shot all-reduces: they are for GPUs, not for cpu"]
            assert outcome["warnings"] == (told if "symmetric_memory" in trial else [])
