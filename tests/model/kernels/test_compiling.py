"""Every kernel of a step compiles for a Hopper, which the interpreter cannot tell; no GPU is needed for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from model.published import write_config

pytest.importorskip("triton")

SHARED_BYTES = 227 << 10  # that a program of a Hopper can have
STACK_BYTES = 64  # for a register or two that one or the other version of the compiler cannot place
ALWAYS = {
    "_admit_kernel",
    "_choose_kernel",
    "_embed_kernel",
    "_embed_rms_norm_kernel",
    "_enter_blocks_kernel",
    "_fetch_kernel",
    "_plan_kernel",
    "_peer_logits_kernel",
    "_one_shot_kernel",
    "_two_shots_kernel",
    "_prepare_kernel",
    "_qk_norm_rope_store_kernel",
    "_retire_kernel",
    "_rms_norm_kernel",
    "_score_kernel",
    "_silu_and_mul_kernel",
}
HAS_NVRTC = bool(find_spec("cuda") and find_spec("cuda.bindings"))
GATED_LINEAR = {"gated_linear"} if HAS_NVRTC else set()
SMALL_LINEAR = {"_fma_kernel", "ring_kernel"} | ({"cluster_linear"} if HAS_NVRTC else set())
ATTENTION = {"prefill_kernel", "decode_kernel"}  # in Gluon
ATTENTION_ELSEWHERE = {"_prefill_kernel", "_decode_kernel"}
DEPENDENT = {
    *SMALL_LINEAR,
    *GATED_LINEAR,
    "_admit_kernel",
    "_prepare_kernel",
    "_retire_kernel",
    "_qk_norm_rope_store_kernel",
    "_rms_norm_kernel",
    "_silu_and_mul_kernel",
    "_score_kernel",
    "_choose_kernel",
    "_decode_kernel",
    "decode_kernel",
    "prefill_kernel",
    "_peer_logits_kernel",
    "_one_shot_kernel",
    "_two_shots_kernel",
}


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layers of 0.6B, one of them, and a vocabulary that nothing divides."""
    folder = write_config("0.6B", tmp_path_factory.mktemp("shape"))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    small = {"num_hidden_layers": 1, "vocab_size": 4099, "eos_token_id": 1, "bos_token_id": 1}
    file.write_text(json.dumps(config | small))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(450)  # half a minute on a core that nobody else wants
@pytest.mark.parametrize(
    ("dtype", "without", "others"),
    [
        ("bfloat16", "", SMALL_LINEAR | GATED_LINEAR | ATTENTION),
        ("float32", "", ATTENTION_ELSEWHERE),
        ("bfloat16", "pdl,gated_linear", SMALL_LINEAR | ATTENTION),
        ("bfloat16", "tensor_descriptors", {"_fma_kernel"} | GATED_LINEAR | ATTENTION_ELSEWHERE),
        ("bfloat16", "pdl,small_linear,tensor_descriptors,fused_decode", GATED_LINEAR | ATTENTION_ELSEWHERE),
    ],
)
def test_steps_compile(shape: Path, tmp_path: Path, dtype: str, without: str, others: set[str]) -> None:
    environment = {**os.environ, "LIGHTQWEN_WITHOUT": without, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.model.kernels.compile_only", str(shape), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == ALWAYS | others
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES, kernel
        assert kernel["stack"] <= STACK_BYTES or dtype == "float32", f"registers are spilled: {kernel}"
        assert kernel["dependent"] == ("pdl" not in without and kernel["name"] in DEPENDENT), kernel


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_what_is_compiled_ahead_is_there_when_steps_launch_it(shape: Path, tmp_path: Path) -> None:
    """Also where another model has left some of the kernels, and where all are there."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    wider = tmp_path / "wider"
    wider.mkdir()
    config = json.loads((shape / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"hidden_size": 2048, "intermediate_size": 2048}))
    for folder, missing in ((shape, True), (wider, True), (shape, False)):
        command = [sys.executable, "-m", "tests.model.kernels.compile_ahead", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert not report["launched"], "what is only tried is not launched"
        assert not report["compiled"], "steps compile what was to be there"
        assert not report["settled"]
        total = report["kernels"]
        if missing:
            assert report["told"][0] == [0, total]
            assert report["told"][-1] == [total, total]
        else:
            assert not report["told"]


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_what_is_shipped_is_what_steps_launch(shape: Path, tmp_path: Path) -> None:
    """Compiled for tensors without memory, and found for tensors that have some."""
    environment = {**os.environ, "LIGHTQWEN_KERNELS": str(tmp_path / "shipped")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "worker.compile", "--model", str(shape), "--set", "max_model_len=1024"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "all there" in done.stderr
    shipped = {file.relative_to(tmp_path) for file in tmp_path.rglob("*")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "tests.model.kernels.compile_ahead", str(shape)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kernels"] > 10
    assert not report["told"], "processes compile what is shipped"
    assert not report["compiled"]
    assert {file.relative_to(tmp_path) for file in (tmp_path / "shipped").rglob("*")} == shipped - {Path("shipped")}
