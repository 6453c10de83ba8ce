"""The engine's benchmark starts an engine as the server does, measures, and ends it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_it_measures_a_small_checkpoint(root: Path, demo_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.engine", "--model", demo_checkpoint, "--only", "ttft_1k_ms"]
    command += ["--set", "device=cpu", "num_blocks=64", "--json", tmp_path / "out.json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=55)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["ttft_1k_ms"]["median"] > 0
    assert result["engine"]["device"] == "cpu"
    assert result["ready_s"] > 0
