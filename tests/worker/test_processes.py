"""The supervisor with real processes: what is killed comes back or ends everything, and nothing is ever left behind.

Starting a server takes some seconds, so each test is the life of one server, with all that can happen in it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import children, command_of, is_alive, until
from tests.worker.conftest import Greedy

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

PROMPT = list(range(7, 27))
LONG = 220
"""Tokens that take long enough for a rank to be killed meanwhile."""


class Generation:
    """One request on its way."""

    def __init__(self, port: int, prompt: list[int], max_tokens: int) -> None:
        self.tokens: list[int] = []
        self.end: dict[str, object] = {}
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60.0)
        self._lines = self._socket.makefile("rwb")
        self._lines.write(json.dumps({"prompt": prompt, "max_tokens": max_tokens}).encode() + b"\n")
        self._lines.flush()

    def read(self, at_least: int) -> list[int]:
        """Wait until so many tokens are there, or it has ended."""
        while len(self.tokens) < at_least and not self.end:
            line = self._lines.readline()
            message = json.loads(line) if line else {"lost": True}
            if "tokens" in message:
                self.tokens += message["tokens"]
            else:
                self.end = message
                self.close()
        return self.tokens

    def finish(self) -> list[int]:
        return self.read(1 << 30)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Server:
    """A served checkpoint in processes of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.reports: list[dict[str, object]] = []
        self.facts: dict[str, int] = {}
        self.generations: list[Generation] = []

    def wait_for(self, key: str) -> dict[str, object]:
        """Read the supervisor's reports up to one that has `key`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.reports.append(json.loads(line))
            if key in self.reports[-1]:
                return self.reports[-1]
        raise AssertionError(f"it ended without {key}: {self.reports}")

    def wait_ready(self) -> None:
        self.facts = self.wait_for("ready")["ready"]  # type: ignore[assignment]

    def generate(self, prompt: list[int] = PROMPT, max_tokens: int = LONG) -> Generation:
        self.generations.append(Generation(self.facts["port"], prompt, max_tokens))
        return self.generations[-1]

    @property
    def tree(self) -> list[int]:
        return [self.process.pid, *children(self.process.pid)]

    @property
    def ranks(self) -> list[int]:
        """The processes of the ranks, in order: neither the gateway nor what Python starts to track its resources."""
        others = {self.process.pid, self.facts["pid"]}
        return [pid for pid in self.tree if pid not in others and "resource_tracker" not in command_of(pid)]

    def lose_ranks(self, pid: int, number: signal.Signals) -> None:
        """Hit a rank, and wait until none of the old ones is left."""
        old = self.ranks
        os.kill(pid, number)
        until(lambda: not any(is_alive(rank) for rank in old), 20.0, "the old ranks live on")

    def exit_code(self, seconds: float = 30.0) -> int:
        return self.process.wait(seconds)


@contextmanager
def serving(root: Path, folder: Path, checkpoint: Path, **options: object) -> Iterator[Server]:
    """Start a server whose temporary files go to `folder`; at the end, see that it left nothing behind."""
    folder.mkdir(exist_ok=True)
    shared_memory = set(os.listdir("/dev/shm"))
    config = {"model": str(checkpoint), "device": "cpu", "num_blocks": 64, "block_size": 16} | options
    code = "from tests.worker.gateway_double import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(config)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    server = Server(process)
    seen = set(server.tree)
    try:
        yield server
        seen |= set(server.tree)
        process.wait(30.0)
    finally:
        for pid in server.tree[::-1] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        for generation in server.generations:
            generation.close()
        if process.stdout is not None:
            process.stdout.close()
    until(lambda: not any(is_alive(pid) for pid in seen), 10.0, "a process is left")
    until(lambda: set(os.listdir("/dev/shm")) <= shared_memory, 10.0, "shared memory is left")
    assert os.listdir(folder) == [], "a temporary file or socket is left"


@pytest.fixture(scope="module")
def long_output(greedy: Greedy) -> list[int]:
    return greedy(PROMPT, LONG)


def test_a_rank_that_is_killed_or_stopped_costs_no_token_and_sigterm_drains(
    root: Path, tmp_path: Path, tiny_checkpoint: Path, greedy: Greedy, long_output: list[int]
) -> None:
    with serving(root, tmp_path / "tmp", tiny_checkpoint, hang_timeout_s=4.0) as server:
        server.wait_ready()
        prompts = [PROMPT[: 3 * length] for length in range(1, 6)]
        assert [server.generate(prompt, 12).finish() for prompt in prompts] == [greedy(p, 12) for p in prompts]

        running = [server.generate() for _ in range(3)]
        assert all(len(generation.read(5)) < LONG for generation in running)
        server.lose_ranks(server.ranks[0], signal.SIGKILL)
        for generation in running:
            assert generation.finish() == long_output
            assert generation.end == {"reason": "max_tokens", "epoch": 2}

        generation = server.generate()
        assert len(generation.read(5)) < LONG
        server.lose_ranks(server.ranks[0], signal.SIGSTOP)
        assert generation.finish() == long_output
        assert generation.end == {"reason": "max_tokens", "epoch": 3}

        generation = server.generate()
        assert len(generation.read(5)) < LONG
        server.process.terminate()
        assert generation.finish() == long_output
        assert server.exit_code() == 0


def test_two_ranks_agree_and_too_many_deaths_end_the_server(
    root: Path, tmp_path: Path, tiny_checkpoint: Path, long_output: list[int]
) -> None:
    with serving(root, tmp_path / "tmp", tiny_checkpoint, tensor_parallel_size=2, max_restarts=1) as server:
        server.wait_ready()
        assert len(server.ranks) == 2
        generation = server.generate()
        assert len(generation.read(5)) < LONG
        server.lose_ranks(server.ranks[1], signal.SIGKILL)
        assert generation.finish() == long_output
        assert generation.end == {"reason": "max_tokens", "epoch": 2}

        generation = server.generate()
        assert len(generation.read(5)) < LONG
        server.lose_ranks(server.ranks[0], signal.SIGKILL)
        assert len(generation.finish()) < LONG
        assert generation.tokens == long_output[: len(generation.tokens)]
        assert generation.end == {"failed": "rank0 was ended by SIGKILL"}
        assert server.exit_code() == 1


def test_four_ranks_share_two_kv_heads_and_end_with_their_gateway(
    root: Path, tmp_path: Path, tiny_checkpoint: Path, greedy: Greedy
) -> None:
    with serving(root, tmp_path / "tmp", tiny_checkpoint, tensor_parallel_size=4) as server:
        server.wait_ready()
        assert len(server.ranks) == 4
        generations = [server.generate(PROMPT[: 5 * length], 20) for length in range(1, 4)]
        assert [generation.finish() for generation in generations] == [
            greedy(PROMPT[: 5 * length], 20) for length in range(1, 4)
        ]
        os.kill(server.facts["pid"], signal.SIGKILL)
        assert server.exit_code() == 1


def test_nothing_outlives_a_supervisor_that_is_killed(root: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    with serving(root, tmp_path / "tmp", tiny_checkpoint) as server:
        server.wait_ready()
        generation = server.generate()
        generation.read(5)
        tree = server.tree
        assert len(tree) >= 3
        server.process.kill()
        until(lambda: not any(is_alive(pid) for pid in tree), 5.0, "somebody lives on")
        assert server.exit_code() == -signal.SIGKILL
        assert len(generation.finish()) < LONG
        assert generation.end == {"lost": True}


def test_sigterm_ends_a_server_that_still_starts(root: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    with serving(root, tmp_path / "tmp", tiny_checkpoint) as server:
        until(lambda: len(server.tree) >= 4, 30.0, "no rank is started")
        began = time.monotonic()
        server.process.terminate()
        assert server.exit_code() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 3.0


def test_what_a_user_must_mend_is_one_line(root: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    with serving(root, tmp_path / "tmp", tiny_checkpoint, num_blocks=2, max_model_len=200) as server:
        error = str(server.wait_for("config_error")["config_error"])
        assert error == (
            "max_model_len=200 does not fit the KV cache of 2 blocks of 16 tokens; "
            "lower it to 32, or give the KV cache more memory"
        )
        assert server.exit_code() == 2
