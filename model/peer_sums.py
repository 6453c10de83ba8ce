"""All-reduce in one kernel, through memory that the GPUs of one machine reach in each other.

A decode step makes two all-reduces a layer, of a few KB each, for which NCCL takes its latency whatever the size. Here
every rank has its summand written where the others can read it (PyTorch's symmetric memory), and one kernel of each
rank sums what all have written (`model.kernels.peer_sum`), with the residual addition and the norm that follow. All of
that happens on the device, in memory that is allocated before, so it can be captured in a CUDA graph.

Small tensors are summed in one shot: every rank sums all rows. Those of few rows are pushed to the others by the layer
that makes them, if it can, else they are read by them; and layers of one row or two sum what is pushed themselves, with
no kernel for it (`model.kernels.cluster_linear`). Larger ones, as prefills have, are summed in two shots: a rank
sums only the rows that it owns, and writes the results to all others. What is larger still is left to NCCL.

Logits, which are not summed but put side by side, go through the same memory and with the same flags
(`model.peer_logits`).

NVLink multicast is neither used nor set up.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
import torch.distributed as dist

from model.errors import ModelError
from model.kernels.peer_logits import Parts
from model.kernels.peer_sum import EMPTY, Outputs, Peers, Push, Pushed, peer_sum, peer_sum_add_rms_norm
from model.peer_logits import MAX_LOGITS_BYTES, PeerLogits

MAX_PEER_BYTES = 1 << 20
"""What a rank reads from all others in one shot at most. Larger tensors are summed in two.

Measured with two ranks only, on H200s. Alone, with the norm, one shot is 2 us faster up to 4 MiB, two shots are at 5,
and from 8 MiB on they are the same to 3 %. (Both move as many bytes between two ranks.) In steps it did not pay: with
one shot up to 4 MiB, 256 rows of 8B (2 MiB) and of 32B (2.5 MiB, 20 ms) took as long as with up to 1. With more ranks
a rank reads more for the same tensor in one shot, and hardly more in two; that they take smaller tensors in one is
reckoned from that. `python -m bench.all_reduce` measures it.
"""

MAX_TWO_SHOT_BYTES = 80 << 20
"""The largest summand of a rank that is added up in two shots: 8,192 rows of 5,120 in 16 bits. The rest is NCCL's.

With the norm, two H200s take 0.7 to 0.8 times as long as with NCCL and a norm's kernel: of 8,192 rows of 4,096 (64 MiB)
217 us instead of 310, of 5,120 302 instead of 379. Prompts of 8B, 16 x 4,096, go from 69.2k to 73.7k tokens a second
with 80 MiB instead of 20, mixed requests from 16.4k to 16.6k (332383d, one machine). The bound is on the memory, of
which twice as much is allocated.
"""

MAX_PUSHED_BYTES = 640 << 10
"""The largest summand of a rank that is pushed: 64 rows of 5,120 in 16 bits. A step of 8B on two H200s takes 2.51 ms
instead of 2.61 with 8 rows, 2.64 instead of 2.70 with 16, 2.81 instead of 2.95 with 32, 3.17 instead of 3.31 with 64.
More rows were not measured: layers of more than 64 do not push. The embedding pushes what fits, also beside layers that
do not."""

MAX_PROGRAMS = 8192
"""Programs that have flags: of a narrow model, there are fewer than the memory has room for."""

_INTEGERS = {2: torch.int16, 4: torch.int32}  # of as many bytes

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
    """Elements of the largest tensor that is summed in one shot, of the largest that is summed in two, of the largest
    that may be pushed, which is one of the first, and of a rank's part of the largest logits that are gathered."""

    one_shot: int
    two_shots: int
    pushed: int = 0
    logits: int = 0

    def __post_init__(self) -> None:
        assert self.pushed <= self.one_shot, "what is pushed is summed in one shot"

    @classmethod
    def of(cls, size: int, dtype: torch.dtype, *, push: bool, logits: int = 0) -> Limits:
        """What is best for `size` ranks, whose layers `push` or do not; of a rank's part of the logits, there are
        never more than `logits` elements."""
        in_one = MAX_PEER_BYTES // (size - 1)
        pushed = min(MAX_PUSHED_BYTES, in_one) if push else 0
        gathered = min(MAX_LOGITS_BYTES, logits * dtype.itemsize)
        return cls(*(most // dtype.itemsize for most in (in_one, MAX_TWO_SHOT_BYTES, pushed, gathered)))


@dataclass(frozen=True, slots=True)
class Room:
    """Where a summand [rows, width] may be written, so that it need not be copied there."""

    memory: torch.Tensor
    push: Push | None  # if it is small: where else it may be written to; then the sum must be told


@dataclass(frozen=True, slots=True)
class _Way:
    """Memory for summands, and how what the ranks have written there is summed."""

    summand: torch.Tensor  # [numel]: this rank's
    peers: Peers
    pushed: Peers | None = None  # the same, of summands that have been pushed

    def takes(self, shape: torch.Size, dtype: torch.dtype) -> bool:
        fits = shape.numel() <= self.summand.numel() and self.peers.programs(shape[0]) <= MAX_PROGRAMS
        return fits and dtype is self.summand.dtype


class PeerSums:
    """This rank's part of the memory, and the sum over all parts, in one shot or in two.

    `logits` gathers what other parts of the memory are for. With `layers_sum`, layers may compute sums by themselves.

    To make one is a collective operation, with the same `limits`, `dtype` and `layers_sum` on every rank of `group`,
    none of which has an `obstacle`. One stream may use it, and no other. Every rank makes the same sums in the same
    order, of the same shapes, and no two of the same place in a row; and gathers the same logits among them.

    In how many shots a sum is made depends on shape and dtype alone: it is the same for all sums of a step. That
    matters, since in two shots a rank has only its own rows of the residual stream, and results lie in shared memory:
    what is launched after the next sum does not find them any more. (`sum_add_rms_norm` may be given such a residual.)

    It must not go while a CUDA graph is being captured: its memory cannot be freed then, and PyTorch ends the process.

    Raises:
        ModelError: the memory cannot be shared; it names the way to do without.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        limits: Limits,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layers_sum: bool = False,
    ) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # else the rendezvous would make a multicast object
        # All parts are aligned to 256 bytes, as memory is that PyTorch allocates.
        small, large, inbox = (-(-numel // 128) * 128 for numel in (limits.one_shot, limits.two_shots, limits.pushed))
        rank, size = group.rank(), group.size()
        parts = [small] * len(Place) + [large] * 2 + [inbox * size] * len(Place) + [limits.logits]
        try:
            self._memory = symmetric_memory.empty((sum(parts),), dtype=dtype, device=device)
            self._flags = symmetric_memory.empty((size, MAX_PROGRAMS), dtype=torch.int32, device=device)
            memory, flags = (symmetric_memory.rendezvous(tensor, group) for tensor in (self._memory, self._flags))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"{device} cannot share memory with other GPUs: {reason}; "
                "set LIGHTQWEN_WITHOUT=symmetric_memory to leave sums and logits to NCCL"
            ) from error
        self._flags.zero_()
        *places, summand, output, first, second, third, logits = self._memory.split(parts)
        inboxes = [part.view(size, inbox) for part in (first, second, third)]
        for of_place in inboxes:
            of_place.view(_INTEGERS[dtype.itemsize]).fill_(EMPTY)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # all flags are zero, and inboxes empty, before any rank writes to another
        # Views of every rank's memory, which must live as long as their addresses are used.
        self._views = [
            [handle.get_buffer(peer, tensor.shape, tensor.dtype) for peer in range(size)]
            for handle, tensor in ((memory, self._memory), (flags, self._flags))
        ]
        for views, tensor in zip(self._views, (self._memory, self._flags), strict=True):
            if views[rank].data_ptr() != tensor.data_ptr():
                raise ModelError(
                    f"PyTorch {torch.__version__} puts shared memory where this version does not look for it; "
                    "set LIGHTQWEN_WITHOUT=symmetric_memory to leave sums and logits to NCCL"
                )
        memories, all_flags = (
            torch.tensor([view.data_ptr() for view in views], device=device) for views in self._views
        )
        meetings = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device)

        def addresses(part: torch.Tensor) -> torch.Tensor:
            offset = int(part.storage_offset() - self._memory.storage_offset())
            return memories + offset * dtype.itemsize

        def one_shot(place: torch.Tensor, of_place: torch.Tensor) -> _Way:
            peers = Peers(rank, addresses(place), all_flags, meetings)
            if not inbox:
                return _Way(place, peers)
            push = Push(rank, addresses(of_place[rank]))
            return _Way(place, peers, replace(peers, pushed=Pushed(of_place, push)))

        self._layers_sum = layers_sum
        self._one_shot = [one_shot(*memory) for memory in zip(places, inboxes, strict=True)]
        outputs = Outputs(output, addresses(output))
        self._two_shots = _Way(summand, Peers(rank, addresses(summand), all_flags, meetings, outputs))
        self.logits = PeerLogits(logits, Parts(rank, addresses(logits), all_flags, meetings))

    def room(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> Room | None:
        """Where a summand [rows, width] may be written, the same memory at every call; None if it is too large."""
        way = self._way(shape, dtype, place)
        if way is None:
            return None
        pushed = None if way.pushed is None else way.pushed.pushed
        small = pushed is not None and shape.numel() <= pushed.inboxes.shape[1]
        return Room(way.summand[: shape.numel()].view(shape), pushed.push if pushed and small else None)

    def pushed(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> Pushed | None:
        """Where a layer that sums by itself pushes its summand [rows, width], and where those of the others come; None
        if it is too large, or layers are not to. With it, the layer's launch is the next sum."""
        room = self.room(shape, dtype, place)
        if not self._layers_sum or room is None or room.push is None:
            return None
        self.logits.pass_sum()
        peers = self._one_shot[place].pushed
        assert peers is not None, "there is where to push to"
        return peers.pushed

    def sum(self, x: torch.Tensor, place: Place, *, pushed: bool = False) -> torch.Tensor | None:
        """Return the sum of all ranks' contiguous [rows, width]; None if `x` is too large.

        `pushed` tells that every rank has written its summand both to the `room` that there is and where `push` says.
        """
        peers = self._put(x, place, pushed=pushed)
        return None if peers is None else peer_sum(x.shape, x.dtype, peers)

    def sum_add_rms_norm(
        self,
        x: torch.Tensor,
        place: Place,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        pushed: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return `add_rms_norm` of the sum, in the same kernel; None if `x` is too large. `pushed`: as in `sum`.

        The second result is a residual for the next sum, of the same shape, and for nothing else.
        """
        peers = self._put(x, place, pushed=pushed)
        return None if peers is None else peer_sum_add_rms_norm(residual, weight, eps, peers)

    def _way(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> _Way | None:
        return next((way for way in (self._one_shot[place], self._two_shots) if way.takes(shape, dtype)), None)

    def _put(self, x: torch.Tensor, place: Place, *, pushed: bool) -> Peers | None:
        """See to it that `x` is where others read it, and return how it is summed."""
        way = self._way(x.shape, x.dtype, place)
        if way is None:
            return None
        self.logits.pass_sum()
        if pushed:
            room = self.room(x.shape, x.dtype, place)
            assert room is not None and room.push is not None, "nothing says where to push this"  # noqa: PT018
            assert x.data_ptr() == way.summand.data_ptr(), "what is pushed is in the memory for it, too"
            return way.pushed
        if x.data_ptr() != way.summand.data_ptr():
            way.summand[: x.numel()].view(x.shape).copy_(x)
        return way.peers


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
