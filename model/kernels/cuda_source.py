"""Kernels in CUDA C++, for what Triton has no words for, such as clusters: compiled, cached, loaded and launched.

PyTorch's packages for CUDA bring what this takes: NVIDIA's compiler in a library (NVRTC), and the package
cuda-bindings, which calls it and the driver. Where they are missing, `compiles` says so, and other kernels do the work.
What has been compiled lies in Triton's cache, beside Triton's own kernels (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from model.errors import ModelError
from model.kernels.runtime import HOPPER_TO_BE, is_hopper, triton

logger = logging.getLogger(__name__)

_HEADER = "hopper.cuh"  # which all may include
SLICE = 64
"""Columns, as the header says: what is swizzled is 128 bytes wide."""
ALIGNMENT = 1024
"""Of swizzled shared memory, in bytes."""
_OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17")
"""The a is for what only this generation has: matrix units that take operands from shared memory."""

instead_of_launching: Callable[[Source], object] | None = None
"""Where launches are only tried (`model.kernels.ahead`), what is told of each kernel that would be launched."""


class CudaSourceError(RuntimeError):
    """NVRTC or the driver refuses what it should do."""


@contextmanager
def dispensable(name: str) -> Iterator[None]:
    """Name, where a kernel cannot be compiled, loaded or launched, what it is dispensable as (`DISPENSABLE`).

    Raises ModelError then.
    """
    try:
        yield
    except CudaSourceError as error:
        raise ModelError(f"{error}; set LIGHTQWEN_WITHOUT={name} to leave its layers to other kernels") from error


@dataclass(frozen=True, slots=True)
class Source:
    """A kernel, which has the name of its file without the ending, and what is defined before the text of the file."""

    file: str
    macros: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return self.file.removesuffix(".cu")

    @property
    def text(self) -> str:
        defined = "".join(f"#define {name} {value}\n" for name, value in self.macros)
        return f'{defined}#line 1 "{self.file}"\n{_text_of(self.file)}'

    def in_cache(self) -> bool:
        """Tell whether `cubin` has nothing to compile."""
        return self._cache().get_file(self._file_in_cache) is not None

    def cubin(self) -> bytes:
        """Return what the driver loads. Raises CudaSourceError where NVRTC does not compile it."""
        files = self._cache()
        found = files.get_file(self._file_in_cache)
        if found is not None:
            with open(found, "rb") as file:
                return file.read()
        cubin = _compile(self)
        files.put(cubin, self._file_in_cache, binary=True)
        return cubin

    @property
    def _file_in_cache(self) -> str:
        return f"{self.name}.cubin"

    def _cache(self) -> Any:
        of = (self.text, _text_of(_HEADER), *_OPTIONS, str(_checked(_nvrtc().nvrtcVersion())))
        return triton.runtime.cache.get_cache_manager(hashlib.sha256("\0".join(of).encode()).hexdigest())


class Kernel:
    """A kernel that is loaded on the device that was the current one."""

    def __init__(self, source: Source) -> None:
        driver = _driver()
        self._module = _checked(driver.cuModuleLoadData(source.cubin()))  # stays loaded for as long as the process
        self._function = _checked(driver.cuModuleGetFunction(self._module, source.name.encode()))
        attributes = driver.CUfunction_attribute
        most = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        room = _checked(driver.cuDeviceGetAttribute(most, torch.cuda.current_device()))
        fixed = _checked(driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, self._function))
        dynamic = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, dynamic, room - fixed))

    def launch(
        self,
        programs: int,
        threads: int,
        *arguments: tuple[Any, Any],
        cluster: int,
        shared_bytes: int,
        pdl: bool,
    ) -> None:
        """Launch so many programs in PyTorch's current stream, `cluster` neighbours of them in a cluster.

        An argument is a value and its ctypes type, or a tensor map and None. `pdl` makes it a dependent launch.
        """
        driver = _driver()
        kinds = driver.CUlaunchAttributeID
        in_cluster = driver.CUlaunchAttribute()
        in_cluster.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        in_cluster.value.clusterDim.x, in_cluster.value.clusterDim.y, in_cluster.value.clusterDim.z = cluster, 1, 1
        dependent = driver.CUlaunchAttribute()
        dependent.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        dependent.value.programmaticStreamSerializationAllowed = int(pdl)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.attrs, config.numAttrs = [in_cluster, dependent], 2
        values, types = zip(*arguments, strict=True)
        _checked(driver.cuLaunchKernelEx(config, self._function, (values, types), 0))


def kernel_of(source: Source, device: torch.device) -> Kernel | None:
    """Return a kernel for `device`, the current one, compiled at the first call; None where launches are only tried."""
    if instead_of_launching is not None:
        instead_of_launching(source)
        return None
    return _loaded(source, device)


@cache
def _loaded(source: Source, device: torch.device) -> Kernel:
    assert device.index in (None, torch.cuda.current_device()), f"{device} is not the current device"
    return Kernel(source)


def tensor_map(
    tensor: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> tuple[Any, None]:
    """Return, as an argument of a kernel, how boxes of a bfloat16 tensor come into swizzled shared memory, or leave it.

    sizes: of each dimension, the innermost first, which is contiguous. strides: of the others, in elements. box: how
    much is fetched or stored, of the innermost dimension 64 or 32 elements, which is as wide as what is swizzled.
    Elements outside are zeros, and not stored.
    """
    driver = _driver()
    assert tensor.dtype is torch.bfloat16, tensor.dtype
    swizzles = driver.CUtensorMapSwizzle
    swizzled = {64: swizzles.CU_TENSOR_MAP_SWIZZLE_128B, 32: swizzles.CU_TENSOR_MAP_SWIZZLE_64B}
    assert box[0] in swizzled, f"boxes are not {box[0]} elements wide"
    encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        len(sizes),
        tensor.data_ptr(),
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride * tensor.itemsize) for stride in strides],
        [driver.cuuint32_t(size) for size in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzled[box[0]],
        # To fetch 256 bytes at a time into the L2 cache takes 4 % longer, where each byte is read once.
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return _checked(encoded), None


def multiplication(columns: int) -> tuple[tuple[str, str], ...]:
    """Return what hopper.cuh wants defined for products of 64 rows and so many columns, 8 to 256 in steps of 8."""
    assert columns in range(8, 257, 8), columns
    sums = columns // 2  # of a thread
    return (
        ("SHAPE", f'"m64n{columns}k16"'),
        ("SUM_NAMES", f'"{", ".join(f"%{i}" for i in range(sums))}"'),
        ("SUMS", ", ".join(f'"+f"(sum[{i}])' for i in range(sums))),
        ("LEFT", f'"%{sums}"'),
        ("RIGHT", f'"%{sums + 1}"'),
    )


def pointer(tensor: torch.Tensor) -> tuple[int, type[ctypes.c_void_p]]:
    """Return a tensor's address as an argument of a kernel."""
    return tensor.data_ptr(), ctypes.c_void_p


def number(value: float) -> tuple[float, type[Any]]:
    """Return an int or a float as an argument of a kernel."""
    return value, ctypes.c_int if isinstance(value, int) else ctypes.c_float


@cache
def compiles(device: torch.device) -> bool:
    """Tell whether kernels in CUDA C++ can be compiled and run on a device; if a Hopper cannot, log why."""
    if not is_hopper(device):
        return False
    try:
        compiler = _checked(_nvrtc().nvrtcVersion())
        if device == HOPPER_TO_BE:
            return True
        newest = _checked(_driver().cuDriverGetVersion()) // 1000
        if compiler[0] > newest:
            raise CudaSourceError(f"the driver knows CUDA {newest}, and may not load what NVRTC {compiler[0]} makes")
    except Exception as error:  # of the import, of the search for the library, or the library's own
        logger.warning("kernels in CUDA C++ cannot be compiled, others are used instead: %s", error)
        return False
    return True


def _compile(source: Source) -> bytes:
    nvrtc = _nvrtc()
    headers = [_text_of(_HEADER).encode()], [_HEADER.encode()]
    program = _checked(nvrtc.nvrtcCreateProgram(source.text.encode(), source.file.encode(), 1, *headers))
    try:
        result, *_ = nvrtc.nvrtcCompileProgram(program, len(_OPTIONS), [option.encode() for option in _OPTIONS])
        if int(result):
            log = _room(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            said = log.rstrip(b"\0 \n").decode(errors="replace")
            raise CudaSourceError(f"{source.file} with {dict(source.macros)}: {said}")
        size = _checked(nvrtc.nvrtcGetCUBINSize(program))
        cubin = _room(size)
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin[:size]


def _room(size: int) -> bytes:
    """Return bytes that NVRTC may write over: more than one, since Python shares those of length one."""
    return bytes(size + 2)


@cache
def _text_of(file: str) -> str:
    return resources.files("model.kernels").joinpath(file).read_text(encoding="utf-8")


def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(result: tuple[Any, ...]) -> Any:
    """Return what a call gave beside its status. Raises CudaSourceError for a status that is not 0."""
    status, *given = result
    if int(status):
        raise CudaSourceError(str(status))
    return given[0] if len(given) == 1 else tuple(given)
