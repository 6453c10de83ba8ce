"""Packed weights compute what `F.linear` does, and forget nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.kernels.packed import linear, pack
from tests.model.kernels.comparing import relative_error

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN packs nothing")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 17, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_linear(dtype: torch.dtype, rows: int, biased: bool) -> None:
    torch.manual_seed(rows)
    weight = parameter(97, 64, dtype=dtype)
    bias = parameter(97, dtype=dtype) if biased else None
    x = torch.randn(rows, 64).to(dtype)
    packed = pack(weight)
    assert (packed.shape, packed.dtype) == (weight.shape, dtype)
    assert torch.equal(packed.to_dense() if packed.is_mkldnn else packed, weight), "every value is still there"
    actual = linear(x, packed, bias)
    assert (actual.shape, actual.dtype, actual.is_contiguous()) == ((rows, 97), dtype, True)
    assert relative_error(actual, F.linear(x, weight, bias)) < TOLERANCE[dtype]


def test_float32_is_packed() -> None:
    assert pack(parameter(8, 16, dtype=torch.float32)).is_mkldnn


def test_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    packed = pack(parameter(512, 256, dtype=torch.float32))
    x = torch.randn(33, 256)
    together = linear(x, packed)
    for first, last in ((0, 1), (5, 7), (0, 16), (16, 33)):
        assert torch.equal(linear(x[first:last].contiguous(), packed), together[first:last])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_cannot_be_packed_stays_as_it_is(dtype: torch.dtype) -> None:
    weight = parameter(8, 16, dtype=dtype)
    assert pack(weight) is weight
    x = torch.randn(3, 16).to(dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_meta_weights_stay_as_they_are() -> None:
    weight = nn.Parameter(torch.empty(8, 16, device="meta"), requires_grad=False)
    assert pack(weight) is weight
