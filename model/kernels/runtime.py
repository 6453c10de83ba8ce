"""The one place that imports Triton, and the one place that decides between a kernel and its torch reference.

Without Triton (a laptop that runs on CPU) every kernel module still imports: `jit` then leaves the kernel a plain
function that nothing calls. Gluon is Triton's lower level, where a kernel says itself what lies in shared memory, who
has which element and what is waited for; Triton's interpreter does not run it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from model.errors import ModelError

# Multiply and add in one instruction, as Triton does by default up to 3.9, and will not from 3.10 on.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = None
if triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    from triton.runtime.jit import DependenciesFinder

    _update_hash = DependenciesFinder._update_hash

    def _constants_first(self: Any, function: Any) -> None:
        # Triton 3.6 takes over the constants of a called function before it has looked for them, so that the name of a
        # kernel in the cache depends on what the process has compiled before; 3.9 looks first, and so does this.
        _ = function.cache_key
        _update_hash(self, function)

    DependenciesFinder._update_hash = _constants_first
try:  # it is called experimental
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
except ImportError:
    gluon = gl = hopper = None

__all__ = [
    "HOPPER_TO_BE",
    "constexpr",
    "fetches_tiles",
    "gl",
    "gluon_constexpr",
    "gluon_jit",
    "gluon_jit_once",
    "hopper",
    "is_hopper",
    "jit",
    "jit_once",
    "multiprocessors",
    "tl",
    "triton",
    "unwanted",
    "use_triton",
    "wanted",
]

HOPPER_TO_BE = torch.device("meta")
"""Stands for a Hopper that is not there. Meta tensors have shapes and no memory, which is all that it takes to try a
launch (`model.kernels.ahead`); PyTorch's operations on them do nothing."""
_HOPPER_MULTIPROCESSORS = 132  # of an H100 or H200 in its SXM form

DISPENSABLE = (
    "pdl",
    "small_linear",
    "symmetric_memory",
    "sharded_sampling",
    "tensor_descriptors",
    "fused_decode",
    "cublaslt",
    "clusters",
    "gated_linear",
)
"""What GPUs are faster with, where it works, and can do without; docs/performance.md tells of each."""


def wanted(name: str) -> bool:
    """Tell whether one of `DISPENSABLE` is to be used where it can work: LIGHTQWEN_WITHOUT does not name it.

    A variable reaches every process of a server or a benchmark, so that one command compares with and without.

    Raises ModelError where the variable names something else.
    """
    assert name in DISPENSABLE, name
    return name not in unwanted()


def unwanted() -> frozenset[str]:
    """Return those of `DISPENSABLE` that the variable LIGHTQWEN_WITHOUT names, with commas between.

    Raises ModelError where it names something else.
    """
    return _names(os.environ.get("LIGHTQWEN_WITHOUT", ""))


@cache
def _names(value: str) -> frozenset[str]:
    names = frozenset(filter(None, value.split(",")))
    if unknown := names - set(DISPENSABLE):
        raise ModelError(
            f"LIGHTQWEN_WITHOUT: there is no {', '.join(sorted(unknown))} to go without; "
            f"there are {', '.join(DISPENSABLE)}"
        )
    return names


def jit(function: Callable[..., Any]) -> Any:
    """Compile `function` with Triton where it is installed (in its interpreter where TRITON_INTERPRET=1)."""
    return function if triton is None else triton.jit(function)


def jit_once(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """Return `jit` for a kernel whose arguments `varying` change from step to step.

    Triton compiles a variant of a kernel for integers that are 1 or divisible by 16, and for pointers that are aligned.
    Where that changes while requests run, one of them would wait for the compiler.
    """
    return lambda function: function if triton is None else triton.jit(function, **_unspecialized(varying))


def gluon_jit(function: Callable[..., Any]) -> Any:
    """As `jit`, for functions in Gluon."""
    return function if gluon is None else gluon.jit(function)


def gluon_jit_once(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """As `jit_once`, for a kernel in Gluon."""
    return lambda function: function if gluon is None else gluon.jit(**_unspecialized(varying))(function)


def gluon_constexpr(function: Callable[..., Any]) -> Any:
    """Let kernels in Gluon call a function of constants, such as one that returns a layout."""
    return function if gluon is None else gluon.constexpr_function(function)


def _unspecialized(varying: tuple[str, ...]) -> dict[str, Any]:
    return {"do_not_specialize": varying, "do_not_specialize_on_alignment": varying}


def constexpr(value: int) -> Any:
    """Return a module's constant in the form in which kernels may read it."""
    return value if triton is None else tl.constexpr(value)


def use_triton(x: torch.Tensor) -> bool:
    """Tell whether an operation on `x` runs as a Triton kernel: it does on a GPU, there or to be, nowhere else.

    Raises ModelError for such a tensor where Triton is not installed.
    """
    if x.is_cpu:
        return False
    if triton is None:
        raise ModelError(
            "running on CUDA needs the package triton, which is not installed; install it or use --device cpu"
        )
    return True


@cache
def is_hopper(device: torch.device) -> bool:
    """Tell whether `device` is a GPU of the generation (compute capability 9) that the project measures on."""
    if device == HOPPER_TO_BE:
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    if device == HOPPER_TO_BE:
        return _HOPPER_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def fetches_tiles(device: torch.device) -> bool:
    """Tell whether kernels in Gluon, for which a tensor memory accelerator fetches tiles, can run and are wanted."""
    return is_hopper(device) and gluon is not None and wanted("tensor_descriptors")
