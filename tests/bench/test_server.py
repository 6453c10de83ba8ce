"""The benchmark through the server: it starts one, sends requests, ends it, and writes what it found."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import children, is_alive, until

BENCH = (sys.executable, "-m", "bench.server")
SERVE = ("--", "--device", "cpu", "--num-blocks", "64", "--block-size", "16")


@pytest.mark.slow
def test_one_stream_of_a_checkpoint(root: Path, endless_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    command = [*BENCH, "--model", str(endless_checkpoint), "--only", "one_stream", "--json", str(file), *SERVE]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=55)
    assert run.returncode == 0, run.stderr
    result = json.loads(file.read_text())
    assert (result["size"], result["hardware"]) == (None, "cpu")  # of no published shape
    assert 0 < result["start"] < 55
    (stream,) = result["one_stream"]
    assert (stream["completed"], stream["prompt_tokens"], stream["output_tokens"]) == (48, 48 * 128, 48 * 64)
    assert stream["cached_tokens"] == 0
    assert stream["options"]["temperature"] == 0.6
    printed = {line.rsplit(maxsplit=1)[0] for line in run.stdout.splitlines()}
    assert printed == {
        "start, s",
        "one_stream: output tokens/s",
        "one_stream: TTFT p50, ms",
        "one_stream: gap between chunks p99, ms",
    }


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ended_while_it_measures_it_leaves_no_process(
    root: Path, endless_checkpoint: Path, tmp_path: Path, how: signal.Signals
) -> None:
    file = tmp_path / "out.json"
    command = [*BENCH, "--model", str(endless_checkpoint), "--only", "one_stream", "--json", str(file), *SERVE]
    seen: set[int] = set()
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        assert any("48 requests, 128 tokens in" in line for line in run.stderr), "no client came"
        for _ in range(5):  # since a look may miss a process while others end
            seen.update(children(run.pid))
            time.sleep(0.05)
        run.send_signal(how)
        _, told = run.communicate(timeout=40)
    assert run.returncode == 128 + signal.SIGINT
    assert told.splitlines()[-1] == "bench.server: interrupted"
    assert "Traceback" not in told
    assert len(seen) >= 3  # client, server and what they started
    until(lambda: not any(map(is_alive, seen)), 10, "processes are left")
    result = json.loads(file.read_text())
    assert result["start"] > 0
    assert "one_stream" not in result


def test_a_server_that_cannot_start_is_told(root: Path, tmp_path: Path) -> None:
    command = [*BENCH, "--model", str(tmp_path / "nowhere"), "--", "--device", "cpu"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=55)
    assert run.returncode == 1
    assert "nowhere" in run.stderr
    assert run.stderr.splitlines()[-1] == "bench.server: the server ended with exit code 1 before it was ready"
    assert "Traceback" not in run.stderr
