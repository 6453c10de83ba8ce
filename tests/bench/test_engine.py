"""The engine benchmark on a small checkpoint: it starts the ranks, measures, ends, and writes what it found."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCH = (sys.executable, "-m", "bench.engine")


@pytest.mark.slow
def test_a_figure_of_a_checkpoint(root: Path, endless_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    command = [*BENCH, "--model", endless_checkpoint, "--only", "ttft_1k_ms", "--json", file, "--set", "device=cpu"]
    run = subprocess.run(list(map(str, command)), cwd=root, capture_output=True, text=True, check=False, timeout=55)
    assert run.returncode == 0, run.stderr
    result = json.loads(file.read_text())
    assert result["engine"]["device"] == "cpu"
    assert result["size"] is None  # it is of no published shape
    assert len(result["ttft_1k_ms"]["values"]) == 3
    assert all(value > 0 for value in result["ttft_1k_ms"]["values"])
    assert 0 < result["ready_s"] <= sum(result["phases_s"].values())


@pytest.mark.slow
def test_an_interrupt_ends_it_at_once_and_leaves_what_was_measured(
    root: Path, endless_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    figures = ("ttft_1k_ms", "mixed256_tok_s")  # the second takes minutes here
    command = [*BENCH, "--model", endless_checkpoint, "--only", *figures, "--json", file, "--set", "device=cpu"]
    with subprocess.Popen(
        list(map(str, command)), cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("ttft_1k_ms")
        began = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, told = run.communicate(timeout=40)
    assert time.monotonic() - began < 4, "a gateway that does not end is killed after 5 s"
    assert run.returncode == 128 + signal.SIGINT
    assert told.splitlines()[-1] == "bench.engine: interrupted before mixed256_tok_s"
    result = json.loads(file.read_text())
    assert len(result["ttft_1k_ms"]["values"]) == 3
    assert "mixed256_tok_s" not in result


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_a_user_must_mend_is_one_line(root: Path) -> None:
    command = [*BENCH, "--set", "device=cuda"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=55)
    assert run.returncode == 1
    told = [line for line in run.stderr.splitlines() if line.startswith("bench.engine: ")]
    assert len(told) == 1
    assert "needs 1 CUDA GPU" in told[0]
    assert "device=cpu" in told[0]
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("device", "--set: 'device' is not of the form OPTION=VALUE"),
        ("devise=cpu", "--devise: no such option"),
        ("--max-running=0", "--max-running: input should be greater than or equal to 1, got '0'"),
    ],
)
def test_a_wrong_option_of_the_engine_is_told(option: str, says: str, root: Path) -> None:
    run = subprocess.run([*BENCH, f"--set={option}"], cwd=root, capture_output=True, text=True, check=False, timeout=55)
    assert run.returncode == 2
    assert says in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_help_defines_every_figure(root: Path) -> None:
    run = subprocess.run([*BENCH, "--help"], cwd=root, capture_output=True, text=True, check=True, timeout=55)
    for figure in ("mixed256:", "tpot_bN:", "ttft_1k:", "prefill_16x4k:", "tpot_b8_ctx8k:"):
        assert figure in run.stdout


def test_a_file_that_cannot_be_written_is_told_first(root: Path, tmp_path: Path) -> None:
    command = [*BENCH, "--json", str(tmp_path / "nowhere" / "out.json")]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=55)
    assert run.returncode == 2
    assert "nowhere/out.json: name a file in a folder that is there" in run.stderr
