"""Linear layers with what stands around them, whichever way they are computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.kernels import cublaslt, packed
from model.kernels.linear import linear, linear_add_norm, norm_linear
from model.kernels.norm import Normed
from tests.model.kernels.comparing import TOLERANCE, relative_error

EPS = 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("pack", [False, True], ids=["", "packed"])
def test_linear_add_norm(triton_device: torch.device, pack: bool, bias: bool, dtype: torch.dtype) -> None:
    """Of more rows than fused launches take, and of few."""
    for rows in (3, 300):
        torch.manual_seed(rows)
        x, weight, residual, gain, added = (
            torch.randn(shape).to(triton_device, dtype)
            for shape in ((rows, 192), (128, 192), (rows, 128), (128,), (128,))
        )
        product = x.double() @ weight.double().T + (added.double() if bias else 0.0)
        expected = residual.double() + product
        layer = nn.Parameter(weight, requires_grad=False)
        normed, total = linear_add_norm(
            x, packed.pack(layer) if pack else layer, added if bias else None, residual, gain, EPS
        )
        assert relative_error(total, expected) < 2 * TOLERANCE[dtype]
        wide = total.double()
        wide *= (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain.double()
        assert relative_error(normed.finish(), wide) < 2 * TOLERANCE[dtype]


class _Product:
    """What `product_for` returns, on a CPU; it remembers what it was called with."""

    def __init__(self) -> None:
        self.runs: list[bool] = []

    def run(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
        self.runs.append(add)
        product = x @ weight.T
        out.copy_(out + product if add else product)


def test_products_that_are_faster_than_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the place of PyTorch's wherever there is no bias, write where they are told to, and add in place."""
    product = _Product()
    monkeypatch.setattr(cublaslt, "product_for", lambda x, weight: product)
    x, weight, wide, bias = torch.randn(40, 64), torch.randn(32, 64), torch.randn(64, 64), torch.randn(32)
    memory = torch.full((40, 32), torch.nan)
    assert linear(x, weight, out=memory) is memory
    torch.testing.assert_close(memory, x @ weight.T)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    gate, up = (x @ wide.T).chunk(2, dim=1)
    torch.testing.assert_close(norm_linear(Normed(x), wide, gated=True), torch.nn.functional.silu(gate) * up)
    residual, gain = torch.randn(40, 32), torch.randn(32)
    expected = residual + x @ weight.T
    normed, total = linear_add_norm(x, weight, None, residual, gain, EPS)
    assert total is residual
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(
        normed.finish(), expected * (expected.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain
    )
    assert product.runs == [False, False, False, True]
    torch.testing.assert_close(linear(x, weight, bias), x @ weight.T + bias)
    torch.testing.assert_close(linear_add_norm(x, weight, bias, expected, gain, EPS)[1], expected + x @ weight.T + bias)
    assert len(product.runs) == 4
