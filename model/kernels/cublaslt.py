"""Products by cuBLASLt, with the algorithm that was measured to be the fastest instead of the one that it would take.

What it takes by itself is up to 40 % slower for 80 to 256 rows (docs/performance.md). `algorithms.json` names what is
faster, for the layers of the models that were measured; `python -m bench.products` measures, and writes it. The numbers
are cuBLASLt's own, and used with releases of the version that they were measured with, on Hoppers. PyTorch multiplies
what the file does not name, and everything with another version.

PyTorch has no way to name an algorithm, so this calls the C library that PyTorch has loaded. Names in capitals below
are those of its header, cublasLt.h; no other function, number or structure is used.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from bisect import bisect_left
from collections.abc import Mapping
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import torch

from model.kernels.runtime import is_hopper, wanted

logger = logging.getLogger(__name__)

_FEW_ROWS = 16
"""So many rows and fewer were not measured, and are PyTorch's: our own kernels take nearly all of them."""
_SMALL = (32, 64, 80, 96, 112, *range(128, 257, 32))
_LARGE = (*range(384, 1025, 128), *range(1280, 2049, 256), 3072, 4096, 6144, 8192)
ROW_CLASSES = (*_SMALL, *_LARGE)
"""Numbers of rows that may be measured; in between, and above, the next or the last one's algorithm is taken. Of steps'
graphs (`worker/shapes.py`), those of 64 to 256 rows, and mixed ones, have as many."""

_BF16, _FLOAT, _COMPUTE_FLOAT = 14, 0, 68  # CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F
_TRANSPOSE_A, _LAYOUT_COLUMNS = 3, 3  # CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATRIX_LAYOUT_COLS

_WORKSPACE_BYTES = 4096
"""Some algorithms ask for four, to count the tiles that programs have taken. Products follow one another in a stream,
and may share them."""
_UNCOUNTED_ROWS = 256
"""Products of so many rows and fewer get no workspace. Then programs know their tiles in advance, and no launch has to
clear a counter before, which is mostly faster (docs/performance.md)."""


class Algorithm(NamedTuple):
    """What tells one of cuBLASLt's algorithms from others that have the same `CONSTANTS`."""

    tile: int
    cluster: int
    option: int = 0
    swizzle: int = 0


ATTRIBUTES: Mapping[str, tuple[int, Any]] = {
    "family": (0, c_int32),  # CUBLASLT_ALGO_CONFIG_ID
    "tile": (1, c_uint32),  # .._TILE_ID
    "splits": (2, c_int32),  # .._SPLITK_NUM
    "swizzle": (4, c_uint32),  # .._CTA_SWIZZLING
    "option": (5, c_uint32),  # .._CUSTOM_OPTION
    "stages": (6, c_uint32),  # .._STAGES_ID
    "cluster": (8, c_uint16),  # .._CLUSTER_SHAPE_ID
}
CONSTANTS: Mapping[str, int] = {"family": 66, "splits": 1, "stages": 35}
"""The fastest are of one family, which finds out itself how many stages there are; splitting the reduction, which needs
a large workspace, has never been the best."""

_SIGNATURES: Mapping[str, list[Any]] = {
    "cublasLtCreate": [c_void_p],
    "cublasLtMatmulDescCreate": [c_void_p, c_int, c_int],
    "cublasLtMatmulDescSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatrixLayoutCreate": [c_void_p, c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatrixLayoutSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmulAlgoInit": [c_void_p, *[c_int] * 7, c_void_p],
    "cublasLtMatmulAlgoConfigSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmulAlgoCheck": [c_void_p] * 8,
    "cublasLtMatmul": [*[c_void_p] * 14, c_size_t, c_void_p],
}
_ONE, _ZERO = c_float(1.0), c_float(0.0)


class AlgorithmStruct(ctypes.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = (("data", c_uint64 * 8),)


class ResultStruct(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", AlgorithmStruct),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CublasError(RuntimeError):
    """cuBLASLt refuses what it should do."""


def product_for(x: torch.Tensor, weight: torch.Tensor) -> Product | None:
    """Return what multiplies x [rows, k] by weight [n, k] faster than PyTorch does, ready for so many rows.

    None if nothing is known to. It is where both are contiguous bfloat16, on a Hopper that is the current device, and
    an algorithm has been measured with this version of cuBLASLt.
    """
    if not x.dtype is weight.dtype is torch.bfloat16 or not is_hopper(x.device) or not wanted("cublaslt"):
        return None
    if x.is_meta:  # a product of a library has no kernel of ours
        return None
    rows = row_class(x.shape[0])
    product = None if rows is None else _product(x.device, *weight.shape, rows)
    if product is None or not (x.is_contiguous() and weight.is_contiguous() and product.prepare(x.shape[0])):
        return None
    return product


def row_class(rows: int) -> int | None:
    """Return what so many rows count as; None where they are too few."""
    if rows <= _FEW_ROWS:
        return None
    return ROW_CLASSES[min(bisect_left(ROW_CLASSES, rows), len(ROW_CLASSES) - 1)]


@cache
def _product(device: torch.device, n: int, k: int, rows: int) -> Product | None:
    algorithm = measured().get((n, k, rows))
    library = library_of(device)
    if algorithm is None or library is None or not is_measured(library.version):
        return None
    struct = library.algorithm(algorithm)
    try:
        return None if struct is None else Product(library, n, k, struct)
    except CublasError as error:
        logger.warning("a product of %d rows by [%d, %d] is left to PyTorch: %s", rows, n, k, error)
        return None


@cache
def measured() -> Mapping[tuple[int, int, int], Algorithm]:
    """Return the algorithms of `algorithms.json`, by n, k and class of rows."""
    products = _file()["products"]
    return {
        (*map(int, shape.split("x")), int(rows)): Algorithm(*numbers)  # type: ignore[misc]
        for shape, algorithms in products.items()
        for rows, numbers in algorithms.items()
    }


def is_measured(version: str) -> bool:
    """Tell whether the numbers of `algorithms.json` are for a version of cuBLASLt, such as "13.1.0"."""
    return same_numbers(version, str(_file()["cublaslt"]))


def same_numbers(version: str, other: str) -> bool:
    """Tell whether two versions of cuBLASLt have the same numbers: patches of a minor version do, by their headers."""
    return version.rpartition(".")[0] == other.rpartition(".")[0]


@cache
def _file() -> dict[str, Any]:
    return json.loads(resources.files("model.kernels").joinpath("algorithms.json").read_text(encoding="utf-8"))


@cache
def library_of(device: torch.device) -> Library | None:
    """Return the library with a handle for `device`; None, and a line in the log, where there is none."""
    try:
        library = Library(device)
    except (OSError, AttributeError, CublasError) as error:
        logger.warning("products are left to PyTorch: %s", error)
        return None
    if not is_measured(library.version):
        logger.info(
            "products are left to PyTorch: cuBLASLt is %s, measured was %s", library.version, _file()["cublaslt"]
        )
    return library


class Library:
    """cuBLASLt, as PyTorch has loaded it, with a handle for one device."""

    def __init__(self, device: torch.device) -> None:
        """Raises OSError where it is not loaded, AttributeError where it lacks a function, CublasError for others."""
        name = f"libcublasLt.so.{(torch.version.cuda or '').partition('.')[0]}"
        self.functions = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        for function, arguments in _SIGNATURES.items():
            getattr(self.functions, function).argtypes = arguments
        self.functions.cublasLtGetVersion.restype = c_size_t
        number = self.functions.cublasLtGetVersion()
        self.version = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
        self.device = device
        self.workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        with torch.cuda.device(device):
            self.handle = self.made("cublasLtCreate")

    def made(self, function: str, *arguments: object) -> c_void_p:
        """Return what a function makes. Raises CublasError."""
        made = c_void_p()
        self.call(function, byref(made), *arguments)
        return made

    def call(self, function: str, *arguments: object) -> None:
        """Raises CublasError."""
        if status := getattr(self.functions, function)(*arguments):
            raise CublasError(f"{function} of cuBLASLt {self.version} failed with status {status}")

    def layout(self, rows: int, columns: int) -> c_void_p:
        """A matrix in cuBLAS's order: columns that follow one another, where tensors have rows. Raises CublasError."""
        return self.made("cublasLtMatrixLayoutCreate", _BF16, rows, columns, rows)

    def algorithm(self, algorithm: Algorithm) -> AlgorithmStruct | None:
        """Return what cuBLASLt is given for it; None where there is no such number."""
        struct = AlgorithmStruct()
        types = (_COMPUTE_FLOAT, _FLOAT, *[_BF16] * 4)
        if self.functions.cublasLtMatmulAlgoInit(self.handle, *types, CONSTANTS["family"], byref(struct)):
            return None
        for name, number in {**CONSTANTS, **algorithm._asdict()}.items():
            attribute, kind = ATTRIBUTES[name]
            value = kind(number)
            if name != "family" and self.functions.cublasLtMatmulAlgoConfigSetAttribute(
                byref(struct), attribute, byref(value), ctypes.sizeof(value)
            ):
                return None
        return struct


class Product:
    """x @ weight.T of one weight's shape [n, k]; `prepare` it for a number of rows, then `run` it."""

    def __init__(self, library: Library, n: int, k: int, algorithm: AlgorithmStruct) -> None:
        """Raises CublasError."""
        self._library, self._algorithm = library, algorithm
        self._rows, self._fits, self._counts = 0, False, False
        # cuBLAS sees each tensor transposed, and gives out.T = weight @ x.T.
        self._kind = library.made("cublasLtMatmulDescCreate", _COMPUTE_FLOAT, _FLOAT)
        transposed = c_int32(1)
        library.call("cublasLtMatmulDescSetAttribute", self._kind, _TRANSPOSE_A, byref(transposed), 4)
        self._weight, self._x, self._out = library.layout(k, n), library.layout(k, 1), library.layout(n, 1)

    @property
    def description(self) -> tuple[c_void_p, ...]:
        """The operation, and the layouts of weight, x, and the result: as what is added to, and as what is made."""
        return self._kind, self._weight, self._x, self._out, self._out

    def prepare(self, rows: int) -> bool:
        """Be for so many rows from now on; return whether the algorithm is. What a graph has captured stays as it is.

        Raises CublasError.
        """
        if rows != self._rows:
            self.resize(rows)
            result = ResultStruct()
            status = self._library.functions.cublasLtMatmulAlgoCheck(
                self._library.handle, *self.description, byref(self._algorithm), byref(result)
            )
            self._fits = status == 0 and result.status == 0 and result.workspace_bytes <= _WORKSPACE_BYTES
        return self._fits

    def resize(self, rows: int) -> None:
        """Be for so many rows, whether the algorithm is or not. Raises CublasError."""
        self._rows, self._fits = rows, False
        columns = c_uint64(rows)
        for layout in (self._x, self._out):
            self._library.call("cublasLtMatrixLayoutSetAttribute", layout, _LAYOUT_COLUMNS, byref(columns), 8)

    def run(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
        """Write x @ weight.T to `out` [rows, n], or `add` it to what is there; summed in float32, rounded once.

        All are contiguous bfloat16, at addresses that are divisible by 16, of as many rows as it is prepared for.

        Raises CublasError.
        """
        assert x.shape[0] == out.shape[0] == self._rows, "it is prepared for other rows"
        library, result = self._library, c_void_p(out.data_ptr())
        operands = (
            *(library.handle, self._kind, byref(_ONE)),
            *(weight.data_ptr(), self._weight, x.data_ptr(), self._x),
            *(byref(_ONE if add else _ZERO), result, self._out, result, self._out),
            byref(self._algorithm),
        )
        stream = torch.cuda.current_stream(library.device).cuda_stream
        if self._rows <= _UNCOUNTED_ROWS and not self._counts:
            # What `prepare` asks says what an algorithm takes, not whether it can go without. 13.1.0's can.
            self._counts = library.functions.cublasLtMatmul(*operands, None, 0, stream) != 0
            if not self._counts:
                return
        try:
            library.call("cublasLtMatmul", *operands, library.workspace.data_ptr(), _WORKSPACE_BYTES, stream)
        except CublasError as error:
            raise CublasError(f"{error}; LIGHTQWEN_WITHOUT=cublaslt leaves products to PyTorch") from None
