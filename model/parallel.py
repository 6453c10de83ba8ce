"""Tensor parallelism as a value that constructors receive; no process-wide rank or group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model.kernels.norm import add_rms_norm
from model.kernels.peer_sum import OneShot
from model.peer_sums import PeerSums, Place, Room

# torch 2.13 renamed it and warns about the old name; 2.11 has only that.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _together(collective: Callable[..., object], *tensors: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Make a collective, but where tensors have no memory: then there is nobody else."""
    if not tensors[0].is_meta:
        collective(*tensors, group=group)


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place among `size` ranks. `group` is None exactly when size is 1 (nothing to talk to).

    `peer_sums`, where all ranks have it, sums all but very large tensors faster than the group does, and puts columns
    side by side.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    peer_sums: PeerSums | None = None

    @classmethod
    def single(cls) -> TensorParallel:
        return cls()

    def room_for_summand(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> Room | None:
        """What can be done for a sum while its argument [rows, width] is made; None: nothing."""
        return None if self.peer_sums is None else self.peer_sums.room(shape, dtype, place)

    def one_shot(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> OneShot | None:
        """What a layer needs that computes the next sum [rows, width] by itself; None: `all_reduce` is to do it."""
        return None if self.peer_sums is None else self.peer_sums.one_shot(shape, dtype, place)

    def all_reduce(self, x: torch.Tensor, place: Place, *, pushed: bool = False) -> torch.Tensor:
        """Return the sum of every rank's contiguous [rows, width], the same bits on every rank; `x` is used up.
        `pushed`: this rank has written it where the room's `push` says, too.

        It is there until the next sum, which may have it as the residual.
        """
        if self.group is None:
            return x
        if self.peer_sums is not None and (total := self.peer_sums.sum(x, place, pushed=pushed)) is not None:
            return total
        _together(dist.all_reduce, x, group=self.group)
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
        """Return `add_rms_norm` of the sum of every rank's `x`, which is used up. `pushed`: this rank has written it
        where the room's `push` says, too.

        The normed rows are the same bits on every rank, and there until the next sum. The second result is good for one
        thing only, being the residual of the next sum of this shape: of large tensors, each rank has a part of it.
        """
        if self.peer_sums is not None:
            done = self.peer_sums.sum_add_rms_norm(x, place, residual, weight, eps, pushed=pushed)
            if done is not None:
                return done
        if self.group is not None:
            _together(dist.all_reduce, x, group=self.group)
        return add_rms_norm(x, residual, weight, eps)

    def all_gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Put every rank's [rows, ...] one below the other: [rows * size, ...], the same on every rank."""
        if self.group is None:
            return x
        gathered = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        _together(_all_gather_into, gathered, x.contiguous(), group=self.group)
        return gathered

    def room_for_columns(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
        """Where `gather_columns`, or `share_columns`, would have its next argument [rows, n] written, to save a copy;
        None: it does not mind."""
        return None if self.peer_sums is None else self.peer_sums.logits.room(shape, dtype)

    def gather_columns(self, x: torch.Tensor, columns: int) -> torch.Tensor:
        """Put every rank's [rows, n] side by side, but for what lies past `columns`: contiguous [rows, columns], the
        same on every rank. `x` is used up."""
        if self.group is None:
            return x[:, :columns].contiguous()
        if self.peer_sums is not None and (whole := self.peer_sums.logits.gather(x, columns, share=False)) is not None:
            return whole
        return _side_by_side(self.all_gather_rows(x).view(self.size, *x.shape), columns)

    def share_columns(self, x: torch.Tensor, columns: int) -> torch.Tensor:
        """Give each rank its share of the rows of `gather_columns`: contiguous [ceil(rows / size), columns].

        The rows are shared out in order. Where they do not divide, the last shares end in rows of zeros.
        """
        if self.group is None:
            return x[:, :columns].contiguous()
        if self.peer_sums is not None and (share := self.peer_sums.logits.gather(x, columns, share=True)) is not None:
            return share
        missing = -len(x) % self.size
        x = F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
        parts = torch.empty_like(x)
        _together(dist.all_to_all_single, parts, x, group=self.group)
        return _side_by_side(parts.view(self.size, -1, x.shape[1]), columns)


def _side_by_side(parts: torch.Tensor, columns: int) -> torch.Tensor:
    """[ranks, rows, n] to contiguous [rows, columns], what lies past them dropped."""
    return parts.transpose(0, 1).flatten(1)[:, :columns].contiguous()
