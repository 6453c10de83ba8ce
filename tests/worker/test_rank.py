"""What a rank says when it cannot start: one readable line for the supervisor, and an exit code."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch

from model.config import Qwen3Config
from model.published import write_config
from worker.children import RankSpec
from worker.config import EngineConfig
from worker.control import ChildEnd, Fatal, SupervisorEnd
from worker.endpoint import private_endpoint
from worker.rank import run_rank
from worker.runtime import captured_tokens, max_mixed_tokens, resolve


def reason_of(config: EngineConfig) -> str:
    """Run a rank that must give up; returns its reason."""
    ours, theirs = multiprocessing.Pipe()
    spec = RankSpec(
        rank=0,
        epoch=1,
        config=config,
        gateways=private_endpoint("test"),
        plans=private_endpoint("test"),
        rendezvous="",
    )
    began = time.monotonic()
    assert run_rank(spec, ChildEnd(theirs)) != 0
    assert time.monotonic() - began < 3.0
    theirs.close()
    told = SupervisorEnd(ours).receive()
    ours.close()
    assert isinstance(told[-1], Fatal)
    assert "\n" not in told[-1].reason
    return told[-1].reason


@pytest.fixture
def config(tiny_checkpoint: Path) -> EngineConfig:
    return EngineConfig(model=str(tiny_checkpoint), device="cpu", num_blocks=20, block_size=16)


def changed(config: EngineConfig, **fields: object) -> EngineConfig:
    return EngineConfig.model_validate(config.model_dump() | fields)


def test_a_folder_that_is_not_there(config: EngineConfig, tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    assert reason_of(changed(config, model=str(folder))).startswith(f"{folder}: no such folder")


def test_another_architecture(config: EngineConfig, tmp_path: Path) -> None:
    shutil.copytree(config.model, tmp_path, dirs_exist_ok=True)
    shape = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape | {"architectures": ["LlamaForCausalLM"]}))
    reason = reason_of(changed(config, model=str(tmp_path)))
    assert "LlamaForCausalLM" in reason
    assert "Qwen3ForCausalLM" in reason


def test_no_weights(config: EngineConfig, tmp_path: Path) -> None:
    shutil.copy(Path(config.model) / "config.json", tmp_path)
    assert str(tmp_path) in reason_of(changed(config, model=str(tmp_path)))


def test_a_number_of_ranks_that_does_not_divide(config: EngineConfig) -> None:
    reason = reason_of(changed(config, tensor_parallel_size=3))
    assert "tensor-parallel size 3" in reason
    assert "use one of 1, 2, 4" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(config: EngineConfig) -> None:
    reason = reason_of(changed(config, device="cuda"))
    assert "0 found" in reason
    assert "device=cpu" in reason


def test_going_without_what_there_is_not(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "pdl,speed")
    assert reason_of(config).startswith("LIGHTQWEN_WITHOUT: there is no speed to go without; there are pdl,")


def test_what_a_rank_goes_without_is_told(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "small_linear,pdl")
    reason_of(changed(config, num_blocks=3, max_model_len=64))
    assert caplog.messages[0] == "rank=0 goes without: pdl, small_linear"


def test_a_context_that_the_kv_cache_does_not_hold(config: EngineConfig) -> None:
    reason = reason_of(changed(config, num_blocks=3, max_model_len=64))
    assert reason.startswith("max_model_len=64 does not fit the KV cache of 3 blocks of 16 tokens; lower it to 48")


def test_a_context_beyond_the_checkpoints(config: EngineConfig) -> None:
    assert "max_model_len=300 is beyond the checkpoint's 256" in reason_of(changed(config, max_model_len=300))


def test_fewer_tokens_a_step_than_running_requests(config: EngineConfig) -> None:
    reason = reason_of(changed(config, max_batched_tokens=16, max_running=17))
    assert "max_batched_tokens=16 is below max_running=17" in reason


@pytest.mark.parametrize("max_mixed_tokens", [16, 65])
def test_mixed_steps_out_of_bounds(config: EngineConfig, max_mixed_tokens: int) -> None:
    limits = {"max_running": 17, "max_batched_tokens": 64, "max_mixed_tokens": max_mixed_tokens}
    reason = reason_of(changed(config, **limits))
    assert f"max_mixed_tokens={max_mixed_tokens} must be at least max_running=17" in reason
    assert "at most max_batched_tokens=64" in reason


def test_more_memory_than_there_is(config: EngineConfig) -> None:
    reason = reason_of(changed(config, num_blocks=1 << 40))
    assert "KV blocks need" in reason
    assert "lower num_blocks" in reason


def test_no_memory_for_one_block(config: EngineConfig) -> None:
    reason = reason_of(changed(config, num_blocks=None, cpu_kv_gib=1e-9))
    assert "no memory for one KV block" in reason
    assert "cpu_kv_gib" in reason


def test_weights_that_do_not_fit(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmany lines follow")

    monkeypatch.setattr("worker.rank.build_runner", too_much)
    assert "raise tensor_parallel_size" in reason_of(config)


@pytest.mark.parametrize(
    ("size", "ranks", "captured", "mixed", "batched"),
    [
        ("0.6B", 1, 8192, 8192, 8192),
        ("1.7B", 1, 8192, 8192, 8192),
        ("8B", 2, 4096, 4096, 8448),
        ("8B", 1, 2048, 2048, 8448),
        ("32B", 4, 2048, 2048, 8448),
        ("32B", 2, 1280, 1280, 8448),
        ("32B", 1, 640, 1024, 8448),
    ],
)
def test_large_models_have_room_for_prompts_beside_decodes(
    monkeypatch: pytest.MonkeyPatch,
    config: EngineConfig,
    tmp_path: Path,
    size: str,
    ranks: int,
    captured: int,
    mixed: int,
    batched: int,
) -> None:
    """And but for the largest ones' such a step has a graph; one of prompts alone has it, or whole turns of tiles."""
    shape = Qwen3Config.from_folder(write_config(size, tmp_path))
    flops = 2 * shape.layer_parameters / ranks
    assert max(captured_tokens(flops)) == captured
    assert max_mixed_tokens(changed(config, max_batched_tokens=None), 8192, 256, flops, on_gpu=True) == mixed
    assert max_mixed_tokens(changed(config, max_batched_tokens=None), 5000, 256, flops, on_gpu=True) == min(mixed, 5000)

    monkeypatch.setattr("worker.runtime._device", lambda config, rank: torch.device("cuda", rank))
    monkeypatch.setattr("worker.runtime.resolve_backend", lambda wanted, device: "triton")
    asked = {"max_running": 256, "max_batched_tokens": None, "max_mixed_tokens": None, "tensor_parallel_size": ranks}
    runtime = resolve(changed(config, **asked), shape, 0)
    assert (runtime.max_batched_tokens, runtime.max_mixed_tokens) == (batched, mixed)
