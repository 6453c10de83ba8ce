"""Tensor parallelism as a value that constructors receive; no process-wide rank or group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

# torch 2.13 renamed it and warns about the old name; 2.11 has only that.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place among `size` ranks. `group` is None exactly when size is 1 (nothing to talk to)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def single(cls) -> TensorParallel:
        return cls()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns `x`."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate every rank's [rows, n] along the last dimension: [rows, n * size], the same on every rank."""
        if self.group is None:
            return x
        rows, width = x.shape
        parts = torch.empty((self.size, rows, width), dtype=x.dtype, device=x.device)
        _all_gather_into(parts.view(self.size * rows, width), x.contiguous(), group=self.group)
        return parts.transpose(0, 1).reshape(rows, self.size * width)
