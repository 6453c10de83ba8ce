"""What bench.products writes is what the model reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.kernels import cublaslt
from model.kernels.cublaslt import ROW_CLASSES, Algorithm
from model.published import SIZES

pytest.importorskip("triton", reason="Triton is not installed")

from bench.products import TABLE, Result, known_for, rows_of, text_of, updated
from bench.small_linear import Layer, layers_of

LAYER = Layer("8B", "down", 4096, 12288, adds=True)
FASTER, SLOWER = Algorithm(18, 2, 0, 1), Algorithm(20, 5, 3, 0)


def result(rows: int, pytorch: float, us: dict[Algorithm, float], layer: Layer = LAYER) -> Result:
    return Result(layer, rows, pytorch, us, tried=9)


def test_the_fastest_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        result(256, 48.1, {SLOWER: 45.0, FASTER: 41.8}),
        result(128, 34.3, {FASTER: 34.2}),  # no gain that would count
        result(1024, 140.0, {}),  # none was right
        result(96, 19.0, {SLOWER: 15.0}, Layer("8B", "o", 4096, 4096)),
    ]
    table = updated({"cublaslt": "", "gpus": [], "products": {}}, results, version="13.1.0", gpu="NVIDIA H200")
    assert json.loads(text_of(table)) == table
    (tmp_path / "algorithms.json").write_text(text_of(table))
    monkeypatch.setattr("model.kernels.cublaslt.resources.files", lambda package: tmp_path)
    cublaslt._file.cache_clear()
    cublaslt.measured.cache_clear()
    try:
        assert cublaslt.measured() == {(4096, 4096, 96): SLOWER, (4096, 12288, 256): FASTER}
        assert known_for(LAYER) == {256: FASTER}
        assert cublaslt.is_measured("13.1.1")
        assert not cublaslt.is_measured("13.2.0")
    finally:
        cublaslt._file.cache_clear()
        cublaslt.measured.cache_clear()


def test_what_was_measured_takes_the_place_of_what_was() -> None:
    old = {
        "cublaslt": "13.1.0",
        "gpus": ["NVIDIA H100"],
        "products": {"4096x12288": {"128": [1, 2, 0, 0], "256": [3, 4, 0, 0]}},
    }
    table = updated(old, [result(128, 30.0, {FASTER: 30.0})], version="13.1.0", gpu="NVIDIA H200")
    assert table["products"] == {"4096x12288": {"256": [3, 4, 0, 0]}}
    assert table["gpus"] == ["NVIDIA H100", "NVIDIA H200"]
    assert updated(table, [], version="13.1.1", gpu="NVIDIA H200")["products"] == table["products"]
    table = updated(table, [result(256, 48.0, {FASTER: 47.9, SLOWER: 48.1})], version="13.1.0", gpu="NVIDIA H200")
    assert table["products"] == {"4096x12288": {"256": list(FASTER)}}  # hardly a gain, but there was an entry
    table = updated(old, [result(1024, 30.0, {FASTER: 20.0})], version="13.2.0", gpu="NVIDIA H200")
    assert table == {"cublaslt": "13.2.0", "gpus": ["NVIDIA H200"], "products": {"4096x12288": {"1024": list(FASTER)}}}


def test_the_table_is_as_it_would_be_written() -> None:
    text = TABLE.read_text(encoding="utf-8")
    assert text_of(json.loads(text)) == text


def test_the_table_has_what_a_library_computes(tmp_path: Path) -> None:
    """What our own kernels take would not be looked up; nor would the head's rows beyond those that draw a token."""
    models = [f"{size}/{ranks}" for size in SIZES for ranks in (1, 2, 4, 8)]
    layers = {layer for model in models for layer in layers_of(model, tmp_path)}
    looked_up = {(layer.n, layer.k, rows) for layer in layers for rows in rows_of(layer, ROW_CLASSES)}
    assert set(cublaslt.measured()) <= looked_up


def test_a_result_tells_what_was_found() -> None:
    found = str(result(256, 48.0, {FASTER: 40.0}))
    assert found.startswith("8B down 4096x12288, 256 rows: PyTorch 48.0 us, best 40.0 (+20.0%; 644 TFLOP/s, 2.52 TB/s)")
    assert str(result(256, 48.0, {})).endswith("PyTorch 48.0 us, nothing else of 9")
