"""Root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

import torch

from model.kernels.norm import rms_norm
from model.layers.shard import ShardedModule, empty_parameter


class RMSNorm(ShardedModule):
    """The norm of a row. One behind a row-parallel layer is applied by that (`RowParallelLinear.forward`)."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(size, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [tokens, size]."""
        return rms_norm(x, self.weight, self.eps)
