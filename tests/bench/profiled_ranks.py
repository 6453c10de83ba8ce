"""What the leader of `test_profile.py` does. A module of its own: processes that are started import it, and it can be
run as a command to be interrupted."""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np

from bench.profile import Engine, run_ranks, start_decodes, start_mixed
from worker.config import EngineConfig
from worker.plan import StepPlan


def config_for(folder: Path, size: int, **options: int) -> EngineConfig:
    fixed = {"device": "cpu", "tensor_parallel_size": size, "num_blocks": 32, "block_size": 16}
    return EngineConfig.model_validate({"model": str(folder), **fixed, **options})


def run_requests(file: Path, engine: Engine) -> None:
    """Let three requests end, and others begin and be forgotten; write every step's tokens, and what was timed."""
    tokens: list[list[int]] = []
    collect = engine._runner.collect

    def collect_and_note() -> np.ndarray:
        drawn = collect()
        tokens.append(drawn.tolist())
        return drawn

    engine._runner.collect = Mock(side_effect=collect_and_note)  # type: ignore[method-assign]
    engine.submit(2, 20, 9)
    for _ in range(4):
        assert engine.turn()
    engine.reset()
    engine.submit(3, 30, 6)
    while engine.turn():
        pass
    times = {name: len(values) for name, values in engine.times.items()}
    file.write_text(json.dumps({"tokens": tokens, "times": times}))


def run_decodes(file: Path, engine: Engine) -> None:
    """Let three requests decode whose prompts take several steps, and then more than there is memory for."""
    started = start_decodes(engine, 3, 40, 8)
    facts = {"started": started, "running": engine.stats.running, "only_decodes": engine.only_decodes}
    file.write_text(json.dumps(facts))
    start_decodes(engine, 20, 40, 8)


def run_mixed(file: Path, engine: Engine) -> None:
    """Let three requests decode beside prompts that fill the steps, and write what each step had."""
    steps = []
    launch = engine._runner.launch

    def launch_and_note(plan: StepPlan) -> None:
        steps.append((plan.num_tokens, plan.num_decode_rows, plan.num_rows))
        launch(plan)

    start_mixed(engine, 3, 40, 20, 8)
    engine._runner.launch = Mock(side_effect=launch_and_note)  # type: ignore[method-assign]
    for _ in range(8):
        engine.turn()
    file.write_text(json.dumps(steps))


def fail(engine: Engine) -> None:
    raise RuntimeError("the leader has enough")


def mislead(engine: Engine) -> None:
    """Send a plan that is none, on which the follower fails, and wait."""
    assert engine._plans is not None
    engine._plans.send(b"no plan")
    time.sleep(60)


def tell_and_wait(engine: Engine) -> None:
    """Wait as within a collective that nobody else joins: for a lock that it holds, where no signal handler of Python's
    gets its turn; for a minute at most."""
    signal.alarm(60)
    sys.stdout.write("up\n")
    sys.stdout.flush()
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)


if __name__ == "__main__":
    run_ranks(config_for(Path(sys.argv[1]), 2), tell_and_wait)
