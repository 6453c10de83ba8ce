"""Which tiling of the fused linear kernels is fastest on this GPU: `python -m bench.small_linear --json out.json`.

For every linear layer of the chosen models and 1 to 256 rows, each tiling is timed against what it replaces: a product
by cuBLAS (see `bench.products`) and the separate kernel behind it, a norm with its residual addition or a SiLU. (A
layer behind a norm applies its scale, which the layer before has left to it; so the separate product is timed with a
norm's kernel before it. Among several ranks norms are part of the sum over these, and are not timed.) As in
`bench.kernels`, launches over rotated weights that exceed the L2 cache are captured in a CUDA graph, and the median of
its replays is divided by the launches. The best are timed again without dependent launch (PDL), and whole decoder
layers in a row, where launches of different kinds follow each other. What comes out are entries of the tables in
model/kernels/tilings.py, each behind the name of its table. Kernels are compiled first, in as many processes as there
are cores; a model takes a minute on sixteen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.provenance import json_file, provenance
from model.kernels import cluster_linear
from model.kernels.cuda_source import SLICE
from model.kernels.linear import linear_add_norm, norm_linear
from model.kernels.norm import Normed, Scale
from model.kernels.rows import empty_rows
from model.kernels.runtime import triton
from model.kernels.small_linear import Tiling, small_linear_add_norm_triton, small_linear_triton
from model.kernels.tilings import (
    CLUSTERS_ONLY,
    ROW_CLASSES,
    Work,
    cluster_tiling,
    default_tiling,
    most_clustered_rows,
    tiling_for,
)
from model.published import share, split_share, write_config

LAYERS = ("qkv", "o", "gate_up", "down", "lm_head")
MODELS = ("0.6B", "8B", "32B/2")  # size, and the ranks of a tensor-parallel group that share it
ROTATED_BYTES = 160 << 20
LAUNCHES, REPLAYS = 24, 7
EPS = 1e-6
DTYPE = torch.bfloat16
MAX_ERROR = 2e-2
_IN_PIECES = (40, 48, 80, 96, 192)  # widths to be tried where they leave a program for nearly every multiprocessor

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer of one model, and what stands around it."""

    model: str
    name: str
    n: int
    k: int
    behind: tuple[int, int] | None = None  # the weight [n, k] of the layer before the norm in front of this one
    adds: bool = False  # to the residual stream, which it norms
    gated: bool = False

    def work(self, rows: int) -> Work:
        return Work(rows, self.n, self.k, self.gated)

    def without_clusters(self, rows: int) -> Tiling | None:
        """How it is launched where there are no clusters."""
        return tiling_for(rows, self.n, self.k, gated=self.gated, adds=self.adds)

    def parts(self, rows: int) -> int:
        """How many sums of squares a row has in front of this layer; any number, if the layer before leaves none."""
        before = tiling_for(rows, *self.behind, gated=False, adds=True, clusters=True) if self.behind else None
        return before.parts(self.k) if before else triton.cdiv(self.k, 64)

    @property
    def scaled(self) -> bool:
        """Whether it applies the scale of a norm."""
        return self.behind is not None

    @property
    def num_bytes(self) -> int:
        return 2 * self.n * self.k


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to launch a layer."""

    tiling: Tiling
    pdl: bool = True

    def __str__(self) -> str:
        tiling = self.tiling
        text = f"{tiling.form}{tiling.rows} {tiling.block_n}x{tiling.block_k} w{tiling.warps}"
        text += f" s{tiling.stages}" + (f" /{tiling.splits}" if tiling.splits > 1 else "")
        text += f" by {tiling.block_rows}" if tiling.block_rows else ""
        return text + ("" if self.pdl else " no PDL")


def layers_of(model: str, folder: Path) -> list[Layer]:
    size, tp = split_share(model)
    config = json.loads((write_config(size, folder / size) / "config.json").read_text(encoding="utf-8"))
    hidden, inter = config["hidden_size"], config["intermediate_size"] // tp
    q_dim = config["num_attention_heads"] * config["head_dim"] // tp
    kv_dim = config["num_key_value_heads"] * config["head_dim"] // tp
    alone = tp == 1  # else norms are part of the sum over ranks
    o, down = (hidden, q_dim), (hidden, inter)
    return [
        Layer(model, "qkv", q_dim + 2 * kv_dim, hidden, behind=down if alone else None),
        Layer(model, "o", *o, adds=alone),
        Layer(model, "gate_up", 2 * inter, hidden, behind=o if alone else None, gated=True),
        Layer(model, "down", *down, adds=alone),
        Layer(model, "lm_head", config["vocab_size"] // tp, hidden),
    ]


def variants_for(layer: Layer, rows: int) -> list[Variant]:
    """Return what is worth trying, each once: the default, and what fills the GPU with tiles the layer has room for."""
    return list(dict.fromkeys(_variants(layer, rows)))


def _variants(layer: Layer, rows: int) -> Iterator[Variant]:
    for tiling in (default_tiling(layer.work(rows)), layer.without_clusters(rows)):
        if tiling is not None:
            yield Variant(tiling)
    if not layer.gated and rows <= most_clustered_rows(adds=layer.adds):
        for tiling in _cluster_tilings(layer, rows):
            yield Variant(tiling)
    if rows <= 2:
        for warps, blocks in ((1, (2, 4)), (2, (4, 8)), (4, (2, 4, 8, 16)), (8, (2, 4, 8)), (16, (2, 4))):
            for block_n in blocks:
                fills = layer.n // block_n >= 120 and 256 * warps < 2 * layer.k
                if fills and block_n <= 16 // rows and layer.k <= {1: 1024, 2: 3072}.get(warps, layer.k):
                    for stages in _fma_stages(layer.k, rows, block_n, 256 * warps):
                        yield Variant(Tiling("fma", rows, block_n, 256 * warps, warps, stages=stages))
    for tiling in _ring_tilings(layer, rows):
        yield Variant(tiling)


def _cluster_tilings(layer: Layer, rows: int) -> Iterator[Tiling]:
    """Return those with as many tiles under way as one or two programs to each multiprocessor have room for."""
    block_rows = max(8, rows)
    for size, slices in product((2, 4), (1, 2, 3, 4)):
        block_k = slices * SLICE
        steps = layer.k // (size * block_k)
        cut = layer.n % cluster_linear.FEATURES == 0 == layer.k % (size * block_k)
        if not cut or steps < 2 or layer.n // cluster_linear.FEATURES * size > 264:
            continue
        rooms = (cluster_linear.most_stages(block_rows, slices, programs) for programs in (1, 2))
        for stages in sorted({min(steps, room) for room in rooms if room >= 2}):
            yield Tiling("cluster", rows, cluster_linear.FEATURES, block_k, 4, size, stages, block_rows)


def _ring_tilings(layer: Layer, rows: int) -> Iterator[Tiling]:
    """Return those that fill the GPU, with as many tiles under way as one, two or three programs to each of its
    multiprocessors have room for."""
    if rows <= 32:
        yield from _tilings_of(layer, rows, (max(8, rows),), (64, 128), (1, 2, 4))
    if rows >= 32:
        blocks_of_n = (16, 32, 64, 128, 256, *_IN_PIECES)
        yield from _tilings_of(layer, rows, (64, 128) if rows > 64 else (64,), blocks_of_n, (1, 2))


def _tilings_of(
    layer: Layer, rows: int, blocks_of_rows: Sequence[int], blocks_of_n: Sequence[int], splittings: Sequence[int]
) -> Iterator[Tiling]:
    for block_rows, block_n, block_k, splits in product(blocks_of_rows, blocks_of_n, (64, 128, 256), splittings):
        programs = -(-layer.n // block_n) * -(-rows // block_rows) * splits
        steps = -(-layer.k // (splits * block_k))
        if programs < 60 or (programs > 280 and (splits > 1 or block_n < 64)) or not 2 <= steps <= 100:
            continue
        if block_n in _IN_PIECES and (not 120 <= programs <= 132 or (layer.gated and block_n == 40)):
            continue
        if block_n * block_k < 4096 or (block_n == 64 == block_k and rows > 64):  # tiles too small to be worth trying
            continue
        tile = 2 * (block_rows + block_n) * block_k
        for stages in sorted({min(room // tile, steps, 12) for room in (74_000, 110_000, 222_000)}):
            if stages >= 2 and stages * tile >= 60_000:
                for warps in (4, 8)[: 2 if block_rows == 128 <= 2 * block_n else 1]:
                    if block_rows * block_n <= 32 * warps * 128:  # sums, in the registers of a thread
                        yield Tiling("ring", rows, block_n, block_k, warps, splits, stages, block_rows)


def _fma_stages(k: int, rows: int, block_n: int, block_k: int) -> Iterable[int]:
    """How many tiles to hold: whole weight rows where registers suffice, else one tile, or two small ones."""
    whole = -(-k // block_k)
    if whole <= 4 and block_n * whole <= 16 and block_n * whole * rows <= 48:
        return (whole,)
    return (1, 2) if block_n <= 4 else (1,)


@contextmanager
def separate_launches() -> Iterator[None]:
    """Let the model do without fused layers and dependent launches, beside what the environment says."""
    before = os.environ.get("LIGHTQWEN_WITHOUT")
    os.environ["LIGHTQWEN_WITHOUT"] = ",".join([*filter(None, [before]), "pdl", "small_linear"])
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIGHTQWEN_WITHOUT"]
        else:
            os.environ["LIGHTQWEN_WITHOUT"] = before


def draw(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPE, device="cuda").normal_(std=std)


def launch(
    layer: Layer, variant: Variant, normed: Normed, residual: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor
) -> tuple[Normed, torch.Tensor]:
    """What the model does for a layer with the fused kernels: return what the next one reads, and the new residual."""
    options: dict[str, Any] = {"tiling": variant.tiling, "pdl": variant.pdl}
    if layer.adds:
        return small_linear_add_norm_triton(normed.x, weight, None, residual, gain, EPS, **options)
    out = small_linear_triton(normed.x, weight, scale=normed.scale, gated=layer.gated, **options)
    return Normed(out), residual


def launch_separately(
    layer: Layer, normed: Normed, residual: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor
) -> tuple[Normed, torch.Tensor]:
    """What the model does for a layer without them, to the residual too."""
    with separate_launches():
        if layer.adds:
            return linear_add_norm(normed.finish(), weight, None, residual, gain, EPS)
        return Normed(norm_linear(normed, weight, gated=layer.gated)), residual


class Inputs:
    """A layer's weights, in several sets, and activations."""

    def __init__(self, layer: Layer, sets: int | None = None) -> None:
        self.layer = layer
        sets = sets or max(1, -(-ROTATED_BYTES // layer.num_bytes))
        self.weights = [draw(layer.n, layer.k, std=0.02) for _ in range(sets)]
        self.x, self._residual = draw(max(ROW_CLASSES), layer.k), draw(max(ROW_CLASSES), layer.n)
        self._added = torch.zeros_like(self._residual)  # to which separate launches add
        self._gain, ones = draw(layer.n), torch.ones(layer.k, dtype=DTYPE, device="cuda")
        self._normed: dict[int, Normed] = {}
        for rows in ROW_CLASSES:
            x = self.x[:rows]
            squares = x.float().square().mean(dim=1, keepdim=True) * layer.k / layer.parts(rows)
            scale = Scale(squares.repeat(1, layer.parts(rows)), x, ones, EPS)
            self._normed[rows] = Normed(x, scale if layer.scaled else None)

    def launch(self, weight: torch.Tensor, rows: int, variant: Variant) -> torch.Tensor:
        return launch(self.layer, variant, self._normed[rows], self._residual[:rows], self._gain, weight)[0].x

    def launch_separately(self, weight: torch.Tensor, rows: int) -> torch.Tensor:
        return launch_separately(self.layer, self._normed[rows], self._added[:rows], self._gain, weight)[0].x

    def error(self, rows: int, variant: Variant) -> float:
        """Return the relative difference between a launch and the same in float32, over some of the features."""
        weight, layer = self.weights[0], self.layer
        x = self._normed[rows].finish().float()
        features = layer.n // 2 if layer.gated else layer.n
        picked = torch.arange(features, device="cuda")[:: max(1, features // 1024)]
        expected = x @ weight[picked].float().T
        if layer.gated:
            expected = F.silu(expected) * (x @ weight[features + picked].float().T)
        if layer.adds:
            expected = (self._residual[:rows, picked].float() + expected) * self._gain[picked].float()
        out = self.launch(weight, rows, variant)[:, picked].float()
        return float((out - expected).norm() / expected.norm())

    def time(self, call: Callable[[torch.Tensor], object]) -> float:
        """Return the microseconds of `call`, made for each of the weights in turn."""
        sets = len(self.weights)
        launches = -(-max(8, min(LAUNCHES, (4 << 30) // self.layer.num_bytes)) // sets) * sets
        return time_calls([partial(call, weight) for weight in self.weights], launches)

    def time_variant(self, rows: int, variant: Variant) -> float:
        """Return the microseconds of a launch; infinity, and a line of output, where it fails or is wrong."""
        try:
            error = self.error(rows, variant)
            if error < MAX_ERROR:  # which NaN is not
                return self.time(lambda weight: self.launch(weight, rows, variant))
            problem = f"wrong by {error:.3g}"
        except Exception as error:  # reported, and the others go on
            problem = f"{type(error).__name__} {error}"[:200]
        print(f"{self.layer.model} {self.layer.name} rows {rows} {variant}: {problem}", flush=True)
        return float("inf")


def time_calls(calls: Sequence[Call], launches: int) -> float:
    """Return the median microseconds of one call, in a graph of `launches` that goes round and round `calls`."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in range(launches):
            calls[launch % len(calls)]()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairwise(events)) * 1000 / launches


Wanted = tuple[Layer, int, Variant]


def compile_some(layer: Layer, wanted: list[tuple[int, Variant]]) -> None:
    """Run in a process of its own: launch each variant once. What fails here fails again, and is told, when timed."""
    inputs = Inputs(layer, sets=1)
    for rows, variant in wanted:
        try:
            inputs.launch(inputs.weights[0], rows, variant)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"compiling {layer.name} {variant}: {type(error).__name__}", flush=True)


def compile_all(wanted: Iterable[Wanted]) -> None:
    """Fill Triton's cache from several processes. Kernels know little of a layer, so most serve several."""
    kernels: dict[tuple[object, ...], Wanted] = {}
    for layer, rows, variant in wanted:
        tiling = variant.tiling
        # Whole tiles are read without a mask; those of fma are held all at once where there are no more.
        tiles = layer.k / (tiling.block_k * (tiling.stages if tiling.form in ("fma",) else tiling.splits))
        beside = (triton.next_power_of_2(layer.parts(rows)) if layer.scaled else 0, layer.adds, layer.gated)
        key = (variant, *beside, layer.n % tiling.block_n == 0, tiles.is_integer(), tiles <= 1)
        kernels.setdefault(key, (layer, rows, variant))
    chunks: dict[tuple[Layer, int], list[tuple[int, Variant]]] = {}
    for index, (layer, rows, variant) in enumerate(kernels.values()):
        chunks.setdefault((layer, index % 4), []).append((rows, variant))
    print(f"compiling {len(kernels)} kernels", flush=True)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_some, [layer for layer, _ in chunks], chunks.values()))


@dataclass(slots=True)
class Result:
    """One layer and number of rows; times in microseconds."""

    layer: Layer
    rows: int
    cublas: float
    separate: float
    times: dict[Variant, float]

    @property
    def ranked(self) -> list[Variant]:
        return sorted(self.times, key=self.times.__getitem__)

    @property
    def best(self) -> Variant:
        return self._best_of(self.times)

    def further(self) -> list[Variant]:
        """The best one without PDL."""
        return [replace(self.best, pdl=False)]

    @property
    def by_default(self) -> float:
        """What a layer takes that the table does not name, without clusters."""
        default = default_tiling(self.layer.work(self.rows))
        return self.separate if default is None else self.times[Variant(default)]

    def entries(self) -> Iterator[tuple[str, str]]:
        """The lines that the tables lack, each with the name of its table."""
        in_clusters = {variant for variant in self.times if variant.tiling.form == "cluster"}
        if self.rows in CLUSTERS_ONLY:  # where others have what more rows have
            other = self.layer.without_clusters(self.rows)
            least = self.times[Variant(other)] if other else self.separate
        else:
            best = self._best_of(self.times.keys() - in_clusters)
            wanted = best.tiling if self.times[best] < 0.98 * self.separate else None
            default = default_tiling(self.layer.work(self.rows))
            least = min(self.times[best], self.separate)
            if self.by_default >= 1.03 * least and wanted != default:
                yield "MEASURED", self._line(wanted, self.times[best] if wanted else self.separate, self.by_default)
        if not in_clusters:
            return
        best, default = self._best_of(in_clusters), cluster_tiling(self.layer.work(self.rows))
        wanted = best.tiling if self.times[best] < 0.98 * least else None
        by_default = least if default is None else self.times[Variant(default)]
        if by_default >= 1.03 * min(self.times[best], least) and wanted != default:
            yield "CLUSTERED", self._line(wanted, self.times[best] if wanted else least, by_default)

    def _best_of(self, variants: Collection[Variant]) -> Variant:
        return min((variant for variant in variants if variant.pdl), key=self.times.__getitem__)

    def _line(self, wanted: Tiling | None, us: float, by_default: float) -> str:
        layer, work = self.layer, self.layer.work(self.rows)
        key = f"Work({work.rows}, {work.n}, {work.k}{', gated=True' if work.gated else ''})"
        comment = f"{layer.model} {layer.name}: {us:.1f}, else {by_default:.1f}"
        return f"{key}: {source(wanted) if wanted else None},  # {comment}"

    def report(self) -> dict[str, object]:
        times = {str(variant): self.times[variant] for variant in self.ranked}
        return {**asdict(self.layer), "rows": self.rows, "cublas": self.cublas, "separate": self.separate, "us": times}


def source(tiling: Tiling) -> str:
    numbers = [tiling.rows, tiling.block_n, tiling.block_k, tiling.warps, tiling.splits, tiling.stages]
    numbers += [tiling.block_rows] if tiling.block_rows else []
    return f'Tiling("{tiling.form}", {", ".join(map(str, numbers))})'


def sweep(inputs: Inputs, rows: int) -> Result:
    """Time every variant of one layer and number of rows."""
    return Result(
        layer=inputs.layer,
        rows=rows,
        cublas=inputs.time(lambda weight: F.linear(inputs.x[:rows], weight)),
        separate=inputs.time(lambda weight: inputs.launch_separately(weight, rows)),
        times={variant: inputs.time_variant(rows, variant) for variant in variants_for(inputs.layer, rows)},
    )


def time_chain(layers: Sequence[Layer], best: dict[str, Variant], rows: int) -> str:
    """Time decoder layers in a row; a copy of the queries stands for attention, which is no dependent launch."""
    per_layer = sum(layer.num_bytes for layer in layers)
    count = max(4, -(-2 * ROTATED_BYTES // per_layer))
    weights = [[draw(layer.n, layer.k, std=0.02) for layer in layers] for _ in range(count)]
    hidden_size, q_dim = layers[0].k, layers[1].k
    gain, x = torch.ones(hidden_size, dtype=DTYPE, device="cuda"), draw(max(ROW_CLASSES), hidden_size)[:rows]
    stream = x.clone()  # separate launches add to it

    def run(variants: dict[str, Variant] | None) -> None:
        normed, residual = Normed(x), stream
        for of_layer in weights:
            for layer, weight in zip(layers, of_layer, strict=True):
                if layer.name == "o":
                    queries = normed.x[:, :q_dim]
                    normed = Normed(empty_rows(rows, q_dim, like=queries).copy_(queries))
                arguments = (normed, residual, gain, weight)
                if variants is None:
                    normed, residual = launch_separately(layer, *arguments)
                else:
                    normed, residual = launch(layer, variants[layer.name], *arguments)

    without = {name: replace(variant, pdl=False) for name, variant in best.items()}
    times = [time_calls([partial(run, variants)], 1) / count for variants in (None, without, best)]
    return (
        f"# {layers[0].model} rows {rows}: a layer takes {times[0]:.1f} us separate, {times[1]:.1f} fused, "
        f"{times[2]:.1f} fused with PDL ({per_layer / times[2] / 1e6:.2f} TB/s)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        nargs="+",
        type=share,
        default=list(MODELS),
        metavar="SIZE[/RANKS]",
        help="model shapes, or those of one of several ranks (default: %(default)s)",
    )
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROW_CLASSES), choices=ROW_CLASSES)
    parser.add_argument("--seconds", type=float, default=180.0, help="begin no more layers after this (%(default)s)")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write every time here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.small_linear: no CUDA device", file=sys.stderr)
        return 1
    began = time.monotonic()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        layers = [layer for model in arguments.model for layer in layers_of(model, Path(folder))]
    compile_all(
        (layer, rows, variant) for layer in layers for rows in arguments.rows for variant in variants_for(layer, rows)
    )
    results: list[Result] = []
    for layer in layers:
        if time.monotonic() - began > arguments.seconds:
            print(f"out of time before {layer.model} {layer.name}")
            break
        inputs = Inputs(layer)
        results += [sweep(inputs, rows) for rows in arguments.rows]
        print(f"{layer.model} {layer.name} done after {time.monotonic() - began:.0f} s", flush=True)
        torch.cuda.empty_cache()
    compile_all((result.layer, result.rows, variant) for result in results for variant in result.further())
    for layer in layers:
        inputs = Inputs(layer)
        for result in (result for result in results if result.layer == layer):
            result.times |= {variant: inputs.time_variant(result.rows, variant) for variant in result.further()}
        torch.cuda.empty_cache()
    # Layers of several models may have one size; where results differ, the later one stands.
    entries = {
        (table, result.layer.work(result.rows)): f"{table}: {line}"
        for result in results
        for table, line in result.entries()
    }
    if arguments.json:
        report = provenance("bench.small_linear") | {"torch": torch.__version__, "table": list(entries.values())}
        report |= {"hardware": torch.cuda.get_device_name(), "results": [result.report() for result in results]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, after {time.monotonic() - began:.0f} s")
    print("\n".join(entries.values()))
    for model in arguments.model:
        chained = [layer for layer in layers if layer.model == model and layer.name != "lm_head"]
        for rows in arguments.rows:
            best = {
                result.layer.name: result.best
                for result in results
                if (result.layer.model, result.rows) == (model, rows)
            }
            if len(best) >= len(chained):
                print(time_chain(chained, best, rows), flush=True)
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
