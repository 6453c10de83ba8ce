"""Gate, up and SiLU of many rows in one launch: the kernel against float64, and how launches are cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import ModelError
from model.kernels import cuda_source
from model.kernels import gated_linear as gated_linear_module
from model.kernels import linear as linear_module
from model.kernels.cuda_source import CudaSourceError, Source
from model.kernels.gated_linear import Cut, cut_for, gated_linear, sources_for
from model.kernels.linear import load_gates, norm_linear
from model.kernels.norm import Normed, Scale, rms_norm_triton
from model.kernels.runtime import multiprocessors
from model.kernels.small_linear import Tiling, small_linear_add_norm_triton
from tests.model.kernels.comparing import ON_HOPPER, TOLERANCE, poisoned, relative_error

EPS = 1e-6
BFLOAT16 = torch.bfloat16
SINGLE = [
    Cut(block_rows=96, groups=3, rows=90, features=296, programs=132),  # of which the last tile has but eight
    Cut(block_rows=128, groups=3, rows=128, features=960, programs=132),
    Cut(block_rows=160, groups=2, rows=129, features=128, programs=132),
    Cut(block_rows=256, groups=3, rows=256, features=96, programs=132),
    Cut(block_rows=224, groups=3, rows=600, features=192, programs=6),
    Cut(block_rows=32, groups=2, rows=20, features=64, programs=1),
]
SEVERAL = [
    Cut(block_rows=256, groups=3, rows=1000, features=480, programs=4),
    Cut(block_rows=160, groups=2, rows=300, features=200, programs=6),  # an odd number of tiles of features
    Cut(block_rows=256, groups=2, rows=700, features=64, programs=2),
    Cut(block_rows=192, groups=3, rows=5000, features=288, programs=8),  # of several bands, the last one lower
    Cut(block_rows=32, groups=3, rows=65, features=8, programs=2),
]
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="gated_linear needs a Hopper")


def draw(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device).to(BFLOAT16)


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x.double(), weight.double()).chunk(2, dim=1)
    return F.silu(gate) * up


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("k", [64, 448, 1536])
@pytest.mark.parametrize("cut", SINGLE + SEVERAL, ids=str)
def test_against_float64(triton_device: torch.device, cut: Cut, k: int) -> None:
    torch.manual_seed(cut.rows + k)
    # What is behind the last row is fetched with it, and counts for nothing.
    x = poisoned(cut.tiles_of_rows * cut.block_rows, k, dtype=BFLOAT16, device=triton_device)[: cut.rows]
    x.copy_(draw(cut.rows, k, device=triton_device))
    weight = draw(2 * cut.features, k, device=triton_device) / 16
    before = x.clone(), weight.clone()
    out = gated_linear(x, weight, cut=cut, pdl=False)
    assert out.shape == (cut.rows, cut.features)
    assert relative_error(out, exact(x, weight)) < 2 * TOLERANCE[BFLOAT16]
    assert torch.equal(x, before[0]), "inputs are not written"
    assert torch.equal(weight, before[1]), "inputs are not written"
    assert torch.equal(gated_linear(x, weight, cut=cut, pdl=True), out), "the same launch gives the same bits"
    moved = gated_linear(x.roll(7, 0), weight, cut=cut, pdl=False)
    assert torch.equal(moved.roll(-7, 0), out), "a row does not depend on others, nor on its place"
    for block_rows, groups in ((64, 2), (256, 3)):
        other = Cut(block_rows=block_rows, groups=groups, rows=cut.rows, features=cut.features, programs=4)
        assert torch.equal(gated_linear(x, weight, cut=other, pdl=False), out), "nor on how it is cut"


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("parts", [1, 40, 128, 300])
@pytest.mark.parametrize("cut", [cut for cut in SINGLE if cut.scales], ids=str)
def test_rows_that_are_still_to_be_scaled(triton_device: torch.device, cut: Cut, parts: int) -> None:
    torch.manual_seed(parts)
    k = 512
    total, gain = 3 * draw(cut.rows, k, device=triton_device), draw(k, device=triton_device)
    weight = draw(2 * cut.features, k, device=triton_device) / 16
    total *= torch.logspace(-2, 2, cut.rows, device=triton_device).to(BFLOAT16)[:, None]  # each has a scale of its own
    squares = torch.zeros(cut.rows, parts, device=triton_device)
    squares.index_add_(1, torch.arange(k, device=triton_device) * 7 % parts, total.float().square())
    out = gated_linear(total * gain, weight, scale=Scale(squares, total, gain, EPS), cut=cut, pdl=True)
    wide = total.double()
    normed = gain.double() * wide * (wide.square().mean(1, keepdim=True) + EPS).rsqrt()
    assert relative_error(out, exact(normed, weight)) < 4 * TOLERANCE[BFLOAT16]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("cut", [SINGLE[3], SEVERAL[0]], ids=str)
def test_dependent_launches_wait_for_rows_and_memory(triton_device: torch.device, cut: Cut) -> None:
    """Each launch begins while the norm before it still runs, whose result it takes, and takes memory of one before."""
    torch.manual_seed(1)
    k, layers = 2048, 12
    weights = [draw(2 * cut.features, k, device=triton_device) / 32 for _ in range(layers)]
    back = [draw(k, cut.features, device=triton_device) / 32 for _ in range(layers)]
    gain = draw(k, device=triton_device)

    def chain(x: torch.Tensor, *, pdl: bool) -> torch.Tensor:
        for into, out_of in zip(weights, back, strict=True):
            x = F.linear(gated_linear(rms_norm_triton(x, gain, EPS), into, cut=cut, pdl=pdl), out_of)
            if not pdl:
                torch.cuda.synchronize()
        return x

    check_replays(chain, draw(cut.rows, k, device=triton_device))


@pytest.mark.gpu
@needs_hopper
def test_dependent_launches_wait_for_scales(triton_device: torch.device) -> None:
    """As the layer before leaves them, which lets the next begin as it begins itself."""
    torch.manual_seed(2)
    rows, width, cut, layers = 128, 1024, replace(SINGLE[1], features=1024), 12
    tiling = Tiling("ring", rows=128, block_n=32, block_k=128, warps=4, stages=4, block_rows=64)
    weights = [draw(2 * width, width, device=triton_device) / 32 for _ in range(layers)]
    back = [draw(width, width, device=triton_device) / 32 for _ in range(layers)]
    gain = draw(width, device=triton_device)

    def chain(x: torch.Tensor, *, pdl: bool) -> torch.Tensor:
        residual = torch.zeros_like(x)
        for into, out_of in zip(weights, back, strict=True):
            normed, residual = small_linear_add_norm_triton(
                x, out_of, None, residual, gain, EPS, tiling=tiling, pdl=pdl
            )
            if not pdl:
                torch.cuda.synchronize()
            x = gated_linear(normed.x, into, scale=normed.scale, cut=cut, pdl=pdl)
            if not pdl:
                torch.cuda.synchronize()
        return x

    check_replays(chain, draw(rows, width, device=triton_device))


def check_replays(chain: Callable[..., torch.Tensor], x: torch.Tensor) -> None:
    """Dependent launches in a graph give the bits of launches that wait for one another."""
    chain(x, pdl=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x, pdl=True)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, chain(x, pdl=False))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("rows", [100, 1000])
def test_a_layer_takes_it(triton_device: torch.device, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8B's width, on an H200: 100 rows are scaled in the launch, 1,000 before it."""
    torch.manual_seed(rows)
    k, features = 512, 96 * (multiprocessors(triton_device) - 4)
    total, gain = draw(rows, k, device=triton_device), draw(k, device=triton_device)
    weight = draw(2 * features, k, device=triton_device) / 16
    squares = total.float().square().sum(1, keepdim=True)
    normed = Normed(total * gain, Scale(squares, total, gain, EPS))
    out = norm_linear(normed, weight, gated=True)
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", "gated_linear")
    separate = norm_linear(normed, weight, gated=True)
    assert not torch.equal(out, separate), "it rounds less often"
    assert relative_error(out, separate.double()) < 4 * TOLERANCE[BFLOAT16]


@given(rows=st.integers(1, 20_000), features=st.integers(1, 4000).map(lambda n: 8 * n), programs=st.integers(2, 160))
@settings(deadline=None)
def test_every_cut_can_be_launched(rows: int, features: int, programs: int) -> None:
    cut = cut_for(rows, features, 4096, programs)
    if cut is None:
        return
    assert rows > 64
    assert cut.tiles_of_rows * cut.block_rows >= rows
    assert cut.tiles_of_features * cut.groups * 32 >= features
    assert cut.block_rows in range(32, 257, 32)
    assert cut.tiles_of_features % cut.cluster == 0
    assert cut.stages >= 3
    static = 16 * cut.stages + 4 * cut.block_rows + 16
    assert cut.shared_bytes + static <= 227 << 10, "a Hopper's program has no more"
    assert cut.programs in (programs, programs - 1)
    assert cut.programs % 2 == 0, "neighbours are a cluster"
    tiles = cut.tiles_of_rows * cut.tiles_of_features
    assert cut.single == (tiles <= cut.programs)
    turns = max(len(range(program, tiles, cut.programs)) for program in range(cut.programs))
    assert rows * features <= turns * cut.programs * cut.block_rows * cut.groups * 32
    assert tiles >= 0.9 * turns * cut.programs, "nearly all have something to do all the time"


@given(features=st.integers(1, 300).map(lambda n: 96 * n), programs=st.integers(2, 140), most=st.integers(60, 3000))
@settings(max_examples=20, deadline=None)
def test_all_kernels_are_known_before(features: int, programs: int, most: int) -> None:
    cuts = [cut for rows in range(1, most + 1) if (cut := cut_for(rows, features, 512, programs)) is not None]
    launched = {cut.source(scaled=scaled) for cut in cuts for scaled in {False, cut.scales}}
    assert set(sources_for(most, features, 512, programs)) == launched


def test_kernels_are_told_of_where_launches_are_only_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Source] = []
    monkeypatch.setattr(cuda_source, "instead_of_launching", told.append)
    weight = torch.empty((2 * 12288, 64), dtype=BFLOAT16)
    load_gates(weight, 8192)
    assert not told, "a CPU has none"
    for name, value in (("_gates_many", True), ("multiprocessors", 132)):
        monkeypatch.setattr(linear_module, name, lambda _, value=value: value)
    load_gates(weight, 8192)
    assert told == list(sources_for(8192, 12288, 64, 132))
    assert len(told) == 16


@pytest.mark.parametrize(
    ("rows", "features", "k", "expected"),
    [
        (128, 12288, 4096, (128, 3, True)),  # 8B
        (200, 12288, 4096, (224, 3, True)),
        (1024, 12288, 4096, (256, 3, False)),
        (512, 6144, 4096, (256, 3, True)),  # 8B, of two ranks
        (256, 6144, 4096, None),  # 64 programs
        (1024, 3072, 1024, (256, 3, True)),  # 0.6B
        (256, 3072, 1024, None),  # 32 programs
        (1024, 12800, 5120, None),  # 32B, of two ranks: six turns, and a little of a seventh
        (64, 12288, 4096, None),  # ring's
        (128, 12288, 4104, None),
        (128, 12284, 4096, None),
    ],
)
def test_how_layers_are_cut(rows: int, features: int, k: int, expected: tuple[int, int, bool] | None) -> None:
    cut = cut_for(rows, features, k, 132)
    assert (cut and (cut.block_rows, cut.groups, cut.single)) == expected


def test_what_does_not_compile_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Source, device: torch.device) -> None:
        raise CudaSourceError(f"{source.file}: no")

    monkeypatch.setattr(gated_linear_module, "kernel_of", fail)
    x, weight = torch.zeros((90, 64), dtype=BFLOAT16), torch.zeros((592, 64), dtype=BFLOAT16)
    with pytest.raises(ModelError, match=r"gated_linear.cu: no; set LIGHTQWEN_WITHOUT=gated_linear"):
        gated_linear(x, weight, cut=SINGLE[0], pdl=False)
