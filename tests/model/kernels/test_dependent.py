"""Dependent launches: where they are made, and that each waits for what it reads."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import model.kernels
from model.kernels import dependent
from model.kernels.activation import silu_and_mul
from model.kernels.attention import paged_attention_triton, paged_decode_triton
from model.kernels.dependent import begin_dependents, wait
from model.kernels.gated_linear import Cut, gated_linear
from model.kernels.norm import Scale, add_rms_norm, rms_norm
from model.kernels.peer_sum import peer_sum_add_rms_norm
from model.kernels.prefill_attention import overlapped_prefill
from model.kernels.rope_kv import qk_norm_rope_store
from model.kernels.runtime import jit, tl, triton
from model.kernels.sampling import sample_triton
from model.kernels.small_linear import Tiling, small_linear_add_norm_triton, small_linear_triton
from tests.model.kernels.comparing import ON_HOPPER
from tests.model.kernels.test_attention import make_batch, plan_of
from tests.model.kernels.test_fused_decode import make_projected
from tests.model.kernels.test_peer_logits import Group as Columns
from tests.model.kernels.test_peer_sum import Group, Inboxes
from tests.model.kernels.test_sampling import make_logits, mixed_tables
from tests.model.kernels.test_small_linear import CLUSTER, FMA, RING
from worker import table_kernels
from worker.handover import Handover
from worker.plan import ADMISSION
from worker.scheduler import BROKEN_ROW, NO_TOKEN
from worker.table_kernels import admit_triton, prepare_triton, retire_triton
from worker.tables import SlotState, SlotTables

EPS = 1e-6
TWO = replace(FMA, rows=2)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="only a Hopper has dependent launches")


@pytest.mark.parametrize(
    ("without", "hopper", "options"),
    [
        ("", True, {"launch_pdl": True}),
        ("small_linear", True, {"launch_pdl": True}),
        ("", False, {}),
        ("pdl", True, {}),
    ],
)
def test_options(monkeypatch: pytest.MonkeyPatch, without: str, hopper: bool, options: dict[str, bool]) -> None:
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", without)
    monkeypatch.setattr(dependent, "is_hopper", lambda device: hopper)
    assert dependent.dependent_launch(torch.empty(1)) == options


@jit
def _late_kernel(
    late_ptr,  # [count], what is copied
    out_ptr,  # [count]
    count,
    nanoseconds,
    BLOCK: tl.constexpr,
    WAITS: tl.constexpr,
):
    """Let the next launch begin, and copy so many nanoseconds later."""
    begin_dependents(True)
    if WAITS:
        wait(True)
    begin = tl.extra.cuda.globaltimer()
    now = begin
    while now - begin < nanoseconds:
        now = tl.extra.cuda.globaltimer()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(late_ptr + place, mask=place < count), mask=place < count)


def copy_late(tensor: torch.Tensor, out: torch.Tensor, nanoseconds: int = 20_000, *, waits: bool = True) -> None:
    source, target = tensor.view(torch.int16).view(-1), out.view(torch.int16).view(-1)
    _late_kernel[(triton.cdiv(len(source), 4096),)](
        source, target, len(source), nanoseconds, BLOCK=4096, WAITS=waits, launch_pdl=True
    )


class Launch(NamedTuple):
    """A launch whose inputs may come late."""

    call: Callable[..., Sequence[torch.Tensor]]
    inputs: Sequence[torch.Tensor]
    prepare: Callable[[], object] = lambda: None
    """Puts back what a launch leaves in another state, before inputs come."""


def results_of_late(launch: Launch) -> Iterator[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]:
    """Yield what it returns for two draws of its inputs, and what it returns in a graph where these come late."""
    places = launch.inputs
    inputs = [place.clone() for place in places]

    def late() -> Sequence[torch.Tensor]:
        launch.prepare()
        for place in places:
            place.fill_(torch.nan if place.is_floating_point() else 0)
        for tensor, place in zip(inputs, places, strict=True):
            copy_late(tensor, place)
        return launch.call(*places)

    late()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = late()
    for _ in range(2):  # so that what the last launch left is not what this one should find
        for tensor, place in zip(inputs, places, strict=True):
            tensor.copy_(tensor * torch.rand_like(tensor) if tensor.is_floating_point() else tensor.flip(0))
            place.copy_(tensor)
        launch.prepare()
        torch.cuda.synchronize()
        expected = [out.clone() for out in launch.call(*places)]
        graph.replay()
        torch.cuda.synchronize()
        yield expected, outs


@pytest.mark.gpu
@needs_hopper
def test_what_does_not_wait_shows(triton_device: torch.device) -> None:
    """Else the next test would show nothing."""
    x = torch.ones(1000, device=triton_device)

    def copy(waits: bool) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        def call(tensor: torch.Tensor) -> list[torch.Tensor]:
            out = torch.empty_like(tensor)
            copy_late(tensor, out, 0, waits=waits)
            return [out]

        return call

    for expected, outs in results_of_late(Launch(copy(True), [x])):
        assert torch.equal(outs[0], expected[0])
    for _, outs in results_of_late(Launch(copy(False), [x])):
        assert outs[0].isnan().all()


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(device, dtype)


def norm(device: torch.device) -> Launch:
    weight = draw(1024, device=device)
    return Launch(lambda x: [rms_norm(x, weight, EPS)], [draw(48, 1024, device=device)])


def norm_of_sum(device: torch.device) -> Launch:
    weight = draw(1024, device=device)
    inputs = [draw(48, 1024, device=device) for _ in range(2)]
    return Launch(lambda x, residual: add_rms_norm(x, residual, weight, EPS), inputs)


def silu(device: torch.device) -> Launch:
    return Launch(lambda x: [silu_and_mul(x)], [draw(48, 2048, device=device)])


def rope(device: torch.device) -> Launch:
    heads, kv_heads, tokens = 8, 4, 48
    weight, cos_sin = draw(128, device=device), draw(tokens, 128, device=device, dtype=torch.float32)
    slots = torch.arange(tokens, device=device)
    positions = slots.int()
    caches = torch.zeros(2, 1, 64, kv_heads, 128, dtype=torch.bfloat16, device=device)

    def call(qkv: torch.Tensor) -> list[torch.Tensor]:
        q = qk_norm_rope_store(qkv, weight, weight, cos_sin, positions, slots, *caches, heads, kv_heads, EPS)
        return [q, caches]

    return Launch(call, [draw(tokens, (heads + 2 * kv_heads) * 128, device=device)])


def small_linear(device: torch.device, tiling: Tiling, *, scaled: bool = False, gated: bool = False) -> Launch:
    k = 512
    weight, gain, x = draw(256, k, device=device), draw(k, device=device), draw(tiling.rows, k, device=device)

    def call(x: torch.Tensor, squares: torch.Tensor | None = None) -> list[torch.Tensor]:
        scale = None if squares is None else Scale(squares, x, gain, EPS)
        return [small_linear_triton(x, weight, scale=scale, gated=gated, tiling=tiling, pdl=True)]

    return Launch(call, [x, *([torch.rand(tiling.rows, 5, device=device)] if scaled else [])])


def small_linear_of_sum(device: torch.device, tiling: Tiling) -> Launch:
    k, n = 512, 256
    weight, gain = draw(n, k, device=device), draw(n, device=device)

    def call(x: torch.Tensor, residual: torch.Tensor) -> list[torch.Tensor]:
        options = {"tiling": tiling, "pdl": True}
        normed, total = small_linear_add_norm_triton(x, weight, None, residual, gain, EPS, **options)
        assert normed.scale is not None
        return [normed.x, normed.scale.squares, total]

    return Launch(call, [draw(tiling.rows, width, device=device) for width in (k, n)])


def gate_and_up(device: torch.device, *, scaled: bool = False) -> Launch:
    k, cut = 448, Cut(block_rows=96, groups=3, rows=90, features=296, programs=132)
    weight, gain, x = draw(2 * cut.features, k, device=device), draw(k, device=device), draw(cut.rows, k, device=device)

    def call(x: torch.Tensor, squares: torch.Tensor | None = None) -> list[torch.Tensor]:
        scale = None if squares is None else Scale(squares, x, gain, EPS)
        return [gated_linear(x, weight, scale=scale, cut=cut, pdl=True)]

    return Launch(call, [x, *([torch.rand(cut.rows, 5, device=device)] if scaled else [])])


def decode(device: torch.device, head_dim: int) -> Launch:
    rows = [(1, 70), (1, 700), (1, 0)]
    batch = make_batch(rows, head_dim=head_dim, block_size=64, dtype=torch.bfloat16, device=device)
    plan = plan_of(batch, max_chunk_rows=0)

    def call(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        return [paged_attention_triton(q, keys, values, batch.block_tables, batch.scale, plan)]

    return Launch(call, [batch.q, batch.key_cache, batch.value_cache])


def fused_decode(device: torch.device, head_dim: int) -> Launch:
    rows = [(1, 70), (1, 700), (1, 0)]
    batch = make_batch(rows, head_dim=head_dim, block_size=64, dtype=torch.bfloat16, device=device)
    plan, projected = plan_of(batch, max_chunk_rows=0), make_projected(batch)
    caches = batch.key_cache, batch.value_cache

    def call(qkv: torch.Tensor) -> list[torch.Tensor]:
        return [paged_decode_triton(replace(projected, qkv=qkv), *caches, batch.block_tables, batch.scale, plan)]

    return Launch(call, [projected.qkv])


def prefill(device: torch.device) -> Launch:
    """Alone: in a step decode attention comes before it."""
    batch = make_batch([(100, 100), (30, 200)], head_dim=128, block_size=64, dtype=torch.bfloat16, device=device)
    plan = plan_of(batch)

    def call(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        out = torch.empty_like(q)
        overlapped_prefill(q, keys, values, batch.block_tables, plan, out, batch.scale)
        return [out]

    return Launch(call, [batch.q, batch.key_cache, batch.value_cache])


def sampling(device: torch.device) -> Launch:
    tables, slots = mixed_tables(device), torch.arange(8, device=device)
    lengths = torch.full((8,), 7, dtype=torch.int32, device=device)
    logits = make_logits(8, torch.bfloat16, device)
    return Launch(lambda logits: [sample_triton(logits, slots, lengths, tables)], [logits])


def sum_of_ranks(device: torch.device, group_of: type[Inboxes] | type[Group]) -> Launch:
    """By one rank, whose peer has been there before."""
    shape = (7, 256)
    group = group_of(0, 2, shape, torch.bfloat16, device)
    weight, residual = draw(shape[1], device=device), draw(*shape, device=device)

    def call(x: torch.Tensor, residual: torch.Tensor) -> list[torch.Tensor]:
        normed, total = peer_sum_add_rms_norm(x, residual, weight, EPS, group.way)
        return [normed[::2], total[::2]]  # the rows that this rank has in two shots

    return Launch(call, [group.x, residual], group.put)


def logits_of_ranks(device: torch.device) -> Launch:
    group = Columns(0, 2, 7, 128, torch.bfloat16, device)
    for memory in group.memory:
        memory.copy_(torch.randn(memory.shape))
    return Launch(lambda _: [group.gather(share=False)], [group.memory[0]], group.put)


def make_state(device: torch.device) -> tuple[SlotState, Callable[[], None]]:
    """Tables of eight slots, of which number i has i + 1 tokens to compute, and what puts them back."""
    tables = SlotTables(num_slots=8, max_model_len=64, block_size=16, vocab_size=100, device=device)
    state, number = tables.state, torch.arange(9, dtype=torch.int32)
    state.tokens.copy_(torch.randint(1, 100, state.tokens.shape))
    state.blocks.copy_(torch.randint(0, 100, state.blocks.shape))
    for tensor, values in ((state.computed, number), (state.length, 2 * number + 1), (state.max_length, 64)):
        tensor.copy_(torch.as_tensor(values))
    state.done.fill_(False)
    tensors = state_tensors(state)
    saved = [tensor.clone() for tensor in tensors]

    def put_back() -> None:
        for tensor, values in zip(tensors, saved, strict=True):
            tensor.copy_(values)

    return state, put_back


def state_tensors(state: SlotState) -> list[torch.Tensor]:
    sampling = state.sampling
    return [state.tokens, state.computed, state.length, state.max_length, state.done, sampling.top_k, sampling.counts]


def admission(device: torch.device) -> Launch:
    state, put_back = make_state(device)
    records = np.zeros(3, ADMISSION)
    for name, values in (("slot", (1, 4, 6)), ("num_ids", (5, 6, 7)), ("num_prompt", 4), ("max_length", 50)):
        records[name] = values
    records["top_k"], records["penalizes"] = (7, 8, 9), 1
    words = torch.from_numpy(records.view(np.int32).reshape(3, -1)).to(device)
    ids = torch.arange(1, 19, dtype=torch.int32, device=device)

    def call(words: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
        admit_triton(state, words, ids)
        return state_tensors(state)

    return Launch(call, [words, ids], put_back)


def preparation(device: torch.device) -> Launch:
    state, _ = make_state(device)

    def call(slots: torch.Tensor, query_lens: torch.Tensor) -> list[torch.Tensor]:
        made = prepare_triton(state, slots, query_lens, 40, decode_only=False)
        return [tensor for name, tensor in made.items() if name != "block_tables"]  # of which a part is written

    slots = torch.arange(8, dtype=torch.int32, device=device)
    return Launch(call, [slots, slots + 1])


def retirement(device: torch.device) -> Launch:
    state, put_back = make_state(device)
    handover = Handover(num_places=2, num_words=8, num_rows=8, device=device)

    def call(slots: torch.Tensor, query_lens: torch.Tensor, drawn: torch.Tensor) -> list[torch.Tensor]:
        retire_triton(state, slots, query_lens, drawn, handover, no_token=NO_TOKEN, broken_row=BROKEN_ROW)
        return state_tensors(state)

    slots = torch.arange(8, dtype=torch.int32, device=device)
    return Launch(call, [slots, slots + 1, slots + 30], put_back)


LAUNCHES: dict[str, Callable[[torch.device], Launch]] = {
    "norm": norm,
    "norm of a sum": norm_of_sum,
    "SiLU": silu,
    "RoPE": rope,
    **{
        f"{tiling.form}, {tiling.rows} rows": partial(small_linear, tiling=tiling)
        for tiling in (FMA, TWO, RING, CLUSTER)
    },
    **{f"{tiling.form}, scaled": partial(small_linear, tiling=tiling, scaled=True) for tiling in (FMA, RING, CLUSTER)},
    **{f"{tiling.form}, gated": partial(small_linear, tiling=tiling, gated=True) for tiling in (FMA, RING)},
    **{f"{tiling.form}, of a sum": partial(small_linear_of_sum, tiling=tiling) for tiling in (FMA, RING, CLUSTER)},
    "gated": gate_and_up,
    "gated, scaled": partial(gate_and_up, scaled=True),
    **{f"decode, {head_dim}": partial(decode, head_dim=head_dim) for head_dim in (64, 128)},
    **{f"fused decode, {head_dim}": partial(fused_decode, head_dim=head_dim) for head_dim in (64, 128)},
    "prefill": prefill,
    "sampling": sampling,
    "sum of ranks in one shot": partial(sum_of_ranks, group_of=Inboxes),
    "sum of ranks in two shots": partial(sum_of_ranks, group_of=Group),
    "logits of ranks": logits_of_ranks,
    "admission": admission,
    "preparation": preparation,
    "retirement": retirement,
}
"""Of each kernel that is launched so. (That fused decode attention waits for its tickets, no input shows.)"""

KERNELS = {
    "_rms_norm_kernel": "norm",
    "_silu_and_mul_kernel": "SiLU",
    "_qk_norm_rope_store_kernel": "RoPE",
    "_fma_kernel": "fma, scaled",
    "ring_kernel": "ring, scaled",
    "cluster_linear": "cluster, scaled",
    "gated_linear": "gated",
    "_decode_kernel": "decode, 64",
    "decode_kernel": "decode, 128",
    "prefill_kernel": "prefill",
    "_score_kernel": "sampling",
    "_choose_kernel": "sampling",
    "_one_shot_kernel": "sum of ranks in one shot",
    "_two_shots_kernel": "sum of ranks in two shots",
    "_peer_logits_kernel": "logits of ranks",
    "_admit_kernel": "admission",
    "_prepare_kernel": "preparation",
    "_retire_kernel": "retirement",
}
"""Which of the launches shows that a kernel waits."""

FIRST = {"_fetch_kernel", "_embed_rms_norm_kernel"}  # these let the next launch begin, and are ordinary ones themselves


def test_no_dependent_kernel_is_left_out() -> None:
    modules = [importlib.import_module(f"model.kernels.{m.name}") for m in pkgutil.iter_modules(model.kernels.__path__)]
    found = {file.stem for path in model.kernels.__path__ for file in Path(path).glob("*.cu")}
    for module in (*modules, table_kernels):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel") and "PDL" in kernel.arg_names:
                found.add(name)
    assert found == set(KERNELS) | FIRST
    assert set(KERNELS.values()) <= set(LAUNCHES)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("launch", LAUNCHES)
def test_inputs_may_come_late(triton_device: torch.device, launch: str) -> None:
    for expected, outs in results_of_late(LAUNCHES[launch](triton_device)):
        for out, own in zip(outs, expected, strict=True):
            assert torch.equal(out, own)
