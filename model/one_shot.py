"""All-reduce of small tensors in one kernel, through memory that the GPUs of one machine reach in each other.

A decode step makes two all-reduces a layer, of a few KB each, for which NCCL takes its latency whatever the size. Here
every rank writes its summand where the others can read it, and sums what all have written (PyTorch's symmetric memory).

PyTorch's kernel `one_shot_all_reduce` sums in the order of the ranks, so all of them get the same bits. The ranks meet
in it twice: before they read, and when all have read. Once it has run, nobody reads this rank's memory any more, and
what comes next in the stream may write to it. All of that happens on the device, in memory that is allocated before, so
it can be captured in a CUDA graph. Its variant `one_shot_all_reduce_copy`, which takes a summand from anywhere, is not
used: there one warp tells the others that the summand is in place as soon as that warp has copied its part of it.

NVLink multicast is neither used nor set up.
"""

from __future__ import annotations

import ctypes
import os

import torch
import torch.distributed as dist

from model.errors import ModelError

MAX_PEER_BYTES = 4 << 20
"""What a rank reads from all others in one kernel at most. Larger tensors are left to NCCL.

Measured with two ranks only, on H100s: up to there, and at the one larger size tried (5 MiB), this is faster than NCCL.
With more ranks a rank reads more for the same tensor, so that they take smaller ones; whether those are the right ones
`python -m bench.all_reduce --ranks 4` would tell.
"""

_P2P_ATTRIBUTES = (2, 3)  # CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED and _NATIVE_ATOMIC_SUPPORTED of CUDA's driver


class OneShotAllReduce:
    """This rank's part of the memory, and the sum over all parts.

    To make one is a collective operation, with the same `numel` and `dtype` on every rank of `group`, none of which has
    an `obstacle`. One stream may use it, and no other.

    Args:
        numel: elements of the largest tensor that it takes.

    Raises:
        ModelError: the memory cannot be shared; it names the way to do without.
    """

    def __init__(self, group: dist.ProcessGroup, *, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # else the rendezvous would make a multicast object
        try:
            self._memory = symmetric_memory.empty(numel, dtype=dtype, device=device)
            symmetric_memory.rendezvous(self._memory, group)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"{device} cannot share memory with other GPUs for small all-reduces: {reason}; "
                "set LIGHTQWEN_WITHOUT=symmetric_memory to leave them to NCCL"
            ) from error
        self._group_name = group.group_name

    def room(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
        """Where a summand of this shape may be written, so that it need not be copied there; None if it is too large.

        It is the same memory at every call.
        """
        if shape.numel() > self._memory.numel() or dtype is not self._memory.dtype:
            return None
        return self._memory[: shape.numel()].view(shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the sum of all ranks' contiguous `x` in a tensor of its own; None if `x` is too large."""
        summand = self.room(x.shape, x.dtype)
        if summand is None:
            return None
        if x.data_ptr() != summand.data_ptr():
            summand.copy_(x)
        return torch.ops.symm_mem.one_shot_all_reduce(summand, "sum", self._group_name)


def largest_numel(size: int, dtype: torch.dtype) -> int:
    """Elements of the largest tensor that `size` ranks should sum in one shot."""
    return MAX_PEER_BYTES // (size - 1) // dtype.itemsize


def obstacle(size: int, *, dtype: torch.dtype, device: torch.device) -> str:
    """Why this rank cannot take part, "" if it can. Ranks 0 .. `size` - 1 are on the CUDA devices of these numbers."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"PyTorch's kernel does not sum {dtype}"
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
