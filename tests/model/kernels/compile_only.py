"""Compile what steps launch for compute capability 9.0, without a GPU: `compile_only.py CHECKPOINT DTYPE`.

Whole steps run on CPU tensors through Triton's own JIT, with a driver that compiles and does not launch, so that what
they compute is garbage. Writes a line of JSON for each kernel that was compiled.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import model.kernels
import worker.tables
from model import sampler
from model.attention.triton_backend import TritonAttention
from model.config import Qwen3Config
from model.kernels import cuda_source
from model.kernels.cuda_source import Source
from model.kernels.embedding import embed_triton
from model.kernels.linear import can_push, linear, norm_linear
from model.kernels.norm import Normed, Scale
from model.kernels.peer_logits import Parts, peer_logits
from model.kernels.peer_sum import OneShot, Push, TwoShots, peer_sum, peer_sum_add_rms_norm
from model.kernels.runtime import unwanted
from model.kernels.small_linear import small_linear_triton
from model.kernels.tilings import MEASURED, PUSHED
from model.parallel import TensorParallel
from model.qwen3 import Qwen3ForCausalLM
from worker.handover import Handover
from worker.plan import NO_ADMISSION, StepBounds
from worker.shapes import StepShape
from worker.tables import SlotTables

CPU = torch.device("cpu")
MAX_LEN, BLOCK, SLOTS = 1024, 64, 256
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class CompileOnly:
    """A driver of a Hopper that is not there."""

    def launcher_cls(self, source: object, metadata: object) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class LaunchOfSource:
    """Stands for a kernel in CUDA C++ that is loaded; looks like what Triton has compiled."""

    def __init__(self, source: Source, launched: dict[str, Any]) -> None:
        self.was_cached = source.in_cache()
        self.asm = {"cubin": source.cubin()}
        self._source, self._launched = source, launched

    def launch(self, *_: object, shared_bytes: int, pdl: bool, **__: object) -> None:
        before = self._launched.get(repr(self._source))
        most = max(shared_bytes, before.metadata.shared if before else 0)
        self.metadata = SimpleNamespace(name=self._source.name, launch_pdl=pdl, shared=most)
        self._launched[repr(self._source)] = self


def main(folder: str, dtype: torch.dtype) -> None:
    kernels = stand_in()
    config = Qwen3Config.from_folder(folder)
    run_steps(config, dtype)
    run_sums(config.hidden_size, dtype)
    run_ends(config.vocab_size, config.hidden_size, dtype)
    run_pieces(dtype)
    run_gated(dtype)
    for kernel in kernels.values():
        sys.stdout.write(json.dumps(describe(kernel)) + "\n")


def stand_in() -> dict[str, Any]:
    """Pretend that there is a Hopper; return what is compiled from now on, by the hash that Triton's cache knows."""
    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel is not None:  # the launch was made, and not only tried
            kernels[kernel.hash] = kernel
        return kernel

    def compile_source(source: Source, device: torch.device) -> LaunchOfSource | None:
        if cuda_source.instead_of_launching is not None:
            cuda_source.instead_of_launching(source)
            return None
        return LaunchOfSource(source, kernels)

    driver.set_active(CompileOnly())
    JITFunction.run = compile_only
    modules = [importlib.import_module(f"model.kernels.{m.name}") for m in pkgutil.iter_modules(model.kernels.__path__)]
    stand_ins = {
        "use_triton": lambda _: True,
        "is_hopper": lambda _: True,
        "multiprocessors": lambda _: 132,
        "library_of": lambda _: None,  # of cuBLASLt, which would want a device
        "compiles": lambda _: find_spec("cuda") is not None and find_spec("cuda.bindings") is not None,
        "kernel_of": compile_source,
        "tensor_map": lambda *_: (None, None),
    }
    for module in (*modules, sampler, worker.tables):
        for name, stand_in in stand_ins.items():
            if hasattr(module, name):
                setattr(module, name, stand_in)
    return kernels


def run_steps(config: Qwen3Config, dtype: torch.dtype, decodes: Sequence[int] = ()) -> None:
    """Steps of every kind: so many rows, of which so many may be chunks."""
    attention = TritonAttention(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        block_size=BLOCK,
        device=CPU,
        dtype=dtype,
    )
    qwen3 = Qwen3ForCausalLM(
        config, attention, max_model_len=MAX_LEN, tp=TensorParallel.single(), dtype=dtype, device=CPU
    )
    tables = SlotTables(
        num_slots=SLOTS, max_model_len=MAX_LEN, block_size=BLOCK, vocab_size=config.vocab_size, device=CPU
    )
    cache = torch.zeros(
        (config.num_hidden_layers, 2, 2, BLOCK, config.num_key_value_heads, config.head_dim), dtype=dtype
    )
    nobody = torch.from_numpy(NO_ADMISSION.view(np.int32))
    tables.admit_records(nobody.view(1, -1), nobody)
    # Of what is gone without something, a few: most kernels are the same.
    few = bool(unwanted()) or dtype is torch.float32
    decodes = decodes or ((1, 4, 16, 32) if few else (1, 2, 8, 16, 32, 64, 80, 96, 128, 256))
    handover = Handover(num_places=4, num_words=4096, num_rows=SLOTS, device=CPU)
    for rows, singles, chunks in (*((rows, rows, 0) for rows in decodes), (5, 5, 3), (8, 0, 8)):
        tokens = 320 if chunks else rows
        bounds = StepBounds(
            num_tokens=tokens,
            num_decode_rows=0 if chunks else rows,
            max_single_rows=singles,
            max_chunk_rows=chunks,
            max_query_len=tokens if chunks else 1,
            max_kv_len=MAX_LEN,
        )
        slots, ones = torch.zeros(rows, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)
        tables.set_blocks(torch.zeros((3, 3), dtype=torch.int32))
        tables.fetch(handover, StepShape(rows, bounds, max_updates=rows))
        inputs, of_rows = tables.prepare(slots, ones, bounds)
        logits = qwen3.compute_logits(qwen3(inputs, cache)[:rows])
        tables.retire_to(handover, of_rows, sampler.sample(logits, slots, ones, tables.sampling))


def run_sums(width: int, dtype: torch.dtype) -> None:
    """What ranks do together, in one shot, with what is pushed already or not, and in two."""
    nowhere = torch.zeros(2, dtype=torch.int64)
    x, residual = torch.zeros((2, SLOTS, width), dtype=dtype)
    weight, push = torch.ones(width, dtype=dtype), Push(1, nowhere)
    meetings = torch.zeros(SLOTS, dtype=torch.int32)
    one_shot = OneShot(torch.zeros((1, x.numel()), dtype=dtype), push)
    two_shots = TwoShots(1, x.view(-1), nowhere, torch.zeros_like(x).view(-1), nowhere, nowhere, meetings)
    for way, pushed in ((one_shot, False), (one_shot, True), (two_shots, False)):
        peer_sum(x, way, pushed=pushed)
        peer_sum_add_rms_norm(x, residual, weight, 1e-6, way, pushed=pushed)
    square = torch.zeros((width, width), dtype=dtype)
    for rows in (1, 8, 16, 32):
        x = torch.zeros((rows, width), dtype=dtype)
        if can_push(x, square):
            linear(x, square, out=torch.empty_like(x), push=push)


def run_ends(vocab_size: int, width: int, dtype: torch.dtype) -> None:
    """What ranks of which each has a part of the vocabulary do for the embedding and for the logits."""
    meetings = torch.zeros(SLOTS, dtype=torch.int32)
    for size in (2, 8):
        columns, nowhere = -(-vocab_size // size), torch.zeros(size, dtype=torch.int64)
        table, ids = torch.zeros((columns, width), dtype=dtype), torch.zeros(3, dtype=torch.int32)
        for push in (None, Push(1, nowhere)):
            embed_triton(ids, table, columns, columns, push=push)
        for share in (False, True):
            parts = Parts(1, nowhere, nowhere, meetings)
            peer_logits(3, columns, vocab_size, dtype, parts, share=share)


def run_pieces(dtype: torch.dtype) -> None:
    """Layers in tiles of two pieces, of sizes that the checkpoint need not have."""
    if dtype is not torch.bfloat16 or {"small_linear", "tensor_descriptors"} & unwanted():
        return
    push = Push(1, torch.zeros(2, dtype=torch.int64))
    for work, tiling in (*MEASURED.items(), *PUSHED.items()):
        if tiling is not None and tiling.form == "ring" and tiling.pieces[1]:
            x, weight = (torch.empty((rows, work.k), dtype=dtype) for rows in (work.rows, work.n))
            pushed = None if work.gated else push
            small_linear_triton(x, weight, gated=work.gated, push=pushed, tiling=tiling, pdl="pdl" not in unwanted())


def run_gated(dtype: torch.dtype) -> None:
    """Gate, up and SiLU of many rows, of a width that the checkpoint need not have: in one tile for each program, with
    a norm's scale and without, and in several."""
    width, features = 512, 12288
    weight, gain = (torch.empty(shape, dtype=dtype) for shape in ((2 * features, width), (width,)))
    for rows in (65, 128, 192, 256, 1024, 2048):
        x = torch.empty((rows, width), dtype=dtype)
        norm_linear(Normed(x), weight, gated=True)
        norm_linear(Normed(x, Scale(torch.empty((rows, 4)), x, gain, 1e-6)), weight, gated=True)


def describe(kernel: Any) -> dict[str, object]:
    """Its name, and what it needs: bytes of shared memory and of stack, where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = re.search(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+)", usage)
    # What Triton's kernels have is all of the other kind. A kilobyte is the system's, and none of the 227 of a program.
    fixed = re.search(r"SHARED:(\d+)", usage)
    assert numbers is not None, usage
    return {
        "name": kernel.metadata.name,
        "dependent": kernel.metadata.launch_pdl,
        "shared": kernel.metadata.shared
        + (int(fixed[1]) - 1024 if fixed and isinstance(kernel, LaunchOfSource) else 0),
        **{name: int(number) for name, number in numbers.groupdict().items()},
    }


if __name__ == "__main__":
    main(sys.argv[1], getattr(torch, sys.argv[2]))
