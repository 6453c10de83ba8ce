"""Linear layers of few rows, which read every weight once and compute what stands around them in the same launch.

A decode step of up to 16 rows is bound by reading the weights, and for small models by the number of launches. So one
launch here is `residual + linear(rms_norm(x))`, or `silu(gate) * up` of such a linear, each part optional.

There are two kernels. *fma* (1, 2 or 4 rows) multiplies in registers: a program owns a few weight rows and walks along
them, always one tile of the weight ahead. *dot* (up to 16 rows) multiplies on the tensor cores with the weight as the
left operand, so that the rows of x are the narrow side; it may split the reduction over several programs, the last of
which to arrive adds up the partial sums of all in a fixed order and leaves the counter as it found it.

Rounding is that of the separate operations, with one exception: *dot* applies 1 / rms(x) to the sums instead of to x,
so that x is read once, and rounds weight * x once where the norm rounds twice. The bits of a row depend on its values,
the weights and the tiling alone: not on other rows, nor on which program arrives last.

**Programmatic dependent launch (PDL).** With `pdl`, a program may start while kernels before it still run. The rules:

- Before `gdc_wait` a program reads only what no kernel writes: weights, biases and norm weights, of which it requests
  its first tiles. Everything else is read, and anything at all is written, after it.
- Every program calls `gdc_wait`, also one without work. A kernel then ends after all kernels before it have ended, so
  that waiting for the last one is waiting for all, and a kernel that was launched without PDL may follow.
- `gdc_launch_dependents` comes first: it promises nothing about memory, since whoever comes next waits for the end of
  this kernel and not for this call.

The model's layers do not use these kernels yet: no GPU has measured them. `python -m bench.small_linear` compares them
with what the layers launch now, and prints for which shapes they would pay.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead.)

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F

from model.kernels.activation import silu_and_mul_torch
from model.kernels.norm import rms_norm_torch
from model.kernels.runtime import jit, jit_once, tl, triton

_MAX_SPLIT_TILES = 4096


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut into programs.

    A launch takes up to `rows` rows: a power of two, from 1 for fma and from 8 for dot. A tile is `block_n` weight rows
    (of a gated layer half of them gates, half of them ups) and `block_k` of their columns; fma needs 256 columns for
    each of its `warps`, so that a thread has the same eight columns of all rows. `splits` programs share the reduction
    of one row block (dot only). With dependent launch, `prefetch` columns of each weight row, a power of two from 64 or
    none, are requested into the L2 cache ahead of everything else.
    """

    form: Literal["fma", "dot"]
    rows: int
    block_n: int
    block_k: int
    warps: int
    splits: int = 1
    stages: int = 1
    prefetch: int = 0

    def __post_init__(self) -> None:
        if self.form == "fma":
            assert self.block_k == 256 * self.warps, "a thread of fma has eight columns of a tile"


def small_linear_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `residual + act(norm(x) @ weight.T + bias)`, each part where it is given.

    x: [rows, k]. weight: [n, k], bias: [n]. norm: [k], the weight of an RMSNorm with `eps`. With `gated` the first
    n / 2 features are gates and the others ups, and act is silu(gate) * up. residual, and what is returned: [rows, n],
    or [rows, n / 2] with `gated`. Inputs are not written.
    """
    if norm is not None:
        x = rms_norm_torch(x, norm, eps)
    out = F.linear(x, weight, bias)
    if gated:
        out = silu_and_mul_torch(out)
    return out if residual is None else residual + out


def small_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    tiling: Tiling,
    pdl: bool = False,
) -> torch.Tensor:
    """As `small_linear_torch`, for as many rows as the tiling takes, and k divisible by 8.

    `pdl` makes it a dependent launch, for which a GPU of compute capability 9 or later is needed.
    """
    rows, (n, k) = x.shape[0], weight.shape
    width = n // 2 if gated else n
    assert rows <= tiling.rows, f"{rows} rows are too many for {tiling}"
    assert all(t.is_contiguous() for t in (x, weight, residual) if t is not None), "x, weight, residual: contiguous"
    assert k % 8 == 0, f"rows of {k} elements are not aligned"
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    # A pointer that nothing is read through stands for what is not given.
    pointers = (
        x,
        weight,
        x if bias is None else bias,
        x if norm is None else norm,
        x if residual is None else residual,
    )
    parts = {"NORM": norm is not None, "BIAS": bias is not None, "RESIDUAL": residual is not None, "GATED": gated}
    launch = {"num_warps": tiling.warps, "num_stages": tiling.stages} | ({"launch_pdl": True} if pdl else {})
    tiles = triton.cdiv(n, tiling.block_n)
    even_n, even_k = n % tiling.block_n == 0, k % (tiling.block_k * tiling.splits) == 0
    if tiling.form == "fma":
        _fma_kernel[(tiles,)](
            *pointers,
            out,
            eps,
            rows,
            n,
            k,
            ROWS=tiling.rows,
            BLOCK_N=tiling.block_n,
            BLOCK_K=tiling.block_k,
            ONE_TILE=k <= tiling.block_k,
            EVEN_N=even_n,
            EVEN_K=even_k,
            PREFETCH=tiling.prefetch if pdl else 0,
            LANES=32 * tiling.warps,
            PDL=pdl,
            **parts,
            **launch,
        )
        return out
    splits = tiling.splits
    shape = (tiles, splits, tiling.rows) if splits > 1 else (0, 0, 0)
    assert splits == 1 or tiles <= _MAX_SPLIT_TILES, f"{tiles} row blocks are too many to be split"
    _dot_kernel[(tiles, splits)](
        *pointers,
        out,
        torch.empty((*shape, tiling.block_n), dtype=torch.float32, device=x.device),
        torch.empty(shape, dtype=torch.float32, device=x.device),
        _arrivals(x.device),
        eps,
        rows,
        n,
        k,
        ROWS=tiling.rows,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        SPLITS=splits,
        EVEN_N=even_n,
        EVEN_K=even_k,
        STAGES=tiling.stages,
        PREFETCH=tiling.prefetch if pdl else 0,
        LANES=32 * tiling.warps,
        PDL=pdl,
        **parts,
        **launch,
    )
    return out


@cache
def _arrivals(device: torch.device) -> torch.Tensor:
    """Return a device's counters of arrived programs: zero before and after every launch, so that all can share them.

    Kernels of one device run in stream order here; two streams with split launches at a time would need two of these.
    """
    return torch.zeros(_MAX_SPLIT_TILES, dtype=torch.int32, device=device)


@jit
def _features(tile, n, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """Return which weight rows a program owns, [BLOCK_N]; gated, each gate is followed by its up."""
    index = tl.arange(0, BLOCK_N)
    if GATED:
        feature = tile * (BLOCK_N // 2) + index // 2
        feature = tl.where(feature < n // 2, feature + (index % 2) * (n // 2), n)
    else:
        feature = tile * BLOCK_N + index
    return feature


@jit
def _begin(
    weight_ptr,
    feature,
    n,
    k,
    first,
    last,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Let the next kernel start; request columns first .. first + PREFETCH - 1 (below last) of each weight row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if PREFETCH > 0:
        # Each thread asks for a piece of its own, unless pieces would be small: they must be of whole 16 bytes.
        PIECES: tl.constexpr = max(1, min(LANES // BLOCK_N, PREFETCH // 64))
        PIECE: tl.constexpr = PREFETCH // PIECES
        column = first + tl.arange(0, PIECES) * PIECE
        wanted = (feature < n)[:, None] & (column < last)[None, :]
        count = tl.where(wanted, tl.minimum(last - column, PIECE)[None, :], 0)
        pointer = weight_ptr + feature.to(tl.int64)[:, None] * k + column[None, :]
        num_bytes = count * (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r",
            [pointer, num_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def _finish(
    total,  # [BLOCK_N, ROWS] float32
    tile,
    feature,  # [BLOCK_N]
    row,  # [ROWS]
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    n,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Apply what comes after the product and store it, rounding where the separate operations do."""
    dtype = out_ptr.dtype.element_ty
    if BIAS:
        total += tl.load(bias_ptr + feature, mask=feature < n, other=0.0).to(tl.float32)[:, None]
    total = total.to(dtype).to(tl.float32)
    if GATED:
        pairs = tl.permute(tl.reshape(total, (BLOCK_N // 2, 2, ROWS)), (0, 2, 1))
        gate, up = tl.split(pairs)
        total = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
        column = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        width = n // 2
    else:
        column = feature
        width = n
    offsets = row.to(tl.int64)[None, :] * width + column[:, None]
    mask = (column < width)[:, None] & (row < rows)[None, :]
    if RESIDUAL:
        total = total.to(dtype).to(tl.float32) + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(dtype), mask=mask)


@jit_once("rows")
def _fma_kernel(
    x_ptr,  # [rows, k]
    weight_ptr,  # [n, k]
    bias_ptr,  # [n], read only with BIAS
    norm_ptr,  # [k], read only with NORM
    residual_ptr,  # as out, read only with RESIDUAL
    out_ptr,  # [rows, n], with GATED [rows, n / 2]
    eps,
    rows,
    n,
    k,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_TILE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):
    """One program: BLOCK_N features of every row."""
    tile = tl.program_id(0)
    feature = _features(tile, n, BLOCK_N, GATED)
    _begin(weight_ptr, feature, n, k, BLOCK_K, k, BLOCK_N, LANES, PREFETCH, PDL)
    column = tl.arange(0, BLOCK_K)
    weights = weight_ptr + feature.to(tl.int64)[:, None] * k + column[None, :]
    owned = (feature < n)[:, None]
    weight = _load_tile(weights, owned, column, k, EVEN_N, EVEN_K)
    if NORM and ONE_TILE:
        gain = tl.load(norm_ptr + column, mask=column < k, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    dtype = x_ptr.dtype.element_ty

    if ONE_TILE:
        for r in tl.static_range(ROWS):
            x = _load_row(x_ptr, r, rows, column, k)
            if NORM:
                x = _norm_row(x, tl.rsqrt(tl.sum(x * x, axis=0) / k + eps), gain, dtype)
            _finish(
                tl.sum(weight.to(tl.float32) * x[None, :], axis=1)[:, None], tile, feature, r + tl.arange(0, 1),
                bias_ptr, residual_ptr, out_ptr, rows, n, BLOCK_N, 1, BIAS, GATED, RESIDUAL,
            )  # fmt: skip
    else:
        scales = ()
        for r in tl.static_range(ROWS):
            if NORM:
                squares = tl.zeros([BLOCK_K], tl.float32)
                for start in range(0, k, BLOCK_K):
                    x = _load_row(x_ptr, r, rows, start + column, k)
                    squares += x * x
                scales = scales + (tl.rsqrt(tl.sum(squares, axis=0) / k + eps),)  # type: ignore  # noqa: RUF005
        sums = ()
        for _ in tl.static_range(ROWS):
            sums = sums + (tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32),)  # type: ignore  # noqa: RUF005
        for start in range(0, k, BLOCK_K):
            ahead = start + BLOCK_K
            next_weight = _load_tile(weights + ahead, owned, ahead + column, k, EVEN_N, False)
            wide = weight.to(tl.float32)
            if NORM:
                gain = tl.load(norm_ptr + start + column, mask=start + column < k, other=0.0).to(tl.float32)
            new_sums = ()
            for r in tl.static_range(ROWS):
                x = _load_row(x_ptr, r, rows, start + column, k)
                if NORM:
                    x = _norm_row(x, scales[r], gain, dtype)
                # Eight neighbours lie in one thread, which adds them up without asking others.
                products = tl.reshape(wide * x[None, :], (BLOCK_N, BLOCK_K // 8, 8))
                new_sums = new_sums + (sums[r] + tl.sum(products, axis=2),)  # type: ignore  # noqa: RUF005
            sums = new_sums
            weight = next_weight
        for r in tl.static_range(ROWS):
            _finish(
                tl.sum(sums[r], axis=1)[:, None], tile, feature, r + tl.arange(0, 1),
                bias_ptr, residual_ptr, out_ptr, rows, n, BLOCK_N, 1, BIAS, GATED, RESIDUAL,
            )  # fmt: skip


@jit
def _load_row(x_ptr, r, rows, column, k):
    """Load columns of one row of x, [BLOCK_K] float32: zeros outside of it."""
    is_row = r + tl.arange(0, 1) < rows
    return tl.load(x_ptr + r * k + column, mask=is_row & (column < k), other=0.0).to(tl.float32)


@jit
def _norm_row(x, scale, gain, dtype: tl.constexpr):
    """Return gain * (scale * x), rounded where `rms_norm` does."""
    return (gain * (x * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@jit
def _load_tile(pointers, owned, column, k, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """Load a tile of the weight, [BLOCK_N, BLOCK_K]: zeros outside of it."""
    if EVEN_N and EVEN_K:
        tile = tl.load(pointers)
    elif EVEN_K:
        tile = tl.load(pointers, mask=owned, other=0.0)
    elif EVEN_N:
        tile = tl.load(pointers, mask=(column < k)[None, :], other=0.0)
    else:
        tile = tl.load(pointers, mask=owned & (column < k)[None, :], other=0.0)
    return tile


@jit_once("rows")
def _dot_kernel(
    x_ptr,  # [rows, k]
    weight_ptr,  # [n, k]
    bias_ptr,  # [n], read only with BIAS
    norm_ptr,  # [k], read only with NORM
    residual_ptr,  # as out, read only with RESIDUAL
    out_ptr,  # [rows, n], with GATED [rows, n / 2]
    partial_ptr,  # [tiles, SPLITS, ROWS, BLOCK_N] float32, where SPLITS > 1
    squares_ptr,  # [tiles, SPLITS, ROWS] float32, where SPLITS > 1 and NORM
    arrivals_ptr,  # [tiles] int32, zeros before and after
    eps,
    rows,
    n,
    k,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):
    """One program: BLOCK_N features of every row, over one of SPLITS parts of the reduction."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    part = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLITS) * BLOCK_K
    first = split * part
    last = tl.minimum(first + part, k)
    feature = _features(tile, n, BLOCK_N, GATED)
    _begin(weight_ptr, feature, n, k, first, last, BLOCK_N, LANES, PREFETCH, PDL)
    owned = (feature < n)[:, None]
    column = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    weights = weight_ptr + feature.to(tl.int64)[:, None] * k + column[None, :]
    xs = x_ptr + row[:, None] * k + column[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()

    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        weight = _load_tile(weights + start, owned, start + column, k, EVEN_N, EVEN_K)
        inside = start + column < k
        x = tl.load(xs + start, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        if NORM:
            gain = tl.load(norm_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            x = (wide * gain[None, :]).to(x.dtype)
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")

    if SPLITS > 1:
        place = tile * SPLITS * ROWS + row
        index = tl.arange(0, BLOCK_N)
        tl.store(partial_ptr + (place + split * ROWS)[None, :] * BLOCK_N + index[:, None], total)
        if NORM:
            tl.store(squares_ptr + place + split * ROWS, squares)
        tl.debug_barrier()  # every thread's part is stored before one of them tells so
        arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
        if arrived != SPLITS - 1:
            return
        tl.store(arrivals_ptr + tile, 0)
        total = tl.zeros([BLOCK_N, ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
        for s in tl.static_range(SPLITS):
            # Past the L1 cache, which does not see what other multiprocessors write.
            partial = partial_ptr + (place + s * ROWS)[None, :] * BLOCK_N + index[:, None]
            total += tl.load(partial, cache_modifier=".cg")
            if NORM:
                squares += tl.load(squares_ptr + place + s * ROWS, cache_modifier=".cg")
    if NORM:
        total *= tl.rsqrt(squares / k + eps)[None, :]
    _finish(
        total, tile, feature, row, bias_ptr, residual_ptr, out_ptr, rows, n,
        BLOCK_N, ROWS, BIAS, GATED, RESIDUAL,
    )  # fmt: skip
