"""Skills are functions of their random numbers, and their checks know right from wrong."""

from __future__ import annotations

import json
from random import Random

import pytest

from model.demo.data import held_out_questions, is_held_out, training_question
from model.demo.scoring import tasks, thresholds
from model.demo.skills import SKILLS, Question, TaughtSkill
from model.demo.skills.question import (
    conforms,
    ends_with,
    is_json,
    is_text,
    refuses,
    says_number,
)

EVERY_SKILL = pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.make.__name__)


def questions(skill: TaughtSkill, number: int) -> list[Question]:
    rng = Random(11)
    return [skill.make(rng) for _ in range(number)]


def shown(question: Question) -> tuple[object, ...]:
    return (question.key, list(question.messages), list(question.tools), question.thought, question.answer)


@EVERY_SKILL
def test_same_random_numbers_same_questions(skill: TaughtSkill) -> None:
    assert [shown(q) for q in questions(skill, 50)] == [shown(q) for q in questions(skill, 50)]


@EVERY_SKILL
def test_checks_accept_the_taught_answers(skill: TaughtSkill) -> None:
    for question in questions(skill, 300):
        assert question.skill == skill.name
        assert question.check(question.answer), question
        assert question.check(question.direct), question


@EVERY_SKILL
def test_checks_refuse_other_answers(skill: TaughtSkill) -> None:
    """Nothing at all is wrong, and so is nearly every answer to another question of the skill."""
    made = questions(skill, 200)
    others = made[1:] + made[:1]
    assert not any(question.check("") for question in made)
    if skill.name not in ("refusals", "small talk"):  # a refusal is right whatever it is that is not known
        taken = sum(question.check(other.answer) for question, other in zip(made, others, strict=True))
        assert taken < 0.2 * len(made)


@EVERY_SKILL
def test_checks_refuse_a_broken_answer(skill: TaughtSkill) -> None:
    if skill.name in ("stories", "refusals", "small talk", "tool results"):
        return  # free text: what is checked is what it mentions
    for question in questions(skill, 200):
        if "text does not say" not in question.answer and "没有提到" not in question.answer:
            assert not question.check(question.answer + " 99999 zzz"), question


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("42", True),
        ("7 * 6 = 42", True),
        ("It is 42.", True),
        ("有 42 个。", True),
        ("42, or 43", False),
        ("142", False),
    ],
)
def test_says_number(answer: str, right: bool) -> None:
    assert says_number(42)(answer) is right


@pytest.mark.parametrize("answer", ["-5", "3 - 8 = -5", "是-5。"])
def test_says_negative_number(answer: str) -> None:
    assert says_number(-5)(answer)
    assert not says_number(5)(answer)


def test_texts_are_compared_without_quotes_around_them() -> None:
    assert is_text("a, b")(' "a, b"\n')
    assert not is_text("a, b")("a b")
    assert ends_with("owl")('Anna has a pet owl. So: "owl"')
    assert not ends_with("owl")("a fowl")
    assert refuses("I don't know the mayor of Rome.")
    assert not refuses("The mayor of Rome is Anna.")


SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer"},
        "size": {"type": "string", "enum": ["small", "large"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["age", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ({"age": 3, "size": "small"}, True),
        ({"age": 3, "size": "small", "tags": ["x"]}, True),
        ({"age": 3}, False),
        ({"age": "3", "size": "small"}, False),
        ({"age": True, "size": "small"}, False),
        ({"age": 3, "size": "tiny"}, False),
        ({"age": 3, "size": "small", "more": 1}, False),
        ({"age": 3, "size": "small", "tags": [1]}, False),
        ([], False),
    ],
)
def test_conforms(value: object, right: bool) -> None:
    assert conforms(value, SCHEMA) is right


def test_json_must_hold_the_values() -> None:
    expected = {"age": 3, "size": "small"}
    assert is_json(SCHEMA, expected)(json.dumps(expected))
    assert not is_json(SCHEMA, expected)('{"age": 4, "size": "small"}')
    assert not is_json(SCHEMA, expected)('{"age": 3, "size": "small"')


def test_unknown_schema_keywords_are_no_silent_yes() -> None:
    with pytest.raises(KeyError, match="pattern"):
        conforms("x", {"type": "string", "pattern": "y"})


# -- what is held out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skill", list(thresholds()))
def test_held_out_questions_are_all_held_out_and_different(skill: str) -> None:
    found = held_out_questions(skill, 60, seed=3)
    assert all(is_held_out(question) for question in found)
    assert len({question.key for question in found}) == len(found)


def test_training_never_sees_a_held_out_question() -> None:
    rng = Random(5)
    trained = [training_question(rng) for _ in range(5000)]
    assert not any(is_held_out(question) for question in trained)
    asked = {(task.question.skill, task.question.key) for task in tasks(50)}
    assert not asked & {(question.skill, question.key) for question in trained}


def test_what_is_asked_counts_and_not_its_wording() -> None:
    sums = [q for q in questions(SKILLS[0], 20_000) if q.key == "7 + 8 = 15"]
    assert len({str(q.messages) for q in sums}) > 1
    assert len({is_held_out(q) for q in sums}) == 1


def test_evaluations_ask_in_both_modes() -> None:
    modes = [task.thinking for task in tasks(4, ["sorting"])]
    assert modes == [True, False, True, False]
