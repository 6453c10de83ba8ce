"""Linear layers whose weight is split over the ranks of a tensor-parallel group (Megatron-LM, arXiv:1909.08053).

A column-parallel layer splits the output features, so that each rank computes its own; a row-parallel layer after it
splits the input features in the same way, and the norm after that sums the ranks' results. One all-reduce per pair is
all they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.kernels.linear import linear, norm_linear
from model.kernels.packed import pack
from model.layers.activation import SiluAndMul
from model.layers.norm import RMSNorm
from model.layers.shard import Part, Shard, ShardedModule, empty_parameter
from model.one_shot import Place
from model.parallel import TensorParallel


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in_features] to this rank's output features, the packed parts side by side."""
        return linear(x, self.weight, self.bias)

    def after(
        self, norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None, then: SiluAndMul | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (then(self(norm(x + residual))), x + residual), in fewer launches where that is faster.

        x, residual: [tokens, in_features]; without a residual (the first layer's) the sum is x itself, and with one `x`
        is this rank's summand of a row-parallel layer.
        """
        if residual is not None and norm.tp.size > 1:
            normed, total = norm(x, residual)
            return linear(normed, self.weight, self.bias, gated=then is not None), total
        return norm_linear(x, residual, norm.weight, norm.eps, self.weight, self.bias, gated=then is not None)

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
    """Input features split over ranks; each makes a summand, and the norm behind this layer adds them up.

    Args:
        place: which layers' summands these are, as the norm knows them.
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's [tokens, in_features / size] to its summand of [tokens, out_features]; rank 0's has the bias."""
        bias = self.bias if self._tp.rank == 0 else None
        room = self._tp.room_for_summand(torch.Size((x.shape[0], self.weight.shape[0])), x.dtype, self._place)
        return linear(x, self.weight, bias, out=room)

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
