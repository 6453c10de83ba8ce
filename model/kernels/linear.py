"""Linear layers with what stands around them, and the one place that decides in how many launches.

In steps of few rows, a norm with its residual addition, the product and the SiLU gate may be one launch
(`small_linear`); how it is cut, and whether it pays, stands in `tilings`. Everything else, and anything on the CPU, is
one operation after another.
"""

from __future__ import annotations

import torch

from model.kernels import packed
from model.kernels.activation import silu_and_mul
from model.kernels.dependent import dependent_launch
from model.kernels.norm import add_rms_norm, rms_norm
from model.kernels.runtime import use_triton, wanted
from model.kernels.small_linear import Tiling, small_linear_triton
from model.kernels.tilings import tiling_for

_ROWS_WITHOUT_PDL = 4
"""With more rows, and launches that are not dependent, cuBLAS was the faster (docs/performance.md)."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x @ weight.T + bias, and with `gated` silu of its first half of features times the second half.

    x: [rows, k], contiguous. weight: [n, k], or as `packed.pack` made it. bias: [n]. `out` is where the result goes if
    nothing speaks against it.
    """
    tiling = _tiling(x, weight, norm=False, gated=gated)
    if tiling is not None:
        pdl = bool(dependent_launch(x))
        return small_linear_triton(x, weight, bias, gated=gated, out=out, tiling=tiling, pdl=pdl)[0]
    if gated:
        return silu_and_mul(packed.linear(x, weight, bias))
    return packed.linear(x, weight, bias, out=out)


def norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (linear(rms_norm(x + residual)), x + residual), the sum being x itself where `residual` is None.

    x, residual: [rows, k]. norm: [k], with `eps`. weight, bias, gated: as for `linear`. Inputs are not written.
    """
    tiling = _tiling(x, weight, norm=True, gated=gated)
    if tiling is not None:
        return small_linear_triton(
            x,
            weight,
            bias,
            norm=norm,
            eps=eps,
            residual=residual,
            gated=gated,
            tiling=tiling,
            pdl=bool(dependent_launch(x)),
        )
    if residual is None:
        normed, total = rms_norm(x, norm, eps), x
    else:
        normed, total = add_rms_norm(x, residual, norm, eps)
    return linear(normed, weight, bias, gated=gated), total


def _tiling(x: torch.Tensor, weight: torch.Tensor, *, norm: bool, gated: bool) -> Tiling | None:
    """How to compute a layer in one launch; None where that is not to be done."""
    if not _wants_small_linear(x):
        return None
    rows, (n, k) = x.shape[0], weight.shape
    return tiling_for(rows, n, k, norm=norm, gated=gated)


def _wants_small_linear(x: torch.Tensor) -> bool:
    """Tell whether fused launches are for `x`; tilings are for elements of two bytes with bfloat16's range."""
    pays = x.shape[0] <= _ROWS_WITHOUT_PDL or bool(dependent_launch(x))
    return pays and wanted("small_linear") and x.dtype is torch.bfloat16 and use_triton(x)
