"""Linear layers with what stands around them, whichever way they are computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.kernels import packed
from model.kernels.linear import linear_add_norm
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
