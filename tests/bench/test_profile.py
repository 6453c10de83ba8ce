"""The profile as far as no GPU is needed: how its ranks work together and end, its groups of kernels, its refusals."""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import pkgutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import model.kernels
import worker.table_kernels
from bench.profile import Engine, Span, _busy_and_idle, group_of, report, run_ranks, sampling_params
from tests.bench import profiled_ranks
from tests.bench.profiled_ranks import config_for
from tests.processes import children, is_alive, until
from worker.messages import SamplingParams

PROFILE = (sys.executable, "-m", "bench.profile")


@pytest.mark.slow
def test_ranks_draw_together_what_one_draws_alone(endless_checkpoint: Path, tmp_path: Path) -> None:
    """A follower that had not made the same steps would have given its part of other sums."""
    results = []
    for size in (1, 2):
        file = tmp_path / f"{size}.json"
        run_ranks(config_for(endless_checkpoint, size), functools.partial(profiled_ranks.run_requests, file))
        results.append(json.loads(file.read_text()))
    assert results[0] == results[1]
    assert [len(tokens) for tokens in results[0]["tokens"]] == [2] * 4 + [3] * 6
    assert results[0]["times"]["retire"] == 10


@pytest.mark.slow
def test_prompts_fill_the_steps_of_requests_that_decode(endless_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    config = config_for(endless_checkpoint, 1, max_running=24, max_batched_tokens=32, max_mixed_tokens=32)
    run_ranks(config, functools.partial(profiled_ranks.run_mixed, file))
    steps = json.loads(file.read_text())
    assert len(steps) == 8
    for tokens, decodes, rows in steps:
        assert tokens == 32
        assert 3 <= decodes < rows  # a prompt whose last token is alone in its step counts as well


@pytest.mark.slow
def test_prompts_that_find_no_room_beside_decodes_are_told(
    endless_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_for(endless_checkpoint, 1, max_running=3, max_batched_tokens=32, max_mixed_tokens=32)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 1"):
        run_ranks(config, functools.partial(profiled_ranks.run_mixed, tmp_path / "steps.json"))
    assert "no prompt of 20 tokens begins beside 3 requests that decode" in capfd.readouterr().err


@pytest.mark.slow
def test_decodes_are_alone_when_they_are_measured(
    endless_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing is measured where they cannot all decode at a time, of which a user is told."""
    file = tmp_path / "decodes.json"
    config = config_for(endless_checkpoint, 1, max_running=24, max_batched_tokens=32, max_mixed_tokens=32)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 1"):
        run_ranks(config, functools.partial(profiled_ranks.run_decodes, file))
    facts = json.loads(file.read_text())
    assert facts == {"started": pytest.approx(6, abs=2), "running": 3, "only_decodes": True}
    error = capfd.readouterr().err
    assert "requests of 40 tokens decode at a time here, not 20" in error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "who", "why"),
    [(profiled_ranks.fail, 0, "the leader has enough"), (profiled_ranks.mislead, 1, "StepPlan.decode")],
)
def test_a_rank_that_fails_says_why_and_the_others_end(
    work: Callable[[Engine], None], who: int, why: str, endless_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = f"process {who} terminated with exit code 1"
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match=ended):
        run_ranks(config_for(endless_checkpoint, 2), work)
    assert not multiprocessing.active_children()
    assert why in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_process_is_left_when_it_is_ended(number: signal.Signals, root: Path, endless_checkpoint: Path) -> None:
    """By Ctrl-C or at once, even if only the process that was started hears of it."""
    command = [sys.executable, "-m", "tests.bench.profiled_ranks", str(endless_checkpoint)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            started = children(process.pid)
            process.send_signal(number)
            assert process.wait(15) == -number
        finally:
            process.kill()
    assert len(started) >= 2
    until(lambda: not any(map(is_alive, started)), 10.0, "a process is left")


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("void c10d::symmetric_memory::one_shot_all_reduce_kernel<c10::BFloat16, 8, 2>(...)", "collectives"),
        ("_one_shot_kernel", "collectives"),
        ("_two_shots_kernel", "collectives"),
        ("_rms_norm_kernel", "norm"),
        ("_qk_norm_rope_kernel", "rope + kv write"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNN", "linear"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "torch"),
    ],
)
def test_groups(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_when_the_device_is_busy_and_where_it_idles() -> None:
    """Kernels that overlap count once, and what ends last is what the device idles after."""
    spans = [
        Span(30, 35, "c"),
        Span(0, 10, "a"),
        Span(2, 5, "b"),
        Span(8, 12, "b"),
        Span(14, 20, "c"),
        Span(50, 51, "d"),
    ]
    busy, gaps = _busy_and_idle(spans)
    assert busy == 12 + 6 + 5 + 1
    assert gaps == {"b -> c": 2, "c -> c": 10, "c -> d": 15}
    assert _busy_and_idle([]) == (0.0, {})


def test_every_kernel_of_ours_has_a_group() -> None:
    modules = [importlib.import_module(f"model.kernels.{m.name}") for m in pkgutil.iter_modules(model.kernels.__path__)]
    kernels = [name for module in (*modules, worker.table_kernels) for name in vars(module) if name.endswith("_kernel")]
    assert len(kernels) > 12
    kernels += [file.stem for path in model.kernels.__path__ for file in Path(path).glob("*.cu")]
    assert "gated_linear" in kernels
    assert [name for name in kernels if group_of(name) == "torch"] == []


def test_the_report_tells_of_how_many_gpus_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    file = tmp_path / "out.json"
    sampling = sampling_params("temperature=0.6,top_k=20,top_p=0.95")
    engine = Mock()
    report(Namespace(size="8B", batches=[], prefill=[], mixed=[], json=file, sampling=sampling), 4, engine)
    assert engine.sampling == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    written = json.loads(file.read_text())
    assert (written["hardware"], written["tensor_parallel_size"], written["profiles"]) == ("a GPU", 4, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor-parallel-size", "3"], "tensor-parallel size 3 does not divide the model's 16 query heads"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size: input should be greater than or equal to 1, got 0"),
        (["--sampling", "top_x=3"], "no top_x in sampling; there are temperature, top_k, top_p"),
        (["--sampling", "top_k=many"], "Expected `int`, got `str` - at `$.top_k`"),
        (["--sampling", "greedy"], "no greedy in sampling"),
        (["--sampling", "seed=3"], "no seed in sampling"),
        (["--set", "device"], "--set: 'device' is not of the form OPTION=VALUE"),
        (["--set", "device=cpu"], "needs a CUDA GPU: there is no device to profile here"),
    ],
)
def test_what_cannot_be_profiled_is_told(options: list[str], message: str, root: Path) -> None:
    run = subprocess.run([*PROFILE, *options], cwd=root, capture_output=True, text=True, check=False, timeout=55)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
