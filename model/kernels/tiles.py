"""What kernels in Gluon share: tiles that a tensor memory accelerator brings, what matrix units leave, numbers that
warps tell one another, and dependent launches."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (As in the other kernel modules.)

from __future__ import annotations

from typing import Any

import torch

from model.kernels.runtime import constexpr, gl, gluon_constexpr, gluon_jit, hopper

# Triton 3.9 has other names than 3.6.
copy_tile: Any = hopper and (getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared)
thread_barrier: Any = gl and getattr(gl, "barrier", getattr(gl, "thread_barrier", None))
_REINTERPRETS = constexpr(bool(gl) and hasattr(gl.shared_memory_descriptor, "reinterpret"))
_NUMBERS = constexpr(8)  # of a place in a queue


def tiles_of(matrix: torch.Tensor, rows: int, columns: int) -> Any:
    """Describe a contiguous matrix of 16-bit elements as tiles, of a multiple of 64 columns: zeros outside of it."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    assert matrix.dtype.itemsize == 2, f"barriers count bytes of 16-bit elements, not of {matrix.dtype}"
    return TensorDescriptor.from_tensor(matrix, [rows, columns], gl.NVMMASharedLayout(128, 16))


@gluon_constexpr
def products_layout(columns, warps):
    """Return which thread has which sum of products: warps share the rows of the left operand."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, 16])


@gluon_jit
def as_words(tile, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Return the shared memory of a tile of 16-bit elements as words of 32 bits: [ROWS, COLUMNS // 2]."""
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    if _REINTERPRETS:
        words = tile.reinterpret(gl.int32, [ROWS, COLUMNS // 2], WORDS)
    else:
        words = tile._reinterpret(gl.int32, [ROWS, COLUMNS // 2], WORDS)
    return words


@gluon_jit
def load_record(records_ptr, number, there):
    """Return the eight numbers of a record of `SplitList` or `TileList`, zeros if it is not `there`."""
    record = records_ptr + number * 8
    first = gl.load(record, mask=there, other=0)
    second = gl.load(record + 1, mask=there, other=0)
    third = gl.load(record + 2, mask=there, other=0)
    fourth = gl.load(record + 3, mask=there, other=0)
    fifth = gl.load(record + 4, mask=there, other=0)
    sixth = gl.load(record + 5, mask=there, other=0)
    seventh = gl.load(record + 6, mask=there, other=0)
    eighth = gl.load(record + 7, mask=there, other=0)
    return first, second, third, fourth, fifth, sixth, seventh, eighth


@gluon_jit
def queue_of_numbers(PLACES: gl.constexpr):
    """Return shared memory in which one warp leaves up to eight numbers in each of several places, for other warps."""
    return gl.allocate_shared_memory(gl.int32, [PLACES * _NUMBERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon_jit
def tell(number, place, INDEX: gl.constexpr, queue):
    """Leave one number, as one warp."""
    WARP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    queue.index(place * _NUMBERS + INDEX).store(gl.full([1], 0, gl.int32, WARP) + number)


@gluon_jit
def hear(place, INDEX: gl.constexpr, queue):
    """Return one number, as four warps."""
    WARPS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(queue.index(place * _NUMBERS + INDEX).load(WARPS), axis=0)


@gluon_jit
def begin_dependents(PDL: gl.constexpr):
    """As in `model.kernels.dependent`."""
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon_jit
def wait(PDL: gl.constexpr):
    """As in `model.kernels.dependent`."""
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
