"""Fused linear layers of few rows: the kernels against float64 and against the separate operations."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from model.kernels.runtime import is_hopper
from model.kernels.small_linear import Tiling, small_linear_torch, small_linear_triton
from model.kernels.tilings import tiling_for
from tests.model.kernels.comparing import MATCH, ON_GPU, TOLERANCE, poisoned, relative_error

EPS = 1e-6
FMA = Tiling(form="fma", rows=1, block_n=8, block_k=256, warps=1)
DOT = Tiling(form="dot", rows=16, block_n=16, block_k=64, warps=4, stages=3)
HELD = Tiling(form="held", rows=16, block_n=8, block_k=256, warps=4, stages=2)
TILINGS = [
    *(replace(FMA, rows=rows) for rows in (1, 2, 4)),
    replace(FMA, rows=2, block_k=1024, warps=4),
    replace(FMA, stages=2),
    replace(FMA, rows=4, stages=3, prefetch=256),
    HELD,
    replace(HELD, rows=8, block_n=16, block_k=512, warps=8, stages=1),
    replace(HELD, rows=32, warps=8),
    DOT,
    replace(DOT, rows=8, block_n=64, block_k=128, prefetch=64),
    replace(DOT, splits=3),
    replace(DOT, rows=8, splits=8),  # of which some have no columns
]
SHAPES = [(24, 512), (18, 328), (6, 72), *([(4096, 4096), (1024, 3072)] if ON_GPU else [])]
"""Weights [n, k] of whole tiles, of ragged ones, and less than one."""
# Triton's interpreter multiplies no bfloat16 matrices: float16 stands in for it there.
TENSOR_CORES = torch.bfloat16 if ON_GPU else torch.float16
HALF = {"fma": torch.bfloat16, "held": TENSOR_CORES, "dot": TENSOR_CORES}
CASES = [(tiling, dtype) for tiling in TILINGS for dtype in (torch.float32, HALF[tiling.form])]
# In float32, twice as much would have to be held.
CASES += [(replace(HELD, block_k=2048, warps=8), torch.bfloat16), (replace(HELD, rows=64), torch.bfloat16)] * ON_GPU
MATCH = MATCH | {torch.float16: 2e-3}
CLOSE = {torch.float32: 4e-6, torch.float16: 8e-3, torch.bfloat16: 2**-7 if ON_GPU else 8e-2}
"""Sums of another order: the largest element of a few may be rounded to its neighbour, and the gate's product again."""


class Layer(NamedTuple):
    """What a launch computes, as keyword arguments that `inputs` fills."""

    norm: bool = False
    residual: bool = False
    bias: bool = False
    gated: bool = False


LAYERS = [
    Layer(),
    Layer(norm=True, gated=True),
    Layer(norm=True, residual=True, bias=True),
    Layer(norm=True, residual=True, gated=True),
    Layer(bias=True, gated=True),
]


def inputs(layer: Layer, rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(device, dtype)

    arguments: dict[str, object] = {"x": 3 * draw(rows, k), "weight": (torch.randn(n, k) / k**0.5).to(device, dtype)}
    if layer.norm:
        arguments |= {"norm": draw(k), "eps": EPS}
    if layer.bias:
        arguments["bias"] = draw(n)
    if layer.residual:
        arguments["residual"] = draw(rows, k)
    return arguments | {"gated": layer.gated}


def exact(arguments: dict[str, object]) -> torch.Tensor:
    wide = {name: value.double() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    x = wide["x"]
    if "residual" in wide:
        # Rounded as the kernels say: what is normed is what is handed on.
        x = (arguments["x"] + arguments["residual"]).double()
    if "norm" in wide:
        x = wide["norm"] * x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    out = F.linear(x, wide["weight"], wide.get("bias"))
    if arguments["gated"]:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return out


@pytest.mark.parametrize(
    ("tiling", "dtype", "layer"),
    [(*case, layer) for case in CASES for layer in LAYERS if not (layer.norm and case[0].form == "held")],
    ids=str,
)
def test_small_linear(triton_device: torch.device, dtype: torch.dtype, tiling: Tiling, layer: Layer) -> None:
    for n, k in SHAPES:
        if tiling.form == "held" and k > tiling.block_k * tiling.stages:
            continue
        for rows in {max(tiling.rows - 1, 1), *([tiling.rows] if ON_GPU else [])}:
            arguments = inputs(layer, rows, n, k, dtype, triton_device)
            before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
            memory = poisoned(rows, n // 2 if layer.gated else n, dtype=dtype, device=triton_device)
            out, total = small_linear_triton(**arguments, out=memory, tiling=tiling, pdl=is_hopper(triton_device))
            expected, expected_total = small_linear_torch(**arguments)
            assert out is memory
            assert total.dtype == dtype
            assert relative_error(out, exact(arguments)) < 2 * TOLERANCE[dtype], (n, k, rows)
            if not layer.norm:  # whose rounding differs
                assert relative_error(out, expected) < CLOSE[dtype], (n, k, rows)
            if layer.residual:
                assert relative_error(total, expected_total) < MATCH[dtype], (n, k, rows)
            else:
                assert total is arguments["x"]
            assert all(torch.equal(arguments[name], value) for name, value in before.items()), "inputs are not written"


@pytest.mark.parametrize("rows", range(1, 9))
def test_any_number_of_rows_by_default(triton_device: torch.device, rows: int) -> None:
    arguments = inputs(Layer(gated=True), rows, 36, 136, torch.float32, triton_device)
    tiling = tiling_for(rows, 36, 136, norm=False, gated=True)
    assert tiling is not None
    out, _ = small_linear_triton(**arguments, tiling=tiling)
    assert relative_error(out, exact(arguments)) < 2 * TOLERANCE[torch.float32]


def test_no_tiling_for_many_rows_or_unaligned_ones() -> None:
    assert tiling_for(17, 4096, 1024, norm=False, gated=False) is None
    assert tiling_for(1, 4096, 1020, norm=False, gated=False) is None


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_a_row_does_not_depend_on_others(triton_device: torch.device, tiling: Tiling) -> None:
    norms = tiling.form != "held"
    layer = Layer(norm=norms, residual=norms, gated=True)
    arguments = inputs(layer, tiling.rows, 18, 328, HALF[tiling.form], triton_device)
    together = small_linear_triton(**arguments, tiling=tiling)
    x, residual = arguments.pop("x"), arguments.pop("residual", None)
    for row in {0, tiling.rows // 2, tiling.rows - 1}:
        one = slice(row, row + 1)
        own = residual if residual is None else residual[one]
        alone = small_linear_triton(x[one], residual=own, **arguments, tiling=tiling)
        assert all(torch.equal(mine[0], all_rows[row]) for mine, all_rows in zip(alone, together, strict=True))


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_nothing_past_the_rows_is_read_or_written(triton_device: torch.device, tiling: Tiling) -> None:
    norms = tiling.form != "held"
    arguments = inputs(Layer(norm=norms, residual=norms), 1, 18, 328, torch.float32, triton_device)
    for name in {"x", "residual"} & arguments.keys():
        memory = poisoned(tiling.rows, 328, dtype=torch.float32, device=triton_device)
        memory[:1] = arguments[name]
        arguments[name] = memory[:1]
    out, total = small_linear_triton(**arguments, tiling=tiling)
    assert relative_error(out, exact(arguments)) < TOLERANCE[torch.float32]
    assert torch.equal(total, arguments["x"] + arguments.get("residual", 0))


def test_held_does_not_norm(triton_device: torch.device) -> None:
    arguments = inputs(Layer(norm=True), 1, 8, 64, torch.float32, triton_device)
    with pytest.raises(AssertionError, match="does not norm"):
        small_linear_triton(**arguments, tiling=HELD)


def test_too_many_columns_to_be_held(triton_device: torch.device) -> None:
    x, weight = torch.randn(3, 520, device=triton_device), torch.randn(8, 520, device=triton_device)
    with pytest.raises(AssertionError, match="520 columns"):
        small_linear_triton(x, weight, tiling=HELD)


def test_too_many_rows_for_a_tiling(triton_device: torch.device) -> None:
    x, weight = torch.randn(3, 64, device=triton_device), torch.randn(8, 64, device=triton_device)
    with pytest.raises(AssertionError, match="3 rows"):
        small_linear_triton(x, weight, tiling=replace(FMA, rows=2))
    assert small_linear_triton(x[:0], weight, tiling=FMA)[0].shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", [replace(FMA, rows=4, prefetch=256), replace(DOT, splits=4, prefetch=256)], ids=str)
def test_a_chain_with_dependent_launches(triton_device: torch.device, tiling: Tiling) -> None:
    """Each launch reads what the one before wrote; a program that does not wait for it shows."""
    size, length = 4096, 24
    weights = [(torch.randn(size, size) / size**0.5).to(triton_device, torch.bfloat16) for _ in range(length)]
    norm = torch.ones(size, dtype=torch.bfloat16, device=triton_device)

    def chain(x: torch.Tensor, *, pdl: bool) -> torch.Tensor:
        total = x
        for weight in weights:
            x, total = small_linear_triton(x, weight, norm=norm, eps=EPS, residual=total, tiling=tiling, pdl=pdl)
        return x + total

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
