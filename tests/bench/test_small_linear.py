"""The lines that bench.small_linear prints are entries of the table that the model reads."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from model.kernels.small_linear import Tiling
from model.kernels.tilings import Work, default_tiling

pytest.importorskip("triton", reason="Triton is not installed")

from bench.small_linear import ROW_CLASSES, Layer, Result, Variant, layers_of, variants_for

LAYER = Layer("0.6B", "gate_up", 6144, 1024, norm=True, gated=True)
INSIDE, BEHIND = (Variant(Tiling("dot", 8, 32, 256, 4, 2, 4, 512), norm) for norm in (True, False))
FUSED, AFTER_NORM = Work(8, 6144, 1024, norm=True, gated=True), Work(8, 6144, 1024, gated=True)

BY_DEFAULT = default_tiling(AFTER_NORM)
assert BY_DEFAULT is not None
DEFAULT = Variant(BY_DEFAULT, norm=False)  # with the norm inside there is none


def value(node: ast.expr) -> object:
    """What Python makes of an entry's key or value."""
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    assert isinstance(node.func, ast.Name)
    made = {"Work": Work, "Tiling": Tiling}[node.func.id]
    return made(*map(ast.literal_eval, node.args), **{k.arg or "": ast.literal_eval(k.value) for k in node.keywords})


@pytest.mark.parametrize(
    ("us_inside", "us_behind", "us_by_default", "expected"),
    [
        (5.0, 6.0, 7.0, {FUSED: INSIDE.tiling}),
        (6.0, 5.0, 7.0, {AFTER_NORM: BEHIND.tiling}),
        (6.0, 5.0, 5.1, {}),
        (11.0, 12.0, 13.0, {AFTER_NORM: None}),
        (11.0, 12.0, 10.1, {}),
    ],
)
def test_entries_are_what_the_table_lacks(
    us_inside: float, us_behind: float, us_by_default: float, expected: dict[Work, Tiling | None]
) -> None:
    times = {INSIDE: us_inside, BEHIND: us_behind, DEFAULT: us_by_default}
    result = Result(LAYER, 8, cublas=8.0, separate=10.0, times=times)
    [statement] = ast.parse("{" + "\n".join(result.entries().values()) + "\n}").body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Dict)
    keys = [value(key) for key in statement.value.keys if key is not None]
    assert keys == list(result.entries())
    assert dict(zip(keys, map(value, statement.value.values), strict=True)) == expected


@pytest.mark.parametrize("rows", ROW_CLASSES)
@pytest.mark.parametrize("model", ["0.6B", "32B/2"])
def test_every_layer_has_variants_that_take_its_rows(tmp_path: Path, model: str, rows: int) -> None:
    for layer in layers_of(model, tmp_path):
        variants = variants_for(layer, rows)
        assert len(variants) == len(set(variants)) > 1
        assert all(variant.tiling.rows >= rows and (layer.norm or not variant.norm) for variant in variants)
