"""Gate, up and the SiLU between them, of many rows, as one launch in CUDA C++, for Hopper.

A library's product leaves gates and ups in memory, where a kernel of its own reads them again. Here a thread has a gate
and its up when it has multiplied, and only what becomes of them is written. It does what `small_linear_torch` does with
a gate, for more rows than *ring* is fast for. gated_linear.cu tells how.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from model.kernels.cuda_source import (
    ALIGNMENT,
    SLICE,
    Source,
    dispensable,
    kernel_of,
    multiplication,
    number,
    pointer,
    tensor_map,
)
from model.kernels.norm import Scale
from model.kernels.rows import empty_rows, whole_tiles

_FEATURES = 32  # of a group of warps
LEAST_ROWS = 65
"""Up to 64 others are faster."""
_MAX_ROWS = 256  # of a tile: the widest right operand that matrix units take
_ROOM = (227 << 10) - ALIGNMENT - 2048  # for operands and results, beside barriers and scales
_BAND = 8  # tiles of rows: in 8B, the x of 2,048 rows is 16 MB, a third of the L2 cache
_LEAST_OF_SEVERAL = 160  # rows of a tile, where there are several: with fewer, the weight passes the L2 cache too often
_LEAST_FILLED = 0.9
"""With 0.87, such as 1,024 rows of 32B on two GPUs have, an H200 is no faster than with separate launches."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a launch of so many rows and features is cut into tiles of `block_rows` rows and 32 * `groups` features, of
    which so many programs, an even number, compute one each at a time.
    """

    block_rows: int  # 32 to 256, a multiple of 32
    groups: int  # 2 or 3
    rows: int
    features: int
    programs: int

    @property
    def tiles_of_rows(self) -> int:
        return _cdiv(self.rows, self.block_rows)

    @property
    def tiles_of_features(self) -> int:
        """A multiple of `cluster`."""
        tiles = _cdiv(self.features, _FEATURES * self.groups)
        return tiles if self.single else _cdiv(tiles, 2) * 2

    @property
    def single(self) -> bool:
        """Whether each program has one tile, or none."""
        return self.tiles_of_rows * _cdiv(self.features, _FEATURES * self.groups) <= self.programs

    @property
    def scales(self) -> bool:
        """Whether x may be one that is still to be scaled."""
        return self.single and self.tiles_of_rows == 1

    @property
    def turns(self) -> int:
        """How many tiles the programs that have most compute one after the other."""
        return _cdiv(self.tiles_of_rows * self.tiles_of_features, self.programs)

    @property
    def filled(self) -> float:
        """Which share of the time programs have something to multiply."""
        return self.tiles_of_rows * self.features / (_FEATURES * self.groups * self.turns * self.programs)

    @property
    def cluster(self) -> int:
        """Programs that fetch x for one another. With a single tile for each, that is no faster."""
        return 1 if self.single else 2

    @property
    def rows_of_piece(self) -> int:
        """Rows that a group stores at a time. With a single tile, they lie where 64 rows of the weight have been."""
        return self.block_rows // 2 if self.single and self.block_rows > 128 else self.block_rows

    @property
    def stages(self) -> int:
        return min((_ROOM - self._result_bytes) // self._stage_bytes, 8)

    @property
    def shared_bytes(self) -> int:
        return ALIGNMENT + self.stages * self._stage_bytes + self._result_bytes

    @property
    def _stage_bytes(self) -> int:
        return (2 * _FEATURES * self.groups + self.block_rows) * SLICE * 2

    @property
    def _result_bytes(self) -> int:
        return 0 if self.single else self.block_rows * self.groups * _FEATURES * 2

    def source(self, *, scaled: bool = False) -> Source:
        assert self.scales or not scaled, "a program has the scales of one tile, which must be all"
        return Source(
            "gated_linear.cu",
            (
                ("ROWS", str(self.block_rows)),
                ("GROUPS", str(self.groups)),
                ("CLUSTER", str(self.cluster)),
                ("STAGES", str(self.stages)),
                ("SINGLE", str(int(self.single))),
                ("SCALED", str(int(scaled))),
                *multiplication(self.block_rows),
            ),
        )


def _cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def cut_for(rows: int, features: int, k: int, programs: int) -> Cut | None:
    """Return how so many rows are cut for so many programs at a time; None where that leaves too many of them without
    anything to do, where there are so few rows that other kernels are faster, or where the layer cannot be cut so.

    Tiles that are as large as they may be are the best, since each fetches both operands for itself; somewhat smaller
    ones where that lets programs end together.
    """
    if rows < LEAST_ROWS or features % 8 or k % SLICE:
        return None
    programs -= programs % 2  # neighbours are a cluster
    fewest = _cdiv(rows, _MAX_ROWS)
    cuts = (
        Cut(_cdiv(_cdiv(rows, tiles), 32) * 32, groups, rows, features, programs)
        for tiles in ((fewest, fewest + 1) if fewest > 1 else (1,))
        for groups in (3, 2)
    )
    best = min(
        (cut for cut in cuts if fewest == 1 or cut.block_rows >= _LEAST_OF_SEVERAL),
        key=lambda cut: cut.turns * (cut.block_rows + 96) * (cut.groups + 0.25),  # as 8B's tiles take time
    )
    return best if best.filled >= _LEAST_FILLED else None


def sources_for(most_rows: int, features: int, k: int, programs: int) -> Iterable[Source]:
    """Return all kernels that launches of up to so many rows may be of."""
    every: dict[Source, None] = {}  # in this order
    for rows in range(LEAST_ROWS, most_rows + 1, 32):  # which up to the next number are cut alike
        cut = cut_for(rows, features, k, programs)
        if cut is not None:
            every |= {cut.source(scaled=scaled): None for scaled in {False, cut.scales}}
    return every


def load_kernels(weight: torch.Tensor, most_rows: int, programs: int) -> None:
    """Compile and load all kernels that `gated_linear` may launch for a weight and up to so many rows, or tell of them
    where launches are only tried: steps of any number of rows may come, and none is to wait for a compiler.

    Raises ModelError where a kernel cannot be compiled or loaded.
    """
    with dispensable("gated_linear"):
        for source in sources_for(most_rows, weight.shape[0] // 2, weight.shape[1], programs):
            kernel_of(source, weight.device)


def gated_linear(
    x: torch.Tensor, weight: torch.Tensor, *, scale: Scale | None = None, cut: Cut, pdl: bool
) -> torch.Tensor:
    """Return silu(gates) * ups, both of x @ weight.T; with `scale`, if the cut `scales`, x is one that is still to
    be scaled.

    x: [rows, k], as many as the cut is for. weight: [2 * features, k], gates before ups. The result: [rows, features].
    All of bfloat16 and contiguous. Products are float32, and a gate is rounded before it is multiplied.

    Raises ModelError where the kernel cannot be compiled, loaded or launched.
    """
    rows, k = x.shape
    features = weight.shape[0] // 2
    assert (rows, features) == (cut.rows, cut.features), f"[{rows}, {features}] for {cut}"
    assert weight.shape == (2 * features, k), f"{tuple(weight.shape)} for {k} columns"
    assert features % 8 == 0 == k % SLICE, f"a weight of [{2 * features}, {k}] is not cut into tiles"
    assert x.is_contiguous(), "x must be contiguous"
    assert weight.is_contiguous(), "the weight must be contiguous"
    assert scale is None or (scale.squares.is_contiguous() and len(scale.squares) == rows), (
        "sums of squares of each row"
    )
    out, tiles = empty_rows(rows, features, like=x), whole_tiles(x, cut.block_rows)
    with dispensable("gated_linear"):
        kernel = kernel_of(cut.source(scaled=scale is not None), x.device)
        if kernel is not None:
            kernel.launch(
                min(cut.tiles_of_rows * cut.tiles_of_features, cut.programs),
                cut.groups * 128,
                # Eight gates lie before their eight ups.
                tensor_map(weight, (k, 8, 2, features // 8), (k, features * k, 8 * k), (SLICE, 8, 2, _FEATURES // 8)),
                tensor_map(tiles, (k, len(tiles)), (k,), (SLICE, cut.block_rows // cut.cluster)),
                tensor_map(out, (features, rows), (features,), (_FEATURES, cut.rows_of_piece)),
                pointer(out if scale is None else scale.squares),  # nothing is read through it if there is no scale
                number(0.0 if scale is None else scale.eps),
                number(0 if scale is None else scale.squares.shape[1]),
                *map(number, (rows, k, cut.tiles_of_rows, cut.tiles_of_features, _BAND)),
                cluster=cut.cluster,
                shared_bytes=cut.shared_bytes,
                pdl=pdl,
            )
    return out
