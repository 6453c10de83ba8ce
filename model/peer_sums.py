"""All-reduce in one kernel, through memory that the GPUs of one machine reach in each other.

A decode step makes two all-reduces a layer, of a few KB each, for which NCCL takes its latency whatever the size. Here
every rank has its summand written where the others can read it (PyTorch's symmetric memory), and one kernel of each
rank sums what all have written (`model.kernels.peer_sum`), with the residual addition and the norm that follow. All of
that happens on the device, in memory that is allocated before, so it can be captured in a CUDA graph.

Small tensors are summed in one shot: every rank sums all rows. Larger ones, as prefills have, in two: a rank sums only
the rows that it owns, and writes the results to all others. What is larger still is left to NCCL.

NVLink multicast is neither used nor set up.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from model.errors import ModelError
from model.kernels.peer_sum import Outputs, Peers, peer_sum, peer_sum_add_rms_norm

MAX_PEER_BYTES = 1 << 20
"""What a rank reads from all others in one shot at most. Larger tensors are summed in two.

Measured with two ranks only, on H200s. Alone, with the norm, one shot is 2 us faster up to 4 MiB, two shots are at 5,
and from 8 MiB on they are the same to 3 %. (Both move as many bytes between two ranks.) In steps it did not pay: with
one shot up to 4 MiB, 256 rows of 8B (2 MiB) took as long as with up to 1, and those of 32B (2.5 MiB) 20.0 ms instead of
18.4. With more ranks a rank reads more for the same tensor in one shot, and hardly more in two; that they take smaller
tensors in one is reckoned from that. `python -m bench.all_reduce` measures it.
"""

MAX_TWO_SHOT_BYTES = 20 << 20
"""The largest summand of a rank that is added up in two shots: 2,048 rows of 5,120 in 16 bits. The rest is NCCL's.

Up to there, two shots with the norm take 0.6 to 0.7 times as long as NCCL and a norm's kernel (two H200s); beyond,
nothing was measured. The bound is on the memory, of which twice as much is allocated. (A prompt just below it may be
padded to a graph beyond it, which is NCCL's: 1.7B's of 4,097 to 5,120 tokens, and 8B's of 2,049 to 2,560 on 8 ranks.)
"""

MAX_PROGRAMS = 8192
"""Programs that have flags: of a narrow model, there are fewer than the memory has room for."""

_P2P_ATTRIBUTES = (2, 3)  # CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED and _NATIVE_ATOMIC_SUPPORTED of CUDA's driver


class Place(IntEnum):
    """Where a summand lies: with which layers' outputs.

    In a step these follow one another so that no two sums in a row, nor a step's last and the next one's first, share a
    place. That is all that keeps a summand of one shot from being overwritten before every rank has read it.
    """

    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """Elements of the largest tensor that is summed in one shot, and of the largest that is summed in two."""

    one_shot: int
    two_shots: int

    @classmethod
    def of(cls, size: int, dtype: torch.dtype) -> Limits:
        """What is best for `size` ranks."""
        return cls(MAX_PEER_BYTES // (size - 1) // dtype.itemsize, MAX_TWO_SHOT_BYTES // dtype.itemsize)


@dataclass(frozen=True, slots=True)
class _Way:
    """Memory for summands, and how what the ranks have written there is summed."""

    summand: torch.Tensor  # [numel]: this rank's
    peers: Peers

    def takes(self, shape: torch.Size, dtype: torch.dtype) -> bool:
        fits = shape.numel() <= self.summand.numel() and self.peers.programs(shape[0]) <= MAX_PROGRAMS
        return fits and dtype is self.summand.dtype


class PeerSums:
    """This rank's part of the memory, and the sum over all parts, in one shot or in two.

    To make one is a collective operation, with the same `limits` and `dtype` on every rank of `group`, none of which
    has an `obstacle`. One stream may use it, and no other. Every rank makes the same sums in the same order, of the
    same shapes, and no two of the same place in a row.

    How a sum is made depends on shape and dtype alone, so that all sums of a step are made in the same way. That
    matters, since in two shots a rank has only its own rows of the residual stream, and results lie in shared memory:
    what is launched after the next sum does not find them any more. (`sum_add_rms_norm` may be given such a residual.)

    It must not go while a CUDA graph is being captured: its memory cannot be freed then, and PyTorch ends the process.

    Raises:
        ModelError: the memory cannot be shared; it names the way to do without.
    """

    def __init__(self, group: dist.ProcessGroup, limits: Limits, *, dtype: torch.dtype, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # else the rendezvous would make a multicast object
        small, large = (-(-numel // 8) * 8 for numel in (limits.one_shot, limits.two_shots))  # all parts are aligned
        parts = [small] * len(Place) + [large] * 2
        rank, size = group.rank(), group.size()
        try:
            self._memory = symmetric_memory.empty((sum(parts),), dtype=dtype, device=device)
            self._flags = symmetric_memory.empty((size, MAX_PROGRAMS), dtype=torch.int32, device=device)
            memory, flags = (symmetric_memory.rendezvous(tensor, group) for tensor in (self._memory, self._flags))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"{device} cannot share memory with other GPUs for all-reduces: {reason}; "
                "set LIGHTQWEN_WITHOUT=symmetric_memory to leave them to NCCL"
            ) from error
        self._flags.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(group)  # all flags are zero before any rank sets one
        # Views of every rank's memory, which must live as long as their addresses are used.
        self._views = [
            [handle.get_buffer(peer, tensor.shape, tensor.dtype) for peer in range(size)]
            for handle, tensor in ((memory, self._memory), (flags, self._flags))
        ]
        for views, tensor in zip(self._views, (self._memory, self._flags), strict=True):
            if views[rank].data_ptr() != tensor.data_ptr():
                raise ModelError(
                    f"PyTorch {torch.__version__} puts shared memory where this version does not look for it; "
                    "set LIGHTQWEN_WITHOUT=symmetric_memory to leave all-reduces to NCCL"
                )
        memories, all_flags = (
            torch.tensor([view.data_ptr() for view in views], device=device) for views in self._views
        )
        meetings = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device)
        *places, summand, output = self._memory.split(parts)

        def way(summand: torch.Tensor, outputs: Outputs | None = None) -> _Way:
            return _Way(summand, Peers(rank, addresses(summand), all_flags, meetings, outputs))

        def addresses(part: torch.Tensor) -> torch.Tensor:
            offset = int(part.storage_offset() - self._memory.storage_offset())
            return memories + offset * dtype.itemsize

        self._one_shot = [way(place) for place in places]
        self._two_shots = way(summand, Outputs(output, addresses(output)))

    def room(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> torch.Tensor | None:
        """Where a summand [rows, width] may be written, so that it need not be copied there; None if it is too large.

        It is the same memory at every call.
        """
        way = self._way(shape, dtype, place)
        return None if way is None else way.summand[: shape.numel()].view(shape)

    def sum(self, x: torch.Tensor, place: Place) -> torch.Tensor | None:
        """Return the sum of all ranks' contiguous [rows, width]; None if `x` is too large."""
        way = self._put(x, place)
        return None if way is None else peer_sum(x.shape, x.dtype, way.peers)

    def sum_add_rms_norm(
        self, x: torch.Tensor, place: Place, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return `add_rms_norm` of the sum, in the same kernel; None if `x` is too large.

        The second result is a residual for the next sum, of the same shape, and for nothing else.
        """
        way = self._put(x, place)
        return None if way is None else peer_sum_add_rms_norm(residual, weight, eps, way.peers)

    def _way(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> _Way | None:
        return next((way for way in (self._one_shot[place], self._two_shots) if way.takes(shape, dtype)), None)

    def _put(self, x: torch.Tensor, place: Place) -> _Way | None:
        """See to it that `x` is where others read it, and return how it is summed."""
        way = self._way(x.shape, x.dtype, place)
        if way is not None and x.data_ptr() != way.summand.data_ptr():
            way.summand[: x.numel()].view(x.shape).copy_(x)
        return way


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
