"""Compile kernels before a process needs them, several at a time.

A process compiles a kernel when it first launches it, one after the other, and a step has some hundred of them. What
has been compiled lies in Triton's cache on disk, so that other processes can fill it: threads would wait for one
another. To learn what is wanted, launches are tried without being made. Forked processes then compile, and touch
nothing of the GPU.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from model.errors import ModelError
from model.kernels import cuda_source
from model.kernels.cuda_source import Source
from model.kernels.runtime import triton

logger = logging.getLogger(__name__)

_WORD = 4  # bytes of a number in a pipe
# What says that a folder cannot be written, or has no room.
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}


class _Wanted(Protocol):
    """A kernel to be compiled."""

    @property
    def name(self) -> str: ...

    def in_cache(self) -> bool:
        """Tell whether it lies in the cache."""

    def compile(self) -> object:
        """Have it in the cache."""


@dataclass(frozen=True, slots=True)
class _OfTriton:
    """A kernel of Triton's: the function, and what `preload` is to be told of the variant."""

    function: Any
    specialization: str

    @property
    def name(self) -> str:
        return str(self.function.__name__)

    def in_cache(self) -> bool:
        """Have it in this process, and tell whether it lay in the cache."""
        hits: list[bool] = []

        def listen(*, cache_hit: bool, **_: object) -> None:
            hits.append(cache_hit)

        knobs = triton.knobs.compilation
        before, knobs.listener = knobs.listener, listen
        try:
            self.function.preload(self.specialization)
        finally:
            knobs.listener = before
        return all(hits)

    def compile(self) -> None:
        kernel = self.function.preload(self.specialization)
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)  # which Triton 3.6 compiles, too


@dataclass(frozen=True, slots=True)
class _OfSource:
    """A kernel in CUDA C++."""

    source: Source

    @property
    def name(self) -> str:
        return self.source.name

    def in_cache(self) -> bool:
        return self.source.in_cache()

    def compile(self) -> None:
        self.source.cubin()


def compile_ahead(
    launch: Callable[[], object],
    *,
    processes: int,
    settle: Callable[[], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
    begin: float = 0.0,
) -> bool:
    """Have in Triton's cache what `launch` launches, without launching it: what kernels would write stays as it is.

    Up to `processes` forked ones compile; each calls `settle` first. `progress` is told how many kernels are done, and
    of how many. Who does the same at the same time, such as other ranks, should `begin` elsewhere in the list, from 0
    to 1. Nothing is forked where all is in the cache. What cannot be compiled is logged, and will be found out by who
    launches it. Returns whether everything is in the cache.

    Raises:
        ModelError: the cache cannot be written, and not everything is in it.
    """
    with _launches_tried() as wanted:
        launch()  # whatever follows, since ranks wait for one another in what is not a kernel of ours
    kernels = list(wanted.values())
    if processes < 2:
        return False
    started = time.monotonic()
    try:
        if all(kernel.in_cache() for kernel in kernels):  # up to the first that was not
            return True
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        raise ModelError(_no_place(error)) from error
    first = int(begin * len(kernels))
    kernels = kernels[first:] + kernels[:first]  # those that are there are done at once
    failed = _compile_in_processes(kernels, min(processes, len(kernels)), settle, progress)
    logger.info("compiled kernels=%d seconds=%.1f", len(kernels), time.monotonic() - started)
    if failed:
        logger.warning("compiling kernels ahead failed in %d processes", failed)
    return not failed


def _no_place(error: OSError) -> str:
    where = error.filename or triton.knobs.cache.dir
    return (
        f"cannot keep compiled kernels: {where}: {error.strerror}; "
        "let this user write there, make room, or name another folder in TRITON_CACHE_DIR (worker.compile: by --into)"
    )


@contextmanager
def _launches_tried() -> Iterator[dict[object, _Wanted]]:
    """Launch nothing, and collect the kernels: of Triton's, those that this process has not compiled yet."""
    wanted: dict[object, _Wanted] = {}  # by what tells them apart
    run = triton.JITFunction.run

    def collect(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        wanted[fn.name, key] = _OfTriton(fn.jit_function, compile["specialization_data"])
        return True

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    def collect_source(source: Source) -> None:
        wanted[source] = _OfSource(source)

    knobs = triton.knobs.runtime
    before, knobs.jit_cache_hook = knobs.jit_cache_hook, collect
    cuda_source.instead_of_launching = collect_source
    triton.JITFunction.run = only_compile  # else those that it has compiled would run, on what the others did not write
    try:
        yield wanted
    finally:
        triton.JITFunction.run = run
        cuda_source.instead_of_launching = None
        knobs.jit_cache_hook = before


def _compile_in_processes(
    kernels: list[_Wanted], processes: int, settle: Callable[[], None], progress: Callable[[int, int], None]
) -> int:
    """Return how many of the processes failed. Each takes the number of the next kernel from one pipe, and tells of it
    in another when it is done, which ends when all have. In a third one it says that there is no place for kernels.

    Raises ModelError where one has said so.
    """
    device = triton.runtime.driver.active.get_current_device()
    todo, give = os.pipe()
    told, done = os.pipe()
    reasons, complain = os.pipe()
    # All that there is to do, before anybody can be gone who would take it; a pipe has room for thousands.
    os.write(give, b"".join(number.to_bytes(_WORD, "little") for number in range(len(kernels))))
    os.close(give)
    children: list[int] = []
    for _ in range(processes):
        try:
            child = _fork()
        except OSError as error:  # no more processes, or no more memory for them
            logger.warning("%d of %d processes compile kernels: %s", len(children), processes, error)
            break
        if child == 0:
            code = 1
            try:
                os.close(told)
                os.close(reasons)
                settle()
                code = _take_and_compile(kernels, todo, done, complain, device)
            finally:
                os._exit(code)  # nothing of the parent's is to be cleaned up here
        children.append(child)
    for end in (todo, done, complain):
        os.close(end)
    count = 0
    progress(count, len(kernels))
    while arrived := os.read(told, _WORD * len(kernels)):
        count += len(arrived) // _WORD
        progress(count, len(kernels))
    os.close(told)
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    with open(reasons, encoding="utf-8") as lines:
        if reason := lines.readline():
            raise ModelError(reason.rstrip())
    return failed


def _fork() -> int:
    with warnings.catch_warnings():  # of other threads' locks, of which the compiler needs none
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _take_and_compile(kernels: list[_Wanted], todo: int, done: int, complain: int, device: int) -> int:
    """Compile as long as there is something to do, and place for it; return 1 if anything failed, else 0."""
    # PyTorch would ask CUDA, which does not work in a forked process.
    triton.runtime.driver.active.get_current_device = lambda: device
    failed = 0
    while taken := os.read(todo, _WORD):
        kernel = kernels[int.from_bytes(taken, "little")]
        try:
            kernel.compile()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _NO_PLACE:
                os.write(complain, f"{_no_place(error)}\n".encode())
                return 1
            # Whatever it is, it comes again where the kernel is launched, and is not lost there.
            logger.warning("cannot compile %s ahead", kernel.name, exc_info=True)
            failed = 1
        os.write(done, taken)
    return failed
