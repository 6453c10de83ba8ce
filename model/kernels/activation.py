"""SwiGLU's elementwise half: SiLU of the gate times the up projection."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead.)

from __future__ import annotations

import torch
import torch.nn.functional as F

from model.kernels.dependent import begin_dependents, dependent_launch, wait
from model.kernels.rows import empty_rows
from model.kernels.runtime import jit, tl, triton, use_triton

_BLOCK = 1024


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up for x = [gate, up] side by side.

    x: [n, 2 * d], returns [n, d]. silu is rounded to x's dtype before the product, as in transformers' Qwen3MLP.
    """
    return (silu_and_mul_triton if use_triton(x) else silu_and_mul_torch)(x)


def silu_and_mul_torch(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_and_mul_triton(x: torch.Tensor) -> torch.Tensor:
    rows, width = x.shape[0], x.shape[1] // 2
    assert x.is_contiguous(), "silu_and_mul reads contiguous rows"
    out = empty_rows(rows, width, like=x)
    launch = dependent_launch(x)
    _silu_and_mul_kernel[(rows, triton.cdiv(width, _BLOCK))](
        x, out, WIDTH=width, BLOCK=_BLOCK, PDL=bool(launch), num_warps=4, **launch
    )
    return out


@jit
def _silu_and_mul_kernel(
    x_ptr,  # [rows, 2 * WIDTH]
    out_ptr,  # [rows, WIDTH]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin_dependents(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(x_ptr + row * (2 * WIDTH) + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * WIDTH) + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, (silu * up).to(dtype), mask=mask)
