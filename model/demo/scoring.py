"""Which held-out questions an evaluation asks, how their answers are counted, and the table that tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.demo.chat import prompt, without_thought
from model.demo.data import held_out_questions
from model.demo.skills import SKILLS, Question

EVALUATION_SEED = 7
MAX_NEW_TOKENS = 384


@dataclass(frozen=True, slots=True)
class Task:
    """One question in one mode."""

    question: Question
    thinking: bool

    @property
    def prompt(self) -> str:
        return prompt(self.question, thinking=self.thinking)

    def is_right(self, text: str) -> bool:
        """Judge what a model has written, thought included."""
        return self.question.check(without_thought(text) if self.thinking else text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How a skill did. Right answers with and without a thought, and how often each was asked for."""

    skill: str
    threshold: float
    thinking_right: int
    thinking_asked: int
    direct_right: int
    direct_asked: int

    @property
    def right(self) -> int:
        return self.thinking_right + self.direct_right

    @property
    def asked(self) -> int:
        return self.thinking_asked + self.direct_asked

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def passed(self) -> bool:
        return self.share >= self.threshold


def thresholds() -> dict[str, float]:
    """The skills that are evaluated, and the share of right answers that each must reach."""
    return {skill.name: skill.threshold for skill in SKILLS if skill.threshold > 0}


def tasks(questions_per_skill: int, skills: Sequence[str] = ()) -> list[Task]:
    """Held-out questions, the same for the same number; every other one is to be answered with a thought."""
    return [
        Task(question, thinking=index % 2 == 0)
        for skill in skills or thresholds()
        for index, question in enumerate(held_out_questions(skill, questions_per_skill, EVALUATION_SEED))
    ]


def score(asked: Sequence[Task], texts: Sequence[str]) -> list[Score]:
    """Count right answers by skill."""
    results = []
    for skill, threshold in thresholds().items():
        marks = [
            (task.thinking, task.is_right(text))
            for task, text in zip(asked, texts, strict=True)
            if task.question.skill == skill
        ]
        if marks:
            results.append(
                Score(
                    skill=skill,
                    threshold=threshold,
                    thinking_right=sum(right for thinking, right in marks if thinking),
                    thinking_asked=sum(thinking for thinking, _ in marks),
                    direct_right=sum(right for thinking, right in marks if not thinking),
                    direct_asked=sum(not thinking for thinking, _ in marks),
                )
            )
    return results


def table(scores: Sequence[Score]) -> str:
    """The scores as Markdown."""

    def percent(right: int, asked: int) -> str:
        return f"{100 * right / asked:5.1f} %" if asked else "      -"

    lines = [
        "| skill              | thinking |  direct | together | wanted |    |",
        "| ------------------ | -------: | ------: | -------: | -----: | -- |",
    ]
    for row in scores:
        lines.append(
            f"| {row.skill:18} |  {percent(row.thinking_right, row.thinking_asked)} | "
            f"{percent(row.direct_right, row.direct_asked)} |  {100 * row.share:5.1f} % | "
            f"{100 * row.threshold:4.0f} % | {'ok' if row.passed else 'NO'} |"
        )
    return "\n".join(lines)


def wrong_answers(asked: Sequence[Task], texts: Sequence[str], limit: int) -> list[str]:
    """Some answers that are wrong, for whoever wants to know why: at most `limit` of each skill."""
    seen: dict[str, int] = {}
    lines = []
    for task, text in zip(asked, texts, strict=True):
        skill = task.question.skill
        if not task.is_right(text) and seen.setdefault(skill, 0) < limit:
            seen[skill] += 1
            said = str(task.question.messages[-1]["content"])[-160:]
            wanted = task.question.answer if task.thinking else task.question.direct
            lines.append(f"{skill}, thinking={task.thinking}: {said!r}\n  wanted {wanted!r}\n  got    {text[-300:]!r}")
    return lines
