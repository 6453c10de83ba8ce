"""Products by cuBLASLt's algorithms that the table names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.kernels import cublaslt
from model.kernels.cublaslt import ROW_CLASSES, Algorithm, measured, product_for, row_class
from model.kernels.runtime import is_hopper
from tests.model.kernels.comparing import TOLERANCE, relative_error


def test_rows_count_as_the_next_class() -> None:
    assert row_class(16) is None
    for rows in range(17, 9000):
        counted = row_class(rows)
        assert counted in ROW_CLASSES
        assert counted >= min(rows, ROW_CLASSES[-1])
        assert not any(rows <= other < counted for other in ROW_CLASSES)


def test_the_table_is_of_classes_that_are_looked_up() -> None:
    assert measured()
    for (n, k, rows), algorithm in measured().items():
        assert n % 8 == k % 8 == 0
        assert rows in ROW_CLASSES
        assert all(number >= 0 for number in algorithm)


def test_nothing_on_a_cpu() -> None:
    n, k, rows = next(iter(measured()))
    assert product_for(torch.zeros((rows, k), dtype=torch.bfloat16), torch.zeros((n, k), dtype=torch.bfloat16)) is None


class _Library:
    """What a product asks of cuBLASLt, on a CPU; `least` is the workspace, in bytes, without which it does nothing."""

    handle, device = None, torch.device("cpu")

    def __init__(self, least: int) -> None:
        self.functions, self.least, self.given = self, least, list[int]()
        self.workspace = torch.empty(4096, dtype=torch.uint8)

    def made(self, *_: object) -> None: ...

    def layout(self, *_: object) -> None: ...

    def call(self, function: str, *arguments: object) -> None:
        if function == "cublasLtMatmul" and self.cublasLtMatmul(*arguments):
            raise cublaslt.CublasError("cublasLtMatmul failed")

    def cublasLtMatmulAlgoCheck(self, *_: object) -> int:
        return 0

    def cublasLtMatmul(self, *arguments: Any) -> int:
        *_, workspace, size, _stream = arguments
        assert (workspace is None) == (size == 0)
        self.given.append(size)
        return 7 * (size < self.least)


@pytest.mark.parametrize(
    ("rows", "least", "given"),
    [
        (256, 0, [0, 0]),
        (257, 0, [4096, 4096]),
        (256, 4, [0, 4096, 4096]),  # it remembers
    ],
)
def test_few_rows_go_without_a_counter_where_they_can(
    monkeypatch: pytest.MonkeyPatch, rows: int, least: int, given: list[int]
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    library = _Library(least)
    product = cublaslt.Product(library, 8, 16, cublaslt.AlgorithmStruct())  # type: ignore[arg-type]
    assert product.prepare(rows)
    x, weight, out = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((rows, 16), (8, 16), (rows, 8)))
    for _ in range(2):
        product.run(x, weight, out)
    assert library.given == given


def test_a_product_that_fails_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    product = cublaslt.Product(_Library(10**6), 8, 16, cublaslt.AlgorithmStruct())  # type: ignore[arg-type]
    assert product.prepare(1)
    x, weight, out = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((1, 16), (8, 16), (1, 8)))
    with pytest.raises(cublaslt.CublasError, match="LIGHTQWEN_WITHOUT=cublaslt"):
        product.run(x, weight, out)


def pair(rows: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn((rows, k), device="cuda").to(dtype)
    return x, (torch.randn((n, k), device="cuda") / k**0.5).to(dtype)


@pytest.fixture
def in_use() -> None:
    device = torch.device("cuda", 0)
    library = cublaslt.library_of(device) if is_hopper(device) else None
    if library is None or not cublaslt.is_measured(library.version):
        pytest.skip("another GPU or another cuBLASLt than was measured")


@pytest.mark.gpu
@pytest.mark.usefixtures("in_use")
def test_products_are_right() -> None:
    """Of every entry that there is, for as many rows as were measured, and for others."""
    used = 0
    for n, k in sorted({(n, k) for n, k, _ in measured()}):
        _, weight = pair(1, n, k)
        wide = weight.double()
        classes = [rows for n_, k_, rows in measured() if (n_, k_) == (n, k)]
        for rows in sorted({most - fewer for most in classes for fewer in (0, 1, 13)}):
            x, _ = pair(rows, 8, k)
            product = product_for(x, weight)
            if row_class(rows) in classes:
                assert product is not None, f"{n}x{k}, {rows} rows"
            if product is None:
                continue
            used += 1
            picked = torch.unique(
                torch.tensor([0, 1, rows // 3, rows // 2, rows - 2, rows - 1], device="cuda").clamp(0)
            )
            expected = x[picked].double() @ wide.T
            out = torch.full((rows, n), torch.nan, dtype=torch.bfloat16, device="cuda")
            product.run(x, weight, out)
            assert out.isfinite().all(), f"{n}x{k}, {rows} rows"
            assert relative_error(out[picked], expected) < TOLERANCE[torch.bfloat16], f"{n}x{k}, {rows} rows"
            before = torch.randn_like(out)
            product.run(x, weight, out.copy_(before), add=True)
            assert relative_error(out[picked], before[picked].double() + expected) < TOLERANCE[torch.bfloat16]
    assert used


@pytest.mark.gpu
@pytest.mark.usefixtures("in_use")
def test_a_product_in_a_graph() -> None:
    """Gives the same bits, also when the product is for other rows since."""
    n, k, rows = next(iter(measured()))
    x, weight = pair(rows, n, k)
    product = product_for(x, weight)
    assert product is not None
    expected, out = (torch.empty((rows, n), dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product.run(x, weight, expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product.run(x, weight, out.zero_())
    product.prepare(rows - 1)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("in_use")
def test_what_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, rows = next(iter(measured()))
    x, weight = pair(rows, n, k)
    assert product_for(x, weight) is not None
    assert product_for(x.half(), weight.half()) is None
    assert product_for(*pair(rows, n + 8, k)) is None
    assert product_for(x, torch.cat([weight, weight], dim=1)[:, :k]) is None
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "cublaslt")
    assert product_for(x, weight) is None


@pytest.mark.gpu
@pytest.mark.usefixtures("in_use")
@pytest.mark.parametrize(
    "changes",
    [{"is_measured": lambda version: False}, {"measured": lambda: Everything(Algorithm(10**6, 2))}],
    ids=["another version", "an unknown algorithm"],
)
def test_what_this_cublaslt_has_not(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    n, k, rows = next(iter(measured()))
    for name, value in changes.items():
        monkeypatch.setattr(cublaslt, name, value)
    cublaslt._product.cache_clear()
    try:
        assert product_for(*pair(rows, n, k)) is None
    finally:
        cublaslt._product.cache_clear()


class Everything(dict[tuple[int, int, int], Algorithm]):
    """A table that has one algorithm for all."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__()
        self._algorithm = algorithm

    def get(self, key: object, default: object = None) -> Algorithm:  # type: ignore[override]
        return self._algorithm
