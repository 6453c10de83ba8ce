"""`lightqwen bench` against `lightqwen serve` on a small checkpoint: every way to load it, small."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightqwen.client import Client
from tests.processes import LIGHTQWEN, Serve, until
from tests.test_cli import Screen


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    server = Serve.start("--port", "0")
    try:
        server.wait_ready()
        yield server.address
    finally:
        server.close()


def model_name(target: str) -> str:
    with Client(target) as client:
        return client.model().name


def measure(target: str, folder: Path, *options: str | Path) -> dict[str, Any]:
    command = [*LIGHTQWEN, "bench", "--target", target, "--json", folder / "r.json", "--details", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((folder / "r.json").read_text())
    assert result["failed"] == {}
    assert result["completed"] == result["planned"]
    assert result["itl"]["count"] == result["arrivals"] - result["completed"]
    assert result["ttft"]["min"] > 0
    assert result["server"]["device"] == "cpu"
    assert result["model"]["name"] == model_name(target)
    return result


LOADS = {
    "all at once": [],
    "closed loop": ["--concurrency", "3"],
    "poisson": ["--request-rate", "10"],
    "evenly spaced": ["--request-rate", "10", "--burstiness", "inf"],
    "bursts, capped": ["--request-rate", "20", "--burstiness", "0.5", "--concurrency", "2"],
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_random_input(target: str, tmp_path: Path, load: list[str]) -> None:
    lengths = ["--num-requests", "8", "--input-len", "10:40", "--output-len", "4:12"]
    result = measure(target, tmp_path, *lengths, *load, "--output", "tokens")
    assert result["finish_reasons"] == {"MAX_TOKENS": 8}, "random input goes on to the length that was asked for"
    assert 8 * 10 <= result["prompt_tokens"] <= 8 * 40
    assert 8 * 4 <= result["output_tokens"] <= 8 * 12
    assert result["cached_tokens"] == 0
    if "--request-rate" in load and "--concurrency" not in load:
        assert result["lateness"]["p50"] < 1000


def test_trace_of_all_kinds(target: str, tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0.0, "prompt": "Once upon a time", "output_length": 5},
        {"timestamp": 0.1, "messages": [{"role": "user", "content": "Hello"}], "output_length": 6},
        {"timestamp": 0.3, "token_ids": [5, 6, 7], "output_length": 7},
        {"timestamp": 0.6, "input_length": 20, "output_length": 8},
    ]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = measure(target, tmp_path, "--trace", tmp_path / "trace.jsonl", "--ignore-eos")
    assert result["output_tokens"] == 5 + 6 + 7 + 8
    assert result["duration_s"] >= 0.6
    began = [record["began_s"] for record in result["records"]]
    assert began == sorted(began)


def test_shared_blocks_of_a_trace_are_found_in_the_cache(target: str, tmp_path: Path) -> None:
    """Two prompts that share their first 64 tokens, one after the other, over KV blocks of 16 tokens."""
    lines = [{"input_length": 80, "output_length": 2, "hash_ids": [1, 2, 3, 4, last]} for last in (5, 6)]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--trace", tmp_path / "trace.jsonl", "--concurrency", "1", "--hash-block-size", "16"]
    result = measure(target, tmp_path, *options)
    assert [record["cached_tokens"] for record in result["records"]] == [0, 64]
    assert measure(target, tmp_path, *options, "--no-prefix-cache")["cached_tokens"] == 0


def test_progress_and_ctrl_c_on_a_terminal(target: str) -> None:
    screen = Screen(
        [*LIGHTQWEN, "bench", "--target", target, "--num-requests", "40", "--concurrency", "4", "--output-len", "400"]
    )
    screen.expect("/40 done, 4 running; ")
    screen.expect("TTFT p50 ")
    with Client(target) as client:
        until(lambda: client.load().running == 4, 10, "four run")
        screen.type("\x03")
        screen.expect("interrupted: cancelling what runs")
        screen.expect("4 interrupted, ")
        assert screen.wait() == 130
        until(lambda: client.load().running == 0, 5, "the server goes on with what nobody waits for")
