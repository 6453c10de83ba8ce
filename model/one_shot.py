"""All-reduce of small tensors in one kernel, through memory that the GPUs of one machine reach in each other.

A decode step makes two all-reduces a layer, of a few KB each, for which NCCL takes its latency whatever the size. Here
every rank has its summand written where the others can read it (PyTorch's symmetric memory), and one kernel of each
rank sums what all have written (`model.kernels.peer_sum`), with the residual addition and the norm that follow. All of
that happens on the device, in memory that is allocated before, so it can be captured in a CUDA graph.

NVLink multicast is neither used nor set up.
"""

from __future__ import annotations

import ctypes
import os
from enum import IntEnum

import torch
import torch.distributed as dist

from model.errors import ModelError
from model.kernels.peer_sum import Peers, peer_sum, peer_sum_add_rms_norm

MAX_PEER_BYTES = 4 << 20
"""What a rank reads from all others in one kernel at most. Larger tensors are left to NCCL.

Measured with two ranks only, on H100s, with PyTorch's kernel in the place of this one: up to there, and at the one
larger size tried (5 MiB), it is faster than NCCL. With more ranks a rank reads more for the same tensor, so that they
take smaller ones; whether those are the right ones `python -m bench.all_reduce --ranks 4` would tell.
"""

MAX_ROWS = 8192
"""Rows that can be told of: of a narrow model, fewer than the memory holds."""

_P2P_ATTRIBUTES = (2, 3)  # CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED and _NATIVE_ATOMIC_SUPPORTED of CUDA's driver


class Place(IntEnum):
    """Where a summand lies: with which layers' outputs.

    In a step these follow one another so that no two sums in a row, nor a step's last and the next one's first, share a
    place. That is all that keeps a summand from being overwritten before every rank has read it.
    """

    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2


class OneShotAllReduce:
    """This rank's part of the memory, and the sum over all parts.

    To make one is a collective operation, with the same `numel` and `dtype` on every rank of `group`, none of which has
    an `obstacle`. One stream may use it, and no other. Every rank makes the same sums in the same order, of the same
    shapes, and no two of the same place in a row.

    Args:
        numel: elements of the largest tensor that it takes.

    Raises:
        ModelError: the memory cannot be shared; it names the way to do without.
    """

    def __init__(self, group: dist.ProcessGroup, *, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # else the rendezvous would make a multicast object
        numel = -(-numel // 8) * 8  # so that every place is aligned
        size = group.size()
        try:
            self._memory = symmetric_memory.empty((len(Place), numel), dtype=dtype, device=device)
            self._flags = symmetric_memory.empty((size, MAX_ROWS), dtype=torch.int32, device=device)
            memory, flags = (symmetric_memory.rendezvous(tensor, group) for tensor in (self._memory, self._flags))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"{device} cannot share memory with other GPUs for small all-reduces: {reason}; "
                "set LIGHTQWEN_WITHOUT=symmetric_memory to leave them to NCCL"
            ) from error
        self._flags.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(group)  # all flags are zero before any rank sets one
        # Views of every rank's memory, which must live as long as their addresses are used.
        self._views = [
            [handle.get_buffer(rank, tensor.shape, tensor.dtype) for rank in range(size)]
            for handle, tensor in ((memory, self._memory), (flags, self._flags))
        ]
        for views, tensor in zip(self._views, (self._memory, self._flags), strict=True):
            if views[group.rank()].data_ptr() != tensor.data_ptr():
                raise ModelError(
                    f"PyTorch {torch.__version__} puts shared memory where this version does not look for it; "
                    "set LIGHTQWEN_WITHOUT=symmetric_memory to leave small all-reduces to NCCL"
                )
        memories, all_flags = (
            torch.tensor([view.data_ptr() for view in views], device=device) for views in self._views
        )
        epochs = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        self._peers = {
            place: Peers(group.rank(), memories + place * numel * dtype.itemsize, all_flags, epochs) for place in Place
        }

    def room(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> torch.Tensor | None:
        """Where a summand [rows, width] may be written, so that it need not be copied there; None if it is too large.

        It is the same memory at every call.
        """
        memory = self._memory[place]
        if shape.numel() > memory.numel() or shape[0] > MAX_ROWS or dtype is not memory.dtype:
            return None
        return memory[: shape.numel()].view(shape)

    def sum(self, x: torch.Tensor, place: Place) -> torch.Tensor | None:
        """Return the sum of all ranks' contiguous [rows, width] in a tensor of its own; None if `x` is too large."""
        return peer_sum(x.shape, x.dtype, self._peers[place]) if self._put(x, place) else None

    def sum_add_rms_norm(
        self, x: torch.Tensor, place: Place, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return `add_rms_norm` of the sum, in the same kernel; None if `x` is too large."""
        return peer_sum_add_rms_norm(residual, weight, eps, self._peers[place]) if self._put(x, place) else None

    def _put(self, x: torch.Tensor, place: Place) -> bool:
        """See to it that `x` is where others read it; tell whether there is room."""
        room = self.room(x.shape, x.dtype, place)
        if room is not None and x.data_ptr() != room.data_ptr():
            room.copy_(x)
        return room is not None


def largest_numel(size: int, dtype: torch.dtype) -> int:
    """Elements of the largest tensor that `size` ranks should sum in one shot."""
    return MAX_PEER_BYTES // (size - 1) // dtype.itemsize


def obstacle(size: int, *, device: torch.device) -> str:
    """Why this rank cannot take part, "" if it can. Ranks 0 .. `size` - 1 are on the CUDA devices of these numbers."""
    import torch.distributed._symmetric_memory as symmetric_memory

    backend = symmetric_memory.get_backend(device)
    if backend != "CUDA":
        return f"PyTorch's symmetric memory is {backend or 'not built'} here, not CUDA (see TORCH_SYMMMEM)"
    unreachable = [peer for peer in range(size) if peer != device.index and not _reaches(device.index, peer)]
    if unreachable:
        return f"GPU {device.index} does not reach the memory of GPU {unreachable[0]} as over NVLink"
    return ""


def _reaches(device: int, peer: int) -> bool:
    """Tell whether a GPU can read, write and atomically change another's memory; over PCIe it cannot do the last."""
    driver = ctypes.CDLL("libcuda.so.1")
    value = ctypes.c_int()
    return all(
        driver.cuDeviceGetP2PAttribute(ctypes.byref(value), attribute, device, peer) == 0 and value.value == 1
        for attribute in _P2P_ATTRIBUTES
    )
