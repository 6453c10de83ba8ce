"""Linear layers whose weight is split over the ranks of a tensor-parallel group (Megatron-LM, arXiv:1909.08053).

A column-parallel layer splits the output features, so that each rank computes its own; a row-parallel layer after it
splits the input features in the same way, and the ranks' results are summed. One all-reduce per pair is all they say.

Around a pair of them stand a norm before and the residual stream behind. A row-parallel layer adds to the stream and
norms it for the column-parallel layer that comes next, since all of that can be one operation: with several ranks the
sum over them is, and with one the product. It may leave the last step of the norm to the next product (`Normed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.kernels.linear import can_push, can_sum, linear, linear_add_norm, linear_sum_add_norm, norm_linear
from model.kernels.norm import Normed
from model.kernels.packed import pack
from model.layers.activation import SiluAndMul
from model.layers.norm import RMSNorm
from model.layers.shard import Part, Shard, ShardedModule, empty_parameter
from model.parallel import TensorParallel
from model.peer_sums import Place


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one checkpoint tensor that this rank holds."""

    full: int  # of the tensor in the checkpoint
    first: int
    count: int


class ColumnParallelLinear(ShardedModule):
    """Output features split over ranks; may pack several checkpoint tensors, one below the other, into one weight."""

    def __init__(
        self, in_features: int, parts: dict[Part, _Rows], *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self._in_features = in_features
        self._parts = parts
        rows = sum(part.count for part in parts.values())
        self.weight = empty_parameter(rows, in_features, dtype=dtype, device=device)
        self.bias = empty_parameter(rows, dtype=dtype, device=device) if bias else None

    def forward(self, normed: Normed, then: SiluAndMul | None = None) -> torch.Tensor:
        """[tokens, in_features] to this rank's output features, the packed parts side by side, and `then` of these."""
        return norm_linear(normed, self.weight, self.bias, gated=then is not None)

    def finish(self) -> None:
        self.weight = pack(self.weight)

    def shard(self, parameter: str, part: Part | None = None) -> Shard:
        """Return the rows of the tensor called `part`; of its weight or its bias."""
        if part is None:
            raise ValueError(f"{type(self).__name__} packs {list(self._parts)}; say which")
        offset = 0
        for name, rows in self._parts.items():
            if name == part:
                break
            offset += rows.count
        rows = self._parts[part]
        rest = (self._in_features,) if parameter == "weight" else ()
        return Shard(
            full_shape=(rows.full, *rest),
            source=(slice(rows.first, rows.first + rows.count), *(slice(0, size) for size in rest)),
            target=self.get_parameter(parameter).narrow(0, offset, rows.count),
        )


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections in one, split by heads. Where ranks outnumber KV heads, several hold each."""

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        *,
        bias: bool,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        heads = total_num_heads // tp.size
        kv_heads = max(1, total_num_kv_heads // tp.size)
        first_kv_head = tp.rank * total_num_kv_heads // tp.size
        kv_rows = _Rows(total_num_kv_heads * head_dim, first_kv_head * head_dim, kv_heads * head_dim)
        parts: dict[Part, _Rows] = {
            "q": _Rows(total_num_heads * head_dim, tp.rank * heads * head_dim, heads * head_dim),
            "k": kv_rows,
            "v": kv_rows,
        }
        super().__init__(hidden_size, parts, bias=bias, dtype=dtype, device=device)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several projections of the same input in one; part i is the i-th of `out_features`."""

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        parts: dict[Part, _Rows] = {
            part: _Rows(full, tp.rank * (full // tp.size), full // tp.size) for part, full in enumerate(out_features)
        }
        super().__init__(in_features, parts, bias=bias, dtype=dtype, device=device)


class RowParallelLinear(ShardedModule):
    """Input features split over ranks, whose summands are added up, to the residual stream too.

    Args:
        place: which layers' summands these are.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        tp: TensorParallel,
        place: Place,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._tp = tp
        self._place = place
        self._in_features = in_features
        self.weight = empty_parameter(out_features, in_features // tp.size, dtype=dtype, device=device)
        self.bias = empty_parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor, residual: torch.Tensor, norm: RMSNorm) -> tuple[Normed, torch.Tensor]:
        """Return (norm(total), total), total being residual + this layer's output, the same on every rank.

        x: this rank's [tokens, in_features / size]. residual: [tokens, out_features], whose memory the total may take.
        """
        if self._tp.size == 1:
            return linear_add_norm(x, self.weight, self.bias, residual, norm.weight, norm.eps)
        if self.bias is None and can_sum(x, self.weight):
            one_shot = self._tp.one_shot(residual.shape, x.dtype, self._place)
            if one_shot is not None:
                return linear_sum_add_norm(x, self.weight, residual, norm.weight, norm.eps, one_shot)
        bias = self.bias if self._tp.rank == 0 else None
        room = self._tp.room_for_summand(residual.shape, x.dtype, self._place)
        memory = None if room is None else room.memory
        push = room.push if room is not None and can_push(x, self.weight) else None
        summand = linear(x, self.weight, bias, out=memory, push=push)
        normed, total = self._tp.all_reduce_add_rms_norm(
            summand, self._place, residual, norm.weight, norm.eps, pushed=push is not None
        )
        return Normed(normed), total

    def finish(self) -> None:
        self.weight = pack(self.weight)

    def shard(self, parameter: str, part: Part | None = None) -> Shard:
        """Return this rank's columns of the weight; the bias is held whole by every rank."""
        if parameter == "bias":
            return super().shard(parameter, part)
        out_features, width = self.weight.shape
        first = self._tp.rank * width
        return Shard(
            full_shape=(out_features, self._in_features),
            source=(slice(0, out_features), slice(first, first + width)),
            target=self.weight,
        )
