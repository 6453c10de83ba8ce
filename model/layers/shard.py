"""Which slice of which checkpoint tensor a rank needs, and where it goes. The loader knows no more of the layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

Part = str | int
"""Names one checkpoint tensor among those packed into one parameter, as in `packed_modules_mapping`."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One slice of a checkpoint tensor, and the view of a parameter that it fills."""

    full_shape: tuple[int, ...]  # of the tensor in the checkpoint
    source: tuple[slice, ...]  # the part of it that this rank wants, one slice per dimension
    target: torch.Tensor  # of the shape that `source` cuts out


class ShardedModule(nn.Module):
    """A layer that can tell the loader how its parameters come out of a checkpoint."""

    def finish(self) -> None:
        """Be told that every parameter has its values."""

    def shard(self, parameter: str, part: Part | None = None) -> Shard:
        """Return the slice that fills `parameter` (its `part`, where several tensors are packed in one).

        The default is a parameter that every rank holds whole.
        """
        target = self.get_parameter(parameter)
        return Shard(tuple(target.shape), tuple(slice(0, size) for size in target.shape), target)


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A parameter without values: the loader fills it."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
