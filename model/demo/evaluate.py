"""Ask held-out questions through a running server: `python -m model.demo.evaluate --target localhost:50051`.

Greedy, so that two runs on equal logits give equal texts: `--json` keeps the answers, `--same-as` compares with those.
Speaks to the server as any user's program does, through the public client; nothing else here knows of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightqwen.client import AsyncClient, LightqwenError
from model.demo.scoring import MAX_NEW_TOKENS, Task, score, table, tasks, thresholds, wrong_answers

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """One line of a file of answers."""

    skill: str
    thinking: bool
    prompt: str
    text: str
    right: bool


async def ask_all(target: str, asked: Sequence[Task], concurrency: int) -> list[str]:
    """Ask every question, `concurrency` at a time; returns the texts in the order of the questions.

    Raises:
        LightqwenError: a call failed.
    """
    texts = [""] * len(asked)
    left = iter(range(len(asked)))

    async def work(client: AsyncClient) -> None:
        for index in left:
            texts[index] = await _ask(client, asked[index])

    try:
        async with AsyncClient(target) as client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work(client))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return texts


async def _ask(client: AsyncClient, task: Task) -> str:
    """As a chat that the server renders; a conversation with tools as the text that the template makes of it."""
    question = task.question
    plain = not question.tools and all(message.keys() == {"role", "content"} for message in question.messages)
    if plain:
        generation = client.chat(
            question.messages,
            enable_thinking=task.thinking,
            temperature=0.0,
            max_tokens=MAX_NEW_TOKENS,
            timeout=TIMEOUT_S,
        )
    else:
        generation = client.generate(task.prompt, temperature=0.0, max_tokens=MAX_NEW_TOKENS, timeout=TIMEOUT_S)
    return await generation.text()


def keep(asked: Sequence[Task], texts: Sequence[str]) -> list[KeptAnswer]:
    return [
        KeptAnswer(task.question.skill, task.thinking, task.prompt, text, task.is_right(text))
        for task, text in zip(asked, texts, strict=True)
    ]


def write_answers(path: Path, answers: Sequence[KeptAnswer]) -> None:
    """Write answers as JSON lines."""
    fields = KeptAnswer.__slots__
    lines = [json.dumps({name: getattr(answer, name) for name in fields}, ensure_ascii=False) for answer in answers]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_answers(path: Path) -> list[KeptAnswer]:
    return [KeptAnswer(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def differences(before: Sequence[KeptAnswer], now: Sequence[KeptAnswer]) -> list[str]:
    """One paragraph for each question that has another text now, or that only one side has."""
    earlier = {answer.prompt: answer.text for answer in before}
    later = {answer.prompt: answer.text for answer in now}
    return [
        f"{prompt[-200:]!r}\n  before {earlier.get(prompt)!r}\n  now    {later.get(prompt)!r}"
        for prompt in earlier | later
        if earlier.get(prompt) != later.get(prompt)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m model.demo.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--target", default="localhost:50051", help="host:port of the server (default: localhost:50051)"
    )
    parser.add_argument("--questions", type=int, default=100, help="of each skill (default: 100)")
    parser.add_argument("--skills", nargs="+", choices=list(thresholds()), default=[], help="ask only these")
    parser.add_argument("--concurrency", type=int, default=16, help="questions at the same time (default: 16)")
    parser.add_argument("--json", type=Path, help="write questions and answers here, one JSON object on a line")
    parser.add_argument("--same-as", type=Path, help="fail if an answer differs from those in this file of --json")
    parser.add_argument("--show-wrong", type=int, default=1, help="wrong answers to show of each skill (default: 1)")
    arguments = parser.parse_args()
    asked = tasks(arguments.questions, arguments.skills)
    try:
        texts = asyncio.run(ask_all(arguments.target, asked, arguments.concurrency))
    except LightqwenError as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        return 2
    scores, answers = score(asked, texts), keep(asked, texts)
    print("\n".join([*wrong_answers(asked, texts, arguments.show_wrong), table(scores)]))
    if arguments.json:
        write_answers(arguments.json, answers)
    failed = not all(row.passed for row in scores)
    if arguments.same_as:
        changed = differences(read_answers(arguments.same_as), answers)
        print("\n".join([*changed, f"{len(changed)} of {len(answers)} answers differ from {arguments.same_as}"]))
        failed = failed or bool(changed)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
