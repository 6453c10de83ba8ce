"""Traces: what a line may say, and how a wrong one is told."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.load.errors import LoadError
from bench.load.trace import read_trace
from lightqwen.client import build_chat


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_every_kind_of_prompt(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(
        tmp_path,
        {"prompt": "Why?", "output_length": 7},
        {"messages": messages},
        "",
        {"token_ids": [1, 2, 3]},
        {"input_length": 12, "output_length": 3, "hash_ids": [5, 6], "chat_id": 1, "type": "text", "turn": 2},
    )
    text, chat, ids, lengths = read_trace(path)
    assert (text.prompt, text.output_length, text.input_length) == ("Why?", 7, None)
    assert chat.prompt == build_chat(messages)
    assert chat.output_length is None
    assert (ids.prompt, ids.number) == (array("I", [1, 2, 3]), 4), "empty lines count, but say nothing"
    assert (lengths.prompt, lengths.input_length, lengths.output_length) == (None, 12, 3)
    assert lengths.hash_ids == (5, 6)


def test_lines_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    path = write(tmp_path, *({"timestamp": t, "input_length": n} for t, n in ((3, 1), (1, 2), (3, 3), (2.5, 4))))
    assert [line.input_length for line in read_trace(path)] == [2, 4, 1, 3], "equal times keep the file's order"
    assert [line.input_length for line in read_trace(path, 2)] == [2, 1], "the first two of the file"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"input_length": 5', "not JSON: Expecting ',' delimiter at column 19"),
        ("[1]", "not a JSON object"),
        ({"timestamp": 1}, "one of prompt, messages, token_ids, input_length is needed, got none"),
        ({"prompt": "x", "input_length": 3}, "got prompt and input_length"),
        ({"prompt": ""}, "prompt has to be text"),
        ({"prompt": 5}, "prompt has to be text"),
        ({"messages": []}, "messages has to be"),
        ({"messages": ["x"]}, "messages has to be"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "colour": "red"}]}, "colour"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [1, -2]}, "token_ids"),
        ({"token_ids": [1.5]}, "token_ids"),
        ({"token_ids": [2**32]}, "token_ids"),
        ({"input_length": 0}, "input_length has to be a whole number from 1, got 0"),
        ({"input_length": True}, "input_length"),
        ({"input_length": 5, "output_length": "7"}, "output_length"),
        ({"input_length": 5, "timestamp": -1}, "timestamp"),
        ({"input_length": 5, "timestamp": "now"}, "timestamp"),
        ('{"input_length": 5, "timestamp": NaN}', "timestamp"),
        ({"input_length": 5, "hash_ids": "abc"}, "hash_ids"),
        ({"input_length": 5, "hash_ids": [-1]}, "hash_ids"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, line: Any, words: str) -> None:
    path = write(tmp_path, {"input_length": 1}, line)
    with pytest.raises(LoadError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert words in str(caught.value)


def test_all_lines_have_a_time_or_none(tmp_path: Path) -> None:
    path = write(tmp_path, {"input_length": 1, "timestamp": 0}, {"input_length": 1})
    with pytest.raises(LoadError, match="line 2: no timestamp, although other lines have one"):
        read_trace(path)


def test_file_that_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="No such file"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(LoadError, match="Is a directory"):
        read_trace(tmp_path)
    with pytest.raises(LoadError, match="is empty"):
        read_trace(write(tmp_path, ""))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError, match="not UTF-8"):
        read_trace(tmp_path / "binary")


published = st.fixed_dictionaries(
    {
        "timestamp": st.one_of(st.integers(0, 10**7), st.floats(0, 1e6, allow_nan=False)),
        "input_length": st.integers(1, 200_000),
        "output_length": st.integers(1, 10_000),
        "hash_ids": st.lists(st.integers(0, 10**9), max_size=20),
    },
    optional={"chat_id": st.integers(), "parent_chat_id": st.integers(), "type": st.text(), "turn": st.integers()},
)


@given(st.lists(published, min_size=1, max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_published_traces_are_read_whole(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    read = read_trace(write(tmp_path, *lines))
    expected = sorted(lines, key=lambda line: line["timestamp"])
    assert [line.timestamp for line in read] == [float(line["timestamp"]) for line in expected]
    assert [line.input_length for line in read] == [line["input_length"] for line in expected]
    assert [line.output_length for line in read] == [line["output_length"] for line in expected]
    assert [list(line.hash_ids) for line in read] == [line["hash_ids"] for line in expected]


@given(st.text(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_read_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text, encoding="utf-8", errors="replace")
    told = ""
    try:
        told = f"{len(read_trace(path))} lines of {path}"
    except LoadError as error:
        told = str(error)
    assert str(path) in told
