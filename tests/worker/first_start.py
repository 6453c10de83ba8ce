"""Start on a GPU with nothing compiled: `first_start.py CHECKPOINT`.

Writes a line of JSON: which kernels this process compiled itself, and how many others did.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton

from tests.worker.gpu_engine import generate, make_runner, requests
from worker import runner


def main(folder: str) -> None:
    compiled: list[str] = []
    told: list[int] = []

    def listen(*, src: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            compiled.append(src.name)

    triton.knobs.compilation.listener = listen
    compile_ahead = runner.compile_ahead

    def watched(*args: Any, progress: Any, **options: Any) -> bool:
        def tell(done: int, total: int) -> None:
            told.append(done)
            progress(done, total)

        return compile_ahead(*args, progress=tell, **options)

    runner.compile_ahead = watched
    engine, shape = make_runner(Path(folder))
    generate(engine, shape, requests(8, 0.7))
    sys.stdout.write(json.dumps({"own": compiled, "others": max(told, default=0)}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
