"""What the evaluation keeps and compares. That it speaks to a server, the tests of the whole server show."""

from __future__ import annotations

from pathlib import Path

from model.demo.chat import END_OF_TURN, completion
from model.demo.evaluate import differences, keep, read_answers, write_answers
from model.demo.scoring import score, table, tasks, wrong_answers

ASKED = tasks(4, ["arithmetic", "tool calls"])
RIGHT = [completion(task.question, thinking=task.thinking).removesuffix(END_OF_TURN) for task in ASKED]


def test_right_answers_score_everything() -> None:
    scores = score(ASKED, RIGHT)
    assert [(row.skill, row.share, row.passed) for row in scores] == [("arithmetic", 1, True), ("tool calls", 1, True)]
    assert wrong_answers(ASKED, RIGHT, 3) == []


def test_one_wrong_answer_of_four_fails() -> None:
    texts = ["", *RIGHT[1:]]
    arithmetic, tools = score(ASKED, texts)
    assert (arithmetic.thinking_right, arithmetic.thinking_asked, arithmetic.direct_right) == (1, 2, 2)
    assert not arithmetic.passed
    assert tools.passed
    assert "NO" in table([arithmetic])
    assert "NO" not in table([tools])
    assert len(wrong_answers(ASKED, texts, 3)) == 1


def test_a_thought_that_never_ends_is_no_answer() -> None:
    text = RIGHT[0].replace("</think>", "")
    assert not ASKED[0].is_right(text)


def test_kept_answers_are_compared_question_by_question(tmp_path: Path) -> None:
    answers = keep(ASKED, RIGHT)
    write_answers(tmp_path / "answers", answers)
    assert read_answers(tmp_path / "answers") == answers
    assert differences(answers, answers) == []
    changed = keep(ASKED, [*RIGHT[:-1], "something else"])
    assert len(differences(answers, changed)) == 1
    assert len(differences(answers, answers[1:])) == 1
