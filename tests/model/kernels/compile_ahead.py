"""Compile ahead what a few steps launch, then run them: `compile_ahead.py CHECKPOINT`, without a GPU. What is shipped
in the folder that LIGHTQWEN_KERNELS names, if it is set, need not be compiled.

Writes a line of JSON: how many kernels there are, which of them were compiled when the steps ran, and what was told of
progress.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton

from model.config import Qwen3Config
from model.kernels.ahead import compile_ahead
from model.kernels.shipped import use_shipped
from tests.model.kernels.compile_only import run_steps, stand_in


def main(folder: str) -> None:
    kernels = stand_in()
    use_shipped()
    config = Qwen3Config.from_folder(folder)
    told: list[tuple[int, int]] = []
    settled: list[int] = []  # stays empty here: only the others settle

    def steps() -> None:
        run_steps(config, torch.bfloat16, decodes=(8,))

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    compile_ahead(steps, processes=2, settle=lambda: settled.append(1), progress=progress)
    launched = len(kernels)
    compiled: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            compiled.append(src.name)

    triton.knobs.compilation.listener = listen
    steps()
    compiled += [name for name, kernel in kernels.items() if not getattr(kernel, "was_cached", True)]
    report = {"launched": launched, "kernels": len(kernels), "compiled": compiled, "told": told, "settled": settled}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
