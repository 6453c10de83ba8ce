"""The all-reduce benchmark as far as no GPU is needed: its options, its refusal, and what it concludes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.all_reduce import KINDS, Result, build_parser, crossover
from model.one_shot import MAX_PEER_BYTES


def test_options() -> None:
    options = build_parser().parse_args([])
    assert (options.ranks, options.rows[0], options.rows[-1], options.json) == (2, 1, 512, None)
    assert build_parser().parse_args(["--rows", "1", "8", "--json", "x"]).rows == [1, 8]


@pytest.mark.skipif(torch.cuda.device_count() >= 8, reason="there are eight GPUs")
def test_too_few_gpus_are_told(root: Path) -> None:
    command = [sys.executable, "-m", "bench.all_reduce", "--ranks", "8"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 1
    assert run.stderr.startswith("bench.all_reduce: 8 CUDA devices are needed")


def test_the_crossover_is_where_the_first_loss_is() -> None:
    def results(*nccl: float) -> list[Result]:
        return [Result(2**i, 1024, dict.fromkeys(KINDS, 10.0) | {"nccl, norm": us}) for i, us in enumerate(nccl)]

    limit = f"allows {MAX_PEER_BYTES // 3 // 2048} rows"
    assert crossover(results(12, 11, 9, 11), 4).startswith("width 1024: one-shot is faster up to 2 rows (12288 bytes")
    assert crossover(results(9, 11), 4) == f"width 1024: NCCL is faster from 1 rows on; MAX_PEER_BYTES {limit}"
    assert crossover(results(12, 11), 4).endswith(limit)
