"""The one place that imports Triton, and the one place that decides between a kernel and its torch reference.

Without Triton (a laptop that runs on CPU) every kernel module still imports: `jit` then leaves the kernel a plain
function that nothing calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from model.errors import ModelError

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = None

__all__ = ["jit", "tl", "triton", "use_triton"]


def jit(function: Callable[..., Any]) -> Any:
    """Compile `function` with Triton where it is installed (in its interpreter where TRITON_INTERPRET=1)."""
    return function if triton is None else triton.jit(function)


def use_triton(x: torch.Tensor) -> bool:
    """Tell whether an operation on `x` runs as a Triton kernel: it does on CUDA, nowhere else.

    Raises ModelError for a CUDA tensor where Triton is not installed.
    """
    if x.is_cuda and triton is None:
        raise ModelError(
            "running on CUDA needs the package triton, which is not installed; install it or use --device cpu"
        )
    return x.is_cuda
