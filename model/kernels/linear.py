"""Linear layers with what stands around them, and the one place that decides in how many launches.

In steps of few rows, a product and the SiLU gate may be one launch, and so may a product, the residual addition and
the norm behind it, but for a scale that the next product applies (`small_linear`); how such a launch is cut, and
whether it pays, stands in `tilings`. Of many rows, a product and the gate still may (`gated_linear`). Everything
else, and anything on the CPU, is one operation after another, of which products are a library's (`cublaslt`,
`packed`).
"""

from __future__ import annotations

import torch

from model.kernels import cublaslt, packed
from model.kernels.activation import silu_and_mul
from model.kernels.cuda_source import compiles
from model.kernels.dependent import dependent_launch
from model.kernels.gated_linear import cut_for, gated_linear, load_kernels
from model.kernels.norm import Normed, add_rms_norm, rms_norm
from model.kernels.peer_sum import OneShot, Push
from model.kernels.runtime import fetches_tiles, multiprocessors, use_triton, wanted
from model.kernels.small_linear import Tiling, small_linear_add_norm_triton, small_linear_triton
from model.kernels.tilings import summing_tiling_for, tiling_for

_RING_ROWS = 8  # the fewest that ring is measured with


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    push: Push | None = None,
) -> torch.Tensor:
    """Return x @ weight.T + bias.

    x: [rows, k], contiguous. weight: [n, k], or as `packed.pack` made it. bias: [n]. `out` is where the result goes if
    nothing speaks against it. With `push`, for which `can_push` must be true, it goes to the other ranks too.
    """
    tiling = _tiling(x, weight, clusters=bias is None) if push is None else _pushing(x, weight)
    if tiling is not None:
        return small_linear_triton(x, weight, bias, out=out, push=push, tiling=tiling, pdl=bool(dependent_launch(x)))
    assert push is None, "only ring pushes"
    return _separate(x, weight, bias, out=out)


def can_push(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Tell whether `linear` can push its result to other ranks."""
    return _pushing(x, weight) is not None


def can_sum(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Tell whether `linear_sum_add_norm` can be called."""
    return _summing(x, weight) is not None


def linear_sum_add_norm(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float, one_shot: OneShot
) -> tuple[Normed, torch.Tensor]:
    """Return (rms_norm(total, gain, eps), total), total being residual + the sum over all ranks of x @ weight.T: the
    same bits on every rank, however it sums; what is normed, on those that launch the same. `can_sum` must be true.
    Shapes: as for `linear_add_norm`.
    """
    tiling = _summing(x, weight)
    assert tiling is not None, "clusters alone sum"
    pdl = bool(dependent_launch(x))
    return small_linear_add_norm_triton(x, weight, None, residual, gain, eps, one_shot=one_shot, tiling=tiling, pdl=pdl)


def norm_linear(
    normed: Normed, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gated: bool = False
) -> torch.Tensor:
    """Return `linear` of rows behind a norm; with `gated` silu of its first half of features times the second half."""
    x = normed.x
    tiling = _tiling(x, weight, gated=gated, clusters=bias is None and not gated)
    if tiling is not None:
        pdl = bool(dependent_launch(x))
        return small_linear_triton(x, weight, bias, scale=normed.scale, gated=gated, tiling=tiling, pdl=pdl)
    if gated and bias is None and _gates_many(weight):
        cut = cut_for(x.shape[0], weight.shape[0] // 2, weight.shape[1], multiprocessors(x.device))
        if cut is not None:
            scale = normed.scale if cut.scales else None
            rows = normed.finish() if scale is None else x
            return gated_linear(rows, weight, scale=scale, cut=cut, pdl=bool(dependent_launch(x)))
    product = _separate(normed.finish(), weight, bias)
    return silu_and_mul(product) if gated else product


def load_gates(weight: torch.Tensor, most_rows: int) -> None:
    """Compile and load all kernels of which `norm_linear` with a gate launches one for up to so many rows: the very
    number decides which, and steps can have any."""
    if _gates_many(weight):
        load_kernels(weight, most_rows, multiprocessors(weight.device))


def linear_add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
) -> tuple[Normed, torch.Tensor]:
    """Return (rms_norm(residual + linear(x), gain, eps), residual + linear(x)).

    x, weight, bias: as for `linear`. residual: [rows, n], contiguous; the second result may take its memory. gain: [n].
    """
    tiling = _tiling(x, weight, adds=True, clusters=bias is None)
    if tiling is not None:
        pdl = bool(dependent_launch(x))
        return small_linear_add_norm_triton(x, weight, bias, residual, gain, eps, tiling=tiling, pdl=pdl)
    if bias is None and not weight.is_mkldnn:  # added where it is stored: the norm has half as much to read and write
        if (product := cublaslt.product_for(x, weight)) is not None:
            product.run(x, weight, residual, add=True)
        else:
            residual.addmm_(x, weight.t())
        return Normed(rms_norm(residual, gain, eps)), residual
    normed, total = add_rms_norm(packed.linear(x, weight, bias), residual, gain, eps)
    return Normed(normed), total


def _separate(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear` by a library."""
    product = cublaslt.product_for(x, weight) if bias is None else None
    if product is not None:
        out = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
        product.run(x, weight, out)
        return out
    return packed.linear(x, weight, bias, out=out)


def _tiling(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    gated: bool = False,
    adds: bool = False,
    push: bool = False,
    clusters: bool = False,
) -> Tiling | None:
    """How to compute a layer in one launch, with `clusters` also by those; None where that is not to be done."""
    if not _wants_small_linear(x):
        return None
    n, k = weight.shape
    rows = max(x.shape[0], _RING_ROWS) if push else x.shape[0]
    clusters = clusters and _has_clusters(x.device)
    tiling = tiling_for(rows, n, k, gated=gated, adds=adds, push=push, clusters=clusters)
    if tiling is not None and tiling.form == "ring" and not fetches_tiles(x.device):
        return None
    return tiling


def _pushing(x: torch.Tensor, weight: torch.Tensor) -> Tiling | None:
    """How to compute a layer that pushes; None where it cannot. Of one row or two, too, only ring does: programs of fma
    have but a few features each, and would wait long for those to arrive."""
    tiling = _tiling(x, weight, push=True)
    return tiling if tiling is not None and tiling.form == "ring" else None


def _summing(x: torch.Tensor, weight: torch.Tensor) -> Tiling | None:
    """How to compute a layer that adds up what ranks have; None where it cannot."""
    if not _wants_small_linear(x) or not _has_clusters(x.device):
        return None
    return summing_tiling_for(x.shape[0], *weight.shape)


def _gates_many(weight: torch.Tensor) -> bool:
    """Tell whether gate, up and SiLU of many rows may be one launch."""
    return wanted("gated_linear") and weight.dtype is torch.bfloat16 and use_triton(weight) and compiles(weight.device)


def _has_clusters(device: torch.device) -> bool:
    return wanted("clusters") and fetches_tiles(device) and compiles(device)


def _wants_small_linear(x: torch.Tensor) -> bool:
    """Tell whether fused launches are for `x`; tilings are for elements of two bytes with bfloat16's range."""
    return wanted("small_linear") and x.dtype is torch.bfloat16 and use_triton(x)
