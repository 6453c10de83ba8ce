"""What the demo model is taught: skills whose answers a program can check, each a function of random numbers."""

from __future__ import annotations

from dataclasses import dataclass

from model.demo.skills.arithmetic import arithmetic, follow_up
from model.demo.skills.conversions import conversions
from model.demo.skills.lists import counting, sorting
from model.demo.skills.passages import backward_questions, long_passages, passage_questions
from model.demo.skills.question import Question, Skill
from model.demo.skills.strings import string_edits
from model.demo.skills.structured import json_by_schema, tool_calls, tool_results
from model.demo.skills.talk import refusals, remembering, small_talk, stories

__all__ = ["SKILLS", "Question", "TaughtSkill"]


@dataclass(frozen=True, slots=True)
class TaughtSkill:
    """A generator of questions, its relative share of the documents, and the share of right answers it must reach."""

    name: str
    make: Skill
    share: float
    threshold: float


SKILLS = (
    TaughtSkill("arithmetic", arithmetic, 14, 0.95),
    TaughtSkill("counting", counting, 7, 0.95),
    TaughtSkill("sorting", sorting, 8, 0.95),
    TaughtSkill("string edits", string_edits, 16, 0.95),
    TaughtSkill("conversions", conversions, 8, 0.90),
    TaughtSkill("passage questions", passage_questions, 18, 0.95),
    TaughtSkill("long passages", long_passages, 2.5, 0.95),
    TaughtSkill("backward questions", backward_questions, 32, 0.95),
    TaughtSkill("JSON by schema", json_by_schema, 4, 0.98),
    TaughtSkill("tool calls", tool_calls, 7, 0.98),
    TaughtSkill("tool results", tool_results, 3, 0.95),
    TaughtSkill("stories", stories, 2, 0.90),
    TaughtSkill("refusals", refusals, 2, 0.90),
    TaughtSkill("multi-turn", remembering, 2, 0.90),
    TaughtSkill("multi-turn", follow_up, 3, 0.90),
    TaughtSkill("small talk", small_talk, 1.5, 0.0),
)
