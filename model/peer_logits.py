"""Logits of all ranks side by side, through memory that the GPUs of one machine reach in each other.

The head has its product written where the others can read it, as layers have their summands, and one kernel of each
rank copies what all have written (`model.kernels.peer_logits`). NCCL would take its latency, and leave every rank's
columns of all rows one below the other.

There is one memory for all steps. It may be written again once a sum of `PeerSums` has been made since it was read, and
so it is given to nobody before. A model makes many in front of its head; those that are too large, and NCCL's, do not
count here (they would do: NCCL's part of a rank begins when what was launched before it has ended, and ends when all
have begun). Then the group gathers, as it does what does not fit.
"""

from __future__ import annotations

import torch

from model.kernels.peer_logits import Parts, peer_logits

MAX_LOGITS_BYTES = 64 << 20
"""The most memory of a rank for its part of the logits: 256 rows of a half of 151,936 in 16 bits are 39 MB."""


class PeerLogits:
    """This rank's memory for its columns of the logits, and the gathering of all ranks'.

    memory: [numel], this rank's, where `parts` says; empty if all logits are to be left to the group.

    Every rank gathers the same shapes in the same order, and between two of them makes a summand and its sum, which is
    told by `pass_sum`. A CUDA graph tells once what it launches at every replay: so one that gathers must make a sum
    before it does.
    """

    def __init__(self, memory: torch.Tensor, parts: Parts) -> None:
        self._memory = memory
        self._parts = parts
        self._being_read = False  # by other ranks, for all that is known here

    def pass_sum(self) -> None:
        """Learn that a sum of all ranks comes next: whatever is launched from then on finds that all have read."""
        self._being_read = False

    def room(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
        """Where a product [rows, width] may be written, so that it need not be copied there; None: nowhere."""
        if self._being_read or shape.numel() > self._memory.numel() or dtype is not self._memory.dtype:
            return None
        return self._memory[: shape.numel()].view(shape)

    def gather(self, x: torch.Tensor, columns: int, *, share: bool) -> torch.Tensor | None:
        """Return all ranks' `x` [rows, width] side by side, but for what lies past `columns`: [rows, columns].

        With `share`, of the rows this rank's, as `peer_logits` says. None where there is no room for `x`, which depends
        on what all ranks do alike. What is returned is this rank's alone, and stays.
        """
        room = self.room(x.shape, x.dtype)
        if room is None:
            return None
        if x.data_ptr() != room.data_ptr():
            room.copy_(x)
        self._being_read = True
        rows, width = x.shape
        return peer_logits(rows, width, columns, x.dtype, self._parts, share=share)
