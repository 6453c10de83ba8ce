"""The two ends of the model, token ids to vectors and vectors to logits, with the vocabulary split over the ranks.

A vocabulary that does not divide by the number of ranks is padded at its end; nothing outside this file sees that.
"""

from __future__ import annotations

import torch

from model.kernels.embedding import can_push, embed, embed_rms_norm
from model.kernels.linear import linear
from model.kernels.norm import Normed
from model.kernels.packed import pack
from model.layers.norm import RMSNorm
from model.layers.shard import Part, Shard, ShardedModule, empty_parameter
from model.parallel import TensorParallel
from model.peer_sums import Place


class _VocabParallel(ShardedModule):
    """A [vocab, hidden] table of which this rank holds equally many rows as every other."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, tp: TensorParallel, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self._tp = tp
        self._vocab_size = vocab_size
        rows = -(-vocab_size // tp.size)
        self._first = min(tp.rank * rows, vocab_size)
        self._count = min(rows, vocab_size - self._first)  # fewer than `rows` where the shard is padded
        self.weight = empty_parameter(rows, hidden_size, dtype=dtype, device=device)

    def shard(self, parameter: str, part: Part | None = None) -> Shard:
        """Return this rank's rows; padding rows belong to no tensor and are never read from."""
        hidden_size = self.weight.shape[1]
        return Shard(
            full_shape=(self._vocab_size, hidden_size),
            source=(slice(self._first, self._first + self._count), slice(0, hidden_size)),
            target=self.get_parameter(parameter).narrow(0, 0, self._count),
        )


class VocabParallelEmbedding(_VocabParallel):
    """Token ids to hidden states, which begin the residual stream."""

    def forward(self, token_ids: torch.Tensor, norm: RMSNorm) -> tuple[Normed, torch.Tensor]:
        """[tokens] ids to (norm(hidden states), hidden states), both [tokens, hidden], the same on every rank."""
        if self._tp.size == 1:
            normed, rows = embed_rms_norm(token_ids, self.weight, norm.weight, norm.eps)
            return Normed(normed), rows
        shape, dtype = torch.Size((len(token_ids), self.weight.shape[1])), self.weight.dtype
        room = self._tp.room_for_summand(shape, dtype, Place.EMBEDDING)
        memory = None if room is None else room.memory
        push = room.push if room is not None and can_push(self.weight) else None
        summand = embed(token_ids, self.weight, self._first, self._count, out=memory, push=push)
        rows = self._tp.all_reduce(summand, Place.EMBEDDING, pushed=push is not None)
        return Normed(norm(rows)), rows


class ParallelLMHead(_VocabParallel):
    """Hidden states to logits."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to contiguous [rows, vocab_size], the same on every rank."""
        return self._tp.gather_columns(self._own_columns(hidden_states), self._vocab_size)

    def forward_share(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to contiguous [ceil(rows / size), vocab_size]: the logits of this rank's share of the rows.

        They are the rows that `forward` gives, bit for bit. Where the rows do not divide, the last shares end in rows
        of zeros.
        """
        return self._tp.share_columns(self._own_columns(hidden_states), self._vocab_size)

    def _own_columns(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to the logits of this rank's part of the vocabulary, with its padding."""
        shape = torch.Size((len(hidden_states), self.weight.shape[0]))
        return linear(hidden_states, self.weight, out=self._tp.room_for_columns(shape, hidden_states.dtype))

    def finish(self) -> None:
        """Where the weight is tied to the embedding and is packed, it is a second copy from now on."""
        self.weight = pack(self.weight)
