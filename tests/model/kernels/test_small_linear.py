"""Fused linear layers of few rows: the kernels against float64 and against the separate operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from model.kernels import cluster_linear
from model.kernels.cluster_linear import source_of
from model.kernels.cuda_source import SLICE, kernel_of
from model.kernels.norm import Normed, Scale
from model.kernels.peer_sum import EMPTY, OneShot, Push
from model.kernels.runtime import is_hopper
from model.kernels.small_linear import (
    Tiling,
    small_linear_add_norm_torch,
    small_linear_add_norm_triton,
    small_linear_torch,
    small_linear_triton,
)
from model.kernels.tilings import tiling_for
from tests.model.kernels.comparing import ON_GPU, ON_HOPPER, TOLERANCE, poisoned, relative_error

EPS = 1e-6
FMA = Tiling("fma", rows=1, block_n=8, block_k=256, warps=1)
RING = Tiling("ring", rows=16, block_n=64, block_k=128, warps=4, stages=3, block_rows=16)
RINGS = [
    RING,
    replace(RING, rows=8, block_n=128, block_k=256, stages=2, block_rows=8),
    replace(RING, rows=32, splits=3, block_rows=32),
    replace(RING, rows=8, splits=8, stages=12, block_rows=8),  # of which some have no columns, and no ring is full
    replace(RING, rows=64, block_n=16, block_k=64, stages=8, block_rows=64),
    replace(RING, rows=256, block_n=32, splits=2, block_rows=64),
    replace(RING, rows=256, warps=8, block_rows=128),
    replace(RING, rows=64, stages=2, block_rows=16),
    replace(RING, rows=64, block_n=48, stages=4, block_rows=64),  # of two pieces
    replace(RING, rows=64, block_n=96, splits=2, block_rows=64),
    replace(RING, rows=256, block_n=192, block_k=64, warps=8, block_rows=128),
    replace(RING, rows=16, block_n=192),
]
"""In Gluon, for Hopper: no interpreter runs them (test_compiling.py compiles them everywhere)."""
TILINGS = [
    *(replace(FMA, rows=rows) for rows in (1, 2)),
    replace(FMA, rows=2, block_k=1024, warps=4),
    replace(FMA, stages=2),
    *RINGS * ON_HOPPER,
]
SHAPES = [(24, 512), (18, 328), (6, 72), *([(4096, 4096), (1024, 3072)] if ON_GPU else [])]
"""Weights [n, k] of whole tiles, of ragged ones, and less than one."""
CASES = [(tiling, torch.bfloat16) for tiling in TILINGS]
CASES += [(tiling, torch.float32) for tiling in TILINGS if tiling.form == "fma"]
CLOSE = {torch.float32: 4e-6, torch.bfloat16: 2**-7 if ON_GPU else 8e-2}
"""Sums of another order: the largest element of a few may be rounded to its neighbour, and with a gate two more."""


CLUSTER = Tiling("cluster", rows=8, block_n=64, block_k=64, warps=4, splits=2, stages=2, block_rows=8)
CLUSTERS = [
    CLUSTER,
    replace(CLUSTER, splits=4),
    replace(CLUSTER, rows=16, block_k=128, splits=4, stages=3, block_rows=16),
    replace(CLUSTER, rows=2, block_k=192, stages=4),
    replace(CLUSTER, rows=24, block_k=256, stages=2, block_rows=24),
    replace(CLUSTER, rows=32, splits=4, stages=18, block_rows=32),
    replace(CLUSTER, rows=64, block_k=128, splits=4, stages=6, block_rows=64),
    replace(CLUSTER, rows=64, stages=5, block_rows=64),
    replace(CLUSTER, rows=80, stages=8, block_rows=80),
    replace(CLUSTER, rows=96, splits=4, stages=3, block_rows=96),
]
"""In CUDA C++, for Hopper, without bias and gate."""


class Layer(NamedTuple):
    """What a launch computes beside the product."""

    scaled: bool = False
    bias: bool = False
    gated: bool = False


LAYERS = [
    Layer(),
    Layer(scaled=True),
    Layer(scaled=True, bias=True),
    Layer(scaled=True, gated=True),
    Layer(bias=True, gated=True),
]
PARTS = 5
"""Sums of squares of a row, of which there are more places than parts in a tile of the kernels'."""


class Tensors(NamedTuple):
    """What every launch reads."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def draw(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape).to(device, dtype)


def tensors(rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device, *, bias: bool = False) -> Tensors:
    weight = (torch.randn(n, k) / k**0.5).to(device, dtype)
    return Tensors(
        3 * draw(rows, k, dtype=dtype, device=device),
        weight,
        draw(n, dtype=dtype, device=device) if bias else None,
    )


def half_normed(total: torch.Tensor) -> Normed:
    """Return a norm of `total` [rows, k] that is still to be scaled, with uneven parts of the squares."""
    rows, k = total.shape
    gain = draw(k, dtype=total.dtype, device=total.device)
    squares = torch.zeros(rows, PARTS, device=total.device)
    squares.index_add_(1, torch.arange(k, device=total.device) % 7 % PARTS, total.float().square())
    return Normed(total * gain, Scale(squares, total, gain, EPS))


def exact_norm(total: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = total.double()
    return gain.double() * wide / (wide.square().mean(dim=-1, keepdim=True) + EPS).sqrt()


def exact(inputs: Tensors, *, scale: Scale | None = None, gated: bool = False) -> torch.Tensor:
    x = inputs.x.double() if scale is None else exact_norm(scale.total, scale.gain)
    out = F.linear(x, inputs.weight.double(), None if inputs.bias is None else inputs.bias.double())
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return out


def shapes(tiling: Tiling) -> Iterator[tuple[int, int, int]]:
    """The weight [n, k] and the rows of x to be tried."""
    for n, k in SHAPES:
        for rows in {max(tiling.rows - 1, 1), *([tiling.rows] if ON_GPU else [])}:
            yield n, k, rows


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("tiling", "dtype"), CASES, ids=str)
def test_small_linear(triton_device: torch.device, dtype: torch.dtype, tiling: Tiling, layer: Layer) -> None:
    for n, k, rows in shapes(tiling):
        inputs = tensors(rows, n, k, dtype, triton_device, bias=layer.bias)
        normed = half_normed(inputs.x) if layer.scaled else Normed(inputs.x)
        x, scale = normed.x, normed.scale
        given = [tensor for tensor in (x, *inputs, scale and scale.squares) if tensor is not None]
        before = [tensor.clone() for tensor in given]
        memory = poisoned(rows, n // 2 if layer.gated else n, dtype=dtype, device=triton_device)
        options: dict[str, Any] = {"scale": scale, "gated": layer.gated}
        out = small_linear_triton(x, *inputs[1:], **options, out=memory, tiling=tiling, pdl=is_hopper(triton_device))
        assert out is memory
        assert relative_error(out, exact(inputs, **options)) < 2 * TOLERANCE[dtype], (n, k, rows)
        if not layer.scaled:  # where the norm's rounding differs
            expected = small_linear_torch(x, *inputs[1:], **options)
            assert relative_error(out, expected) < (2 if layer.gated else 1) * CLOSE[dtype], (n, k, rows)
        assert all(map(torch.equal, given, before)), "inputs are not written"


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("tiling", "dtype"), CASES, ids=str)
def test_small_linear_add_norm(triton_device: torch.device, dtype: torch.dtype, tiling: Tiling, bias: bool) -> None:
    for n, k, rows in shapes(tiling):
        inputs = tensors(rows, n, k, dtype, triton_device, bias=bias)
        residual, gain = (draw(*shape, dtype=dtype, device=triton_device) for shape in ((rows, n), (n,)))
        given = [tensor for tensor in (*inputs, residual, gain) if tensor is not None]
        before = [tensor.clone() for tensor in given]
        arguments = (*inputs, residual, gain, EPS)
        normed, total = small_linear_add_norm_triton(*arguments, tiling=tiling, pdl=is_hopper(triton_device))
        assert normed.scale is not None
        assert normed.scale.total is total
        assert total.dtype == normed.x.dtype == dtype
        assert relative_error(total, residual.double() + exact(inputs)) < TOLERANCE[dtype], (n, k, rows)
        # Of the total as it is stored, whatever that is.
        assert relative_error(normed.x, total.double() * gain.double()) < TOLERANCE[dtype], (n, k, rows)
        squares = total.double().square()
        assert relative_error(normed.scale.squares.double().sum(1), squares.sum(1)) < 1e-6, (n, k, rows)
        tiles = F.pad(squares, (0, -n % tiling.block_n)).unflatten(1, (-1, tiling.block_n))
        pieces = [piece.sum(2) for piece in tiles.split([width for width in tiling.pieces if width], 2)]
        parts = torch.stack(pieces, dim=2).flatten(1)
        assert parts.shape[1] == tiling.parts(n)
        assert relative_error(normed.scale.squares, parts) < 1e-6, "each has a place of its own"
        separate, expected_total = small_linear_add_norm_torch(*arguments)
        assert relative_error(total, expected_total) < CLOSE[dtype], (n, k, rows)
        assert relative_error(normed.finish(), separate.x) < 2 * CLOSE[dtype], (n, k, rows)
        assert all(map(torch.equal, given, before)), "inputs are not written"


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_a_norm_between_two_layers(triton_device: torch.device, tiling: Tiling) -> None:
    """What one launch leaves to be scaled, another scales, by the sums of squares of all tiles, whole or not."""
    n, k, dtype = 328, 72, torch.bfloat16
    inputs = tensors(tiling.rows, n, k, dtype, triton_device)
    residual, gain = (draw(*shape, dtype=dtype, device=triton_device) for shape in ((tiling.rows, n), (n,)))
    normed, total = small_linear_add_norm_triton(*inputs, residual, gain, EPS, tiling=tiling)
    weight = (torch.randn(18, n) / n**0.5).to(triton_device, dtype)
    out = small_linear_triton(normed.x, weight, scale=normed.scale, gated=True, tiling=tiling)
    assert (
        relative_error(out, exact(Tensors(total, weight, None), scale=normed.scale, gated=True)) < 2 * TOLERANCE[dtype]
    )
    finished = small_linear_torch(normed.finish(), weight, gated=True)
    assert relative_error(out, finished) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 2, *([3, 8, 11, 16, 33, 64] if ON_HOPPER else [])])
def test_any_number_of_rows_by_default(triton_device: torch.device, rows: int) -> None:
    tiling = tiling_for(rows, 36, 136, gated=True)
    assert tiling is not None
    inputs = tensors(rows, 36, 136, torch.bfloat16, triton_device)
    out = small_linear_triton(*inputs, gated=True, tiling=tiling)
    assert relative_error(out, exact(inputs, gated=True)) < 2 * TOLERANCE[torch.bfloat16]


def test_no_tiling_for_many_rows_or_unaligned_ones() -> None:
    assert tiling_for(257, 4096, 1024, gated=False) is None
    assert tiling_for(1, 4096, 1020, gated=False) is None


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_a_row_does_not_depend_on_others(triton_device: torch.device, tiling: Tiling) -> None:
    n, k, dtype = 18, 328, torch.bfloat16
    inputs = tensors(tiling.rows, n, k, dtype, triton_device)
    residual, gain = (draw(*shape, dtype=dtype, device=triton_device) for shape in ((tiling.rows, n), (n,)))
    half = half_normed(inputs.x)
    assert half.scale is not None

    def launch(rows: slice) -> list[torch.Tensor]:
        assert half.scale is not None
        scale = replace(half.scale, squares=half.scale.squares[rows])
        out = small_linear_triton(half.x[rows], inputs.weight, scale=scale, gated=True, tiling=tiling)
        added = (inputs.x[rows], inputs.weight, None, residual[rows], gain, EPS)
        normed, total = small_linear_add_norm_triton(*added, tiling=tiling)
        assert normed.scale is not None
        return [out, normed.x, total, normed.scale.squares]

    together = launch(slice(None))
    assert all(map(torch.equal, launch(slice(None)), together)), "the same launch gives the same bits"
    for row in {0, tiling.rows // 2, tiling.rows - 1}:
        alone = launch(slice(row, row + 1))
        assert all(torch.equal(mine[0], of_all[row]) for mine, of_all in zip(alone, together, strict=True))


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_nothing_past_the_rows_is_written(triton_device: torch.device, tiling: Tiling) -> None:
    n, k, dtype = 18, 328, torch.float32 if tiling.form == "fma" else torch.bfloat16

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        memory = poisoned(tiling.rows + 1, tensor.shape[1], dtype=dtype, device=triton_device)
        memory[:1] = tensor
        return memory[:1]

    inputs = tensors(1, n, k, dtype, triton_device)
    x, weight, _ = inputs
    half = half_normed(x)
    assert half.scale is not None
    scale = replace(half.scale, squares=poison(half.scale.squares))
    memory = poisoned(tiling.rows + 1, n, dtype=dtype, device=triton_device)
    out = small_linear_triton(poison(half.x), weight, scale=scale, out=memory[:1], tiling=tiling)
    assert relative_error(out, exact(inputs, scale=half.scale)) < 2 * TOLERANCE[dtype]
    assert memory[1:].isnan().all()
    residual, gain = (draw(*shape, dtype=dtype, device=triton_device) for shape in ((1, n), (n,)))
    normed, total = small_linear_add_norm_triton(poison(x), weight, None, poison(residual), gain, EPS, tiling=tiling)
    assert relative_error(total, residual.double() + exact(inputs)) < TOLERANCE[dtype]
    assert relative_error(normed.finish(), exact_norm(total, gain)) < 2 * TOLERANCE[dtype]
    assert normed.scale is not None
    assert relative_error(normed.scale.squares.double().sum(1), total.double().square().sum(1)) < 1e-6


def test_what_is_added_may_be_what_is_multiplied(triton_device: torch.device) -> None:
    inputs = tensors(1, 64, 64, torch.float32, triton_device)
    gain = draw(64, dtype=torch.float32, device=triton_device)
    _, total = small_linear_add_norm_triton(*inputs, inputs.x, gain, EPS, tiling=FMA)
    assert relative_error(total, inputs.x.double() + exact(inputs)) < TOLERANCE[torch.float32]


def test_too_many_rows_for_a_tiling(triton_device: torch.device) -> None:
    x, weight = torch.randn(3, 64, device=triton_device), torch.randn(8, 64, device=triton_device)
    with pytest.raises(AssertionError, match="3 rows"):
        small_linear_triton(x, weight, tiling=replace(FMA, rows=2))
    assert small_linear_triton(x[:0], weight, tiling=FMA).shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="cluster needs a Hopper")
@pytest.mark.parametrize("shape", [(64, 1536), (128, 3072), (1024, 3072), (4096, 12288)])
@pytest.mark.parametrize("tiling", CLUSTERS, ids=str)
def test_cluster(triton_device: torch.device, tiling: Tiling, shape: tuple[int, int]) -> None:
    """Of as many rows as there may be, and one less, beside memory that is not to be read or written."""
    n, k = shape
    dtype = torch.bfloat16
    for rows in {tiling.rows, max(1, tiling.rows - 1), 1}:
        x, residual = (poisoned(rows + 1, width, dtype=dtype, device=triton_device)[:rows] for width in (k, n))
        inputs = tensors(rows, n, k, dtype, triton_device)
        x.copy_(inputs.x)
        residual.copy_(draw(rows, n, dtype=dtype, device=triton_device))
        gain = draw(n, dtype=dtype, device=triton_device)
        before = [tensor.clone() for tensor in (x, inputs.weight, residual, gain)]
        normed, total = small_linear_add_norm_triton(x, inputs.weight, None, residual, gain, EPS, tiling=tiling)
        assert normed.scale is not None
        assert relative_error(total, residual.double() + exact(inputs)) < TOLERANCE[dtype]
        assert relative_error(normed.x, total.double() * gain.double()) < TOLERANCE[dtype]
        parts = total.double().square().unflatten(1, (-1, n // tiling.parts(n))).sum(2)
        assert parts.shape[1] == tiling.parts(n)
        assert relative_error(normed.scale.squares, parts) < 1e-6, "each has a place of its own"
        assert relative_error(normed.finish(), exact_norm(total, gain)) < 2 * TOLERANCE[dtype]
        assert all(map(torch.equal, (x, inputs.weight, residual, gain), before)), "inputs are not written"
        again, _ = small_linear_add_norm_triton(x, inputs.weight, None, residual, gain, EPS, tiling=tiling, pdl=True)
        assert torch.equal(again.x, normed.x), "the same launch gives the same bits"
        row = rows // 2
        of_row = (x[row : row + 1], inputs.weight, None, residual[row : row + 1], gain, EPS)
        alone, _ = small_linear_add_norm_triton(*of_row, tiling=tiling)
        assert torch.equal(alone.x[0], normed.x[row]), "a row does not depend on others"
        outputs = [
            poisoned(rows + 1, width, dtype=of, device=triton_device)
            for width, of in ((n, dtype), (tiling.parts(n), torch.float32), (n, dtype))
        ]
        added = cluster_linear.Added(residual, gain, *(memory[:rows] for memory in outputs[:2]))
        cluster_linear.cluster_linear(x, inputs.weight, outputs[2][:rows], added=added, pdl=False, **cut_of(tiling))
        for memory, expected in zip(outputs, (total, normed.scale.squares, normed.x), strict=True):
            assert torch.equal(memory[:rows], expected)
            assert memory[rows:].isnan().all(), "nothing past the rows is written"


def cut_of(tiling: Tiling) -> dict[str, int]:
    """How `cluster_linear` is told of a tiling."""
    slices = tiling.block_k // SLICE
    return {"block_rows": tiling.block_rows, "cluster": tiling.splits, "slices": slices, "stages": tiling.stages}


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="cluster needs a Hopper")
@pytest.mark.parametrize("tiling", CLUSTERS, ids=str)
def test_cluster_that_scales(triton_device: torch.device, tiling: Tiling) -> None:
    dtype, n = torch.bfloat16, 128
    for rows, parts in itertools.product({tiling.rows, 1}, (5, 64, 300)):
        inputs = tensors(rows, n, 1536, dtype, triton_device)
        gain = draw(1536, dtype=dtype, device=triton_device)
        squares = torch.zeros(rows, parts, device=triton_device)
        part = torch.arange(1536, device=triton_device) * 7 % parts
        squares.index_add_(1, part, inputs.x.float().square())
        scale = Scale(squares, inputs.x, gain, EPS)
        out = small_linear_triton(inputs.x * gain, inputs.weight, scale=scale, tiling=tiling)
        assert relative_error(out, exact(inputs, scale=scale)) < 2 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="cluster needs a Hopper")
@pytest.mark.parametrize("tiling", CLUSTERS, ids=str)
def test_clusters_that_add_up_what_ranks_have(triton_device: torch.device, tiling: Tiling) -> None:
    """Three ranks on one GPU, which has room for the programs of all, each in a stream of its own."""
    dtype, n, k, ranks = torch.bfloat16, 128, 1536, 3
    for rows in {tiling.rows, max(1, tiling.rows - 1)}:
        inputs = [tensors(rows, n, k, dtype, triton_device) for _ in range(ranks)]
        residual, gain = (draw(*shape, dtype=dtype, device=triton_device) for shape in ((rows, n), (n,)))
        shape = (ranks, ranks - 1, (rows + 1) * n)
        inboxes = torch.full(shape, EMPTY, dtype=torch.int16, device=triton_device).view(dtype)
        results = sum_beside_one_another(inputs, residual, gain, inboxes, tiling)
        summands = [small_linear_triton(*inputs[rank], tiling=tiling).float() for rank in range(ranks)]
        expected = (sum(summands[1:], start=summands[0]).to(dtype).float() + residual.float()).to(dtype)
        for total, squares, scaled in results:
            assert torch.equal(total, expected)
            assert torch.equal(scaled, (total.float() * gain.float()).to(dtype))
            assert relative_error(squares.double().sum(1), total.double().square().sum(1)) < 1e-6
        assert (inboxes.view(torch.int16) == EMPTY).all(), "inboxes are empty again"


def sum_beside_one_another(
    inputs: list[Tensors], residual: torch.Tensor, gain: torch.Tensor, inboxes: torch.Tensor, tiling: Tiling
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return totals, sums of squares and what is scaled of all ranks, whose launches wait for one another: nothing else
    may be asked of the GPU before the last one is made."""
    ranks, (rows, n) = len(inputs), residual.shape
    results = [
        (torch.empty_like(residual), residual.new_empty((rows, tiling.parts(n)), dtype=torch.float32), residual.clone())
        for _ in range(ranks)
    ]
    addresses = [
        torch.tensor(
            [inboxes[other, rank - (rank > other)].data_ptr() if other != rank else 0 for other in range(ranks)],
            device=residual.device,
        )
        for rank in range(ranks)
    ]
    cut = cut_of(tiling)
    kernel_of(source_of(*list(cut.values())[:3], adds=True, ranks=ranks), residual.device)  # compiled, and loaded
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    torch.cuda.synchronize()
    for rank, (stream, (total, squares, scaled)) in enumerate(zip(streams, results, strict=True)):
        added = cluster_linear.Added(residual, gain, total, squares)
        one_shot = OneShot(inboxes[rank], Push(rank, addresses[rank]))
        with torch.cuda.stream(stream):
            cluster_linear.cluster_linear(
                inputs[rank].x, inputs[rank].weight, scaled, added=added, one_shot=one_shot, pdl=True, **cut
            )
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize(
    ("rows", "n", "k", "adds", "clusters", "form"),
    [
        (8, 1024, 3072, False, True, "cluster"),
        (8, 1024, 3072, True, False, "ring"),
        (8, 1024, 3080, True, True, "ring"),  # of which no number of whole tiles is made
        (8, 1032, 3072, True, True, "ring"),
        (8, 16384, 4096, True, True, "ring"),  # has a program for each multiprocessor without being split
        (66, 1024, 3072, True, True, "ring"),
        (66, 4096, 4096, True, True, "cluster"),
        (66, 4096, 4096, False, True, "ring"),
        (97, 4096, 4096, True, True, "ring"),
        (1, 1024, 3072, True, True, "fma"),
    ],
)
def test_where_there_are_clusters(rows: int, n: int, k: int, adds: bool, clusters: bool, form: str) -> None:
    tiling = tiling_for(rows, n, k, gated=False, adds=adds, clusters=clusters)
    assert tiling is not None
    assert tiling.form == form
    assert rows <= tiling.rows


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper")
@pytest.mark.parametrize(
    "tiling",
    [replace(FMA, rows=2), replace(RING, splits=4), replace(RING, rows=64, block_n=32, block_rows=64), *CLUSTERS[1:3]],
    ids=str,
)
def test_a_chain_with_dependent_launches(triton_device: torch.device, tiling: Tiling) -> None:
    """Each launch reads what the ones before wrote; a program that does not wait for them shows."""
    size, length = 4096, 24
    weights = [(torch.randn(size, size) / size**0.5).to(triton_device, torch.bfloat16) for _ in range(length)]
    gain = torch.ones(size, dtype=torch.bfloat16, device=triton_device)
    options: dict[str, Any] = {"tiling": tiling}
    into_options = options if tiling.form != "cluster" else {"tiling": replace(RING, rows=tiling.rows)}

    def chain(x: torch.Tensor, *, pdl: bool) -> torch.Tensor:
        normed, residual = Normed(x), x
        for into, back in zip(weights[::2], weights[1::2], strict=True):
            x = small_linear_triton(normed.x, into, scale=normed.scale, pdl=pdl, **into_options)
            normed, residual = small_linear_add_norm_triton(x, back, None, residual, gain, EPS, pdl=pdl, **options)
        return normed.finish() + residual

    x = torch.randn(tiling.rows, size).to(triton_device, torch.bfloat16)
    expected = chain(x, pdl=False)
    chain(x, pdl=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x, pdl=True)
    for _ in range(10):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="ring needs a Hopper")
@pytest.mark.parametrize("tiling", RINGS, ids=str)
@pytest.mark.parametrize("shape", [(1024, 512), (4096, 2048), (328, 328)])
def test_what_is_pushed_is_what_is_put_out(triton_device: torch.device, tiling: Tiling, shape: tuple[int, int]) -> None:
    """To every other rank's inbox, and nothing beside it; rows are as many as there are, and one less."""
    n, k = shape
    for rows in {tiling.rows, max(1, tiling.rows - 1)}:
        x = torch.randn(rows, k, device=triton_device).bfloat16()
        weight, bias = (torch.randn(*dims, device=triton_device).bfloat16() for dims in ((n, k), (n,)))
        inboxes = [poisoned(tiling.rows + 1, n, dtype=torch.bfloat16, device=triton_device) for _ in range(3)]
        addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes], device=triton_device)
        expected = small_linear_triton(x, weight, bias, tiling=tiling)
        out = small_linear_triton(x, weight, bias, tiling=tiling, push=Push(1, addresses))
        assert torch.equal(out, expected)
        assert relative_error(expected, exact(Tensors(x, weight, bias))) < TOLERANCE[torch.bfloat16]
        for rank, inbox in enumerate(inboxes):
            written = 0 if rank == 1 else rows
            assert torch.equal(inbox[:written], expected[:written])
            assert inbox[written:].isnan().all()
