"""What sampling means: against float64 and transformers, in distribution, and independent of where a row stands."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, ks_1samp

import model.sampler
from model.sampler import SamplingTables, gumbel_noise, sample

VOCAB = 64


def one_slot(vocab_size: int = VOCAB, **parameters: Any) -> SamplingTables:
    """Return tables of one slot with the given values."""
    tables = SamplingTables.allocate(1, vocab_size, 4, "cpu")
    for name, value in parameters.items():
        row = getattr(tables, name)[0]
        value = torch.as_tensor(value, dtype=row.dtype)
        (row[: len(value)] if value.ndim else row).copy_(value)
    return tables


def draw(logits: torch.Tensor, tables: SamplingTables, positions: range) -> list[int]:
    """Draw one token at each position from the same logits [vocab]."""
    rows = len(positions)
    lengths = torch.tensor(positions, dtype=torch.int32)
    return sample(logits.expand(rows, -1).contiguous(), torch.zeros(rows, dtype=torch.int32), lengths, tables).tolist()


def exact_probabilities(logits: np.ndarray, length: int, tables: SamplingTables) -> np.ndarray:
    """Return the distribution that the slot draws from, in float64, written token by token."""

    def parameter(name: str) -> float:
        return getattr(tables, name)[0].item()

    scores = logits.astype(np.float64)
    for token, count in enumerate(tables.counts[0].tolist()):
        if count:
            penalty = parameter("repetition")
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores[token] -= parameter("frequency") * (count // 2) + parameter("presence") * (count >= 2)
    if length < parameter("min_length"):
        for token in tables.stop_ids[0].tolist():
            if token >= 0:
                scores[token] = -np.inf
    if parameter("temperature") < 1e-5:
        return np.eye(len(scores))[int(np.argmax(scores))]
    scores /= parameter("temperature")
    weights = np.exp(scores - scores.max())
    order = sorted(set(weights.tolist()), reverse=True)
    if parameter("top_k") > 0:
        ranked = np.sort(weights)[::-1]
        weights[weights < ranked[min(int(parameter("top_k")), len(ranked)) - 1]] = 0
    if parameter("top_p") < 1:
        target = parameter("top_p") * weights.sum()
        lowest = next(value for value in order if weights[weights >= value].sum() >= target)
        weights[weights < lowest] = 0
    weights[weights < parameter("min_p") * weights.max()] = 0
    return weights / weights.sum()


def assert_follows(tokens: list[int], probabilities: np.ndarray) -> None:
    """Fail where counts this far from the probabilities come up less than once in a million."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(tokens)
    common = expected >= 5
    observed, expected_counts = list(counts[common]), list(expected[common])
    if (~common).any() and expected[~common].sum() > 0:
        observed.append(counts[~common].sum())
        expected_counts.append(expected[~common].sum())
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected_counts, strict=True))
    assert statistic < chi2.ppf(1 - 1e-6, max(len(observed) - 1, 1))


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.15},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"presence": 1.0, "frequency": 0.4, "repetition": 1.3, "counts": [1, 2, 3, 6, 0, 8, 1]},
        {"stop_ids": [3, 9], "min_length": 100_000},
    ],
    ids=lambda parameters: "-".join(parameters) or "plain",
)
def test_frequencies_follow_the_exact_distribution(parameters: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = 1.5 * torch.randn(VOCAB)
    tables = one_slot(**{"temperature": 1.0, "seed": 1234, **parameters})
    probabilities = exact_probabilities(logits.numpy(), 0, tables)
    assert_follows(draw(logits, tables, range(20_000)), probabilities)


def test_seeds_are_independent_draws() -> None:
    torch.manual_seed(1)
    logits = torch.randn(VOCAB)
    tables = SamplingTables.allocate(4_000, VOCAB, 1, "cpu")
    tables.temperature.fill_(1.0)
    tables.seed.copy_(torch.arange(4_000) - 2_000)
    tokens = sample(logits.repeat(4_000, 1), torch.arange(4_000), torch.full((4_000,), 17, dtype=torch.int32), tables)
    assert_follows(tokens.tolist(), exact_probabilities(logits.numpy(), 0, one_slot(temperature=1.0)))


@pytest.mark.parametrize("step", [1, 2, 64])
def test_positions_are_independent(step: int) -> None:
    """Pairs of tokens `step` positions apart are as frequent as the product of their probabilities."""
    logits = torch.tensor([0.5, 0.0, -0.5, 1.0])
    tables = one_slot(4, temperature=1.0, seed=2**63 - 1)
    tokens = draw(logits, tables, range(20_000 + step))
    pairs = [4 * a + b for a, b in zip(tokens, tokens[step:], strict=False)]
    probabilities = logits.double().softmax(0).numpy()
    assert_follows(pairs, np.outer(probabilities, probabilities).ravel())


def test_noise_is_gumbel() -> None:
    noise = gumbel_noise(torch.tensor([0, 1, -1]), torch.tensor([0, 1, 2], dtype=torch.int32), torch.arange(50_000))
    assert noise.isfinite().all()
    for row in noise.double().numpy():
        assert ks_1samp(row, lambda x: np.exp(-np.exp(-x))).pvalue > 1e-6


def test_noise_is_fine_grained_where_rare_tokens_win() -> None:
    """A uniform variate of 24 bits could take 37 values above noise of 13, and none above 16.7."""
    seeds = torch.arange(60)
    noise = gumbel_noise(seeds, torch.zeros(60, dtype=torch.int32), torch.arange(151_936))
    top = noise[noise > 13.0]
    expected = noise.numel() * math.exp(-13.0)
    assert abs(len(top) - expected) < 5 * math.sqrt(expected)
    assert len(top.unique()) == len(top)


def test_noise_is_defined_by_integers() -> None:
    """In plain Python's integers: what a seed gives may never change, nor differ between devices."""
    bits64, bits32 = 2**64 - 1, 2**32 - 1

    def mix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & bits64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & bits64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & bits64
        return x ^ (x >> 31)

    def mix32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & bits32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & bits32
        return x ^ (x >> 16)

    seeds, lengths = [0, 42, 2**64 - 1, 2**63], [0, 7, 40_959, 1]
    expected = []
    for seed, length in zip(seeds, lengths, strict=True):
        key = mix64((mix64(seed) + length) & bits64)
        words = [mix32(mix32(token ^ (key & bits32)) ^ (key >> 32)) for token in range(1_000)]
        expected.append([-math.log(-math.log1p(-(word + 0.5) / 2**32)) for word in words])
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds])
    noise = gumbel_noise(signed, torch.tensor(lengths, dtype=torch.int32), torch.arange(1_000))
    torch.testing.assert_close(noise.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)


@given(
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.0]),
    top_k=st.integers(0, 20),
    top_p=st.floats(0.0, 1.0, width=32),
    min_p=st.floats(0.0, 1.0, width=32),
    presence=st.floats(-2.0, 2.0, width=32),
    frequency=st.floats(-2.0, 2.0, width=32),
    repetition=st.sampled_from([0.5, 1.0, 1.5]),
    banned=st.lists(st.integers(0, 15), max_size=4),
    seed=st.integers(-(2**63), 2**63 - 1),
    logits_seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_no_parameters_draw_an_impossible_token(logits_seed: int, banned: list[int], **parameters: Any) -> None:
    generator = np.random.default_rng(logits_seed)
    logits = generator.normal(size=16).astype(np.float32) * 3
    counts = generator.integers(0, 7, size=16)
    tables = one_slot(16, stop_ids=banned, min_length=50, counts=counts, **parameters)
    probabilities = exact_probabilities(logits, 0, tables)
    # float32 may keep a token whose mass lies on the edge: a smaller cut-off in float64 tells which.
    looser = one_slot(16, stop_ids=banned, min_length=50, counts=counts, **parameters)
    looser.top_p.mul_(1 + 1e-5)
    looser.min_p.mul_(1 - 1e-5)
    possible = (probabilities > 0) | (exact_probabilities(logits, 0, looser) > 0)
    for token in draw(torch.from_numpy(logits), tables, range(20)):
        assert possible[token]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [24 * VOCAB, 5 * VOCAB, 1])
def test_a_token_depends_on_neither_row_nor_batch_nor_slot(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.sampler, "_CHUNK", chunk)
    torch.manual_seed(2)
    rows = 24
    logits = torch.randn(rows, VOCAB).to(dtype)
    tables = SamplingTables.allocate(2 * rows, VOCAB, 2, "cpu")
    for name in ("temperature", "top_p", "min_p", "presence"):
        getattr(tables, name)[:rows] = torch.rand(rows)
    tables.temperature[3] = 0.0
    tables.seed[:rows] = torch.randint(-(2**62), 2**62, (rows,))
    tables.top_k[:rows] = torch.randint(0, 10, (rows,))
    tables.counts[:rows] = torch.randint(0, 4, (rows, VOCAB))
    lengths = torch.arange(rows, dtype=torch.int32)
    together = sample(logits, torch.arange(rows), lengths, tables)
    moved = torch.randperm(rows)
    for name in ("temperature", "top_p", "min_p", "presence", "seed", "top_k", "counts"):
        getattr(tables, name)[rows + moved] = getattr(tables, name)[:rows].clone()
    assert sample(logits[moved], rows + moved[moved], lengths[moved], tables).tolist() == together[moved].tolist()
    alone = [int(sample(logits[[row]], torch.tensor([row]), lengths[[row]], tables)) for row in range(rows)]
    assert alone == together.tolist()


def test_greedy_takes_the_lowest_of_the_highest() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, [60, 9, 33]] = 2.0
    tables = one_slot(temperature=0.0, top_k=3, top_p=0.1)
    tokens = sample(logits, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), tables)
    assert tokens.tolist() == [0, 9]
    assert tokens.dtype == torch.int32


def test_ties_at_the_kth_value_are_all_kept() -> None:
    logits = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 0.0])
    tables = one_slot(6, temperature=1.0, top_k=3)
    assert set(draw(logits, tables, range(500))) == {0, 1, 2, 3, 4}


def test_all_ties_are_kept_however_many() -> None:
    logits = torch.zeros(1000)
    logits[900:] = -1.0
    tokens = draw(logits, one_slot(1000, temperature=1.0, top_k=3), range(5_000))
    assert_follows(tokens, np.repeat([1 / 900, 0.0], [900, 100]))


@pytest.mark.parametrize("top_p", [0.0, 0.05, 0.3])
def test_a_small_share_is_followed_exactly(top_p: float) -> None:
    """Most tokens that are drawn do not survive, so that others are looked at, once and again."""
    logits = torch.linspace(0.0, 4.0, VOCAB)[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))]
    tables = one_slot(temperature=1.0, top_p=top_p)
    assert_follows(draw(logits, tables, range(5_000)), exact_probabilities(logits.numpy(), 0, tables))


def test_stop_ids_are_banned_below_the_minimum_length_only() -> None:
    logits = torch.zeros(VOCAB)
    logits[7] = 50.0
    tables = one_slot(temperature=1.0, stop_ids=[7], min_length=10)
    tokens = draw(logits, tables, range(5, 15))
    assert 7 not in tokens[:5]
    assert tokens[5:] == [7] * 5


@pytest.mark.parametrize("parameters", [{}, {"top_p": 0.1}, {"top_k": 3}, {"top_k": 3, "top_p": 0.1}, {"min_p": 0.5}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unusable_logits_give_minus_one(bad: float, parameters: dict[str, Any]) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 40] = bad
    logits[2, 4] = -math.inf
    tables = one_slot(temperature=1.0, **parameters)
    tokens = sample(logits, torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32), tables).tolist()
    assert tokens[1] == -1
    assert tokens[0] >= 0
    assert tokens[2] >= 0


def test_nothing_given_is_written() -> None:
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    tables = one_slot(temperature=1.0, stop_ids=[3], min_length=10, frequency=1.0)
    sample(logits, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), tables)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("parameters", "processors"),
    [
        ({"top_k": 5}, lambda hf: [hf.TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, lambda hf: [hf.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.2}, lambda hf: [hf.MinPLogitsWarper(0.2)]),
        (
            {"temperature": 0.6, "top_k": 9, "top_p": 0.8},
            lambda hf: [hf.TemperatureLogitsWarper(0.6), hf.TopKLogitsWarper(9), hf.TopPLogitsWarper(0.8)],
        ),
        ({"repetition": 1.4}, lambda hf: [hf.RepetitionPenaltyLogitsProcessor(1.4)]),
    ],
    ids=["top_k", "top_p", "min_p", "temperature-top_k-top_p", "repetition"],
)
def test_agrees_with_transformers(parameters: dict[str, Any], processors: Any) -> None:
    from transformers.generation import logits_process as hf

    torch.manual_seed(3)
    logits = 2 * torch.randn(VOCAB)
    seen = [3, 5, 8, 8, 60]
    counts = torch.zeros(VOCAB, dtype=torch.int32)
    counts[seen] = 2
    tables = one_slot(**{"temperature": 1.0, "counts": counts, **parameters})
    scores = logits[None]
    for processor in processors(hf):
        scores = processor(torch.tensor([seen]), scores)
    np.testing.assert_allclose(
        exact_probabilities(logits.numpy(), 0, tables), scores[0].double().softmax(0).numpy(), rtol=1e-5, atol=1e-9
    )
    kept = (scores[0] > -math.inf).nonzero().flatten().tolist()
    assert set(draw(logits, tables, range(3_000))) <= set(kept)


def test_tables_tell_their_size() -> None:
    tables = SamplingTables.allocate(10, 100, 4, "cpu")
    assert tables.num_bytes == 10 * (6 * 4 + 4 + 8 + 4 * 4 + 4 + 100 * 4)
