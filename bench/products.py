"""Which of cuBLASLt's algorithms is fastest for the layers of a model on this GPU: `python -m bench.products --write`.

For every layer of the chosen models and every class of rows that our own kernel does not take (linear.py in
model/kernels), what PyTorch does is timed, and algorithms that the layer has for any number of rows, or that cuBLASLt
proposes for this product and others like it. The fastest are changed in one number after another as long as that
helps. As in `bench.kernels`, launches go round weights that exceed the L2 cache; those that decide are captured in CUDA
graphs, whose replays take turns. Of 512 rows and more, which keep a GPU busy for so long that power limits its clock,
each runs by itself until the clock has settled. (Gate and up too: a kernel with SiLU in it takes most of their classes,
where CUDA C++ can be compiled.) --write puts what is more than 1.5 % faster than PyTorch's choice (faster at all, where
there is an entry) into model/kernels/algorithms.json, which the model reads; what was not measured stays as it is. A
model takes some five minutes; fewer --rows or --layers make it less.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from ctypes import byref, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.provenance import json_file, provenance
from bench.small_linear import LAYERS, MODELS, ROTATED_BYTES, Layer, draw, layers_of
from model.kernels import cublaslt
from model.kernels.cublaslt import ROW_CLASSES, Algorithm, AlgorithmStruct, Library, Product, ResultStruct
from model.kernels.runtime import is_hopper
from model.kernels.tilings import tiling_for
from model.published import share

TABLE = Path(cublaslt.__file__).with_name("algorithms.json")
LEAST_GAIN = 1.015
MAX_ERROR = 1e-2
_PROPOSALS = 256  # so many are asked for; cuBLASLt has some eight
_OPTIONS = 8
_FINALISTS, _ROUNDS = 8, 7
_SUSTAINED_ROWS, _SUSTAINED_S = 512, 0.12
_HEAD_ROWS = 256  # the head sees the rows that draw a token
_LIKE = (64, 128, 192, 256, 320, 512, 1024, 2048, 4096)  # rows of products whose algorithms are tried, too

Call = Callable[[torch.Tensor], object]


@dataclass(frozen=True, slots=True)
class Result:
    """One product; times in microseconds."""

    layer: Layer
    rows: int
    pytorch: float
    us: dict[Algorithm, float]
    tried: int

    @property
    def best(self) -> Algorithm:
        return min(self.us, key=self.us.__getitem__)

    @property
    def gain(self) -> float:
        return self.pytorch / self.us[self.best]

    def __str__(self) -> str:
        layer = self.layer
        text = f"{layer.model} {layer.name} {layer.n}x{layer.k}, {self.rows} rows: PyTorch {self.pytorch:.1f} us, "
        if not self.us:
            return f"{text}nothing else of {self.tried}"
        us = self.us[self.best]
        tflops = 2 * self.rows * layer.n * layer.k / us / 1e6
        return text + (
            f"best {us:.1f} ({self.gain - 1:+.1%}; {tflops:.0f} TFLOP/s, {layer.num_bytes / us / 1e6:.2f} TB/s), "
            f"{', '.join(map(str, self.best))} of {self.tried}"
        )

    def report(self) -> dict[str, object]:
        layer = {"model": self.layer.model, "layer": self.layer.name, "n": self.layer.n, "k": self.layer.k}
        us = [{"algorithm": list(algorithm), "us": us} for algorithm, us in self.us.items()]
        return {**layer, "rows": self.rows, "pytorch_us": self.pytorch, "tried": self.tried, "best": us}


class Proposals:
    """What algorithms cuBLASLt proposes."""

    def __init__(self, library: Library) -> None:
        self._library = library
        functions = library.functions
        functions.cublasLtMatmulPreferenceCreate.argtypes = [c_void_p]
        functions.cublasLtMatmulAlgoGetHeuristic.argtypes = [*[c_void_p] * 7, c_int, c_void_p, c_void_p]
        functions.cublasLtMatmulAlgoConfigGetAttribute.argtypes = [c_void_p, c_int, c_void_p, c_size_t, c_void_p]
        self._preference = library.made("cublasLtMatmulPreferenceCreate")

    def of(self, rows: int, n: int, k: int) -> list[Algorithm]:
        """Return those of the family, for x [rows, k] and a weight [n, k]."""
        product = Product(self._library, n, k, AlgorithmStruct())
        product.resize(rows)
        results, count = (ResultStruct * _PROPOSALS)(), c_int()
        status = self._library.functions.cublasLtMatmulAlgoGetHeuristic(
            *(self._library.handle, *product.description, self._preference),
            *(len(results), results, byref(count)),
        )
        found = [] if status else [self._numbers(r.algorithm) for r in results[: count.value] if r.status == 0]
        return [algorithm for algorithm in found if algorithm is not None]

    def _numbers(self, struct: AlgorithmStruct) -> Algorithm | None:
        """Return an algorithm's numbers; None if it is of another family, or splits the reduction."""
        values = {}
        for name, (attribute, kind) in cublaslt.ATTRIBUTES.items():
            value, written = kind(), c_size_t()
            arguments = (byref(struct), attribute, byref(value), ctypes.sizeof(value), byref(written))
            self._library.call("cublasLtMatmulAlgoConfigGetAttribute", *arguments)
            values[name] = value.value
        others = {name: values.pop(name) for name in cublaslt.CONSTANTS}
        return Algorithm(**values) if others == cublaslt.CONSTANTS else None


class Search:
    """One layer and number of rows."""

    def __init__(self, library: Library, layer: Layer, rows: int) -> None:
        self._library, self._layer, self._rows = library, layer, rows
        sets = max(2, -(-ROTATED_BYTES // layer.num_bytes))
        self._weights = [draw(layer.n, layer.k, std=0.02) for _ in range(sets)]
        self._x = draw(rows, layer.k)
        self._out = torch.zeros((rows, layer.n), dtype=self._x.dtype, device="cuda")
        picked = torch.arange(layer.n, device="cuda")[:: max(1, layer.n // 512)]
        self._picked, self._expected = picked, self._x.float() @ self._weights[0][picked].float().T
        self._times: dict[Algorithm, float] = {}
        self._calls: dict[Algorithm, Call] = {}

    def run(self, proposed: Sequence[Algorithm], like: Sequence[Algorithm], seconds: float) -> Result:
        """Try what is known for this layer and `proposed` for this product, what is for others `like` it, and what is
        like the best of these."""
        end = time.monotonic() + seconds
        of_layer = known_for(self._layer)
        known = [of_layer[self._rows]] if self._rows in of_layer else []
        every = [*dict.fromkeys([*known, *proposed, *of_layer.values(), *like])]
        tiles, clusters = (sorted({algorithm[index] for algorithm in every}) for index in range(2))
        values = tiles, clusters, range(_OPTIONS), range(2)
        for algorithm in every:
            if time.monotonic() < end - 0.4 * seconds:
                self._try(algorithm)
        tried = 0
        while tried < len(self._times) and time.monotonic() < end:
            tried = len(self._times)
            for algorithm in self._fastest(5):
                for name, numbers in zip(Algorithm._fields, values, strict=True):
                    for number in numbers:
                        if time.monotonic() < end:
                            self._try(algorithm._replace(**{name: number}))
        finalists = [*self._fastest(_FINALISTS), *known]
        if self._rows >= _SUSTAINED_ROWS:  # where a fast one that takes much power may become a slow one
            finalists += proposed
        timed = [algorithm for algorithm in dict.fromkeys(finalists) if algorithm in self._times]
        finalists = [algorithm for algorithm in timed if self._is_right(algorithm)]
        pytorch, *us = self._time([self._by_pytorch, *(self._calls[algorithm] for algorithm in finalists)])
        return Result(self._layer, self._rows, pytorch, dict(zip(finalists, us, strict=True)), len(self._times))

    def _fastest(self, count: int) -> list[Algorithm]:
        return sorted(self._times, key=self._times.__getitem__)[:count]

    def _try(self, algorithm: Algorithm) -> None:
        """Time it roughly, if it is for this product and has not been tried."""
        struct = None if algorithm in self._times else self._library.algorithm(algorithm)
        product = Product(self._library, self._layer.n, self._layer.k, struct) if struct else None
        if product is not None and product.prepare(self._rows):
            self._calls[algorithm] = lambda weight: product.run(self._x, weight, self._out, add=self._layer.adds)
            self._times[algorithm] = self._time_roughly(self._calls[algorithm])

    def _is_right(self, algorithm: Algorithm) -> bool:
        self._out.zero_()
        self._calls[algorithm](self._weights[0])
        out = self._out[:, self._picked].float()
        error = float((out - self._expected).norm() / self._expected.norm())
        if not error < MAX_ERROR:
            print(f"{self._layer.model} {self._layer.name}, {self._rows} rows: {algorithm} is wrong by {error:.3g}")
        return error < MAX_ERROR

    def _by_pytorch(self, weight: torch.Tensor) -> None:
        if self._layer.adds:
            self._out.addmm_(self._x, weight.t())
        else:
            torch.mm(self._x, weight.t(), out=self._out)

    @property
    def _expected_us(self) -> float:
        return 2 * self._rows * self._layer.n * self._layer.k / 6e8 + 20

    def _time_roughly(self, call: Call) -> float:
        launches = max(2, min(12, int(2000 / self._expected_us)))
        call(self._weights[-1])  # loads the kernel
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(launches * 25_000)  # until all are launched
        begin.record()
        for launch in range(launches):
            call(self._weights[launch % len(self._weights)])
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000 / launches

    def _time(self, calls: Sequence[Call]) -> list[float]:
        """Return the median microseconds of each, whose graphs take turns."""
        self._out.zero_()
        graphs, launches = [], len(self._weights) * max(1, int(4000 / self._expected_us / len(self._weights)))
        for call in calls:
            call(self._weights[0])
            torch.cuda.synchronize()
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                for launch in range(launches):
                    call(self._weights[launch % len(self._weights)])
        once = partial(self._replay, launches)
        if self._rows >= _SUSTAINED_ROWS:  # the first one twice, which warms the GPU up
            return [_sustained(partial(once, graph)) for graph in (graphs[0], *graphs)][1:]
        times = [[once(graph) for graph in graphs] for _ in range(_ROUNDS)]
        return [statistics.median(of_graph) for of_graph in zip(*times[1:], strict=True)]

    @staticmethod
    def _replay(launches: int, graph: torch.cuda.CUDAGraph) -> float:
        """Return the microseconds of one of a graph's launches."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000 / launches


def _sustained(once: Callable[[], float]) -> float:
    """Return the median of what `once` returns, again and again, when it has done so for a while."""
    times: list[float] = []
    for measured in (False, True):
        end = time.monotonic() + _SUSTAINED_S
        while time.monotonic() < end:
            microseconds = once()
            if measured:
                times.append(microseconds)
    return statistics.median(times)


def known_for(layer: Layer) -> dict[int, Algorithm]:
    """Return a layer's algorithms in the table, by class of rows."""
    table = cublaslt.measured().items()
    return {rows: algorithm for (n, k, rows), algorithm in table if (n, k) == (layer.n, layer.k)}


def rows_of(layer: Layer, wanted: Sequence[int]) -> list[int]:
    """Return the classes of rows in which a library computes a layer."""
    most = _HEAD_ROWS if layer.name == "lm_head" else max(ROW_CLASSES)
    return [rows for rows in wanted if rows <= most and tiling_for(rows, layer.n, layer.k, gated=layer.gated) is None]


def updated(table: dict[str, Any], results: Iterable[Result], *, version: str, gpu: str) -> dict[str, Any]:
    """Return the table with what was measured; of what was measured with another version nothing is left.

    Who has an entry keeps one for any gain: layers of several models share shapes, and differ in what PyTorch takes.
    """
    known = table if cublaslt.same_numbers(table["cublaslt"], version) else {"gpus": [], "products": {}}
    products: dict[str, dict[str, Sequence[int]]] = known["products"]
    for result in results:
        entries = products.setdefault(f"{result.layer.n}x{result.layer.k}", {})
        least = 1.0 if entries.pop(str(result.rows), None) else LEAST_GAIN
        if result.us and result.gain > least:
            entries[str(result.rows)] = list(result.best)
    in_order = {
        shape: {rows: entries[rows] for rows in sorted(entries, key=int)}
        for shape, entries in sorted(products.items(), key=lambda item: [*map(int, item[0].split("x"))])
        if entries
    }
    return {"cublaslt": version, "gpus": sorted({*known["gpus"], gpu}), "products": in_order}


def text_of(table: dict[str, Any]) -> str:
    """As JSON, with a line for each shape."""
    lines = ",\n".join(f'  "{shape}": {json.dumps(entries)}' for shape, entries in table["products"].items())
    head = "".join(f' "{name}": {json.dumps(table[name])},\n' for name in ("cublaslt", "gpus"))
    return f'{{\n{head} "products": {{\n{lines}\n }}\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        nargs="+",
        type=share,
        default=[*MODELS, "8B/2"],
        metavar="SIZE[/RANKS]",
        help="model shapes, or those of one of several ranks (default: %(default)s)",
    )
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROW_CLASSES), choices=ROW_CLASSES)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=LAYERS, help="which of them (all)")
    parser.add_argument("--seconds", type=float, default=0.8, help="search for so long at a time (%(default)s)")
    parser.add_argument("--write", action="store_true", help="put the best into model/kernels/algorithms.json")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write every time here")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    library = cublaslt.library_of(device) if torch.cuda.is_available() and is_hopper(device) else None
    if library is None:
        print("bench.products: no Hopper (compute capability 9), or PyTorch has no cuBLASLt", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    proposals, results, began = Proposals(library), [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        models = {model: layers_of(model, Path(folder)) for model in arguments.model}
    for model, layers in models.items():
        like = [
            algorithm
            for layer in layers
            for rows in _LIKE
            for n in (layer.n // 2, layer.n, layer.n * 2)
            for algorithm in proposals.of(rows, n, layer.k)
        ]
        for layer in (layer for layer in layers if layer.name in arguments.layers):
            for rows in rows_of(layer, arguments.rows):
                proposed = proposals.of(rows, layer.n, layer.k)
                results.append(Search(library, layer, rows).run(proposed, like, arguments.seconds))
                print(results[-1], flush=True)
                torch.cuda.empty_cache()
        print(f"# {model} done after {time.monotonic() - began:.0f} s", flush=True)
        # After each model, so that a run that is ended leaves what it has measured.
        if arguments.write:
            table = json.loads(TABLE.read_text(encoding="utf-8"))
            table = updated(table, results, version=library.version, gpu=torch.cuda.get_device_name())
            TABLE.write_text(text_of(table), encoding="utf-8")
        if arguments.json:
            report = provenance("bench.products") | {"torch": torch.__version__, "cublaslt": library.version}
            report |= {"hardware": torch.cuda.get_device_name(), "results": [result.report() for result in results]}
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"# {torch.cuda.get_device_name()}, cuBLASLt {library.version}, after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
