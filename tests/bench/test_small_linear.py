"""The lines that bench.small_linear prints are entries of the table that the model reads."""

from __future__ import annotations

import ast
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from model.kernels import cluster_linear
from model.kernels.cuda_source import SLICE
from model.kernels.runtime import triton
from model.kernels.small_linear import Tiling
from model.kernels.tilings import Work, cluster_tiling, default_tiling, summing_tiling_for, tiling_for
from model.published import SIZES
from tests.model.kernels.test_compiling import SHARED_BYTES

pytest.importorskip("triton", reason="Triton is not installed")

from bench.small_linear import ROW_CLASSES, Layer, Result, Variant, layers_of, variants_for

LAYER = Layer("0.6B", "gate_up", 6144, 1024, behind=(1024, 2048), gated=True)
WORK = Work(8, 6144, 1024, gated=True)
FAST = Variant(Tiling("ring", 8, 128, 64, 4, 2, 4, 8))
ADDING, ADDING_WORK = Layer("0.6B", "down", 1024, 3072, adds=True), Work(8, 1024, 3072)
OTHER_CLUSTER = Variant(Tiling("cluster", 8, 64, 192, 4, 4, 4, 8))
BY_DEFAULT = default_tiling(WORK)
assert BY_DEFAULT is not None


def value(node: ast.expr) -> object:
    """What Python makes of an entry's key or value."""
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    assert isinstance(node.func, ast.Name)
    made = {"Work": Work, "Tiling": Tiling}[node.func.id]
    return made(*map(ast.literal_eval, node.args), **{k.arg or "": ast.literal_eval(k.value) for k in node.keywords})


@pytest.mark.parametrize(
    ("us", "us_by_default", "expected"),
    [
        (5.0, 7.0, {WORK: FAST.tiling}),
        (5.0, 5.1, {}),
        (11.0, 13.0, {WORK: None}),
        (11.0, 10.1, {}),
        (7.1, 7.0, {}),
    ],
)
def test_entries_are_what_the_table_lacks(us: float, us_by_default: float, expected: dict[Work, Tiling | None]) -> None:
    times = {FAST: us, Variant(BY_DEFAULT): us_by_default}
    entries = dict(Result(LAYER, 8, cublas=8.0, separate=10.0, times=times).entries())
    assert entries.keys() <= {"MEASURED"}
    assert table_of(entries.get("MEASURED", "")) == expected


@pytest.mark.parametrize(
    ("us", "expected"),
    [
        ({"ring": 5.0, "default": 4.0, "other": 3.8}, {ADDING_WORK: OTHER_CLUSTER.tiling}),
        ({"ring": 5.0, "default": 4.0, "other": 3.9}, {}),
        ({"ring": 3.8, "default": 4.0, "other": 4.0}, {ADDING_WORK: None}),
        ({"ring": 3.9, "default": 4.0, "other": 4.0}, {}),
    ],
)
def test_entries_of_clusters(us: dict[str, float], expected: dict[Work, Tiling | None]) -> None:
    ring, default = default_tiling(ADDING_WORK), cluster_tiling(ADDING_WORK)
    assert ring is not None
    assert default is not None
    times = {Variant(ring): us["ring"], Variant(default): us["default"], OTHER_CLUSTER: us["other"]}
    entries = dict(Result(ADDING, 8, cublas=8.0, separate=10.0, times=times).entries())
    assert entries.keys() <= {"CLUSTERED"}
    assert table_of(entries.get("CLUSTERED", "")) == expected


@pytest.mark.parametrize(("us", "added"), [(3.8, True), (4.0, False)])
def test_entries_of_rows_for_clusters_only(us: float, added: bool) -> None:
    """Without clusters they have what 128 rows have, and nothing else, be it as fast as it may."""
    work, other = Work(80, 1024, 3072), tiling_for(128, 1024, 3072, gated=False)
    default = cluster_tiling(work)
    assert default is not None
    assert other is not None
    cluster = Variant(replace(OTHER_CLUSTER.tiling, rows=80, block_rows=80))
    ring = Variant(replace(FAST.tiling, rows=80))
    times = {Variant(other): 4.0, cluster: us, Variant(default): 4.5, ring: 1.0}
    entries = dict(Result(ADDING, 80, cublas=8.0, separate=10.0, times=times).entries())
    assert table_of(entries["CLUSTERED"]) == {work: cluster.tiling if added else None}
    assert entries.keys() == {"CLUSTERED"}


def table_of(line: str) -> dict[object, object]:
    """What Python makes of a table with a line, or none."""
    [statement] = ast.parse("{" + line + "\n}").body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Dict)
    keys = [value(key) for key in statement.value.keys if key is not None]
    return dict(zip(keys, map(value, statement.value.values), strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_every_tiling_fits(tmp_path: Path, size: str, ranks: int) -> None:
    """In shared memory, whether the model uses it or the sweep tries it; and squares in the registers of a thread."""
    layers = layers_of(f"{size}/{ranks}", tmp_path)
    for layer, rows in product(layers, ROW_CLASSES):
        used = tiling_for(rows, layer.n, layer.k, gated=layer.gated, adds=layer.adds, clusters=not layer.gated)
        pushed = tiling_for(rows, layer.n, layer.k, gated=False, push=True, clusters=True) if not layer.gated else None
        for tiling in [used, pushed, *(variant.tiling for variant in variants_for(layer, rows))]:
            if tiling is not None and tiling.form == "ring":
                tile_bytes = 2 * (tiling.block_rows + tiling.block_n) * tiling.block_k
                assert tiling.stages * (tile_bytes + 16) <= SHARED_BYTES, tiling
            if tiling is not None and tiling.form == "cluster":
                slices = tiling.block_k // SLICE
                assert 2 <= tiling.stages <= cluster_linear.most_stages(tiling.block_rows, slices), tiling
        if used is not None and used.form == "ring" and (parts := parts_before(layer, rows, layers)):
            squares = used.block_rows * triton.next_power_of_2(parts)
            assert squares // (32 * used.warps) <= 64, (layer, used)


def parts_before(layer: Layer, rows: int, layers: list[Layer]) -> int:
    """How many sums of squares a row has in front of a layer, at most; 0 where it has been normed."""
    if layer.scaled:
        return layer.parts(rows)
    names = {"qkv": "down", "gate_up": "o"}
    before = next((other for other in layers if other.name == names.get(layer.name)), None)
    summing = None if before is None else summing_tiling_for(rows, before.n, before.k)
    return 0 if summing is None or before is None else summing.parts(before.n)


@pytest.mark.parametrize("rows", ROW_CLASSES)
@pytest.mark.parametrize("model", ["0.6B", "32B/2"])
def test_every_layer_has_variants_that_take_its_rows(tmp_path: Path, model: str, rows: int) -> None:
    for layer in layers_of(model, tmp_path):
        tilings = [variant.tiling for variant in variants_for(layer, rows)]
        assert len(tilings) > 2
        assert "ring" in {tiling.form for tiling in tilings}
        assert all(rows <= tiling.rows for tiling in tilings)
