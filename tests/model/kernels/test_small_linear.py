"""Fused linear layers of few rows: both kernels against float64 and against the separate operations."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from model.kernels.runtime import is_hopper
from model.kernels.small_linear import Tiling, small_linear_torch, small_linear_triton
from tests.model.kernels.comparing import MATCH, ON_GPU, TOLERANCE, poisoned, relative_error

EPS = 1e-6
FMA = Tiling(form="fma", rows=1, block_n=8, block_k=256, warps=1)
DOT = Tiling(form="dot", rows=16, block_n=16, block_k=64, warps=4, stages=3)
TILINGS = [
    *(replace(FMA, rows=rows) for rows in (1, 2, 4)),
    replace(FMA, rows=2, block_k=1024, warps=4),
    replace(FMA, prefetch=256),
    DOT,
    replace(DOT, rows=8, block_n=64, block_k=128, prefetch=64),
    replace(DOT, splits=3),
    replace(DOT, rows=8, splits=8),  # of which some have no columns
]
SHAPES = [(24, 512), (18, 328), (6, 72), *([(4096, 4096), (1024, 3072)] if ON_GPU else [])]
"""Weights [n, k] of whole tiles, of ragged ones, and less than one."""
# Triton's interpreter multiplies no bfloat16 matrices: float16 stands in for it there.
HALF = {"fma": torch.bfloat16, "dot": torch.bfloat16 if ON_GPU else torch.float16}
CASES = [(tiling, dtype) for tiling in TILINGS for dtype in (torch.float32, HALF[tiling.form])]
MATCH = MATCH | {torch.float16: 2e-3}


class Layer(NamedTuple):
    """What a launch computes, as keyword arguments that `inputs` fills."""

    norm: bool = False
    bias: bool = False
    gated: bool = False
    residual: bool = False


LAYERS = [Layer(), Layer(norm=True, bias=True), Layer(norm=True, gated=True), Layer(bias=True, residual=True)]


def inputs(layer: Layer, rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(device, dtype)

    arguments: dict[str, object] = {"x": 3 * draw(rows, k), "weight": (torch.randn(n, k) / k**0.5).to(device, dtype)}
    if layer.norm:
        arguments |= {"norm": draw(k), "eps": EPS}
    if layer.bias:
        arguments["bias"] = draw(n)
    if layer.residual:
        arguments["residual"] = draw(rows, n)
    return arguments | {"gated": layer.gated}


def exact(arguments: dict[str, object]) -> torch.Tensor:
    wide = {name: value.double() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    x = wide["x"]
    if "norm" in wide:
        x = wide["norm"] * x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    out = F.linear(x, wide["weight"], wide.get("bias"))
    if arguments["gated"]:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return out + wide["residual"] if "residual" in wide else out


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("tiling", "dtype"), CASES, ids=str)
def test_small_linear(triton_device: torch.device, dtype: torch.dtype, tiling: Tiling, layer: Layer) -> None:
    for n, k in SHAPES:
        for rows in {max(tiling.rows - 1, 1), *([tiling.rows] if ON_GPU else [])}:
            arguments = inputs(layer, rows, n, k, dtype, triton_device)
            out = small_linear_triton(**arguments, tiling=tiling, pdl=is_hopper(triton_device))
            assert out.dtype == dtype
            assert relative_error(out, exact(arguments)) < 2 * TOLERANCE[dtype], (n, k, rows)
            if tiling.form == "fma" or not layer.norm:
                assert relative_error(out, small_linear_torch(**arguments)) < 4 * MATCH[dtype], (n, k, rows)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_a_row_does_not_depend_on_others(triton_device: torch.device, tiling: Tiling) -> None:
    arguments = inputs(Layer(norm=True, gated=True), tiling.rows, 18, 328, HALF[tiling.form], triton_device)
    together = small_linear_triton(**arguments, tiling=tiling)
    x = arguments.pop("x")
    for row in {0, tiling.rows // 2, tiling.rows - 1}:
        alone = small_linear_triton(x[row : row + 1], **arguments, tiling=tiling)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_nothing_past_the_rows_is_read_or_written(triton_device: torch.device, tiling: Tiling) -> None:
    arguments = inputs(Layer(norm=True), 1, 18, 328, torch.float32, triton_device)
    memory = poisoned(tiling.rows, 328, dtype=torch.float32, device=triton_device)
    memory[:1] = arguments["x"]
    arguments["x"] = memory[:1]
    assert relative_error(small_linear_triton(**arguments, tiling=tiling), exact(arguments)) < TOLERANCE[torch.float32]


def test_too_many_rows_for_a_tiling(triton_device: torch.device) -> None:
    x, weight = torch.randn(3, 64, device=triton_device), torch.randn(8, 64, device=triton_device)
    with pytest.raises(AssertionError, match="3 rows"):
        small_linear_triton(x, weight, tiling=replace(FMA, rows=2))
    assert small_linear_triton(x[:0], weight, tiling=FMA).shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", [replace(FMA, rows=4, prefetch=256), replace(DOT, splits=4, prefetch=256)], ids=str)
def test_a_chain_with_dependent_launches(triton_device: torch.device, tiling: Tiling) -> None:
    """Each launch reads what the one before wrote; a program that does not wait for it shows."""
    size, length = 4096, 24
    weights = [(torch.randn(size, size) / size**0.5).to(triton_device, torch.bfloat16) for _ in range(length)]
    norm = torch.ones(size, dtype=torch.bfloat16, device=triton_device)

    def chain(x: torch.Tensor, *, pdl: bool) -> torch.Tensor:
        for weight in weights:
            x = small_linear_triton(x, weight, norm=norm, eps=EPS, residual=x, tiling=tiling, pdl=pdl)
        return x

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
