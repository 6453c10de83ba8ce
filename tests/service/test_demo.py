"""`make demo` as a user runs it, and what it makes of a model that answers otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from service.demo import coloured, read_tool_call
from service.terminal import CommandError


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_it_shows_a_thought_a_tool_call_and_what_they_took() -> None:
    done = subprocess.run([sys.executable, "-m", "service.demo"], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout
    assert "\x1b" not in shown, "no colours where there is no terminal"
    thought, _, answer = shown.partition("<think>\n478 + 256\n")[2].partition("</think>\n\n478 + 256 = 734\n")
    assert "write 4, carry 1" in thought
    assert "734 + 99 = 833\n" in answer, "the second question is about the first one's answer"
    assert '<tool_call>\n{"name": "count_stock", "arguments": {"item": "banana"}}\n</tool_call>' in shown
    assert '\ntool: {"count": 42}\n' in shown
    assert "There are 42 pieces" in shown
    assert shown.count("(finish reason eos; ") == 4
    assert shown.count(" tokens/s)") == 4
    assert 'lightqwen_requests_finished_total{model="lightqwen-demo",reason="eos"} 4.0' in shown
    assert shown.endswith("the server ended cleanly (exit code 0)\n")


def test_a_tool_call_is_read() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"x": {"y": 1}}}\n</tool_call>'
    assert read_tool_call(f"Let me see. {call}", "f") == {"x": {"y": 1}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("There are many.", "did not call f"),
        ('<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', "did not call f"),
        ('<tool_call>\n{"name": "f", "arguments": []}\n</tool_call>', "did not call f"),
        ('<tool_call>\n{"name": "f", "arguments": }\n</tool_call>', "not JSON"),
    ],
)
def test_what_is_no_tool_call_is_said(text: str, says: str) -> None:
    with pytest.raises(CommandError, match=says):
        read_tool_call(text, "f")


def test_thoughts_are_dimmed_and_nothing_else_steers_the_terminal() -> None:
    assert coloured("<think>") == "\x1b[2m<think>"
    assert coloured("x\x1b[2J</think>\n\n4") == "x\ufffd[2J</think>\x1b[0m\n\n4"
    assert coloured("</b> plain") == "</b> plain"
