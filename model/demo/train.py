"""Train the demo checkpoint from scratch: `python -m model.demo.train --minutes 15 --out build/demo`.

Makes tokenizer, text and model from nothing but the seed. Stopped at any moment, `--resume` goes on from the last saved
state. With `--steps` instead of `--minutes` the result does not depend on the machine's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from math import lcm
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from model.demo.bundle import (
    TOKENIZER_FILES,
    read_weights,
    write_config,
    write_model_card,
    write_tokenizer,
    write_weights,
)
from model.demo.chat import END_OF_TURN
from model.demo.data import ROW_LENGTHS, MicroBatch, Shard, micro_batches, shards
from model.demo.network import Pieces, Shape, generate, initial_weights
from model.demo.optimizer import Optimizer
from model.demo.scoring import MAX_NEW_TOKENS, Score, Task, score, table, tasks, wrong_answers
from model.demo.tokenizer import added_id, load_tokenizer
from model.demo.update import RecordedUpdate, Update

WARM_UP, DECAY_FROM = 0.02, 0.5
"""Parts of the training: the learning rate climbs until the one, and falls to nothing from the other on."""
PREFETCHED = 24
REPORT_EVERY_S = 5.0
GENERATION_TOKENS = {"cuda": 262_144, "cpu": 16_384}
"""Tokens, prompts and answers together, that are generated at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a training depends on. Exactly one of `minutes` and `steps` is above 0."""

    out: Path
    minutes: float = 0.0
    steps: int = 0
    seed: int = 1
    rate: float = 5e-3
    micro_batch_tokens: int = 49_152
    micro_batches: int = 6
    workers: int = 0
    device: str = "cpu"
    compiled: bool = False
    recorded: bool = False  # steps as CUDA graphs
    save_every_s: float = 120.0
    checks: int = 3  # evaluations on the way
    check_questions: int = 24  # of each skill
    final_questions: int = 200  # of each skill
    start_from: Path | None = None  # a checkpoint's folder instead of random weights
    shape: Shape = field(default_factory=Shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; weights stay in fp32."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


@dataclass(slots=True)
class Progress:
    """How far a training has come."""

    step: int = 0
    micro_batches: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    checks: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)  # tokens so far, loss


class Trainer:
    """One training: weights, optimizer and stream, and where it stands."""

    def __init__(self, settings: Settings, resume: bool) -> None:
        self.settings = settings
        self.progress = Progress()
        settings.out.mkdir(parents=True, exist_ok=True)
        if settings.start_from:  # its embedding fits its own tokenizer
            for name in TOKENIZER_FILES:
                shutil.copyfile(settings.start_from / name, settings.out / name)
        elif not resume:
            write_tokenizer(settings.out)
        self.tokenizer = load_tokenizer(settings.out)
        weights = (
            read_weights(settings.start_from) if settings.start_from else initial_weights(settings.shape, settings.seed)
        )
        self.weights = {name: tensor.to(settings.device).requires_grad_() for name, tensor in weights.items()}
        self.optimizer = Optimizer(self.weights)
        self._state_folder = settings.out / "state"
        if resume:
            self._load()
        self._update = self._make_update()
        self._began = 0.0  # when, had it never been interrupted

    def run(self) -> None:
        """Train until the end of the budget, then write the checkpoint."""
        settings, progress = self.settings, self.progress
        reported_tokens = progress.tokens
        source = shards(settings.out, settings.seed, settings.workers)
        with closing(source), Prefetched(self._stream(source)) as batches:
            # The clock runs from the first batch on: a resumed training makes anew what it has seen already.
            batches = chain([next(batches)], batches)
            reported = saved = time.monotonic()
            self._began = reported - progress.elapsed_s
            while (done := self.done()) < 1:
                loss = self.step(islice(batches, settings.micro_batches), rate_at(done) * settings.rate)
                now = time.monotonic()
                if now - reported >= REPORT_EVERY_S or progress.step == 1:
                    value = float(loss)
                    progress.losses.append((progress.tokens, value))
                    speed = (progress.tokens - reported_tokens) / (now - reported)
                    print(self._line(value, speed, done), flush=True)
                    reported, reported_tokens = now, progress.tokens
                if now - saved >= settings.save_every_s:
                    self.save()
                    saved = now
                if done * (settings.checks + 1) >= progress.checks + 1:
                    progress.checks += 1
                    self.check(settings.check_questions, settings.dtype)
        self.save()

    def step(self, batches: Iterator[MicroBatch], rate: float) -> torch.Tensor:
        """One update from some micro-batches; returns the mean loss of a token, by weight, without waiting for it.

        The next step writes over it.
        """
        group = list(batches)
        total = sum(float(batch.weights.sum()) for batch in group)
        self._update.begin()
        for batch in group:
            self._update.add(batch, total)
            self.progress.tokens += batch.ids.size
        self._update.finish(rate)
        self.progress.step += 1
        self.progress.micro_batches += len(group)
        return self._update.loss

    def done(self) -> float:
        """The part of the budget that is used up, 0 to 1."""
        self.progress.elapsed_s = time.monotonic() - self._began
        if self.settings.steps:
            return self.progress.step / self.settings.steps
        return self.progress.elapsed_s / (60 * self.settings.minutes)

    def check(self, questions: int, dtype: torch.dtype) -> list[Score]:
        """Ask held-out questions and print the table."""
        began = time.monotonic()
        asked = tasks(questions)
        texts = answer(asked, self.weights, self.settings.shape, self.tokenizer, dtype)
        scores = score(asked, texts)
        seconds = time.monotonic() - began
        print("\n".join(["", *wrong_answers(asked, texts, 2)]))
        print(
            f"{questions} held-out questions of each skill, in {dtype}, {seconds:.0f} s\n{table(scores)}\n", flush=True
        )
        return scores

    def _make_update(self) -> Update:
        settings = self.settings
        pieces = Pieces.compiled() if settings.compiled else Pieces()
        parts = (self.weights, self.optimizer, settings.shape, pieces, settings.dtype)
        if not settings.recorded:
            return Update(*parts)
        return RecordedUpdate(*parts, settings.micro_batch_tokens, ROW_LENGTHS)

    def _stream(self, source: Iterator[Shard]) -> Iterator[MicroBatch]:
        """What has not been trained on yet."""
        return islice(micro_batches(source, self.settings.micro_batch_tokens), self.progress.micro_batches, None)

    def _line(self, loss: float, speed: float, done: float) -> str:
        left = (self.progress.elapsed_s / done - self.progress.elapsed_s) / 60 if done > 0 else 0.0
        return (
            f"step {self.progress.step:5}  {100 * done:5.1f} %  loss {loss:.4f}  {speed / 1e3:8.1f} k tokens/s  "
            f"{self.progress.tokens / 1e6:7.1f} M tokens  {left:5.1f} min left"
        )

    # -- state on disk ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write what `--resume` needs. A file is replaced only once its successor is complete."""
        self._state_folder.mkdir(exist_ok=True)
        tensors = {f"weight.{name}": tensor.detach() for name, tensor in self.weights.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state.items()}
        tensors["progress"] = torch.tensor(list(json.dumps(asdict(self.progress)).encode()), dtype=torch.uint8)
        path = self._state_folder / "state.safetensors"
        save_file(tensors, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def _load(self) -> None:
        tensors = load_file(self._state_folder / "state.safetensors")
        self.progress = Progress(**json.loads(bytes(tensors["progress"].tolist())))
        with torch.no_grad():
            for name, tensor in self.weights.items():
                tensor.copy_(tensors[f"weight.{name}"])
        prefix = "optimizer."
        self.optimizer.load({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})


def rate_at(done: float) -> float:
    """The learning rate as a part of its peak: up, level, down to nothing."""
    if done < WARM_UP:
        return max(done / WARM_UP, 0.02)
    return min(1.0, max(0.0, (1 - done) / (1 - DECAY_FROM)))


class Prefetched:
    """Run an iterator in a thread, some items ahead, as long as the `with` block lasts."""

    def __init__(self, source: Iterator[MicroBatch]) -> None:
        self._source = source
        self._items: queue.Queue[MicroBatch | BaseException] = queue.Queue(PREFETCHED)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch")

    def __enter__(self) -> Iterator[MicroBatch]:
        self._thread.start()
        return self._take()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._items.get(timeout=0.1)
            except queue.Empty:
                continue

    def _work(self) -> None:
        try:
            for item in self._source:
                self._items.put(item)
                if self._stop.is_set():
                    return
        except BaseException as error:  # raised again where the items are taken
            self._items.put(error)

    def _take(self) -> Iterator[MicroBatch]:
        while True:
            item = self._items.get()
            if isinstance(item, BaseException):
                raise item
            yield item


def answer(
    asked: Sequence[Task], weights: dict[str, torch.Tensor], shape: Shape, tokenizer: Tokenizer, dtype: torch.dtype
) -> list[str]:
    """Answer questions greedily, those with prompts of like length together."""
    prompts = [
        encoding.ids for encoding in tokenizer.encode_batch([task.prompt for task in asked], add_special_tokens=False)
    ]
    device = next(iter(weights.values())).device
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    texts = [""] * len(prompts)
    while order:
        size = max(1, GENERATION_TOKENS[device.type] // (len(prompts[order[0]]) + MAX_NEW_TOKENS))
        batch, order = order[:size], order[size:]
        limit = min(MAX_NEW_TOKENS, shape.context_length - len(prompts[batch[0]]))
        rows = generate(weights, shape, [prompts[i] for i in batch], limit, added_id(END_OF_TURN), dtype)
        for index, text in zip(batch, tokenizer.decode_batch(rows, skip_special_tokens=True), strict=True):
            texts[index] = text
    return texts


def finish(trainer: Trainer) -> None:
    """Write the checkpoint's files, evaluate what was written, and tell it in the model card."""
    settings, progress = trainer.settings, trainer.progress
    write_config(settings.out, settings.shape)
    write_weights(settings.out, trainer.weights)
    draw_losses(progress.losses, settings.out / "loss.png")
    with torch.no_grad():
        for name, tensor in read_weights(settings.out).items():
            trainer.weights[name].copy_(tensor)
    how = (
        f"Trained on {progress.tokens / 1e6:.0f} million tokens, padding included, in {progress.step} steps and "
        f"{progress.elapsed_s / 60:.1f} minutes on {device_name(settings.device)}"
        f"{', beginning with the weights of an earlier training' if settings.start_from else ''}."
    )
    write_model_card(settings.out, settings.shape, "", how)
    scores = trainer.check(settings.final_questions, settings.dtype)
    asked = f"{settings.final_questions} questions of each skill, answered by the trainer in {settings.dtype}."
    write_model_card(settings.out, settings.shape, f"{table(scores)}\n\n{asked}", how)
    results = [asdict(row) for row in scores]
    (settings.out / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if settings.dtype != torch.float32:
        trainer.check(settings.final_questions, torch.float32)


def draw_losses(losses: Sequence[tuple[int, float]], path: Path) -> None:
    """Draw the loss curve, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        print("no matplotlib: no picture of the loss curve")
        return
    figure = Figure(figsize=(8, 4), layout="tight")
    axes = figure.subplots()
    axes.plot([tokens / 1e6 for tokens, _ in losses], [loss for _, loss in losses])
    axes.set(xlabel="million tokens", ylabel="loss", yscale="log", title="lightqwen demo")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "a CPU"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m model.demo.train",
        description="Train the demo checkpoint: on a GPU in some minutes, with progress, a state every two minutes to "
        "resume from, and a picture of the loss.",
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where to write (default: build/demo)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=0.0, help="wall-clock time to train for (default: 15)")
    budget.add_argument("--steps", type=int, default=0, help="steps to train for, whatever time they take")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument(
        "--start-from", type=Path, help="a checkpoint's folder to begin with, instead of random weights"
    )
    parser.add_argument("--seed", type=int, default=1, help="of weights and text (default: 1)")
    parser.add_argument("--rate", type=float, help="peak learning rate (default: 0.005; 0.003 with --start-from)")
    parser.add_argument("--micro-batch-tokens", type=int, default=49_152, help="of one pass (default: 49152)")
    parser.add_argument("--micro-batches", type=int, default=6, help="of one step (default: 6)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that make text")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.add_argument("--no-graphs", action="store_true", help="do not record steps as CUDA graphs")
    parser.add_argument("--checks", type=int, default=3, help="evaluations on the way (default: 3)")
    parser.add_argument("--final-questions", type=int, default=200, help="of each skill, at the end (default: 200)")
    arguments = parser.parse_args()
    recorded = arguments.device == "cuda" and not arguments.no_graphs
    if recorded and arguments.micro_batch_tokens % lcm(*ROW_LENGTHS):
        parser.error(f"--micro-batch-tokens must be a multiple of {lcm(*ROW_LENGTHS)}, or take --no-graphs")
    settings = Settings(
        out=arguments.out,
        minutes=arguments.minutes or (0.0 if arguments.steps else 15.0),
        steps=arguments.steps,
        seed=arguments.seed,
        rate=arguments.rate or (3e-3 if arguments.start_from else 5e-3),
        micro_batch_tokens=arguments.micro_batch_tokens,
        micro_batches=arguments.micro_batches,
        workers=arguments.workers,
        device=arguments.device,
        compiled=arguments.device == "cuda" and not arguments.no_compile,
        recorded=recorded,
        checks=arguments.checks,
        final_questions=arguments.final_questions,
        start_from=arguments.start_from,
    )
    if settings.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape; flash attention does not
    began = time.monotonic()
    trainer = Trainer(settings, arguments.resume)
    parameters = sum(tensor.numel() for tensor in trainer.weights.values())
    seconds = time.monotonic() - began
    print(
        f"{parameters / 1e6:.2f} M parameters on {device_name(settings.device)}, ready in {seconds:.0f} s", flush=True
    )
    trainer.run()
    finish(trainer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
