"""Compile kernels for H100 and H200 without one, as when an image is built: `python -m worker.compile 0.6B 8B 32B/2`.

Names the published shapes of Qwen3 that are to start without compiling anything, for servers of one rank or, behind a
slash, of several. --model names the folder of a checkpoint of another shape, of which only config.json is read. Options
of the engine on which kernels depend are those that the server will have (--set dtype=float16); most have no influence.

What comes of it is a folder from which servers take what their own cache lacks; see docs/configuration.md. The first
shape takes some 15 s on two cores, others, which share kernels with it, less; each process takes 0.3 GB of memory.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from model.config import Qwen3Config
from model.errors import ModelError
from model.kernels import shipped
from model.kernels.ahead import compile_ahead
from model.published import SIZES, share, split_share, write_config
from worker.config import ConfigError, EngineConfig, add_set_option, engine_config
from worker.parent import end_with
from worker.runner import try_out_nowhere


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m worker.compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shapes", nargs="*", type=share, metavar="SIZE[/RANKS]", help=f"of {', '.join(SIZES)}; ranks: 1, 2, 4 or 8"
    )
    parser.add_argument("--model", nargs="+", default=[], metavar="FOLDER", help="checkpoints of other shapes")
    add_set_option(parser)
    parser.add_argument(
        "--into", type=Path, default=shipped.folder(), metavar="FOLDER", help="where they go, for good (%(default)s)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=max(2, len(os.sched_getaffinity(0))),
        help="compile at the same time, 2 at least (%(default)s)",
    )
    arguments = parser.parse_args()
    if not arguments.shapes and not arguments.model:
        parser.error(f"name a shape, such as {SIZES[0]} or {SIZES[-1]}/2, or a folder by --model")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    options = dict(arguments.set)
    try:
        _make(arguments.into)
        shipped.compile_nowhere(arguments.into.resolve())
        with tempfile.TemporaryDirectory() as scratch:
            wanted = [(folder, {"model": folder, **options}) for folder in arguments.model]
            for shape in arguments.shapes:
                size, ranks = split_share(shape)
                folder = str(write_config(size, Path(scratch, size)))
                wanted.append((shape, {**options, "model": folder, "tensor_parallel_size": str(ranks)}))
            # In a list, so that all are tried even where one fails.
            done = [_compile(name, engine_config(of), arguments.processes) for name, of in wanted]
    except (ModelError, ConfigError) as error:
        parser.exit(1, f"worker.compile: error: {error}\n")
    return 0 if all(done) else 1


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it cannot be written")
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror or error}; name another folder by --into") from error


def _compile(name: str, config: EngineConfig, processes: int) -> bool:
    """Compile what all ranks of one server need; returns whether everything is there."""
    checkpoint = Qwen3Config.from_folder(config.model)
    checkpoint.check_parallel(config.tensor_parallel_size)
    began = time.monotonic()
    complete = True
    for rank in range(config.tensor_parallel_size):
        progress = partial(_show, f"{name}, rank {rank}" if config.tensor_parallel_size > 1 else name)
        complete &= compile_ahead(
            partial(try_out_nowhere, config, checkpoint, rank),
            processes=max(2, processes),
            settle=partial(end_with, os.getpid()),
            progress=progress,
        )
    _say(f"{name}: {'all there' if complete else 'not all could be compiled'} after {time.monotonic() - began:.0f} s\n")
    return complete


def _show(name: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        _say(f"\r{name}: {done} of {total} kernels\x1b[K" + ("\n" if done == total else ""))


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        code = 128 + 2  # what a shell reports after Ctrl-C
        _say("\n")
    os._exit(code)  # at its end the interpreter would write what it still holds of Triton's, which nobody can mend
