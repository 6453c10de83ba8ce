"""Tensor parallelism as a value that constructors receive; no process-wide rank or group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from model.kernels.norm import add_rms_norm
from model.peer_sums import PeerSums, Place, Room

# torch 2.13 renamed it and warns about the old name; 2.11 has only that.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place among `size` ranks. `group` is None exactly when size is 1 (nothing to talk to).

    `peer_sums`, where all ranks have it, sums all but very large tensors faster than the group does.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    peer_sums: PeerSums | None = None

    @classmethod
    def single(cls) -> TensorParallel:
        return cls()

    def room_for_summand(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> Room | None:
        """Where a sum would have its next argument [rows, width] written, to save a copy; None: it does not mind."""
        return None if self.peer_sums is None else self.peer_sums.room(shape, dtype, place)

    def all_reduce(self, x: torch.Tensor, place: Place) -> torch.Tensor:
        """Return the sum of every rank's contiguous [rows, width], the same bits on every rank; `x` is used up.

        It is there until the next sum, which may have it as the residual.
        """
        if self.group is None:
            return x
        if self.peer_sums is not None and (total := self.peer_sums.sum(x, place)) is not None:
            return total
        dist.all_reduce(x, group=self.group)
        return x

    def all_reduce_add_rms_norm(
        self,
        x: torch.Tensor,
        place: Place,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        pushed: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `add_rms_norm` of the sum of every rank's `x`, which is used up. `pushed`: each rank has written it
        where the room's `push` says, too.

        The normed rows are the same bits on every rank, and there until the next sum. The second result is good for one
        thing only, being the residual of the next sum of this shape: of large tensors, each rank has a part of it.
        """
        if self.peer_sums is not None:
            done = self.peer_sums.sum_add_rms_norm(x, place, residual, weight, eps, pushed=pushed)
            if done is not None:
                return done
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return add_rms_norm(x, residual, weight, eps)

    def all_gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Put every rank's [rows, ...] one below the other: [rows * size, ...], the same on every rank."""
        if self.group is None:
            return x
        gathered = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        _all_gather_into(gathered, x.contiguous(), group=self.group)
        return gathered

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate every rank's [rows, n] along the last dimension: [rows, n * size], the same on every rank."""
        if self.group is None:
            return x
        rows, width = x.shape
        parts = self.all_gather_rows(x).view(self.size, rows, width)
        return parts.transpose(0, 1).reshape(rows, self.size * width)

    def exchange_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Give each rank its share of the rows, whole: [rows, n] on every rank to [rows / size, n * size].

        The rows, which must divide by `size`, are shared out in order; every rank's columns are put side by side, as
        by `all_gather_last`, whose rows these are.
        """
        if self.group is None:
            return x
        rows, width = x.shape
        share = rows // self.size
        parts = x.new_empty((self.size, share, width))
        dist.all_to_all_single(parts.view(rows, width), x.contiguous(), group=self.group)
        return parts.transpose(0, 1).reshape(share, self.size * width)
