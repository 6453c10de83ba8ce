"""What stands for PyTorch's symmetric memory, which is for GPUs: files that the ranks' processes all map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory


@dataclass(frozen=True, slots=True)
class Handle:
    """Every rank's tensor; its files are called <path>-<rank>."""

    path: Path
    rank: int
    tensor: torch.Tensor  # this rank's

    def get_buffer(self, rank: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return self.tensor if rank == self.rank else mapped(f"{self.path}-{rank}", shape, dtype)


@contextmanager
def shared_files(folder: Path, rank: int) -> Iterator[None]:
    """Let symmetric memory be files in `folder`, which is made where it is missing."""
    folder.mkdir(exist_ok=True)
    made: list[Path] = []

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(folder / str(len(made)))
        return mapped(f"{made[-1]}-{rank}", torch.Size(shape), dtype)

    met: list[Handle] = []

    def rendezvous(tensor: torch.Tensor, group: dist.ProcessGroup) -> Handle:
        dist.barrier(group)
        met.append(Handle(made[len(met)], rank, tensor))
        return met[-1]

    with (
        patch.object(symmetric_memory, "empty", empty),
        patch.object(symmetric_memory, "rendezvous", rendezvous),
        patch.object(torch.cuda, "synchronize"),
    ):
        yield


def mapped(path: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A file of zeros, unless something has been written to it, as a tensor."""
    return torch.from_file(path, shared=True, size=prod(shape), dtype=dtype).view(shape)
