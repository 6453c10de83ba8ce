"""Linear layers of few rows, which compute what stands around them in the same launch.

A decode step of up to some 256 rows is bound by reading the weights, and for small models by the number of launches. So
one launch here is a linear layer with the SiLU gate after it, or with the residual addition after it and most of the
RMSNorm after that, each part optional.

No program has a whole row of the sum, so that none can norm it: each stores total * gain of its features, and for each
row the sum of the squares of its totals. Whoever multiplies total * gain next adds up those partial sums while the
products are computed, and multiplies them by 1 / rms (`model.kernels.norm.Scale`). Each partial sum has a place of its
own, and they are added in a fixed order.

There are three kernels. *fma* (1 or 2 rows) multiplies in registers: a program owns a few weight rows, and holds
them whole or walks along them. *ring* (`model.kernels.ring_linear`) multiplies on the matrix units of a Hopper, up to
any number of rows. *cluster* (`model.kernels.cluster_linear`) does too, with the reduction split, without a bias or a
gate, and adds up what ranks have.

Rounding is that of the separate operations, with two exceptions. What is added to the residual is not rounded before
(nor is it where cuBLAS adds): the total is, as it is stored, and its rounded elements are what is squared and what is
multiplied by the gain. And that product is rounded once, where the norm rounds twice, since 1 / rms is applied to
float32 products behind it (before the bias and the gate). The bits of a row depend on its values, the weights and the
tilings alone: not on other rows, nor on which program arrives last.

The first weights are requested before the kernel waits for its inputs (`model.kernels.dependent`). Which layers use
these kernels, and how they are cut, is for `model.kernels.linear` to say.
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

from model.kernels import cluster_linear
from model.kernels.activation import silu_and_mul_torch
from model.kernels.cuda_source import SLICE
from model.kernels.dependent import begin_dependents, wait
from model.kernels.norm import Normed, Scale, add_rms_norm_torch
from model.kernels.peer_sum import OneShot, Push
from model.kernels.ring_linear import pieces, ring_kernel
from model.kernels.rows import empty_rows, whole_tiles
from model.kernels.runtime import jit, jit_once, tl, triton
from model.kernels.tiles import tiles_of

_MAX_SPLIT_UNITS = 4096


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut into programs.

    A launch takes up to `rows` rows: 1 or 2 of fma. A tile is `block_n` weight rows (of a gated layer half of them
    gates, half of them ups) and `block_k` of their columns; fma needs 256 columns for each of its `warps`, so that a
    thread has the same eight columns of all rows, and ring a `block_n` that is a power of two or the sum of two, each
    of which is then a piece of its own. `stages` tiles are under way at a time, in registers (fma) or in shared memory
    (ring, cluster). `splits` programs share the reduction of the same features, and add up what all have in a fixed
    order: the last of them to arrive (ring), or each a part of the features (cluster). A program of ring has
    `block_rows` of the rows, one of the others all. With 64 or more of them in ring they are the left operand, else the
    weight is, of which pieces must then be 64 or more, and in cluster are 64.
    """

    form: Literal["fma", "ring", "cluster"]
    rows: int
    block_n: int
    block_k: int
    warps: int
    splits: int = 1
    stages: int = 1
    block_rows: int = 0

    def __post_init__(self) -> None:
        if self.form == "fma":
            assert self.block_k == 256 * self.warps, "a thread of fma has eight columns of a tile"
            assert self.rows <= 2, "fma has one or two rows"
        elif self.form == "cluster":
            assert self.block_n == cluster_linear.FEATURES, "a program of cluster has 64 weight rows"
            assert self.block_k % SLICE == 0, "a tile of cluster is made of slices"
            assert self.rows <= self.block_rows, "a program of cluster has all rows"
            rows = range(8, cluster_linear.MAX_ROWS + 1, 8)
            assert self.block_rows in rows, f"a program of cluster has 8 to {rows[-1]} rows, in steps of 8"
            assert self.splits in (2, 4), "a cluster has two or four programs"
            assert self.warps == 4, "four warps of cluster multiply"
            assert self.stages >= 2, "a ring has two places or more"
        else:
            narrow = self.pieces[1]
            assert narrow & (narrow - 1) == 0, f"{self.block_n} is no sum of two powers of two"
            left = max(self.block_rows, narrow or self.block_n)
            assert left >= 64, "the left operand of ring has 64 rows or more"
            assert self.stages >= 2, "a ring has two places or more"

    @property
    def pieces(self) -> tuple[int, int]:
        """The widths of a tile's two pieces, the second of which may be 0."""
        return pieces(self.block_n)

    def parts(self, n: int) -> int:
        """How many sums of squares a launch that adds leaves of each of its rows of n features."""
        if self.form == "cluster":
            return n // cluster_linear.squared(self.block_rows, self.splits)
        return triton.cdiv(n, self.block_n) * (2 if self.pieces[1] else 1)


def small_linear_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: Scale | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """Return act(x @ weight.T + bias), with `scale` of the norm that it belongs to instead of x.

    x: [rows, k], and with `scale` one that is still to be scaled. weight: [n, k], bias: [n]. With `gated` the first
    n / 2 features are gates and the others ups, and act is silu(gate) * up. The result: [rows, n], or [rows, n / 2]
    with `gated`. Inputs are not written.
    """
    out = F.linear(Normed(x, scale).finish(), weight, bias)
    return silu_and_mul_torch(out) if gated else out


def small_linear_add_norm_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
) -> tuple[Normed, torch.Tensor]:
    """Return (rms_norm(total, gain, eps), total), where total is residual + x @ weight.T + bias, rounded.

    x: [rows, k]. weight: [n, k], bias: [n]. residual: [rows, n]. gain: [n]. Inputs are not written.
    """
    normed, total = add_rms_norm_torch(F.linear(x, weight, bias), residual, gain, eps)
    return Normed(normed), total


def small_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: Scale | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
    push: Push | None = None,
    tiling: Tiling,
    pdl: bool = False,
) -> torch.Tensor:
    """As `small_linear_torch`, for as many rows as the tiling takes, and k divisible by 8.

    The result is written to `out`, contiguous and of its shape and dtype, where that is given, and with `push`, which
    only ring can do, to the other ranks too.
    `pdl` makes it a dependent launch, for which a GPU of compute capability 9 or later is needed.
    """
    if out is None:
        n = weight.shape[0]
        out = empty_rows(x.shape[0], n // 2 if gated else n, like=x)
    _launch(x, weight, bias, out, scale=scale, gated=gated, push=push, tiling=tiling, pdl=pdl)
    return out


def small_linear_add_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    *,
    one_shot: OneShot | None = None,
    tiling: Tiling,
    pdl: bool = False,
) -> tuple[Normed, torch.Tensor]:
    """As `small_linear_add_norm_torch`, on the terms of `small_linear_triton`; what is normed is still to be scaled.

    With `one_shot`, which only cluster can do, it is the sum of all ranks' products that is added to the residual. The
    total has the same bits on every rank; so has what is scaled on those that launch the same.
    """
    scaled, total = empty_rows(*residual.shape, like=residual), torch.empty_like(residual)
    squares = torch.empty((x.shape[0], tiling.parts(weight.shape[0])), dtype=torch.float32, device=x.device)
    assert one_shot is None or tiling.form == "cluster", f"{tiling.form} adds up nothing of other ranks"
    added = (residual, gain, total, squares)
    _launch(x, weight, bias, scaled, added=added, one_shot=one_shot, tiling=tiling, pdl=pdl)
    return Normed(scaled, Scale(squares, total, gain, eps)), total


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    scale: Scale | None = None,
    added: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    gated: bool = False,
    push: Push | None = None,
    one_shot: OneShot | None = None,
    tiling: Tiling,
    pdl: bool,
) -> None:
    """Launch a kernel; `added` is the residual and the gain to read, the totals and the sums of squares to write."""
    rows, (n, k) = x.shape[0], weight.shape
    assert rows <= tiling.rows, f"{rows} rows are too many for {tiling}"
    if tiling.form == "cluster":
        assert push is None, "cluster pushes only what it sums"
        assert bias is None, "cluster adds no bias"
        assert not gated, "cluster has no gate"
        assert all(t.is_contiguous() for t in (x, weight, *(added or ()), out)), "tensors must be contiguous"
        if rows:
            cluster_linear.cluster_linear(
                x,
                weight,
                out,
                scale=scale,
                added=None if added is None else cluster_linear.Added(*added),
                one_shot=one_shot,
                block_rows=tiling.block_rows,
                cluster=tiling.splits,
                slices=tiling.block_k // SLICE,
                stages=tiling.stages,
                pdl=pdl,
            )
        return
    nothing = x  # a pointer that nothing is read through stands for what is not given
    squares = nothing if scale is None else scale.squares
    stream = (nothing,) * 4 if added is None else added
    assert all(t.is_contiguous() for t in (x, weight, squares, *stream, out)), "tensors must be contiguous"
    assert k % 8 == 0, f"rows of {k} elements are not aligned"
    parts = 0 if scale is None else squares.shape[1]
    tiles = triton.cdiv(n, tiling.block_n)
    arguments = (nothing if bias is None else bias, squares, *stream, out)
    numbers = (0.0 if scale is None else scale.eps, rows, n, k, parts)
    options = {
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": tiling.block_k,
        "STAGES": tiling.stages,
        "PDL": pdl,
        "BIAS": bias is not None,
        "ADD": added is not None,
        "SQUARES": triton.next_power_of_2(parts) if parts else 0,
        "GATED": gated,
        "num_warps": tiling.warps,
    }
    if pdl:
        options["launch_pdl"] = True
    if tiling.form == "fma":
        assert push is None, "fma does not push"
        _fma_kernel[(tiles,)](
            x,
            weight,
            *arguments,
            *numbers,
            ROWS=tiling.rows,
            WHOLE=k <= tiling.block_k * tiling.stages,
            EVEN_N=n % tiling.block_n == 0,
            EVEN_K=k >= tiling.block_k * tiling.stages,
            **options,
        )
    elif rows:  # of none there is no descriptor
        blocks = triton.cdiv(rows, tiling.block_rows)
        wide, narrow = (piece // (2 if gated else 1) for piece in tiling.pieces)
        assert narrow % 8 == 0, f"gates or ups of {narrow} weight rows do not lie where matrix units find them"
        ring_kernel[(tiles, blocks, tiling.splits)](
            tiles_of(whole_tiles(x, tiling.block_rows), tiling.block_rows, tiling.block_k),
            tiles_of(weight, wide, tiling.block_k),
            tiles_of(weight, narrow or wide, tiling.block_k),
            *arguments,
            nothing if push is None else push.inboxes,
            *_split_memory(tiles * blocks, tiling.splits, tiling.block_rows * tiling.block_n, x.device),
            *numbers,
            ROWS=tiling.block_rows,
            SPLITS=tiling.splits,
            RANKS=0 if push is None else push.inboxes.shape[0],
            RANK=0 if push is None else push.rank,
            **options,
        )


def _split_memory(units: int, splits: int, elements: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where splits of so many units of so many elements leave their parts, and counters of those that have."""
    assert splits == 1 or units <= _MAX_SPLIT_UNITS, f"{units} units are too many to be split"
    shape = (units, splits, elements) if splits > 1 else (0,)
    return torch.empty(shape, dtype=torch.float32, device=device), _arrivals(device)


@cache
def _arrivals(device: torch.device) -> torch.Tensor:
    """Return a device's counters of arrived programs: zero before and after every launch, so that all can share them.

    Kernels of one device run in stream order here; two streams with split launches at a time would need two of these.
    """
    return torch.zeros(_MAX_SPLIT_UNITS, dtype=torch.int32, device=device)


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
def _load_features(
    pointer,  # [n]
    feature,
    n,
    WANTED: tl.constexpr,
):
    """Load what a weight has for each feature, [BLOCK_N] float32; if not WANTED return what nothing is done with."""
    of_features = tl.zeros([1], tl.float32)
    if WANTED:
        of_features = tl.load(pointer + feature, mask=feature < n, other=0.0).to(tl.float32)
    return of_features


@jit
def _request(
    residual_ptr,
    squares_ptr,
    feature,
    row,
    rows,
    n,
    parts,
    ADD: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """Load what is applied to the products, which can be on its way while they are computed: for `_finish`."""
    residual = tl.zeros([1], tl.float32)
    squares = tl.zeros([1], tl.float32)
    if ADD:
        inside = (feature < n)[:, None] & (row < rows)[None, :]
        residual = tl.load(residual_ptr + row[None, :] * n + feature[:, None], mask=inside, other=0.0)
    if SQUARES > 0:
        part = tl.arange(0, SQUARES)
        inside = (row < rows)[:, None] & (part < parts)[None, :]
        squares = tl.load(squares_ptr + row[:, None] * parts + part[None, :], mask=inside, other=0.0)
    return residual, squares


@jit
def _finish(
    total,  # [BLOCK_N, ROWS] float32
    extras,  # bias and gain [BLOCK_N] float32, residual [BLOCK_N, ROWS], squares [ROWS, SQUARES] float32
    tile,
    feature,  # [BLOCK_N]
    row,  # [ROWS]
    outputs,  # total_ptr, own_squares_ptr, out_ptr
    eps,
    rows,
    n,
    k,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    SQUARES: tl.constexpr,
    GATED: tl.constexpr,
):
    """Apply what comes after the product and store it, rounding where the module says."""
    bias, gain, residual, squares = extras
    total_ptr, own_squares_ptr, out_ptr = outputs
    dtype = out_ptr.dtype.element_ty
    column = feature
    width = n
    if SQUARES > 0:
        total *= tl.rsqrt(tl.sum(squares, axis=1) / k + eps)[None, :]
    if BIAS:
        total += bias[:, None]
    if GATED:
        pairs = tl.permute(tl.reshape(total.to(dtype).to(tl.float32), (BLOCK_N // 2, 2, ROWS)), (0, 2, 1))
        gate, up = tl.split(pairs)
        total = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
        column = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        width = n // 2
    offsets = row.to(tl.int64)[None, :] * width + column[:, None]
    mask = (column < width)[:, None] & (row < rows)[None, :]
    if ADD:
        rounded = (total + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + offsets, rounded, mask=mask)
        total = rounded.to(tl.float32)
        own = own_squares_ptr + row * tl.num_programs(0) + tile
        tl.store(own, tl.sum(total * total, axis=0), mask=row < rows)
        total *= gain[:, None]
    tl.store(out_ptr + offsets, total.to(dtype), mask=mask)


@jit_once("rows")
def _fma_kernel(
    x_ptr,  # [rows, k]
    weight_ptr,  # [n, k]
    bias_ptr,  # [n], read only with BIAS
    squares_ptr,  # [rows, parts] float32, read only where SQUARES, the next power of two, is not 0
    residual_ptr,  # [rows, n], read only with ADD
    gain_ptr,  # [n], read only with ADD
    total_ptr,  # [rows, n], written only with ADD
    own_squares_ptr,  # [rows, tiles] float32, written only with ADD
    out_ptr,  # [rows, n], with GATED [rows, n / 2]
    eps,
    rows,
    n,
    k,
    parts,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    SQUARES: tl.constexpr,
    GATED: tl.constexpr,
):
    """One program: BLOCK_N features of every row. It holds STAGES tiles of the weight, with WHOLE all there are."""
    begin_dependents(PDL)
    tile = tl.program_id(0)
    feature = _features(tile, n, BLOCK_N, GATED)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_K)
    weights = weight_ptr + feature.to(tl.int64)[:, None] * k + column[None, :]
    owned = (feature < n)[:, None]
    held = ()
    for stage in tl.static_range(STAGES):
        here = stage * BLOCK_K + column
        held = held + (_load_tile(weights + stage * BLOCK_K, owned, here[None, :], k, EVEN_N, EVEN_K),)
    bias = _load_features(bias_ptr, feature, n, BIAS)
    gain = _load_features(gain_ptr, feature, n, ADD)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32),)
    wait(PDL)

    residual, squares = _request(residual_ptr, squares_ptr, feature, row, rows, n, parts, ADD, SQUARES)
    if WHOLE:
        xs = ()
        for stage in tl.static_range(STAGES):
            xs = xs + (_load_rows(x_ptr, rows, stage * BLOCK_K + column, k, ROWS),)
        if rows == 0:  # a branch, before which the compiler asks for all of that, not only for what is multiplied first
            return
        for stage in tl.static_range(STAGES):
            sums = _multiply(sums, held[stage], xs[stage], ROWS, BLOCK_N, BLOCK_K)
    else:
        for start in range(0, k, STAGES * BLOCK_K):
            next_held = ()
            for stage in tl.static_range(STAGES):
                x = _load_rows(x_ptr, rows, start + stage * BLOCK_K + column, k, ROWS)
                sums = _multiply(sums, held[stage], x, ROWS, BLOCK_N, BLOCK_K)
                # Into the registers of what was just used, while the other stages are still on their way.
                ahead = start + (STAGES + stage) * BLOCK_K
                tile_ahead = _load_tile(weights + ahead, owned, (ahead + column)[None, :], k, EVEN_N, False)
                next_held = next_held + (tile_ahead,)
            held = next_held
    total = _reduce(sums, BLOCK_N, ROWS)
    extras = bias, gain, residual, squares
    outputs = total_ptr, own_squares_ptr, out_ptr
    _finish(total, extras, tile, feature, row, outputs, eps, rows, n, k, BLOCK_N, ROWS, BIAS, ADD, SQUARES, GATED)


@jit
def _load_rows(x_ptr, rows, column, k, ROWS: tl.constexpr):
    """Load columns of x: ROWS of [BLOCK_K] float32, zeros outside of it."""
    xs = ()
    for r in tl.static_range(ROWS):
        is_row = r + tl.arange(0, 1) < rows
        xs = xs + (tl.load(x_ptr + r * k + column, mask=is_row & (column < k), other=0.0).to(tl.float32),)
    return xs


@jit
def _multiply(
    sums,  # ROWS of [BLOCK_N, BLOCK_K / 8] float32
    weight,  # [BLOCK_N, BLOCK_K]
    xs,  # ROWS of [BLOCK_K] float32
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return `sums` with those of one tile added.

    Eight neighbours lie in one thread, which adds them up without asking others.
    """
    wide = weight.to(tl.float32)
    new_sums = ()
    for r in tl.static_range(ROWS):
        products = tl.reshape(wide * xs[r][None, :], (BLOCK_N, BLOCK_K // 8, 8))
        new_sums = new_sums + (sums[r] + tl.sum(products, axis=2),)
    return new_sums


@jit
def _reduce(
    parts,  # ROWS of [N, BLOCK_K / 8]
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum over the columns of all rows at once: [N, ROWS]."""
    joined = parts[0] if ROWS == 1 else tl.join(parts[0], parts[1])
    return tl.reshape(tl.sum(joined, axis=1), (N, ROWS))


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
