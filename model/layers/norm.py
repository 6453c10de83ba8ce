"""Root-mean-square normalisation (arXiv:1910.07467), fused with the residual addition before it."""

from __future__ import annotations

from typing import overload

import torch

from model.kernels.norm import rms_norm
from model.layers.shard import ShardedModule, empty_parameter
from model.one_shot import Place
from model.parallel import TensorParallel

_ALONE = TensorParallel.single()


class RMSNorm(ShardedModule):
    """The norm of a row, of a sum of two, or, behind a row-parallel layer, of the sum of all ranks' and a residual.

    Args:
        tp, sums: the ranks, and which layers' outputs these are, for a norm that is given a residual.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        tp: TensorParallel = _ALONE,
        sums: Place = Place.MLP,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.tp = tp
        self._sums = sums
        self.weight = empty_parameter(size, dtype=dtype, device=device)

    @overload
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise [tokens, size]; with `residual`, normalise their sum and return it too as the new residual.

        Beside a residual, `x` is this rank's summand: all ranks' are added up first.
        """
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return self.tp.all_reduce_add_rms_norm(x, self._sums, residual, self.weight, self.eps)
