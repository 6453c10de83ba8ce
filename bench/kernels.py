"""Benchmark of the kernels that a model launches, on one GPU: `python -m bench.kernels --json out.json`.

Each kernel is captured in a CUDA graph over several sets of inputs, which together exceed the L2 cache, and timed by
events around replays: the median, per launch. Bytes are the fewest that must move through device memory (each input
read once, each output written once), operations those that causal attention needs. The ceilings are this GPU's,
measured first: reading memory, and the product of two large bf16 matrices. Linear layers have around them what stands
there in a model: o and down of one rank the residual addition and the norm behind them, gate and up SiLU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from bench.provenance import json_file, provenance
from model.kernels.activation import silu_and_mul
from model.kernels.attention import (
    SPLITTING,
    Splitting,
    paged_attention_triton,
    paged_decode_triton,
    plan_attention,
)
from model.kernels.decode_attention import streams
from model.kernels.linear import linear, linear_add_norm, norm_linear
from model.kernels.norm import Normed, add_rms_norm
from model.kernels.rope_kv import Projected, qk_norm_rope_store
from model.kernels.rows import empty_rows
from model.published import share, split_share, write_config
from model.sampler import SamplingTables, sample

BATCHES = (1, 8, 64, 256)
LINEAR_ROWS = (1, 8, 64, 128, 192, 256, 512, 768, 1024, 2048, 8192, 8448)
CONTEXTS = (300, 1024, 8192)
PREFILLS = ((16, 512), (4, 4096))
ROTATED_BYTES = 256 << 20  # inputs to go through before one is used again: several times an H200's 60 MB of L2
MAX_ROTATIONS = 64
LAUNCHES, REPLAYS = 32, 20
EPS = 1e-6
DTYPE = torch.bfloat16

Call = Callable[[], object]

SHARED = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
"""What the ranks of a tensor-parallel group share out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the kernels of a rank see of a model."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    ranks: int = 1

    @classmethod
    def of(cls, share: str, folder: Path) -> Shape:
        """Of a published size, or as "32B/2" of one of the ranks that share it. `folder` is for its config."""
        size, ranks = split_share(share)
        config = json.loads((write_config(size, folder / size) / "config.json").read_text(encoding="utf-8"))
        shape = cls(**{name: config[name] for name in cls.__dataclass_fields__ if name != "ranks"})
        return replace(shape, ranks=ranks, **{name: getattr(shape, name) // ranks for name in SHARED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    kernel: str
    workload: str
    make: Callable[[], Call]  # draws inputs of its own, and returns the launch that reads them
    num_bytes: int
    flops: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    size: str
    kernel: str
    workload: str
    us: float
    tbps: float
    tflops: float

    def share_of(self, ceilings: Ceilings) -> float:
        """Share of the nearer ceiling that was reached, 0 to 1."""
        return max(self.tbps / ceilings.read_tbps, self.tflops / ceilings.bf16_tflops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    read_tbps: float
    bf16_tflops: float

    @classmethod
    def measured(cls) -> Ceilings:
        """What this GPU reaches at best, in some two seconds."""
        memory = torch.zeros(1 << 30, dtype=torch.float32, device="cuda")
        num_bytes = memory.numel() * memory.itemsize
        reading = Case(kernel="", workload="", make=lambda: memory.sum, num_bytes=num_bytes)
        width = 8192
        matrices = randn(width, width), randn(width, width)
        product = Case(kernel="", workload="", make=lambda: partial(torch.mm, *matrices), num_bytes=ROTATED_BYTES)
        return cls(read_tbps=num_bytes / time_case(reading) / 1e6, bf16_tflops=2 * width**3 / time_case(product) / 1e6)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, device="cuda")


def integers(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def elementwise_cases(shape: Shape, block_size: int) -> Iterator[Case]:
    heads, kv_heads, head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim

    def make_norm(tokens: int) -> Call:
        x, residual, weight = (
            randn(tokens, shape.hidden_size),
            randn(tokens, shape.hidden_size),
            randn(shape.hidden_size),
        )
        return lambda: add_rms_norm(x, residual, weight, EPS)

    def make_silu(tokens: int) -> Call:
        x = randn(tokens, 2 * shape.intermediate_size)
        return lambda: silu_and_mul(x)

    def make_rope(tokens: int) -> Call:
        qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim)
        q_weight, k_weight = randn(head_dim), randn(head_dim)
        cos_sin = torch.randn(8192, head_dim, device="cuda")
        blocks = -(-tokens // block_size)
        key_cache, value_cache = (randn(blocks, block_size, kv_heads, head_dim) for _ in range(2))
        positions = torch.randint(8192, (tokens,), dtype=torch.int32, device="cuda")
        slots = torch.randperm(tokens, device="cuda")
        return lambda: qk_norm_rope_store(
            qkv, q_weight, k_weight, cos_sin, positions, slots, key_cache, value_cache, heads, kv_heads, EPS
        )

    for tokens in (*BATCHES, 8192):
        yield Case(
            kernel="add_rms_norm",
            workload=f"tokens {tokens}",
            make=partial(make_norm, tokens),
            num_bytes=2 * 4 * tokens * shape.hidden_size,
        )
        yield Case(
            kernel="silu_and_mul",
            workload=f"tokens {tokens}",
            make=partial(make_silu, tokens),
            num_bytes=2 * 3 * tokens * shape.intermediate_size,
        )
        yield Case(
            kernel="qk_norm_rope_store",
            workload=f"tokens {tokens}",
            make=partial(make_rope, tokens),
            num_bytes=tokens * (2 * 2 * (heads + 2 * kv_heads) + 4) * head_dim,
        )


def linear_cases(shape: Shape) -> Iterator[Case]:
    """The layers as a model computes them; what LIGHTQWEN_WITHOUT names is gone without."""
    hidden, inter = shape.hidden_size, shape.intermediate_size
    q_dim, kv_dim = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim

    def draw_rows(rows: int, k: int) -> torch.Tensor:
        return empty_rows(rows, k, like=randn(0)).normal_()

    def behind_norm(rows: int, n: int, k: int, gated: bool = False) -> Call:
        return partial(norm_linear, Normed(draw_rows(rows, k)), randn(n, k), gated=gated)

    def before_norm(rows: int, n: int, k: int) -> Call:
        if shape.ranks > 1:  # their sum has the norm
            return partial(linear, draw_rows(rows, k), randn(n, k))
        return partial(linear_add_norm, draw_rows(rows, k), randn(n, k), None, randn(rows, n), randn(n), EPS)

    def head(rows: int, n: int, k: int) -> Call:
        return partial(linear, draw_rows(rows, k), randn(n, k))

    added = 3 if shape.ranks == 1 else 1  # read, and written with and without the norm
    layers: tuple[tuple[str, Callable[[int, int, int], Call], int, int, float], ...] = (
        ("qkv", behind_norm, q_dim + 2 * kv_dim, hidden, 1),
        ("o", before_norm, hidden, q_dim, added),
        ("gate, up, SiLU", partial(behind_norm, gated=True), 2 * inter, hidden, 0.5),
        ("down", before_norm, hidden, inter, added),
        ("head", head, shape.vocab_size, hidden, 1),
    )
    for name, make, n, k, moved in layers:
        for rows in LINEAR_ROWS:
            if name != "head" or rows <= BATCHES[-1]:  # which sees the rows that draw a token
                yield Case(
                    kernel=name,
                    workload=f"tokens {rows}",
                    make=partial(make, rows, n, k),
                    num_bytes=2 * (n * k + rows * (k + int(moved * n))),
                    flops=2 * rows * n * k,
                )


def make_attention(
    shape: Shape, rows: int, queries: int, kv_len: int, block_size: int, splitting: Splitting = SPLITTING
) -> Call:
    """Return a layer's launch over rows whose blocks lie in random order; the step's plan is made before.

    Rows of one query are launched as steps of decodes alone do it: where keys stream, with norms, RoPE and storing.
    """
    heads, kv_heads, head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    blocks_per_row = -(-kv_len // block_size)
    key_cache, value_cache = (randn(rows * blocks_per_row, block_size, kv_heads, head_dim) for _ in range(2))
    tables = torch.randperm(rows * blocks_per_row, device="cuda").int().view(rows, blocks_per_row)
    q = randn(rows * queries, heads, head_dim)
    kv_lens = integers([kv_len] * rows)
    starts = integers([row * queries for row in range(rows + 1)])
    plan = plan_attention(
        starts,
        kv_lens,
        tables,
        block_size=block_size,
        num_tokens=rows * queries,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=DTYPE,
        max_chunk_rows=0 if queries == 1 else rows,
        splitting=splitting,
    )
    if queries == 1 and streams(heads, head_dim, key_cache):
        projected = Projected(
            qkv=randn(rows, (heads + 2 * kv_heads) * head_dim),
            q_weight=randn(head_dim),
            k_weight=randn(head_dim),
            cos_sin=torch.randn(kv_len, head_dim, device="cuda"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            eps=EPS,
        )
        return lambda: paged_decode_triton(projected, key_cache, value_cache, tables, head_dim**-0.5, plan)
    return lambda: paged_attention_triton(q, key_cache, value_cache, tables, head_dim**-0.5, plan)


def decode_attention_case(
    shape: Shape, rows: int, context: int, block_size: int, splitting: Splitting = SPLITTING
) -> Case:
    heads, kv_heads, head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    return Case(
        kernel="decode attention",
        workload=f"batch {rows}, context {context}",
        make=partial(make_attention, shape, rows, 1, context, block_size, splitting),
        num_bytes=2 * 2 * rows * (context * kv_heads + heads) * head_dim,
        flops=4 * rows * context * heads * head_dim,
    )


def attention_cases(shape: Shape, block_size: int) -> Iterator[Case]:
    heads, kv_heads, head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    for context in CONTEXTS:
        for rows in BATCHES:
            yield decode_attention_case(shape, rows, context, block_size)
    for rows, length in PREFILLS:
        yield Case(
            kernel="prefill attention",
            workload=f"{rows} x {length}",
            make=partial(make_attention, shape, rows, length, length, block_size),
            num_bytes=2 * 2 * rows * length * (kv_heads + heads) * head_dim,
            flops=4 * heads * head_dim * rows * length * (length + 1) // 2,
        )


SAMPLING = {
    "greedy": {},
    "temperature": {"temperature": 0.6},
    "top_k, top_p": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "top_p": {"temperature": 0.6, "top_p": 0.95},
    "penalties": {"temperature": 0.6, "presence": 1.0},
}


PEAKED = ("top_k, top_p", "top_p")  # by which less survives of peaked logits than of flat ones


def make_sampling(shape: Shape, rows: int, parameters: dict[str, float], *, peaked: bool = False) -> Call:
    """Of normal logits, above which peaked ones have a thousand tokens, of a probability that falls with their rank."""
    tables = SamplingTables.allocate(rows, shape.vocab_size, 4, "cuda")
    for name, value in parameters.items():
        getattr(tables, name).fill_(value)
    logits = 3 * randn(rows, shape.vocab_size)
    if peaked:
        tokens = torch.rand(rows, shape.vocab_size, device="cuda").argsort(dim=1)[:, :1000]
        ranked = 20 - 1.5 * torch.arange(1, 1001, device="cuda").log()
        logits.scatter_(1, tokens, ranked.to(logits.dtype).expand(rows, -1))
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    lengths = integers([100] * rows)
    return lambda: sample(logits, slots, lengths, tables)


def sampling_cases(shape: Shape) -> Iterator[Case]:
    for name, parameters in SAMPLING.items():
        for peaked in (False, True) if name in PEAKED else (False,):
            for rows in BATCHES:
                yield Case(
                    kernel="sample",
                    workload=f"batch {rows}, {name}" + ", peaked" * peaked,
                    make=partial(make_sampling, shape, rows, parameters, peaked=peaked),
                    num_bytes=rows * shape.vocab_size * (2 if name != "penalties" else 6),
                )


def time_case(case: Case) -> float:
    """Return the median microseconds of one launch."""
    rotations = max(1, min(MAX_ROTATIONS, ROTATED_BYTES // max(case.num_bytes, 1)))
    calls = [case.make() for _ in range(rotations)]
    launches = rotations * max(1, LAUNCHES // rotations)
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in range(launches):
            calls[launch % rotations]()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / launches)
    return float(statistics.median(times))


def measure(size: str, case: Case) -> Result:
    us = time_case(case)
    torch.cuda.empty_cache()
    return Result(
        size=size,
        kernel=case.kernel,
        workload=case.workload,
        us=us,
        tbps=case.num_bytes / us / 1e6,
        tflops=case.flops / us / 1e6,
    )


def run(sizes: list[str], kernels: list[str], block_size: int, folder: Path) -> Iterator[Result]:
    for size in sizes:
        shape = Shape.of(size, folder)
        cases = (
            elementwise_cases(shape, block_size),
            linear_cases(shape),
            attention_cases(shape, block_size),
            sampling_cases(shape),
        )
        for case in chain.from_iterable(cases):
            if not kernels or case.kernel in kernels:
                yield measure(size, case)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size",
        nargs="+",
        type=share,
        default=["0.6B", "8B"],
        metavar="SIZE[/RANKS]",
        help="model shapes, or those of one of several ranks (default: %(default)s)",
    )
    parser.add_argument(
        "--kernel", nargs="+", default=[], metavar="NAME", help="only these kernels, as the table names them"
    )
    parser.add_argument("--block-size", type=int, default=64, help="tokens of a KV block (default: %(default)s)")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write the results here too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.kernels: no CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    ceilings = Ceilings.measured()
    torch.cuda.empty_cache()
    name = torch.cuda.get_device_name()
    print(f"{name}: reads {ceilings.read_tbps:.2f} TB/s, multiplies {ceilings.bf16_tflops:.0f} TFLOP/s")
    print(f"{'size':6}{'kernel':20}{'workload':30}{'us':>10}{'TB/s':>8}{'TFLOP/s':>9}{'ceiling':>9}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for result in run(arguments.size, arguments.kernel, arguments.block_size, Path(folder)):
            results.append(result)
            print(
                f"{result.size:6}{result.kernel:20}{result.workload:30}{result.us:10.1f}{result.tbps:8.2f}"
                f"{result.tflops:9.1f}{result.share_of(ceilings):9.0%}"
            )
    if arguments.json:
        report = provenance("bench.kernels") | {
            "hardware": name,
            "torch": torch.__version__,
            "block_size": arguments.block_size,
            "ceilings": asdict(ceilings),
            "results": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
