"""The engine on a real GPU: logits against transformers, graphs against eager steps, no hidden synchronisation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers import Qwen3Config as HfConfig
from transformers import Qwen3ForCausalLM as HfModel

from model.kernels import cluster_linear, gated_linear, rows, small_linear
from model.parallel import TensorParallel
from tests.worker import gpu_rank
from tests.worker.gpu_engine import BLOCK, MAX_LEN, generate, make_runner, make_scheduler, requests

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of a published shape's proportions, small enough to compare quickly."""
    torch.manual_seed(0)
    config = HfConfig(
        vocab_size=4099,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    HfModel(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


EVERYTHING = "small_linear,pdl,tensor_descriptors,fused_decode"
ONE_GPU = ["", "small_linear", "pdl", "tensor_descriptors", "fused_decode", EVERYTHING]


@pytest.fixture(params=ONE_GPU, ids=lambda without: f"without {without or 'nothing'}")
def _without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gone without, here and in processes that are started."""
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", request.param)


@pytest.mark.usefixtures("_without")
@pytest.mark.parametrize("step", [700, 13, 7, 3, 2, 1])
def test_logits_in_bf16_are_as_close_as_transformers_own(checkpoint: Path, step: int) -> None:
    """In steps of many tokens and of few, for which there are other kernels."""
    ids = torch.randint(0, 4099, (700 if step == 700 else 200,), generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def reference(dtype: torch.dtype, attention: str) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation=attention).cuda()
        return model(ids[None].cuda()).logits[0].double()

    exact = reference(torch.float32, "eager")
    own_errors = [(reference(torch.bfloat16, kind) - exact).norm() / exact.norm() for kind in ("eager", "sdpa")]
    logits = gpu_rank.logits_of(checkpoint, TensorParallel.single(), ids, step).double()
    error = (logits - exact).norm() / exact.norm()
    assert error <= 1.2 * max(own_errors), f"{error:.2e} against transformers' {own_errors}"


@pytest.mark.usefixtures("_without")
def test_greedy_tokens_in_fp32_equal_transformers(checkpoint: Path) -> None:
    runner, shape = make_runner(checkpoint, dtype="float32")
    submits = requests(8, temperature=0.0)
    outputs = generate(runner, shape, submits)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").cuda()
    for submit in submits:
        prompt = torch.from_numpy(np.frombuffer(submit.prompt, "<i4").astype(np.int64))[None].cuda()
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=48,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert outputs[submit.request] == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.usefixtures("_without")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_graphs_give_what_eager_steps_give_bit_for_bit(checkpoint: Path, temperature: float) -> None:
    batches = [
        requests(16, temperature, lengths=(2, 30)),  # as many as the largest graph has rows
        # Prompts of 64 tokens: their step has as many tokens as a captured one.
        *(requests(count, temperature, lengths=(64, 65)) for count in (8, 4, 2, 1)),
    ]
    outputs = []
    for cuda_graphs in (True, False):
        runner, shape = make_runner(checkpoint, cuda_graphs=cuda_graphs)
        outputs.append([generate(runner, shape, submits) for submits in batches])
    assert outputs[0] == outputs[1]


def test_layers_fetch_whole_tiles(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not there take long to fetch (`model.kernels.rows`), so whoever makes rows leaves room behind."""
    fetched: list[tuple[int, int, int]] = []

    def whole_tiles(x: torch.Tensor, block_rows: int) -> torch.Tensor:
        tiles = rows.whole_tiles(x, block_rows)
        fetched.append((x.shape[0], block_rows, len(tiles)))
        return tiles

    for module in (small_linear, cluster_linear, gated_linear):
        monkeypatch.setattr(module, "whole_tiles", whole_tiles)
    runner, shape = make_runner(checkpoint, cuda_graphs=False)
    for count, lengths in ((11, (2, 30)), (1, (40, 41)), (1, (70, 71))):
        generate(runner, shape, requests(count, 0.0, lengths=lengths))
    assert {number for number, *_ in fetched} >= {11, 40, 70}
    assert [tile for tile in fetched if tile[2] % tile[1]] == []


def test_the_first_start_compiles_in_other_processes(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.worker.first_start", str(checkpoint)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["others"] >= 20
    assert len(report["own"]) <= 1, "but for the first, which tells that nothing is there"


def test_nothing_is_compiled_that_was_shipped(checkpoint: Path, tmp_path: Path) -> None:
    """What was compiled by a process that sees no GPU is what steps launch on one."""
    shipped = {"LIGHTQWEN_KERNELS": str(tmp_path / "shipped"), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    options = [f"max_model_len={MAX_LEN}", "max_running=16", "max_batched_tokens=512", f"block_size={BLOCK}"]
    command = [sys.executable, "-m", "worker.compile", "--model", str(checkpoint), "--set", *options]
    environment = {**os.environ, **shipped, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "tests.worker.first_start", str(checkpoint)]
    done = subprocess.run(command, env={**os.environ, **shipped}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"own": [], "others": 0}


@pytest.mark.usefixtures("_without")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_step_never_waits_for_the_device(checkpoint: Path, cuda_graphs: bool) -> None:
    runner, shape = make_runner(checkpoint, cuda_graphs=cuda_graphs)
    generate(runner, shape, requests(4, 0.7))  # whatever is set up at first use
    scheduler = make_scheduler(runner, shape)
    for submit in requests(8, 0.7):
        scheduler.submit(0, submit)
    in_flight = []
    while (planned := scheduler.plan()) is not None:
        try:
            torch.cuda.set_sync_debug_mode("error")
            runner.launch(planned.plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        in_flight.append(planned)
        if len(in_flight) == 2:
            scheduler.retire(in_flight.pop(0), runner.collect())


def test_run_ahead_changes_no_token(checkpoint: Path) -> None:
    runner, shape = make_runner(checkpoint)
    submits = requests(12, 0.9, lengths=(2, 30), max_tokens=40)
    # The same batches form whatever the depth: every request starts and ends in the same step.
    assert generate(runner, shape, submits, run_ahead=1) == generate(runner, shape, submits, run_ahead=3)


@pytest.mark.skipif(torch.cuda.device_count() < gpu_rank.SIZE, reason="needs two GPUs")
@pytest.mark.parametrize(
    "without",
    [
        "",
        "symmetric_memory",
        "sharded_sampling",
        "symmetric_memory,sharded_sampling",
        "small_linear,pdl",
        f"symmetric_memory,sharded_sampling,{EVERYTHING}",
    ],
)
def test_two_ranks_compute_what_one_does(checkpoint: Path, tmp_path: Path, without: str) -> None:
    torch.multiprocessing.spawn(
        gpu_rank.main,
        args=(str(tmp_path / "rendezvous"), str(checkpoint), str(tmp_path), without),
        nprocs=gpu_rank.SIZE,
    )
    ids = torch.randint(0, 4099, (700,), generator=torch.Generator().manual_seed(1))
    alone = gpu_rank.logits_of(checkpoint, TensorParallel.single(), ids).double().cpu()
    first, second = (load_file(tmp_path / f"logits-{rank}.safetensors") for rank in range(2))
    for name, logits in first.items():
        assert torch.equal(logits, second[name])
        # Each of the layers rounds its two partial sums to bf16 before they are added.
        assert (logits.double() - alone[: len(logits)]).norm() / alone[: len(logits)].norm() <= 2e-2, name
    first_tokens, second_tokens = (json.loads((tmp_path / f"rounded-{rank}.json").read_text()) for rank in range(2))
    assert first_tokens == second_tokens
    runner, shape = make_runner(checkpoint, dtype="float32")
    expected = generate(runner, shape, requests(8, temperature=0.0))
    for rank in range(gpu_rank.SIZE):
        tokens = json.loads((tmp_path / f"tokens-{rank}.json").read_text())
        assert {int(number): output for number, output in tokens.items()} == expected
