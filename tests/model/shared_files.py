"""What stands for PyTorch's symmetric memory, which is for GPUs: files that the ranks' processes all map."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

_INTEGERS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


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


@contextmanager
def stored_once() -> Iterator[None]:
    """Let Triton's interpreter store every element once, and load at once what others store, as GPUs do.

    It calls memcpy for each, which may move what is so short twice. Between the two, another process may have stored
    the element, or have taken it and said so in its place.
    """
    from triton.runtime.interpreter import InterpreterBuilder  # which not every machine has that runs other tests

    load_otherwise = InterpreterBuilder.create_masked_load

    def load(builder: Any, ptrs: Any, mask: Any, other: Any, cache_policy: object, is_volatile: bool) -> Any:
        loaded = load_otherwise(builder, ptrs, mask, other, cache_policy, is_volatile)
        if is_volatile:
            elements = loaded.data.view(f"u{loaded.data.itemsize}")
            kind, wanted = _INTEGERS[loaded.data.itemsize], np.broadcast_to(mask.data, ptrs.data.shape)
            elements[wanted] = [kind.from_address(address).value for address in ptrs.data[wanted].tolist()]
        return loaded

    def store_once(builder: Any, ptrs: Any, value: Any, mask: Any, cache_policy: object) -> None:
        wanted = np.broadcast_to(mask.data, ptrs.data.shape)
        store(ptrs.data[wanted].tolist(), np.broadcast_to(value.data, ptrs.data.shape)[wanted])

    with (
        patch.object(InterpreterBuilder, "create_masked_store", store_once),
        patch.object(InterpreterBuilder, "create_masked_load", load),
    ):
        yield


def store(addresses: Iterable[int], elements: np.ndarray) -> None:
    """Store elements where other processes read them, each at once."""
    kind = _INTEGERS[elements.itemsize]
    integers = elements.view(f"u{elements.itemsize}").tolist()
    for address, integer in zip(addresses, integers, strict=True):
        kind.from_address(address).value = integer
