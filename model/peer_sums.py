"""All-reduce in one kernel, through memory that the GPUs of one machine reach in each other.

A decode step makes two all-reduces a layer, of a few KB each, for which NCCL takes its latency whatever the size. Here
ranks write to one another's memory (PyTorch's symmetric memory), and one kernel of each rank sums what has come
(`model.kernels.peer_sum`), with the residual addition and the norm that follow. All of that happens on the device, in
memory that is allocated before, so it can be captured in a CUDA graph.

Tensors are summed in one shot: every rank is sent all summands, and sums every row. Those of few rows are sent by the
layer that makes them, if it can; layers of up to `model.kernels.tilings.MAX_SUMMED_ROWS` rows even sum what they are
sent, with no kernel for it (`model.kernels.cluster_linear`). Among more than two ranks, where that would be more to
send than need be, larger ones are summed in two shots: a rank sums only the rows that it owns, and writes the results
to all others. What is larger still is left to NCCL.

Logits, which are not summed but put side by side, go through such memory, too (`model.peer_logits`).

NVLink multicast is neither used nor set up.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from model.errors import ModelError
from model.kernels.peer_logits import Parts
from model.kernels.peer_sum import EMPTY, OneShot, Push, TwoShots, Way, peer_sum, peer_sum_add_rms_norm
from model.kernels.runtime import HOPPER_TO_BE
from model.peer_logits import MAX_LOGITS_BYTES, PeerLogits

MAX_SUM_BYTES = 8448 * 5120 * 2
"""The largest summand of a rank that is added up here: so many rows of 5,120 in 16 bits. The rest is NCCL's.

The bound is on the memory: with two ranks three times as much is allocated as the largest step's summands need, with
more twice as much.
"""

MAX_ONE_SHOT_BYTES = 1 << 20
"""What a rank is sent by all others in one shot at most, where there are more than one of them.

With two ranks both ways move as many bytes, and one shot is the faster at all sizes (docs/performance.md). With more, a
rank is sent more in one shot, and hardly more in two: that they take two from there on is reckoned, not measured.
`python -m bench.all_reduce` measures it.
"""

MAX_PROGRAMS = 8192
"""Programs that have flags: of a narrow model, there are fewer than the memory has room for."""

_INTEGERS = {2: torch.int16, 4: torch.int32}  # of as many bytes

_P2P_ATTRIBUTES = (2, 3)  # CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED and _NATIVE_ATOMIC_SUPPORTED of CUDA's driver


class Place(IntEnum):
    """Whose inboxes a summand comes into: those of which layers' outputs.

    In a step these follow one another so that no two sums in a row, nor a step's last and the next one's first, share a
    place. That is all that keeps an inbox from being written before it is empty.
    """

    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """Elements of the largest tensor that is summed in one shot, of the largest that is summed in two, and of a rank's
    part of the largest logits that are gathered."""

    one_shot: int
    two_shots: int
    logits: int = 0

    @classmethod
    def of(cls, size: int, dtype: torch.dtype, *, summand: int, logits: int = 0) -> Limits:
        """What is best for `size` ranks, where no summand has more than `summand` elements, and no rank's part of the
        logits more than `logits`."""
        most = min(MAX_SUM_BYTES // dtype.itemsize, summand)
        small = MAX_ONE_SHOT_BYTES // (size - 1) // dtype.itemsize
        one_shot, two_shots = (most, 0) if size == 2 else (min(small, most), most)
        return cls(one_shot, two_shots, min(MAX_LOGITS_BYTES // dtype.itemsize, logits))


@dataclass(frozen=True, slots=True)
class Room:
    """What can be done for a sum while its argument [rows, width] is made."""

    memory: torch.Tensor | None  # where it may be written, so that it need not be copied there
    push: Push | None  # where else it may be written; then the sum must be told


class PeerSums:
    """This rank's part of the memory, and the sum over all ranks, in one shot or in two.

    `logits` gathers what other parts of the memory are for.

    To make one is a collective operation, with the same `limits` and `dtype` on every rank of `group`, none of which
    has an `obstacle`. One stream may use it, and no other. Every rank makes the same sums in the same order, of the
    same shapes, and no two of the same place in a row; and gathers the same logits among them.

    In how many shots a sum is made depends on shape and dtype alone: it is the same for all sums of a step. That
    matters, since in two shots a rank has only its own rows of the residual stream, and results lie in shared memory:
    what is launched after the next sum does not find them any more. (`sum_add_rms_norm` may be given such a residual.)

    It must not go while a CUDA graph is being captured: its memory cannot be freed then, and PyTorch ends the process.
    On a GPU that is still to be nobody is met, and nothing shared.

    Raises:
        ModelError: the memory cannot be shared; it names the way to do without.
    """

    def __init__(self, group: dist.ProcessGroup, limits: Limits, *, dtype: torch.dtype, device: torch.device) -> None:
        # All parts are aligned to 256 bytes, as memory is that PyTorch allocates.
        inbox, large = (-(-numel // 128) * 128 for numel in (limits.one_shot, limits.two_shots))
        rank, size = group.rank(), group.size()
        parts = [inbox * (size - 1)] * len(Place) + [large] * 2 + [limits.logits]
        if device == HOPPER_TO_BE:
            self._memory = torch.empty(sum(parts), dtype=dtype, device=device)
            memories, all_flags = (torch.empty(size, dtype=torch.int64, device=device) for _ in range(2))
        else:
            memories, all_flags = self._share(group, parts, dtype=dtype, device=device)
        *places, summand, output, logits = self._memory.split(parts)
        meetings = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device)

        def addresses(part: torch.Tensor) -> torch.Tensor:
            offset = int(part.storage_offset() - self._memory.storage_offset())
            return memories + offset * dtype.itemsize

        def one_shot(inboxes: torch.Tensor) -> OneShot:
            # They are in the order of the ranks, but an owner has none for itself.
            numbers = torch.tensor([rank - (rank > owner) for owner in range(size)], device=device)
            theirs = addresses(inboxes) + numbers * (inbox * dtype.itemsize)
            return OneShot(inboxes.view(size - 1, inbox), Push(rank, theirs))

        self._one_shot = [one_shot(of_place) for of_place in places]
        self._two_shots = TwoShots(rank, summand, addresses(summand), output, addresses(output), all_flags, meetings)
        self.logits = PeerLogits(logits, Parts(rank, addresses(logits), all_flags, meetings))

    def _share(
        self, group: dist.ProcessGroup, parts: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocate this rank's memory, of which the first parts are inboxes, and its flags. Returns where each rank's
        begin: [size] int64 of either."""
        import torch.distributed._symmetric_memory as symmetric_memory

        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # else the rendezvous would make a multicast object
        rank, size = group.rank(), group.size()
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
        inboxes = self._memory[: sum(parts[: len(Place)])]
        inboxes.view(_INTEGERS[dtype.itemsize]).fill_(EMPTY)
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
        return memories, all_flags

    def room(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> Room | None:
        """What can be done for the sum of this place and shape [rows, width] beforehand; None if it is too large."""
        way = self._way(shape, dtype, place)
        if way is None:
            return None
        if isinstance(way, OneShot):
            return Room(None, way.push)
        return Room(way.summand[: shape.numel()].view(shape), None)

    def one_shot(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> OneShot | None:
        """What a layer needs to sum [rows, width] by itself; None if it is too large. With it, the layer's launch is
        the next sum."""
        way = self._way(shape, dtype, place)
        if not isinstance(way, OneShot):
            return None
        self.logits.pass_sum()
        return way

    def sum(self, x: torch.Tensor, place: Place, *, pushed: bool = False) -> torch.Tensor | None:
        """Return the sum of all ranks' contiguous [rows, width]; None if `x` is too large.

        `pushed` tells that this rank has written its summand where the room's `push` says, too.
        """
        way, x = self._put(x, place)
        return None if way is None else peer_sum(x, way, pushed=pushed)

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
        way, x = self._put(x, place)
        return None if way is None else peer_sum_add_rms_norm(x, residual, weight, eps, way, pushed=pushed)

    def _way(self, shape: torch.Size, dtype: torch.dtype, place: Place) -> Way | None:
        if dtype is not self._memory.dtype:
            return None
        in_one, in_two, numel = self._one_shot[place], self._two_shots, shape.numel()
        if numel <= in_one.inboxes.shape[1]:
            return in_one
        return in_two if numel <= in_two.summand.numel() and in_two.programs(shape[0]) <= MAX_PROGRAMS else None

    def _put(self, x: torch.Tensor, place: Place) -> tuple[Way | None, torch.Tensor]:
        """Return how `x` is summed, and where it now is."""
        way = self._way(x.shape, x.dtype, place)
        if way is not None:
            self.logits.pass_sum()
        if isinstance(way, TwoShots):
            own = way.summand[: x.numel()].view(x.shape)
            x = x if x.data_ptr() == own.data_ptr() else own.copy_(x)
        return way, x


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
