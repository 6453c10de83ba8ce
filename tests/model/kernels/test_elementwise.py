"""RMSNorm and SiLU-and-mul: kernels against references in float64, and the references against transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.kernels.activation import silu_and_mul, silu_and_mul_torch, silu_and_mul_triton
from model.kernels.norm import (
    add_rms_norm,
    add_rms_norm_torch,
    add_rms_norm_triton,
    rms_norm,
    rms_norm_torch,
    rms_norm_triton,
)
from tests.model.kernels.comparing import DTYPES, MATCH, ON_GPU, TOLERANCE, relative_error

SHAPES = [(1, 64), (3, 96), (5, 1000), *([(257, 4096), (64, 5120)] if ON_GPU else [])]
EPS = 1e-6


def exact_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return weight.double() * x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(triton_device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (3 * torch.randn(shape)).to(triton_device, dtype)
    weight = torch.randn(shape[1]).to(triton_device, dtype)
    out = rms_norm_triton(x, weight, EPS)
    assert out.dtype == dtype
    assert relative_error(out, exact_rms_norm(x, weight)) < TOLERANCE[dtype]
    assert relative_error(out, rms_norm_torch(x, weight, EPS)) < MATCH[dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(triton_device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, *shape).to(triton_device, dtype)
    weight = torch.randn(shape[1]).to(triton_device, dtype)
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm_triton(x, residual, weight, EPS)
    expected, expected_total = add_rms_norm_torch(x, residual, weight, EPS)
    assert relative_error(total, expected_total) < MATCH[dtype]
    assert relative_error(normed, exact_rms_norm(total, weight)) < TOLERANCE[dtype]
    assert relative_error(normed, expected) < MATCH[dtype]
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(triton_device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (4 * torch.randn(shape[0], 2 * shape[1])).to(triton_device, dtype)
    gate, up = x.double().chunk(2, dim=-1)
    out = silu_and_mul_triton(x)
    assert relative_error(out, F.silu(gate) * up) < TOLERANCE[dtype]
    assert relative_error(out, silu_and_mul_torch(x)) < MATCH[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_references_are_what_transformers_computes(dtype: torch.dtype) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norm = Qwen3RMSNorm(96, eps=EPS)
    norm.weight.data = torch.randn(96)
    norm = norm.to(dtype)
    x = torch.randn(7, 96).to(dtype)
    assert torch.equal(rms_norm_torch(x, norm.weight, EPS), norm(x))
    gate, up = torch.randn(2, 7, 96).to(dtype)
    assert torch.equal(silu_and_mul_torch(torch.cat((gate, up), dim=-1)), F.silu(gate) * up)


def test_no_rows(triton_device: torch.device) -> None:
    x = torch.empty(0, 64, device=triton_device)
    assert rms_norm_triton(x, torch.ones(64, device=triton_device), EPS).shape == (0, 64)
    assert silu_and_mul_triton(x).shape == (0, 32)


def test_dispatch_takes_the_reference_on_cpu() -> None:
    x, residual, weight = torch.randn(3, 4, 64)
    assert torch.equal(rms_norm(x, weight[0], EPS), rms_norm_torch(x, weight[0], EPS))
    for out, expected in zip(
        add_rms_norm(x, residual, weight[0], EPS), add_rms_norm_torch(x, residual, weight[0], EPS), strict=True
    ):
        assert torch.equal(out, expected)
    assert torch.equal(silu_and_mul(x), silu_and_mul_torch(x))
