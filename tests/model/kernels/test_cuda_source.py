"""Kernels in CUDA C++: compiled without a GPU, found in the cache, and gone without where there is no compiler."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.errors import ModelError
from model.kernels import cluster_linear, cuda_source
from model.kernels.cluster_linear import source_of
from model.kernels.cuda_source import CudaSourceError, Source
from model.kernels.runtime import triton

pytest.importorskip("triton", reason="what is compiled lies in its cache")


@pytest.fixture
def nvrtc() -> Any:
    return pytest.importorskip("cuda.bindings.nvrtc", reason="compiles CUDA C++")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return tmp_path


def test_what_is_compiled_is_in_the_cache(nvrtc: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(8, 2, 1)
    assert not source.in_cache()
    cubin = source.cubin()
    assert cubin.startswith(b"\x7fELF")
    assert source.in_cache()
    monkeypatch.setattr(cuda_source, "_compile", lambda source: pytest.fail("compiled again"))
    assert source.cubin() == cubin
    assert not source_of(16, 2, 1).in_cache(), "other macros make another kernel"


def test_an_error_names_file_and_line(nvrtc: Any, cache: Path) -> None:
    macros = dict(source_of(8, 2, 1).macros) | {"ROWS": "eight"}
    broken = Source("cluster_linear.cu", tuple(macros.items()))
    with pytest.raises(CudaSourceError, match=r'(?s)cluster_linear.cu with .*ROWS.*cluster_linear\.cu\(\d+\).*"eight"'):
        broken.cubin()
    assert not broken.in_cache()


@pytest.fixture
def hopper() -> Iterator[torch.device]:
    """Something that is taken for one; what is found out about it is forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_source, "is_hopper", lambda device: True)
        cuda_source.compiles.cache_clear()
        yield torch.device("cpu")
    cuda_source.compiles.cache_clear()


def test_what_does_not_compile_names_the_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Source) -> bytes:
        raise CudaSourceError(f"{source.file}: no")

    monkeypatch.setattr(cuda_source, "_compile", fail)
    monkeypatch.setattr(cluster_linear, "kernel_of", lambda source, device: source.cubin())
    x, weight = (torch.zeros((rows, 256), dtype=torch.bfloat16) for rows in (1, 64))
    with pytest.raises(ModelError, match=r"cluster_linear.cu: no; set LIGHTQWEN_WITHOUT=clusters"):
        cluster_linear.cluster_linear(x, weight, x[:, :64], block_rows=8, cluster=2, slices=1, stages=2, pdl=False)


def test_without_a_compiler_there_are_none(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with caplog.at_level(logging.WARNING):
        assert not cuda_source.compiles(hopper)
        assert not cuda_source.compiles(hopper)
    assert len(caplog.messages) == 1, "once in a process"
    assert "others are used instead" in caplog.messages[0]


@pytest.mark.parametrize(("version", "loads"), [(12090, False), (13000, True), (14010, True)])
def test_the_driver_must_know_what_the_compiler_makes(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: int, loads: bool
) -> None:
    monkeypatch.setattr(cuda_source, "_nvrtc", lambda: SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0)))
    monkeypatch.setattr(cuda_source, "_driver", lambda: SimpleNamespace(cuDriverGetVersion=lambda: (0, version)))
    with caplog.at_level(logging.WARNING):
        assert cuda_source.compiles(hopper) is loads
    assert bool(caplog.messages) is not loads


def test_other_devices_have_none() -> None:
    assert not cuda_source.compiles(torch.device("cpu"))


def test_the_compiler_is_imported_where_it_is_needed() -> None:
    """A laptop has no NVIDIA libraries. (PyTorch itself imports the bindings of the driver, where they are.)"""
    code = "import sys, model.kernels.linear; sys.exit('cuda.bindings.nvrtc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_launch_that_is_only_tried_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Source] = []
    monkeypatch.setattr(cuda_source, "instead_of_launching", told.append)
    assert cuda_source.kernel_of(source_of(8, 2, 1), torch.device("cpu")) is None
    assert told == [source_of(8, 2, 1)]
