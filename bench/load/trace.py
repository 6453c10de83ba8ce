"""Traces: one JSON object on each line. docs/benchmarking.md describes the format.

    {"timestamp": 0.0, "prompt": "Why is the sky blue?", "output_length": 64}
    {"timestamp": 0.7, "messages": [{"role": "user", "content": "Hello"}]}
    {"timestamp": 1.5, "token_ids": [1, 2, 3], "output_length": 8}
    {"timestamp": 2.1, "input_length": 512, "output_length": 100, "hash_ids": [0, 1]}

The last is what Mooncake and Qwen-Bailian publish. Fields that are not named here are left alone.
"""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load.errors import LoadError
from lightqwen.client import Chat, build_chat

PROMPTS = ("prompt", "messages", "token_ids", "input_length")
LARGEST_ID = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceLine:
    """One request of a trace. Of `prompt` and `input_length`, exactly one is set."""

    number: int
    """Counts the file's lines from 1."""
    timestamp: float | None
    """In the trace's unit of time."""
    prompt: str | Chat | array[int] | None
    input_length: int | None
    output_length: int | None
    hash_ids: tuple[int, ...]


def read_trace(path: Path, limit: int | None = None) -> list[TraceLine]:
    """Read the first `limit` requests (None: all) in the order of their timestamps, which all of them have or none.

    Raises:
        LoadError: it cannot be read, or a line is not what it should be.
    """
    lines: list[TraceLine] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if limit is not None and len(lines) == limit:
                    break
                if text.strip():
                    lines.append(_read_line(path, number, text))
    except OSError as error:
        raise LoadError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LoadError(f"the trace {path} is not UTF-8 text") from error
    if not lines:
        raise LoadError(f"the trace {path} is empty")
    without = [line.number for line in lines if line.timestamp is None]
    if 0 < len(without) < len(lines):
        raise LoadError(f"{path}, line {without[0]}: no timestamp, although other lines have one")
    return sorted(lines, key=lambda line: line.timestamp or 0.0)


def _read_line(path: Path, number: int, text: str) -> TraceLine:
    try:
        fields = json.loads(text.strip())
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        given = [name for name in PROMPTS if name in fields]
        if len(given) != 1:
            raise ValueError(f"one of {', '.join(PROMPTS)} is needed, got {' and '.join(given) or 'none'}")
        return TraceLine(
            number=number,
            timestamp=_timestamp(fields.get("timestamp")),
            prompt=_prompt(given[0], fields[given[0]]),
            input_length=_length("input_length", fields.get("input_length")),
            output_length=_length("output_length", fields.get("output_length")),
            hash_ids=tuple(_ids("hash_ids", fields.get("hash_ids", []))),
        )
    except json.JSONDecodeError as error:
        raise LoadError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise LoadError(f"{path}, line {number}: {error}") from error


def _prompt(kind: str, value: Any) -> str | Chat | array[int] | None:
    if kind == "prompt":
        if not isinstance(value, str) or not value:
            raise ValueError("prompt has to be text")
        return value
    if kind == "messages":
        if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
            raise ValueError("messages has to be a list of objects with role and content")
        try:
            return build_chat(value)
        except TypeError as error:
            raise ValueError(f"messages: {error}") from error
    if kind == "token_ids":
        ids = _ids("token_ids", value)
        if not ids or max(ids) > LARGEST_ID:
            raise ValueError("token_ids has to be a list of ids of the model's vocabulary")
        return array("I", ids)
    return None


def _timestamp(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"timestamp has to be a number from 0, got {value!r}")
    return float(value)


def _length(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} has to be a whole number from 1, got {value!r}")
    return value


def _ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        raise ValueError(f"{name} has to be a list of whole numbers from 0")
    return value
