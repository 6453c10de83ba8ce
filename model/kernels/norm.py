"""RMSNorm, alone and fused with the residual addition before it."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead.)

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.kernels.dependent import begin_dependents, dependent_launch, wait
from model.kernels.rows import empty_rows
from model.kernels.runtime import jit, tl, triton, use_triton


@dataclass(frozen=True, slots=True)
class Scale:
    """What is left to do of a norm of `total`: to multiply total * gain, or products with that, by 1 / rms of a row.

    squares: [rows, parts] float32, of each row the sums of the squares of its parts, in no matter which order.
    total: [rows, d]. gain: [d], the norm's weight.
    """

    squares: torch.Tensor
    total: torch.Tensor
    gain: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Normed:
    """Rows behind a norm, as a projection takes them: it may have to scale what it makes of them.

    x: [rows, d], normed; or with `scale` total * gain, rounded once.
    """

    x: torch.Tensor
    scale: Scale | None = None

    def finish(self) -> torch.Tensor:
        """Return the normed rows, for those who do not scale."""
        if self.scale is None:
            return self.x
        return rms_norm(self.scale.total, self.scale.gain, self.scale.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return weight * x / sqrt(mean(x²) + eps) over the last dimension.

    x: [n, d], weight: [d]. Computed in float32 and rounded to x's dtype before the weight is applied, which is where
    transformers' Qwen3RMSNorm rounds.
    """
    return (rms_norm_triton if use_triton(x) else rms_norm_torch)(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rms_norm(x + residual), x + residual), the sum rounded to x's dtype before it is normed.

    x, residual: [n, d], weight: [d]. Neither input is written.
    """
    return (add_rms_norm_triton if use_triton(x) else add_rms_norm_torch)(x, residual, weight, eps)


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return rms_norm_torch(total, weight, eps), total


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    normed = empty_rows(*x.shape, like=x)
    _launch(x, x, weight, normed, normed, eps, add_residual=False)
    return normed


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, total = empty_rows(*x.shape, like=x), torch.empty_like(x)
    _launch(x, residual, weight, normed, total, eps, add_residual=True)
    return normed, total


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    normed: torch.Tensor,
    total: torch.Tensor,
    eps: float,
    *,
    add_residual: bool,
) -> None:
    rows, width = x.shape
    assert all(tensor.is_contiguous() for tensor in (x, residual)), "rms_norm reads contiguous rows"
    block = triton.next_power_of_2(width)
    launch = dependent_launch(x)
    _rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        normed,
        total,
        eps,
        WIDTH=width,
        BLOCK=block,
        ADD_RESIDUAL=add_residual,
        PDL=bool(launch),
        num_warps=min(max(block // 512, 1), 16),
        **launch,
    )


@jit
def _rms_norm_kernel(
    x_ptr,  # [rows, WIDTH]
    residual_ptr,  # [rows, WIDTH], read only with ADD_RESIDUAL
    weight_ptr,  # [WIDTH]
    normed_ptr,  # [rows, WIDTH]
    total_ptr,  # [rows, WIDTH], written only with ADD_RESIDUAL
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    begin_dependents(PDL)
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    dtype = normed_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)
    x = tl.load(x_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD_RESIDUAL:
        x += tl.load(residual_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(total_ptr + row + columns, x.to(dtype), mask=mask)
        x = x.to(dtype).to(tl.float32)
    tl.store(normed_ptr + row + columns, norm_row(x, weight, eps, WIDTH, dtype), mask=mask)


@jit
def norm_row(x, weight, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Return weight * x / rms(x) of one row in `dtype`, rounded as `rms_norm` says. x, weight: [BLOCK] float32."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    return (weight * (x * scale).to(dtype).to(tl.float32)).to(dtype)
