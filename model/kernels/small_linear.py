"""Linear layers of few rows, which read every weight once and compute what stands around them in the same launch.

A decode step of up to 16 rows is bound by reading the weights, and for small models by the number of launches. So one
launch here is a linear layer with the RMSNorm before it (and the residual addition before that), or with the SiLU gate
after it, each part optional.

There are three kernels. *fma* (1, 2 or 4 rows) multiplies in registers: a program owns a few weight rows, and holds
them whole or walks along them. *held* multiplies on the tensor cores, each warp its part of the reduction; a program
holds its weight rows whole, so they must be short, and norms nothing. *dot* does so for long ones, with the weight as
the left operand, so that the rows of x are the narrow side; it may split the reduction over several programs, the last
of which to arrive adds up the partial sums of all in a fixed order and leaves the counter as it found it.

Rounding is that of the separate operations, with one exception: 1 / rms(x) is applied to the sums instead of to x, so
that x is read once. What is multiplied is then gain * x, which for tensor cores is rounded once where the norm rounds
twice, and for *fma* not at all. The bits of a row depend on its values, the weights and the tiling alone: not on other
rows, nor on which program arrives last.

The first weights are requested before the kernel waits for its inputs (`model.kernels.dependent`); `Tiling.prefetch`
tells how many more. Which layers use these kernels, and how they are cut, is for `model.kernels.linear` to say.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead, and knows no lists:
# what a loop collects is a tuple that grows.)

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F

from model.kernels.activation import silu_and_mul_torch
from model.kernels.dependent import begin_dependents, wait
from model.kernels.norm import rms_norm_torch
from model.kernels.runtime import jit, jit_once, tl, triton

_MAX_SPLIT_TILES = 4096


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut into programs.

    A launch takes up to `rows` rows: a power of two, from 1 for fma and from 8 for the others. A tile is `block_n`
    weight rows (of a gated layer half of them gates, half of them ups) and `block_k` of their columns; fma needs 256
    columns for each of its `warps`, so that a thread has the same eight columns of all rows. `stages` tiles are under
    way at a time, in registers (fma, and held, which needs no more than these) or in shared memory (dot). `splits`
    programs share the reduction of one row block (dot only). With dependent launch, `prefetch` columns of each weight
    row (fma: beyond those in registers; held: none), a power of two from 64 or none, are requested into the L2 cache
    ahead of everything else.
    """

    form: Literal["fma", "held", "dot"]
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
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (act(norm(x + residual) @ weight.T + bias), x + residual), each part where it is given.

    x, residual: [rows, k]; their sum is rounded to the dtype before it is normed, and is x itself without `residual`.
    norm: [k], the weight of an RMSNorm with `eps`. weight: [n, k], bias: [n]. With `gated` the first n / 2 features are
    gates and the others ups, and act is silu(gate) * up. The first result: [rows, n], or [rows, n / 2] with `gated`.
    Inputs are not written.
    """
    total = x if residual is None else x + residual
    out = F.linear(total if norm is None else rms_norm_torch(total, norm, eps), weight, bias)
    return silu_and_mul_torch(out) if gated else out, total


def small_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
    tiling: Tiling,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `small_linear_torch`, for as many rows as the tiling takes, k divisible by 8, and a residual only with a norm.

    The first result is written to `out`, contiguous and of its shape and dtype, where that is given.
    `pdl` makes it a dependent launch, for which a GPU of compute capability 9 or later is needed.
    """
    rows, (n, k) = x.shape[0], weight.shape
    assert rows <= tiling.rows, f"{rows} rows are too many for {tiling}"
    assert residual is None or norm is not None, "a residual is added for a norm"
    assert all(t.is_contiguous() for t in (x, weight, residual, out) if t is not None), "tensors must be contiguous"
    assert k % 8 == 0, f"rows of {k} elements are not aligned"
    if out is None:
        out = torch.empty((rows, n // 2 if gated else n), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(x)
    # A pointer that nothing is read through stands for what is not given.
    bias_or_x = x if bias is None else bias
    pointers = (
        x,
        x if residual is None else residual,
        x if norm is None else norm,
        weight,
        bias_or_x,
        out,
        total,
    )
    parts = {"ADD": residual is not None, "NORM": norm is not None, "BIAS": bias is not None, "GATED": gated}
    launch = {"num_warps": tiling.warps, "num_stages": tiling.stages} | ({"launch_pdl": True} if pdl else {})
    tiles = triton.cdiv(n, tiling.block_n)
    if tiling.form == "fma":
        _fma_kernel[(tiles,)](
            *pointers,
            eps,
            rows,
            n,
            k,
            ROWS=tiling.rows,
            BLOCK_N=tiling.block_n,
            BLOCK_K=tiling.block_k,
            STAGES=tiling.stages,
            WHOLE=k <= tiling.block_k * tiling.stages,
            EVEN_N=n % tiling.block_n == 0,
            EVEN_K=k >= tiling.block_k * tiling.stages,
            PREFETCH=tiling.prefetch if pdl else 0,
            LANES=32 * tiling.warps,
            PDL=pdl,
            **parts,
            **launch,
        )
        return out, total
    if tiling.form == "held":
        assert norm is None, "held does not norm"
        assert k <= tiling.block_k * tiling.stages, f"{k} columns are too many for {tiling}"
        _held_kernel[(tiles,)](
            x,
            weight,
            bias_or_x,
            out,
            rows,
            n,
            k,
            ROWS=tiling.rows,
            BLOCK_N=tiling.block_n,
            PARTS=tiling.warps,
            PART=tiling.block_k // tiling.warps,
            STAGES=tiling.stages,
            EVEN_N=n % tiling.block_n == 0,
            EVEN_K=k == tiling.block_k * tiling.stages,
            PDL=pdl,
            BIAS=bias is not None,
            GATED=gated,
            **launch,
        )
        return out, total
    splits = tiling.splits
    shape = (tiles, splits, tiling.rows) if splits > 1 else (0, 0, 0)
    assert splits == 1 or tiles <= _MAX_SPLIT_TILES, f"{tiles} row blocks are too many to be split"
    _dot_kernel[(tiles, splits)](
        *pointers,
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
        EVEN_N=n % tiling.block_n == 0,
        EVEN_K=k % (tiling.block_k * splits) == 0,
        STAGES=tiling.stages,
        PREFETCH=tiling.prefetch if pdl else 0,
        LANES=32 * tiling.warps,
        PDL=pdl,
        **parts,
        **launch,
    )
    return out, total


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
def _prefetch(
    weight_ptr,
    feature,
    n,
    k,
    first,
    last,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Request columns first .. first + PREFETCH - 1 (below last) of each weight row into the L2 cache."""
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
    out_ptr,
    rows,
    n,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Apply what comes after the product and store it, rounding where the separate operations do."""
    dtype = out_ptr.dtype.element_ty
    if BIAS:
        total += tl.load(bias_ptr + feature, mask=feature < n, other=0.0).to(tl.float32)[:, None]
    if GATED:
        pairs = tl.permute(tl.reshape(total.to(dtype).to(tl.float32), (BLOCK_N // 2, 2, ROWS)), (0, 2, 1))
        gate, up = tl.split(pairs)
        total = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
        column = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        width = n // 2
    else:
        column = feature
        width = n
    offsets = row.to(tl.int64)[None, :] * width + column[:, None]
    mask = (column < width)[:, None] & (row < rows)[None, :]
    tl.store(out_ptr + offsets, total.to(dtype), mask=mask)


@jit_once("rows")
def _fma_kernel(
    x_ptr,  # [rows, k]
    residual_ptr,  # [rows, k], read only with ADD
    norm_ptr,  # [k], read only with NORM
    weight_ptr,  # [n, k]
    bias_ptr,  # [n], read only with BIAS
    out_ptr,  # [rows, n], with GATED [rows, n / 2]
    total_ptr,  # [rows, k], written only with ADD
    eps,
    rows,
    n,
    k,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
):
    """One program: BLOCK_N features of every row. It holds STAGES tiles of the weight, with WHOLE all there are."""
    begin_dependents(PDL)
    tile = tl.program_id(0)
    feature = _features(tile, n, BLOCK_N, GATED)
    _prefetch(weight_ptr, feature, n, k, STAGES * BLOCK_K, k, BLOCK_N, LANES, 0 if WHOLE else PREFETCH)
    column = tl.arange(0, BLOCK_K)
    weights = weight_ptr + feature.to(tl.int64)[:, None] * k + column[None, :]
    owned = (feature < n)[:, None]
    held = ()
    gains = ()
    for stage in tl.static_range(STAGES):
        here = stage * BLOCK_K + column
        held = held + (_load_tile(weights + stage * BLOCK_K, owned, here[None, :], k, EVEN_N, EVEN_K),)
        gains = gains + (_load_gain(norm_ptr, here, k, NORM),)
    sums = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32),)
        squares = squares + (tl.zeros([1, BLOCK_K // 8], tl.float32),)
    wait(PDL)

    if WHOLE:
        xs = ()
        for stage in tl.static_range(STAGES):
            rows_of = _load_rows(x_ptr, residual_ptr, rows, stage * BLOCK_K + column, k, ROWS, ADD)
            xs = xs + (rows_of,)
        for stage in tl.static_range(STAGES):
            sums, squares = _multiply(sums, squares, held[stage], gains[stage], xs[stage], ROWS, BLOCK_N, BLOCK_K, NORM)
        for stage in tl.static_range(STAGES):
            _store_rows(xs[stage], total_ptr, tile, rows, stage * BLOCK_K + column, k, ROWS, ADD)
    else:
        for start in range(0, k, STAGES * BLOCK_K):
            next_held = ()
            next_gains = ()
            for stage in tl.static_range(STAGES):
                here = start + stage * BLOCK_K + column
                x = _load_rows(x_ptr, residual_ptr, rows, here, k, ROWS, ADD)
                sums, squares = _multiply(sums, squares, held[stage], gains[stage], x, ROWS, BLOCK_N, BLOCK_K, NORM)
                # Into the registers of what was just used, while the other stages are still on their way.
                ahead = start + (STAGES + stage) * BLOCK_K
                tile_ahead = _load_tile(weights + ahead, owned, (ahead + column)[None, :], k, EVEN_N, False)
                next_held = next_held + (tile_ahead,)
                next_gains = next_gains + (_load_gain(norm_ptr, ahead + column, k, NORM),)
                _store_rows(x, total_ptr, tile, rows, here, k, ROWS, ADD)
            held = next_held
            gains = next_gains
    total = _reduce(sums, BLOCK_N, ROWS)
    if NORM:
        total *= tl.rsqrt(_reduce(squares, 1, ROWS) / k + eps)
    _finish(total, tile, feature, tl.arange(0, ROWS), bias_ptr, out_ptr, rows, n, BLOCK_N, ROWS, BIAS, GATED)


@jit
def _load_rows(x_ptr, residual_ptr, rows, column, k, ROWS: tl.constexpr, ADD: tl.constexpr):
    """Load columns of x, or of x + residual: ROWS of [BLOCK_K] float32, zeros outside of it."""
    dtype = x_ptr.dtype.element_ty
    xs = ()
    for r in tl.static_range(ROWS):
        xs = xs + (_load_row(x_ptr, r, rows, column, k),)
    if ADD:
        totals = ()
        for r in tl.static_range(ROWS):
            total = xs[r] + _load_row(residual_ptr, r, rows, column, k)
            totals = totals + (total.to(dtype).to(tl.float32),)
        xs = totals
    return xs


@jit
def _store_rows(xs, total_ptr, tile, rows, column, k, ROWS: tl.constexpr, ADD: tl.constexpr):
    """With ADD, store columns of x + residual, which every program has: each row is written by one of them."""
    if ADD:
        for r in tl.static_range(ROWS):
            width = tl.where((r < rows) & (tile == r % tl.num_programs(0)), k, 0)
            tl.store(total_ptr + r * k + column, xs[r].to(total_ptr.dtype.element_ty), mask=column < width)


@jit
def _multiply(
    sums,  # ROWS of [BLOCK_N, BLOCK_K / 8] float32
    squares,  # ROWS of [1, BLOCK_K / 8] float32
    weight,  # [BLOCK_N, BLOCK_K]
    gain,  # [BLOCK_K] float32, used with NORM
    xs,  # ROWS of [BLOCK_K] float32
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    """Return `sums` and `squares` with those of one tile added.

    Eight neighbours lie in one thread, which adds them up without asking others.
    """
    wide = weight.to(tl.float32)
    new_sums = ()
    new_squares = ()
    for r in tl.static_range(ROWS):
        x = xs[r]
        if NORM:
            of_row = tl.sum(tl.reshape(x * x, (1, BLOCK_K // 8, 8)), axis=2)
            new_squares = new_squares + (squares[r] + of_row,)
            x = x * gain
        products = tl.reshape(wide * x[None, :], (BLOCK_N, BLOCK_K // 8, 8))
        new_sums = new_sums + (sums[r] + tl.sum(products, axis=2),)
    return new_sums, (new_squares if NORM else squares)


@jit
def _reduce(
    parts,  # ROWS of [N, BLOCK_K / 8]
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum over the columns of all rows at once: [N, ROWS]."""
    if ROWS == 1:
        joined = parts[0]
    elif ROWS == 2:
        joined = tl.join(parts[0], parts[1])
    else:
        joined = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    return tl.reshape(tl.sum(joined, axis=1), (N, ROWS))


@jit
def _load_row(x_ptr, r, rows, column, k):
    """Load columns of one row of x, [BLOCK_K] float32: zeros outside of it."""
    is_row = r + tl.arange(0, 1) < rows
    return tl.load(x_ptr + r * k + column, mask=is_row & (column < k), other=0.0).to(tl.float32)


@jit
def _load_gain(norm_ptr, column, k, NORM: tl.constexpr):
    """Load columns of the norm's weight, [BLOCK_K] float32; without NORM return what nothing is done with."""
    gain = tl.zeros([1], tl.float32)
    if NORM:
        gain = tl.load(norm_ptr + column, mask=column < k, other=0.0).to(tl.float32)
    return gain


@jit
def _load_tile(pointers, owned, column, k, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """Load a tile of the weight, of the shape of `pointers`, to which `owned` and `column` broadcast: zeros outside."""
    if EVEN_N and EVEN_K:
        tile = tl.load(pointers)
    elif EVEN_K:
        tile = tl.load(pointers, mask=owned, other=0.0)
    elif EVEN_N:
        tile = tl.load(pointers, mask=column < k, other=0.0)
    else:
        tile = tl.load(pointers, mask=owned & (column < k), other=0.0)
    return tile


@jit_once("rows")
def _held_kernel(
    x_ptr,  # [rows, k]
    weight_ptr,  # [n, k]
    bias_ptr,  # [n], read only with BIAS
    out_ptr,  # [rows, n], with GATED [rows, n / 2]
    rows,
    n,
    k,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
):
    """One program: BLOCK_N features of every row. It holds all STAGES tiles of the weight before it looks at x.

    A tile has PARTS parts of PART columns: a product for each warp, all of them added up at the end. (A product of
    matrices in batches is that: Triton gives each of as many warps as there are batches one of them.) Weights are
    loaded as the right operand, [PARTS, PART, BLOCK_N]: to turn tiles over behind their loads, the compiler would wait
    for each of them before it asks for the next.
    """
    begin_dependents(PDL)
    tile = tl.program_id(0)
    feature = _features(tile, n, BLOCK_N, GATED)
    row = tl.arange(0, ROWS)
    column = (tl.arange(0, PARTS) * PART)[:, None] + tl.arange(0, PART)[None, :]
    weights = weight_ptr + feature.to(tl.int64)[None, None, :] * k + column[:, :, None]
    offsets = row[None, :, None] * k + column[:, None, :]
    owned = (feature < n)[None, None, :]
    is_row = (row < rows)[None, :, None]
    held = ()
    for stage in tl.static_range(STAGES):
        here = (stage * PARTS * PART + column)[:, :, None]
        held = held + (_load_tile(weights + stage * PARTS * PART, owned, here, k, EVEN_N, EVEN_K),)
    wait(PDL)

    xs = (tl.load(x_ptr + offsets, mask=is_row & (column < k)[:, None, :], other=0.0),)
    products = tl.zeros([PARTS, ROWS, BLOCK_N], tl.float32)
    for stage in tl.static_range(STAGES):
        if stage + 1 < STAGES:  # on its way while this one is multiplied
            ahead = (stage + 1) * PARTS * PART
            inside = (ahead + column < k)[:, None, :]
            xs = xs + (tl.load(x_ptr + offsets + ahead, mask=is_row & inside, other=0.0),)
        products = tl.dot(xs[stage], held[stage], products, input_precision="ieee")
    total = tl.trans(tl.sum(products, axis=0))
    _finish(total, tile, feature, row, bias_ptr, out_ptr, rows, n, BLOCK_N, ROWS, BIAS, GATED)


@jit
def _load_total(x_ptr, residual_ptr, offsets, mask, ADD: tl.constexpr):
    """Load a tile of x, or of x + residual rounded to their dtype: zeros where the mask is not."""
    total = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        total = (total.to(tl.float32) + residual.to(tl.float32)).to(total.dtype)
    return total


@jit_once("rows")
def _dot_kernel(
    x_ptr,  # [rows, k]
    residual_ptr,  # [rows, k], read only with ADD
    norm_ptr,  # [k], read only with NORM
    weight_ptr,  # [n, k]
    bias_ptr,  # [n], read only with BIAS
    out_ptr,  # [rows, n], with GATED [rows, n / 2]
    total_ptr,  # [rows, k], written only with ADD
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
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
):
    """One program: BLOCK_N features of every row, over one of SPLITS parts of the reduction."""
    begin_dependents(PDL)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    part = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLITS) * BLOCK_K
    first = split * part
    last = tl.minimum(first + part, k)
    feature = _features(tile, n, BLOCK_N, GATED)
    _prefetch(weight_ptr, feature, n, k, first, last, BLOCK_N, LANES, PREFETCH)
    owned = (feature < n)[:, None]
    column = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    weights = weight_ptr + feature.to(tl.int64)[:, None] * k + column[None, :]
    offsets = row[:, None] * k + column[None, :]
    wait(PDL)

    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        weight = _load_tile(weights + start, owned, (start + column)[None, :], k, EVEN_N, EVEN_K)
        inside = start + column < k
        mask = (row < rows)[:, None] & inside[None, :]
        x = _load_total(x_ptr, residual_ptr, offsets + start, mask, ADD)
        if ADD:
            # Every program has the sum; each part of it is written by one of them.
            written = tl.where(tile == (start // BLOCK_K) % tl.num_programs(0), rows, 0)
            tl.store(total_ptr + offsets + start, x, mask=(row < written)[:, None] & inside[None, :])
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
    _finish(total, tile, feature, row, bias_ptr, out_ptr, rows, n, BLOCK_N, ROWS, BIAS, GATED)
