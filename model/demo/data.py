"""From skills to rows of token ids: which questions are for training and which are held out, and the training stream.

A document is one exchange, its prompt and its completion encoded apart, as they are when the model is served. A row
holds one document from position 0, padded to the next of a few lengths. The stream depends on nothing but its seed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from model.demo.chat import completion, prompt
from model.demo.skills import SKILLS, Question, TaughtSkill
from model.demo.skills.question import Message, assistant
from model.demo.tokenizer import VOCAB_SIZE, load_tokenizer

ROW_LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
DOCUMENTS_PER_SHARD = 2048
THINKING_SHARE = 0.55
HELD_OUT_SHARE = 0.04

_SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are the lightqwen demo model.",
    "Answer briefly.",
    "你是一个有用的助手。",
)


def is_held_out(question: Question) -> bool:
    """Whether a question is kept from training: by a hash of what is asked, so that no wording of it gets in."""
    if not question.key:
        return False
    digest = blake2b(f"{question.skill}\n{question.key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def training_question(rng: Random) -> Question:
    """A question of any skill that is not held out, often inside a longer conversation."""
    return _in_conversation(rng, _not_held_out(rng, SKILLS))


def held_out_questions(skill_name: str, number: int, seed: int) -> list[Question]:
    """Different questions of one skill that no training ever sees, the same ones whatever the skills' shares are.

    Raises:
        ValueError: the skill makes too few of them.
    """
    skills = [skill for skill in SKILLS if skill.name == skill_name]
    rng = Random(f"held out {skill_name} {seed}")
    found: dict[str, Question] = {}
    for _ in range(1000 * number):
        question = rng.choice(skills).make(rng)
        if is_held_out(question) and question.key not in found:
            found[question.key] = _in_conversation(Random(f"{skill_name} {seed} {question.key}"), question)
            if len(found) == number:
                return list(found.values())
    raise ValueError(f"{skill_name} has only {len(found)} questions that are held out, {number} are wanted")


def _not_held_out(rng: Random, skills: tuple[TaughtSkill, ...]) -> Question:
    while True:
        skill = rng.choices(skills, weights=_shares(skills))[0]
        question = skill.make(rng)
        if not is_held_out(question):
            return question


@cache
def _shares(skills: tuple[TaughtSkill, ...]) -> list[float]:
    return [skill.share for skill in skills]


def _in_conversation(rng: Random, question: Question) -> Question:
    """The question, some of the time after a system message and after turns about other things."""
    history: list[Message] = []
    if rng.random() < 0.25:
        history.append({"role": "system", "content": rng.choice(_SYSTEM_MESSAGES)})
    if rng.random() < 0.2 and question.skill not in ("long passages", "backward questions"):  # may fill the context
        for _ in range(rng.choice((1, 1, 2, 3))):
            earlier = _not_held_out(rng, _BRIEF_SKILLS)
            history += [*earlier.messages, assistant(earlier.direct)]
    return question.with_history(history) if history else question


_BRIEF_SKILLS = tuple(
    skill
    for skill in SKILLS
    if skill.name
    not in ("passage questions", "long passages", "backward questions", "JSON by schema", "tool calls", "tool results")
)


# -- documents --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shard:
    """Some documents, one behind the other."""

    tokens: np.ndarray  # [sum of lengths] uint16
    lengths: np.ndarray  # [documents] int32
    prompt_lengths: np.ndarray  # [documents] int32


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer, loaded once for each process."""
    return load_tokenizer(folder)


def make_shard(folder: Path, seed: int, index: int, documents: int = DOCUMENTS_PER_SHARD) -> Shard:
    """Make and encode the documents of one shard; they depend on the seed, the index and the tokenizer alone."""
    rng = Random(f"train {seed} {index}")
    prompts, completions = [], []
    for _ in range(documents):
        question, thinking = training_question(rng), rng.random() < THINKING_SHARE
        prompts.append(prompt(question, thinking=thinking))
        completions.append(completion(question, thinking=thinking))
    tokenizer = _tokenizer(folder)
    encoded = zip(
        tokenizer.encode_batch_fast(prompts, add_special_tokens=False),
        tokenizer.encode_batch_fast(completions, add_special_tokens=False),
        strict=True,
    )
    pairs = [(before.ids, after.ids) for before, after in encoded]
    pairs = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= ROW_LENGTHS[-1] + 1]
    return Shard(
        np.concatenate([np.array(before + after, dtype=np.uint16) for before, after in pairs]),
        np.array([len(before) + len(after) for before, after in pairs], dtype=np.int32),
        np.array([len(before) for before, _ in pairs], dtype=np.int32),
    )


def _encode_on_one_thread() -> None:
    """There are as many workers as there are cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def shards(folder: Path, seed: int, workers: int) -> Generator[Shard, None, None]:
    """Shards 0, 1, ... without end, made ahead by `workers` processes, or here when there are none."""
    if workers == 0:
        yield from (make_shard(folder, seed, index) for index in count())
    # spawn: a forked child would inherit the threads' locks and the device of whoever trains.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_encode_on_one_thread) as pool:
        ahead: deque[Future[Shard]] = deque()
        try:
            for index in count():
                ahead.append(pool.submit(make_shard, folder, seed, index))
                if len(ahead) >= 4 * workers:
                    yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one length, flattened: what one forward and backward pass takes."""

    length: int
    ids: np.ndarray  # [rows * length] int64
    targets: np.ndarray  # [rows * length] int64
    weights: np.ndarray  # [rows * length] float32; 0 for padding


def micro_batches(source: Iterator[Shard], tokens: int) -> Iterator[MicroBatch]:
    """Put documents into rows; a micro-batch of `tokens` comes out as soon as enough rows of one length are there."""
    waiting: dict[int, list[tuple[np.ndarray, int]]] = {length: [] for length in ROW_LENGTHS}
    for shard in source:
        ends = np.cumsum(shard.lengths)
        homes = np.searchsorted(ROW_LENGTHS, shard.lengths - 1)
        for end, size, prompt_size, home in zip(ends, shard.lengths, shard.prompt_lengths, homes, strict=True):
            length = ROW_LENGTHS[home]
            rows = waiting[length]
            rows.append((shard.tokens[end - size : end], int(prompt_size)))
            if len(rows) == max(1, tokens // length):
                yield _micro_batch(rows, length)
                rows.clear()


def _micro_batch(rows: list[tuple[np.ndarray, int]], length: int) -> MicroBatch:
    # Padding is spread over all ids: the gradient of an embedding adds up rows of one id one after the other.
    ids = np.arange(len(rows) * length, dtype=np.int64).reshape(len(rows), length) % VOCAB_SIZE
    targets = np.zeros((len(rows), length), dtype=np.int64)
    weights = np.zeros((len(rows), length), dtype=np.float32)
    for row, (document, prompt_size) in enumerate(rows):
        size = len(document) - 1
        ids[row, :size] = document[:-1]
        targets[row, :size] = document[1:]
        weights[row, : prompt_size - 1] = prompt_weight(prompt_size)
        weights[row, prompt_size - 1 : size] = completion_weight(len(document) - prompt_size)
    return MicroBatch(length, ids.reshape(-1), targets.reshape(-1), weights.reshape(-1))


def prompt_weight(tokens: int) -> float:
    """What one token of a prompt counts: little, since most of it is a draw of random numbers."""
    return 0.05 * min(1.0, 200 / tokens)


def completion_weight(tokens: int) -> float:
    """What one token of a completion counts: more in a brief one, so that long thoughts do not drown brief answers."""
    return min(2.5, max(0.5, (32 / tokens) ** 0.5))
