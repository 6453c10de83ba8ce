"""What a skill makes: a question, the answer that is to be learnt, and the check that tells right from wrong."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
Check = Callable[[str], bool]
Random = random.Random


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question with one right answer.

    Attributes:
        skill: whose question it is.
        key: what is asked, whatever its wording; whether it is held out hangs on it. Empty: from a closed set of
            phrases, never held out and never part of an evaluation.
        messages: the conversation, up to the message that is to be answered.
        tools: functions that may be called, in the form that chat templates take.
        thought: what goes between <think> and </think>.
        answer: what follows a thought.
        direct: what is said without a thought; it may show its working.
        check: tells whether an answer, without its thought, is right.
    """

    skill: str
    key: str
    messages: Sequence[Message]
    thought: str
    answer: str
    direct: str
    check: Check
    tools: Sequence[Tool] = ()

    def with_history(self, history: Sequence[Message]) -> Question:
        """The same question after other turns; a system message stays the first."""
        system = [message for message in self.messages[:1] if message["role"] == "system"]
        return replace(self, messages=[*system, *history, *self.messages[len(system) :]])


Skill = Callable[[Random], Question]
"""Makes one question, English or Chinese, from nothing but the random numbers that it is handed."""


def ask(
    skill: str,
    key: str,
    prompt: str | Sequence[Message],
    thought: str,
    answer: str,
    check: Check,
    *,
    direct: str | None = None,
    tools: Sequence[Tool] = (),
) -> Question:
    """A question; `prompt` is what the user says, or the whole conversation."""
    return Question(
        skill=skill,
        key=key,
        messages=[user(prompt)] if isinstance(prompt, str) else prompt,
        thought=thought,
        answer=answer,
        direct=answer if direct is None else direct,
        check=check,
        tools=tools,
    )


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def is_chinese(rng: Random, share: float = 0.25) -> bool:
    return rng.random() < share


# -- checks -----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)|(?<=[\u4e00-\u9fff])-?\d+(?:\.\d+)?|-?\d+(?:\.\d+)?(?=[\u4e00-\u9fff])"
)
_EDGES = " \t\n.!?,;:\"'`()。！？，；：“”「」"


def says_number(expected: int) -> Check:
    """The last number of the answer is this one."""

    def check(answer: str) -> bool:
        numbers = _NUMBER.findall(answer)
        return bool(numbers) and float(numbers[-1]) == expected

    return check


def ends_with(expected: str) -> Check:
    """The last word of the answer is this one, whatever quotes and full stops stand around it."""

    def check(answer: str) -> bool:
        text = answer.strip(_EDGES)
        before = text[: -len(expected)]
        ascii_edge = expected[:1].isascii() and before[-1:].isascii() and before[-1:].isalnum()
        return text.endswith(expected) and not ascii_edge

    return check


def is_text(expected: str) -> Check:
    """The answer is this text, apart from quotes and blanks around it."""
    return lambda answer: answer.strip(_EDGES) == expected.strip(_EDGES)


def mentions(*expected: str) -> Check:
    """Every one of these occurs in the answer."""
    return lambda answer: all(part in answer for part in expected)


def refuses(answer: str) -> bool:
    """The answer says that it does not know."""
    return any(phrase in answer for phrase in ("don't know", "does not say", "不知道", "没有提到"))


def is_json(schema: Mapping[str, Any], expected: Mapping[str, Any]) -> Check:
    """The answer is a JSON object that conforms to the schema and holds these values."""

    def check(answer: str) -> bool:
        try:
            value = json.loads(answer)
        except ValueError:
            return False
        return conforms(value, schema) and value == expected

    return check


_TOOL_CALL = re.compile(r"<tool_call>\n(.*)\n</tool_call>", re.DOTALL)


def calls(tool: Tool, arguments: Mapping[str, Any]) -> Check:
    """The answer is one call of this tool, in Qwen3's format, with these arguments, and they conform to its schema."""

    def check(answer: str) -> bool:
        found = _TOOL_CALL.fullmatch(answer.strip())
        try:
            call = json.loads(found[1]) if found else None
        except ValueError:
            return False
        function = tool["function"]
        return call == {"name": function["name"], "arguments": arguments} and conforms(
            call["arguments"], function["parameters"]
        )

    return check


_JSON_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


def conforms(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value follows a JSON schema, of which only the keywords that the skills use are known.

    Raises:
        KeyError: the schema has a keyword beyond those.
    """
    unknown = schema.keys() - {"type", "properties", "required", "additionalProperties", "items", "enum", "description"}
    if unknown:
        raise KeyError(f"schema keywords that are not known here: {', '.join(sorted(unknown))}")
    kind = schema["type"]
    if not isinstance(value, _JSON_TYPES[kind]) or isinstance(value, bool) != (kind == "boolean"):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, list):
        return all(conforms(item, schema["items"]) for item in value)
    if not isinstance(value, dict):
        return True
    properties = schema["properties"]
    return (
        all(name in value for name in schema.get("required", ()))
        and (schema.get("additionalProperties", True) or value.keys() <= properties.keys())
        and all(conforms(item, properties[name]) for name, item in value.items() if name in properties)
    )
