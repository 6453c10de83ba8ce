"""The gate of the MLP."""

from __future__ import annotations

import torch
from torch import nn

from model.kernels.activation import silu_and_mul


class SiluAndMul(nn.Module):
    """SwiGLU's gate (arXiv:2002.05202): SiLU of the first half of the features times the second half."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, 2 * features] to [tokens, features]."""
        return silu_and_mul(x)
