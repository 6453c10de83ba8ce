"""Kernels in CUDA C++: compiled without a GPU, found in the cache, and gone without where there is no compiler."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.kernels import cuda_source
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


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(cuda_source, "is_hopper", lambda device: True)
    cuda_source.compiles.cache_clear()
    cuda_source._has_nvrtc.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not cuda_source.compiles(torch.device("cpu"))
            assert not cuda_source.compiles(torch.device("meta"))
    finally:
        cuda_source.compiles.cache_clear()
        cuda_source._has_nvrtc.cache_clear()
    assert len(caplog.messages) == 1, "once in a process"
    assert "others are used instead" in caplog.messages[0]
    assert not cuda_source.compiles(torch.device("cpu")), "which is no Hopper"


def test_the_compiler_is_imported_where_it_is_needed() -> None:
    """A laptop has no NVIDIA libraries. (PyTorch itself imports the bindings of the driver, where they are.)"""
    code = "import sys, model.kernels.linear; sys.exit('cuda.bindings.nvrtc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_launch_that_is_only_tried_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Source] = []
    monkeypatch.setattr(cuda_source, "instead_of_launching", told.append)
    assert cuda_source.kernel_of(source_of(8, 2, 1), torch.device("cpu")) is None
    assert told == [source_of(8, 2, 1)]
