"""The all-reduce benchmark as far as no GPU is needed: its options, its refusal, sums, and what it concludes."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from bench.all_reduce import DTYPE, EPS, KINDS, WITH_NORM, Memory, Result, Sums, build_parser, crossover
from model.kernels.norm import rms_norm_torch
from model.peer_sums import MAX_ONE_SHOT_BYTES
from tests.model.helpers import interpreted
from tests.model.kernels.comparing import relative_error
from tests.model.shared_files import shared_files


def test_options() -> None:
    options = build_parser().parse_args([])
    assert (options.ranks, options.rows[0], options.rows[-1], options.json) == (2, 1, 8448, None)
    assert build_parser().parse_args(["--rows", "1", "8", "--json", "x"]).rows == [1, 8]


@pytest.mark.skipif(torch.cuda.device_count() >= 8, reason="there are eight GPUs")
def test_too_few_gpus_are_told(root: Path) -> None:
    command = [sys.executable, "-m", "bench.all_reduce", "--ranks", "8"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 1
    assert run.stderr.startswith("bench.all_reduce: 8 CUDA devices are needed")


@pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
def test_sums_are_right_and_go_when_they_are_done(tmp_path: Path) -> None:
    """What is left to the collector of cycles may go while a graph is being captured, when nothing may be freed."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    gc.disable()
    try:
        group = torch.distributed.group.WORLD
        assert group is not None
        with shared_files(tmp_path, 0):
            memory = Memory(group, numel=3 * 64, device=torch.device("cpu"))
        for rows in (1, 3):  # which share the memory
            x = torch.randn(rows, 64).to(DTYPE)
            sums = Sums(x, memory)
            sums.fill(x)
            for kind in ("nccl", "one_shot", *WITH_NORM):
                expected = rms_norm_torch(x, torch.ones(64, dtype=DTYPE), EPS) if kind in WITH_NORM else x
                assert relative_error(sums.make(kind), expected) < 1e-2, kind
            gone = weakref.ref(sums)
            del sums
            assert gone() is None
        gone_memory = weakref.ref(memory.two_shot)
        del memory
        assert gone_memory() is None
    finally:
        gc.enable()
        torch.distributed.destroy_process_group()


def test_the_crossover_tells_who_wins_from_where_on() -> None:
    def results(*us: tuple[float, float, float]) -> list[Result]:
        return [
            Result(2**power, 1024, dict.fromkeys(KINDS, 1.0) | dict(zip(WITH_NORM, times, strict=True)))
            for power, times in enumerate(us)
        ]

    said = crossover(results((9, 5, 7), (10, 6, 7), (12, 9, 8), (13, 19, 18)), 4)
    assert said.startswith("width 1024: fastest with norm are one_shot from 1 on, two_shot from 4 on, nccl from 8 on; ")
    one_shot = MAX_ONE_SHOT_BYTES // 3 // 2048
    assert f"; used are one_shot up to {one_shot} rows, two_shot up to 32768, nccl beyond; " in said
    assert crossover(results((9, 10, 11)), 2).startswith("width 1024: fastest with norm are nccl from 1 on; ")
