"""The sampling kernels draw the tokens that `sample_torch`, their definition, draws."""

from __future__ import annotations

import math

import pytest
import torch

from model.kernels import sampling
from model.kernels.sampling import Parts, sample_triton
from model.sampler import SamplingTables, gumbel_noise, sample_torch
from tests.model.kernels.comparing import ON_GPU

VOCAB = 151_936 if ON_GPU else 1_500
SLOTS = 16
ROWS = 64 if ON_GPU else 12


@pytest.fixture(params=[None, Parts(tiles=3, groups=4)], ids=["as ever", "small tiles"])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with several tiles for each program, and several programs for each row."""
    if request.param is not None:
        monkeypatch.setattr(sampling, "parts_for", lambda rows: request.param)


def mixed_tables(device: torch.device) -> SamplingTables:
    """Return tables in which every slot samples in its own way."""
    tables = SamplingTables.allocate(SLOTS, VOCAB, 3, device)
    tables.seed.copy_(torch.randint(-(2**63), 2**63 - 1, (SLOTS,)))
    tables.temperature[1:] = torch.linspace(0.3, 1.5, SLOTS - 1)
    tables.top_k[2], tables.top_k[3], tables.top_k[9] = 20, 1, VOCAB // 3
    tables.top_p[4], tables.top_p[5], tables.top_p[2] = 0.9, 0.0, 0.95
    tables.min_p[6], tables.min_p[7], tables.min_p[2] = 0.1, 1.0, 0.01
    tables.presence[8], tables.frequency[8], tables.repetition[8] = 0.7, 0.3, 1.2
    tables.frequency[0] = 1.5
    tables.counts[8] = torch.randint(0, 6, (VOCAB,), dtype=torch.int32)
    tables.counts[0] = torch.randint(0, 6, (VOCAB,), dtype=torch.int32)
    tables.stop_ids[10] = torch.tensor([5, VOCAB - 1, -1])
    tables.min_length[10] = 100
    tables.temperature[11] = 1e-6
    tables.top_k[11] = 5
    return tables


def make_logits(rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    logits = (3 * torch.randn(rows, VOCAB)).to(dtype)
    logits[:, 5] += 40 * (torch.arange(rows) % SLOTS == 10)
    return logits.to(device)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_the_reference_tokens(triton_device: torch.device, dtype: torch.dtype) -> None:
    """In bfloat16 many logits tie, at the k-th value too."""
    tables = mixed_tables(triton_device)
    slots = torch.arange(ROWS, device=triton_device) % SLOTS
    lengths = torch.randint(1, 90, (ROWS,), dtype=torch.int32, device=triton_device)
    logits = make_logits(ROWS, dtype, triton_device)
    tokens = sample_triton(logits, slots, lengths, tables)
    expected = sample_torch(logits, slots, lengths, tables)
    assert tokens.dtype == expected.dtype == torch.int32
    assert tokens.tolist() == expected.tolist()
    assert 5 not in tokens[slots == 10].tolist()


@pytest.mark.parametrize("few", [4, 64], ids="few={}".format)
@pytest.mark.parametrize(
    ("spread", "dtype"), [(0.1, torch.float32), (3.0, torch.bfloat16), (3.0, torch.float32), (30.0, torch.bfloat16)]
)
def test_truncation_keeps_what_the_reference_keeps(
    triton_device: torch.device, spread: float, dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From flat to peaked, where all groups must be looked at and where few; with and without bounds of each kind.

    What survives top-k may be found among few scores by comparing each with each, or among as many by bisection.
    """
    monkeypatch.setattr(sampling, "_FEW", few)
    if not ON_GPU:  # so that there are several passes in a vocabulary for the interpreter
        monkeypatch.setattr(sampling, "_LISTED_GROUPS", 16)
    wanted = [
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"top_p": 1 - 2**-24},
        {"top_p": 0.0},
        {"min_p": 0.02},
        {"min_p": 1.0},
        {"top_p": 0.9, "min_p": 0.3},
        {"top_k": 40},
        {"top_k": 40, "top_p": 0.7},
        {"top_k": 5, "top_p": 0.7},
        {"top_k": 7, "top_p": 0.0, "min_p": 0.1},
        {"top_k": 9, "min_p": 0.05, "repetition": 1.3},
        {"top_k": VOCAB - 1, "top_p": 0.9, "min_p": 1e-4},
        {"top_p": 0.9, "repetition": 1.3, "presence": 0.5},
        {"top_k": 40, "top_p": 0.9, "min_length": 100, "stop_ids": 7},
    ]
    tables = SamplingTables.allocate(len(wanted), VOCAB, 3, triton_device)
    tables.temperature.fill_(0.7)
    tables.counts.copy_(torch.randint(0, 4, tables.counts.shape))
    for slot, parameters in enumerate(wanted):
        for name, value in parameters.items():
            getattr(tables, name)[slot] = value
    rows = len(wanted) * (8 if ON_GPU else 1)
    slots = torch.arange(rows, device=triton_device) % len(wanted)
    lengths = torch.arange(rows, dtype=torch.int32, device=triton_device)
    logits = (spread * torch.randn(rows, VOCAB)).to(dtype).to(triton_device)
    tokens = sample_triton(logits, slots, lengths, tables).tolist()
    assert tokens == sample_torch(logits, slots, lengths, tables).tolist()


@pytest.mark.parametrize(("few", "listed"), [(64, 64), (4, 64), (64, 16)])
@pytest.mark.parametrize(
    ("parameters", "survivors"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 11}, 11),
        ({"top_k": 30}, 30),
        ({"top_p": 0.45}, 18),
        ({"top_k": 10, "top_p": 0.45}, 5),
        ({"top_k": 20, "top_p": 0.949}, 19),
        ({"top_k": 20, "top_p": 0.951}, 20),
        ({"top_k": 31, "top_p": 0.999}, 31),
    ],
)
def test_exactly_the_survivors_are_drawn(
    triton_device: torch.device,
    parameters: dict[str, float],
    survivors: int,
    few: int,
    listed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """20 tokens are nearly alike, 20 others come 6 % behind, all others never. Lengths are such that the noise of the
    last survivor, or of the token behind it, is the best of the survivors' and that one's: wherever the cut is off by
    one, another token is drawn.
    """
    monkeypatch.setattr(sampling, "_FEW", few)
    monkeypatch.setattr(sampling, "_LISTED_GROUPS", listed)
    tables = SamplingTables.allocate(1, VOCAB, 3, triton_device)
    for name, value in ({"temperature": 1.0} | parameters).items():
        getattr(tables, name)[0] = value
    order = torch.randperm(VOCAB)[:40]
    logits = torch.full((VOCAB,), -20.0)
    logits[order] = 5 - 1e-4 * torch.arange(40) - 0.06 * (torch.arange(40) >= 20)
    lengths = torch.arange(2000, dtype=torch.int32)
    noisy = logits[order] + gumbel_noise(torch.zeros(2000, dtype=torch.int64), lengths, order)
    best = noisy[:, : survivors + 1].argmax(dim=1)
    lengths = torch.cat([lengths[best == rank][:8] for rank in (survivors - 1, survivors)]).to(triton_device)
    slots = torch.zeros_like(lengths)
    logits = logits.expand(len(lengths), -1).contiguous().to(triton_device)
    tokens = sample_triton(logits, slots, lengths, tables).tolist()
    assert set(tokens) <= set(order[:survivors].tolist())
    assert tokens[:8] == [int(order[survivors - 1])] * 8
    assert tokens == sample_torch(logits, slots, lengths, tables).tolist()


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unusable_logits_give_minus_one(triton_device: torch.device, bad: float) -> None:
    tables = mixed_tables(triton_device)
    slots = torch.tensor([0, 1, 2, 1], device=triton_device)
    lengths = torch.full((4,), 7, dtype=torch.int32, device=triton_device)
    logits = make_logits(4, torch.float32, triton_device)
    for row, token in enumerate((0, VOCAB // 2, VOCAB - 1)):
        logits[row, token] = bad
    tokens = sample_triton(logits, slots, lengths, tables)
    assert tokens[:3].tolist() == [-1, -1, -1]
    assert tokens[3] == sample_torch(logits, slots, lengths, tables)[3] >= 0


@pytest.mark.usefixtures("_parts")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in Triton's interpreter
def test_unusable_scores_give_minus_one(triton_device: torch.device) -> None:
    """Of a stop id that may not come, too; and where float32 does not hold what the temperature makes of a logit."""
    tables = mixed_tables(triton_device)
    tables.stop_ids[0], tables.min_length[0] = 3, 100
    tables.temperature[1] = 0.01
    tables.temperature[2] = 0.01
    slots = torch.tensor([0, 1, 2, 3, 10], device=triton_device)
    lengths = torch.full((5,), 7, dtype=torch.int32, device=triton_device)
    logits = make_logits(5, torch.float32, triton_device)
    logits[0, 3] = math.nan
    logits[1:3, 70] = 1e37
    logits[4, 5] = math.inf
    tokens = sample_triton(logits, slots, lengths, tables).tolist()
    assert tokens[:3] == [-1, -1, -1]
    assert tokens[3] >= 0
    assert tokens[4] == -1
    assert tokens == sample_torch(logits, slots, lengths, tables).tolist()


@pytest.mark.usefixtures("_parts")
def test_rows_of_nothing_but_minus_infinity(triton_device: torch.device) -> None:
    tables = mixed_tables(triton_device)
    slots = torch.tensor([0, 1, 2, 4], device=triton_device)
    lengths = torch.ones(4, dtype=torch.int32, device=triton_device)
    logits = torch.full((4, VOCAB), -math.inf, device=triton_device)
    assert sample_triton(logits, slots, lengths, tables).tolist() == [0, 0, 0, 0]


@pytest.mark.usefixtures("_parts")
def test_ties_go_to_the_lowest_id(triton_device: torch.device) -> None:
    tables = SamplingTables.allocate(1, VOCAB, 1, triton_device)
    logits = torch.zeros(2, VOCAB, device=triton_device)
    logits[1, [VOCAB - 1, 1_030, 70]] = 1.0
    slots = torch.zeros(2, dtype=torch.int64, device=triton_device)
    assert sample_triton(logits, slots, slots.int(), tables).tolist() == [0, 70]


@pytest.mark.parametrize("top_k", [0, 100])
def test_equal_logits_all_survive(triton_device: torch.device, top_k: int) -> None:
    top_p = [1e-9, 0.5, 1 - 2**-24]
    tables = SamplingTables.allocate(len(top_p), VOCAB, 1, triton_device)
    tables.temperature.fill_(1.0)
    tables.top_k.fill_(top_k)
    tables.top_p.copy_(torch.tensor(top_p))
    slots = torch.arange(24, device=triton_device) % len(top_p)
    lengths = torch.arange(24, dtype=torch.int32, device=triton_device)
    logits = torch.zeros(24, VOCAB, device=triton_device)
    tokens = sample_triton(logits, slots, lengths, tables).tolist()
    assert tokens == sample_torch(logits, slots, lengths, tables).tolist()
    assert len(set(tokens)) > 12


def test_a_token_depends_on_neither_row_nor_batch(triton_device: torch.device) -> None:
    """The small batch is cut into other tiles than the large one."""
    tables = mixed_tables(triton_device)
    rows = 17
    slots = torch.ones(rows, dtype=torch.int64, device=triton_device)
    slots[0], slots[13] = 2, 4
    lengths = torch.arange(rows, dtype=torch.int32, device=triton_device)
    logits = make_logits(rows, torch.float32, triton_device)
    together = sample_triton(logits, slots, lengths, tables)
    few = torch.tensor([13, 0, 4], device=triton_device)
    assert sample_triton(logits[few], slots[few], lengths[few], tables).tolist() == together[few].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("without", ["", "pdl"])
def test_in_a_cuda_graph(triton_device: torch.device, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that change between replays are followed."""
    monkeypatch.setenv("LIGHTQWEN_WITHOUT", without)
    tables = mixed_tables(triton_device)
    slots = torch.arange(ROWS, device=triton_device) % SLOTS
    lengths = torch.ones(ROWS, dtype=torch.int32, device=triton_device)
    logits = make_logits(ROWS, torch.bfloat16, triton_device)
    sample_triton(logits, slots, lengths, tables)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample_triton(logits, slots, lengths, tables)
    for _ in range(3):
        lengths += 1
        slots.copy_(slots.roll(1))
        logits.copy_(make_logits(ROWS, torch.bfloat16, triton_device))
        graph.replay()
        assert tokens.tolist() == sample_torch(logits, slots, lengths, tables).tolist()
