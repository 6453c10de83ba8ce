"""A step padded to a CUDA graph's shape computes what the step alone does: on the CPU, where nothing is captured."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from model.attention.triton_backend import _FEW_PROGRAMS
from model.config import Qwen3Config
from model.kernels.tilings import ROW_CLASSES
from model.parallel import TensorParallel
from worker.config import EngineConfig
from worker.messages import SamplingParams, Submit, ids_to_bytes
from worker.plan import ADMISSION, StepPlan
from worker.runner import Runner, build_runner
from worker.runtime import resolve
from worker.scheduler import Scheduler, SchedulerLimits
from worker.shapes import _DECODE_ROWS, StepShape

MAX_LEN, BLOCK, BLOCKS, SLOTS = 128, 16, 64, 8


def make_runner(
    folder: Path, max_running: int = SLOTS, max_batched_tokens: int = 64, max_model_len: int = MAX_LEN
) -> tuple[Runner, Scheduler]:
    config = EngineConfig.model_validate(
        {
            "model": str(folder),
            "device": "cpu",
            "num_blocks": BLOCKS,
            "max_model_len": max_model_len,
            "max_running": max_running,
            "max_batched_tokens": max_batched_tokens,
            "block_size": BLOCK,
        }
    )
    shape = Qwen3Config.from_folder(folder)
    runtime = resolve(config, shape, 0)
    runner = build_runner(config, shape, runtime, TensorParallel.single(), lambda what, done, total: None)
    limits = SchedulerLimits(
        vocab_size=shape.vocab_size,
        max_model_len=max_model_len,
        max_running=max_running,
        max_batched_tokens=max_batched_tokens,
        max_mixed_tokens=max_batched_tokens,
        block_size=BLOCK,
        num_blocks=BLOCKS,
        watermark_blocks=0,
        prefix_caching=False,
    )
    return runner, Scheduler(limits, hash_key=b"k" * 32, clock=lambda: 0.0)


def submit(scheduler: Scheduler, number: int, prompt_tokens: int, vocab_size: int) -> None:
    prompt = np.random.default_rng(number).integers(0, vocab_size, prompt_tokens)
    sampling = SamplingParams(temperature=0.8 * (number % 2), seed=number)
    scheduler.submit(0, Submit(request=number, epoch=1, prompt=ids_to_bytes(prompt), sampling=sampling, max_tokens=12))


class PaddedRunner:
    """Runs every step in the smallest of some shapes, as `Runner` does with those that it has captured."""

    def __init__(self, runner: Runner, shapes: list[StepShape]) -> None:
        self._runner = runner
        self._shapes = shapes
        self.used: set[int] = set()

    @torch.inference_mode()
    def step(self, plan) -> np.ndarray:  # type: ignore[no-untyped-def]
        tables = self._runner._tables
        if len(plan.admissions):
            tables.admit(plan)
        index = next(index for index, shape in enumerate(self._shapes) if shape.fits(plan))
        self.used.add(index)
        shape = self._shapes[index]
        words = np.full(shape.num_words, 2**30, np.int32)
        shape.fill(words, plan, tables.scratch_slot)
        inputs = shape.split(torch.from_numpy(words))
        tables.set_blocks(inputs.updates)
        told = tables.retire(*self._runner._compute(inputs.slots, inputs.query_lens, shape.bounds))
        return told[: plan.num_rows].numpy()


@pytest.mark.parametrize(
    ("arrivals", "used"), [([0] * 8, {"decode", "mixed"}), ([3, 0, 1, 2, 5, 5, 9, 9], {"decode", "prompts", "mixed"})]
)
def test_padding_changes_no_token(tiny_checkpoint: Path, arrivals: list[int], used: set[str]) -> None:
    outputs = []
    for padded in (False, True):
        runner, scheduler = make_runner(tiny_checkpoint)
        shapes = [StepShape.decode(rows, MAX_LEN) for rows in (4, SLOTS)]
        shapes += [StepShape.prompts(64, 3, MAX_LEN)]
        shapes += [StepShape.mixed(tokens, rows, MAX_LEN) for tokens in (32, 64) for rows in (3, SLOTS)]
        graphs = PaddedRunner(runner, shapes)
        tokens: dict[int, list[int]] = {}
        step = 0
        while scheduler.has_work or step <= max(arrivals):
            for number, arrival in enumerate(arrivals):
                if arrival == step:
                    submit(scheduler, number, 1 + 13 * number % 50, scheduler.limits.vocab_size)
            step += 1
            planned = scheduler.plan()
            if planned is None:
                continue
            if padded:
                told = graphs.step(planned.plan)
            else:
                runner.launch(planned.plan)
                told = runner.collect()
            retired = scheduler.retire(planned, told)
            for number, token in zip(retired.numbers.tolist(), retired.tokens.tolist(), strict=True):
                tokens.setdefault(number, []).append(token)
        outputs.append(tokens)
        if padded:
            assert len(graphs.used) >= 3, "the test uses too few shapes to show anything"
            kinds = ["decode", "decode", "prompts", "mixed", "mixed", "mixed", "mixed"]
            assert {kinds[index] for index in graphs.used} == used
    assert outputs[0] == outputs[1]
    assert {len(tokens) for tokens in outputs[0].values()} == {12}


@pytest.mark.parametrize("max_running", [1, 2, SLOTS])
def test_warming_up_takes_no_more_rows_than_may_run(tiny_checkpoint: Path, max_running: int) -> None:
    """On a GPU there is no room for the tokens of more."""
    runner, _ = make_runner(tiny_checkpoint, max_running)
    plans = runner._dead_plans()
    assert max(plan.num_rows for plan in plans) == max_running
    assert {plan.is_decode for plan in plans} == {False, True}
    assert {plan.num_single_rows > 0 for plan in plans if not plan.is_decode} == {False, True}


@pytest.mark.parametrize("max_running", [1, 6, 66])
@pytest.mark.parametrize("max_batched_tokens", [64, 70, 100, 128])
@pytest.mark.parametrize("max_model_len", [16, 48, MAX_LEN])  # of several prompts there may be more tokens than of one
def test_warming_up_has_every_class_of_rows(
    tiny_checkpoint: Path, max_running: int, max_batched_tokens: int, max_model_len: int
) -> None:
    """A step of any number of tokens may come, and of each class kernels are its own."""
    max_running = min(max_running, max_batched_tokens)
    runner, _ = make_runner(tiny_checkpoint, max_running, max_batched_tokens, max_model_len)
    plans = runner._dead_plans()
    most = min(max_batched_tokens, max_running * max_model_len)
    assert {class_of(plan.num_tokens) for plan in plans} >= {class_of(tokens) for tokens in range(1, most + 1)}
    assert all(len(plan.query_lens) <= max_running for plan in plans)
    assert all(plan.max_query_len <= max_model_len for plan in plans)


def class_of(rows: int) -> int:
    return next(most for most in ROW_CLASSES if rows <= most)


def test_warming_up_loads_kernels_of_every_number_of_tokens(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = make_runner(tiny_checkpoint)
    loaded: list[int] = []
    monkeypatch.setattr(runner._model, "load_kernels", loaded.append)
    monkeypatch.setattr(runner, "_admit_nobody", lambda: None)  # a kernel of Triton's, which this runner does not use
    runner.warm_up()
    assert loaded == [runner._runtime.max_batched_tokens]


def test_shapes_take_what_fits() -> None:
    decode, mixed = StepShape.decode(4, MAX_LEN), StepShape.mixed(64, 4, MAX_LEN)
    assert (decode.bounds.num_tokens, decode.bounds.max_chunk_rows) == (4, 0)
    assert (mixed.bounds.num_tokens, mixed.bounds.max_chunk_rows) == (64, 4)
    assert StepShape.mixed(4, 8, MAX_LEN).bounds.max_chunk_rows == 2  # a chunk has two tokens at least


def a_plan(*query_lens: int, decodes: int = 0) -> StepPlan:
    return StepPlan(
        step=0,
        slots=np.arange(len(query_lens), dtype=np.int32),
        query_lens=np.array(query_lens, np.int32),
        num_decode_rows=decodes,
        max_query_len=max(query_lens),
        max_kv_len=max(query_lens),
        block_updates=np.empty((0, 3), np.int32),
        admissions=np.empty(0, ADMISSION),
        admitted_ids=np.empty(0, np.int32),
    )


@pytest.mark.parametrize(
    ("plan", "fits"),
    [
        (a_plan(1, 1, decodes=2), "dm"),
        (a_plan(*[1] * 5, decodes=5), ""),
        (a_plan(2, 62), "pm"),
        (a_plan(2, 63), ""),
        (a_plan(1, 20, decodes=1), "m"),
        (a_plan(20, 1), "m"),  # what was left of a step's budget was one token
        (a_plan(1), "m"),  # a prompt of one token, which a step of decodes alone would not enter
    ],
)
def test_a_step_fits_what_launches_all_it_needs(plan: StepPlan, fits: str) -> None:
    made = {"d": StepShape.decode, "p": partial(StepShape.prompts, 64), "m": partial(StepShape.mixed, 64)}
    assert [name for name, make in made.items() if make(4, MAX_LEN).fits(plan)] == list(fits)


def test_shapes_admit_what_they_have_room_for() -> None:
    shape = StepShape.mixed(64, 4, MAX_LEN)

    def admit(*num_ids: int) -> StepPlan:
        records = np.zeros(len(num_ids), ADMISSION)
        records["num_ids"], records["slot"], records["seed"] = num_ids, np.arange(len(num_ids)), -5
        ones = np.ones(len(num_ids), np.int32)
        return StepPlan(
            step=0,
            slots=ones,
            query_lens=ones,
            num_decode_rows=0,
            max_query_len=1,
            max_kv_len=1,
            block_updates=np.full((2, 3), 7, np.int32),
            admissions=records,
            admitted_ids=np.arange(sum(num_ids), dtype=np.int32),
        )

    for plan, expected in ((admit(40, 24), 2), (admit(40, 25), 0), (admit(1, 1, 1, 1), 4), (admit(), 0)):
        assert shape.admits(plan) == (expected == len(plan.admissions))
        words = np.full(shape.num_words, 2**30, np.int32)
        shape.fill(words, plan, scratch_slot=9)
        parts = shape.split(words)
        assert parts.updates.tolist() == [[7, 7, 7]] * 2 + [[9, 0, 0]] * (shape.max_updates - 2)
        records = np.ascontiguousarray(parts.admissions).view(ADMISSION)[:, 0]
        assert records[:expected].tobytes() == plan.admissions[:expected].tobytes()
        assert (records["slot"][expected:] == -1).all()
        assert (records["num_ids"][expected:] == 0).all()
        ids = plan.admitted_ids if expected else plan.admitted_ids[:0]
        assert parts.ids[: len(ids)].tolist() == ids.tolist()
    assert not shape.admits(admit(*[1] * 5)), "there are four rows"
    assert not StepShape.decode(4, MAX_LEN).admits(admit(1))


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_a_step_and_the_graph_it_is_padded_to_are_fused_or_not_together(kv_heads: int) -> None:
    assert _FEW_PROGRAMS // kv_heads in _DECODE_ROWS
