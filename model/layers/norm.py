"""Root-mean-square normalisation (arXiv:1910.07467), fused with the residual addition before it."""

from __future__ import annotations

from typing import overload

import torch

from model.kernels.norm import add_rms_norm, rms_norm
from model.layers.shard import ShardedModule, empty_parameter


class RMSNorm(ShardedModule):
    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(size, dtype=dtype, device=device)

    @overload
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise [tokens, size]; with `residual`, normalise their sum and return it too as the new residual."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)
