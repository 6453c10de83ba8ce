"""Kernels that were compiled where there is no GPU, such as when an image is built, and are found where there is one.

`python -m worker.compile` fills a folder, which has the form of Triton's cache. A rank looks there for what its own
cache lacks, and nothing is ever written there. What was compiled by another version of Triton, or of our kernels, is
not found, since entries have names that depend on both; then it is compiled as if there were no folder.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from model.errors import ModelError
from model.kernels.runtime import triton

VARIABLE = "LIGHTQWEN_KERNELS"


def folder() -> Path:
    """Return where shipped kernels lie: what the variable LIGHTQWEN_KERNELS names, or a folder of the virtual
    environment. Entries know where they lie, so it cannot be moved."""
    return Path(os.environ.get(VARIABLE) or Path(sys.prefix, "share", "lightqwen", "kernels"))


def compile_nowhere(into: Path) -> None:
    """Let this process compile for a Hopper that is not there (`HOPPER_TO_BE`), from now on, with `into` as the cache.

    Raises:
        ModelError: Triton is not installed, or wants a library that is not there.
    """
    if triton is None:
        raise ModelError("compiling kernels needs the package triton, which is not installed")
    if _compiles_launchers():
        try:
            _nvidia().library_dirs()
        except (AssertionError, OSError) as error:
            raise ModelError(
                f"Triton {triton.__version__} also compiles what launches kernels, and finds no libcuda.so.1 for it; "
                "name the folder of NVIDIA's driver library in TRITON_LIBCUDA_PATH, or install a newer Triton"
            ) from error
    triton.runtime.driver.set_active(_Nowhere())
    triton.knobs.cache.dir = str(into)


class _Nowhere:
    """In the place of Triton's driver: that of a Hopper which is not there."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        """Compile what launches a kernel where Triton does so for each (up to 3.6), which takes the driver's library;
        others have nothing to do."""
        if _compiles_launchers():
            _nvidia().CudaLauncher(source, metadata)


def _compiles_launchers() -> bool:
    return hasattr(_nvidia(), "make_launcher")


def _nvidia() -> Any:
    from triton.backends.nvidia import driver  # where it is not needed, a start does not wait for it

    return driver


def use_shipped() -> None:
    """Let Triton's cache of this process find shipped kernels, where there are any.

    Raises:
        ModelError: LIGHTQWEN_KERNELS names no folder.
    """
    shipped = folder()
    if triton is None:  # which is told by who needs it
        return
    if shipped.is_dir():
        triton.knobs.cache.manager_class = _in_front_of(shipped)
    elif os.environ.get(VARIABLE):
        raise ModelError(f"{VARIABLE}: {shipped} is no folder; fill it with python -m worker.compile, or unset it")


@cache
def _in_front_of(shipped: Path) -> type:
    class InFront(triton.runtime.cache.FileCacheManager):  # type: ignore[misc, name-defined]
        """The cache on disk; what is not in it is looked for among shipped kernels."""

        def __init__(self, key: str, **settings: bool) -> None:
            super().__init__(key, **settings)
            self._behind = _Behind(shipped / key)

        def get_file(self, filename: str) -> str | None:
            return super().get_file(filename) or self._behind.get_file(filename)

        def get_group(self, filename: str) -> dict[str, str] | None:
            return super().get_group(filename) or self._behind.get_group(filename)

    class _Behind(triton.runtime.cache.FileCacheManager):  # type: ignore[misc, name-defined]
        """One entry of the shipped ones, which may only be read."""

        def __init__(self, entry: Path) -> None:  # does not make the folder, as Triton's does
            self.cache_dir = str(entry)

    return InFront
