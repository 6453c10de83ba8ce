"""Rows, network, optimizer and the training itself, in small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.demo import bundle
from model.demo.chat import ADDED_TOKENS, prompt
from model.demo.data import ROW_LENGTHS, Shard, make_shard, micro_batches, training_question
from model.demo.network import Pieces, Shape, generate, initial_weights, loss_sum
from model.demo.optimizer import Optimizer, orthogonal
from model.demo.skills.question import Random
from model.demo.tokenizer import VOCAB_SIZE, added_id, load_tokenizer
from model.demo.train import Settings, Trainer, finish, rate_at
from model.demo.update import RecordedUpdate, Update

SMALL = Shape(hidden_size=32, intermediate_size=48, layers=2, heads=4, head_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a config and random weights."""
    path = tmp_path_factory.mktemp("bundle")
    bundle.write_tokenizer(path)
    bundle.write_config(path, SMALL)
    bundle.write_weights(path, initial_weights(SMALL, 1))
    return path


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> Settings:
    return Settings(
        out=tmp_path / "out", steps=8, micro_batch_tokens=768, micro_batches=2, shape=SMALL, checks=0, start_from=folder
    )


# -- tokenizer and rows -----------------------------------------------------------------------------------------------


def test_tokenizer_round_trips_what_the_skills_say(folder: Path) -> None:
    tokenizer, rng = load_tokenizer(folder), Random(2)
    for _ in range(200):
        text = prompt(training_question(rng), thinking=True)
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["🌍 naïve", "\t\n x  y", "def f(x): return x**2", "<|im_start|>", ""])
def test_tokenizer_round_trips_anything(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_each_digit_and_each_special_token_is_one_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.encode("12345").tokens == ["1", "2", "3", "4", "5"]
    assert [tokenizer.encode(token).ids for token in ADDED_TOKENS] == [[added_id(token)] for token in ADDED_TOKENS]


def test_transformers_renders_prompts_as_training_does(folder: Path) -> None:
    tokenizer, rng = AutoTokenizer.from_pretrained(folder), Random(4)
    for thinking in (True, False) * 100:
        question = training_question(rng)
        rendered = tokenizer.apply_chat_template(
            list(question.messages),
            tools=list(question.tools) or None,
            enable_thinking=thinking,
            add_generation_prompt=True,
            tokenize=False,
        )
        assert rendered == prompt(question, thinking=thinking)


def test_shards_depend_on_seed_and_index_alone(folder: Path) -> None:
    first, again, other = (make_shard(folder, 1, index, documents=50) for index in (3, 3, 4))
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens[:200], other.tokens[:200])


def test_rows_hold_each_document_once_and_weigh_its_completion() -> None:
    def shard(documents: int) -> Shard:
        lengths = np.full(documents, 40, dtype=np.int32)
        return Shard(np.arange(40 * documents, dtype=np.uint16), lengths, np.full(documents, 30, dtype=np.int32))

    made = list(micro_batches(iter([shard(5), shard(5)]), tokens=4 * ROW_LENGTHS[0]))
    assert [batch.length for batch in made] == [ROW_LENGTHS[0]] * 2
    ids, targets, weights = (x.reshape(4, -1)[1] for x in (made[0].ids, made[0].targets, made[0].weights))
    assert ids[:39].tolist() == list(range(40, 79))
    assert targets[:39].tolist() == list(range(41, 80))
    assert (weights[29:39] > 5 * weights[28]).all()
    assert (weights[:29] > 0).all()
    assert (weights[39:] == 0).all()


# -- network ----------------------------------------------------------------------------------------------------------


def test_loss_is_that_of_transformers(folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = bundle.read_weights(folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB_SIZE, (3, 20), generator=generator)
    targets = torch.randint(0, VOCAB_SIZE, (60,), generator=generator)
    token_weights = torch.rand(60, generator=generator)
    with torch.no_grad():
        logits = reference(ids).logits.flatten(0, 1)
    expected = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * token_weights).sum()
    ours = loss_sum(weights, SMALL, Pieces(), ids.flatten(), targets, token_weights, 20, torch.float32)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_generation_is_that_of_transformers(folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {name: 3 * tensor for name, tensor in bundle.read_weights(folder).items()}  # no near ties
    reference.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    prompts = [[5, 6, 7, 8, 9], [300], list(range(40, 60))]
    for ids, made in zip(prompts, generate(weights, SMALL, prompts, 12, 4095, torch.float32), strict=True):
        expected = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            top_k=None,
            top_p=None,
            temperature=None,
            eos_token_id=4095,
            pad_token_id=0,
        )
        assert made == expected[0, len(ids) :].tolist()


def test_generation_stops_at_the_stop_token(folder: Path) -> None:
    weights = bundle.read_weights(folder)
    (free,) = generate(weights, SMALL, [[5, 6, 7]], 10, -1, torch.float32)
    (stopped,) = generate(weights, SMALL, [[5, 6, 7]], 10, free[3], torch.float32)
    assert stopped == free[: free.index(free[3])]


# -- optimizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(2, 16, 48), (2, 48, 16)])
def test_newton_schulz_brings_singular_values_near_1(size: tuple[int, ...]) -> None:
    matrices = torch.randn(size, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_optimizer_descends() -> None:
    drawn = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))  # larger ones would take more steps
    weights = {"model.layers.0.x.weight": drawn.requires_grad_(), "norm": torch.ones(6).requires_grad_()}
    optimizer = Optimizer(weights)
    optimizer.rate.fill_(0.05)
    losses = []
    for _ in range(60):
        loss = torch.stack([tensor.square().sum() for tensor in weights.values()]).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def test_learning_rate_climbs_stays_and_falls() -> None:
    assert rate_at(0.0) < 0.1 < rate_at(0.01) < rate_at(0.02) == rate_at(0.4) == 1.0
    assert 0 < rate_at(0.9) < rate_at(0.6) < 1
    assert rate_at(1.0) == 0


# -- training ---------------------------------------------------------------------------------------------------------


def test_loss_falls_and_the_result_loads(settings: Settings) -> None:
    trainer = Trainer(replace(settings, steps=30, final_questions=1), resume=False)
    weights_before = {name: tensor.detach().clone() for name, tensor in trainer.weights.items()}
    batches = list(islice(micro_batches(iter([make_shard(settings.out, 9, 0, 300)]), 768), 2))
    losses = [float(trainer.step(iter(batches), 5e-3)) for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(not torch.equal(weights_before[name], tensor) for name, tensor in trainer.weights.items())
    finish(trainer)
    model, loading = AutoModelForCausalLM.from_pretrained(settings.out, output_loading_info=True)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert not any(loading.values())
    card = (settings.out / "README.md").read_text(encoding="utf-8")
    assert "| arithmetic" in card
    assert "questions of each skill, answered by the trainer in torch.float32." in card


@pytest.mark.gpu
def test_recorded_steps_are_those_of_one_operation_after_the_other(folder: Path) -> None:
    tokens, lengths = 768, ROW_LENGTHS[:6]
    made = micro_batches(iter([make_shard(folder, 9, 0, 600)]), tokens)
    batches = list(islice((batch for batch in made if batch.length in lengths), 12))
    assert len({batch.length for batch in batches}) > 1
    results = []
    for recorded in (False, True):
        weights = {name: x.cuda().requires_grad_() for name, x in initial_weights(SMALL, 1).items()}
        parts = (weights, Optimizer(weights), SMALL, Pieces(), torch.float32)
        update = RecordedUpdate(*parts, tokens, lengths) if recorded else Update(*parts)
        losses = []
        for first in range(0, 12, 3):
            update.begin()
            for batch in batches[first : first + 3]:
                update.add(batch, 100.0)
            update.finish(5e-3)
            losses.append(float(update.loss))
        results.append((losses, weights))
    (expected, one), (losses, other) = results
    assert losses == pytest.approx(expected, rel=1e-3)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-3)


def test_resumed_training_ends_where_an_unbroken_one_does(settings: Settings, tmp_path: Path) -> None:
    whole = Trainer(settings, resume=False)
    whole.run()
    parts = replace(settings, out=tmp_path / "parts")
    first = Trainer(parts, resume=False)
    stream = first_batches(first, 3 * settings.micro_batches)
    for step in range(3):
        first.step(islice(stream, settings.micro_batches), rate_at(step / settings.steps) * settings.rate)
    first.save()
    second = Trainer(parts, resume=True)
    assert second.progress.step == 3
    second.run()
    assert second.progress.tokens == whole.progress.tokens
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(second.weights[name], tensor, rtol=1e-5, atol=1e-7)


def first_batches(trainer: Trainer, number: int) -> Iterator:
    settings = trainer.settings
    source = (make_shard(settings.out, settings.seed, index) for index in range(10))
    return islice(micro_batches(source, settings.micro_batch_tokens), number)
