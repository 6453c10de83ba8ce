"""`make demo`: serve the bundled checkpoint, hold two conversations, look at the metrics, stop; 0 if all of it worked.

A program like any user's: it starts `lightqwen serve`, waits for its ready line, and talks to it through the client.
In the first conversation the model thinks before it answers. In the second it calls a tool, which runs here, and
answers with what that returned.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightqwen.client import Client, LightqwenError, build_chat
from service.talk import summary
from service.terminal import CommandError, printable, read_ready_line

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 60.0
SHOWN_METRICS = ("lightqwen_generation_tokens_total", "lightqwen_requests_finished_total", "lightqwen_kv_blocks_")

SUMS = ("What is 478 + 256?", "And if you add 99?")
STOCK = {"apple": 12, "banana": 42, "lemon": 7}
STOCK_QUESTION = "How many pieces of banana are in the warehouse?"
STOCK_SCHEMA = {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}
STOCK_TOOL = {
    "name": "count_stock",
    "description": "Count an item in the warehouse",
    "parameters_json_schema": json.dumps(STOCK_SCHEMA),
}

_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*\})\s*</tool_call>", re.DOTALL)
_TAG = re.compile(r"(<think>|<tool_call>)|</think>|</tool_call>")
_COLOURS = {"<think>": "\x1b[2m", "<tool_call>": "\x1b[36m"}
_NO_COLOUR = "\x1b[0m"

Message = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m service.demo", description="Serve, converse, measure, stop.")
    parser.add_argument("--prompt", action="append", help="ask this first, instead of sums; once more: the next turn")
    parser.add_argument("--max-tokens", type=int, default=256, help="output tokens of an answer at most (default: 256)")
    arguments = parser.parse_args()
    try:
        with _server() as (process, facts):
            with Client(facts["address"]) as client:
                _think(client, arguments.prompt or SUMS, arguments.max_tokens)
                _use_a_tool(client, arguments.max_tokens)
            _show_metrics(facts["metrics"])
            _stop(process)
    except (CommandError, LightqwenError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    return 0


# -- conversations -----------------------------------------------------------------------------------------------------


def _think(client: Client, questions: Sequence[str], max_tokens: int) -> None:
    """Ask one question after the other. What was thought is no part of what the model reads next."""
    _step("# a conversation with a model that thinks before it answers")
    messages: list[Message] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        text = _answer(client, messages, max_tokens, thinking=True)
        messages.append({"role": "assistant", "content": text.rpartition("</think>")[2].strip()})


def _use_a_tool(client: Client, max_tokens: int) -> None:
    """Ask what only a tool can tell, run the tool, and let the model answer with what it returned."""
    name = STOCK_TOOL["name"]
    _step(f"# a conversation with a model that may call {name}, a function of this program")
    messages: list[Message] = [{"role": "user", "content": STOCK_QUESTION}]
    text = _answer(client, messages, max_tokens, tools=[STOCK_TOOL])
    arguments = read_tool_call(text, name)
    call = {"name": name, "arguments_json": json.dumps(arguments, ensure_ascii=False)}
    messages.append({"role": "assistant", "tool_calls": [call]})
    messages.append({"role": "tool", "content": json.dumps({"count": STOCK.get(str(arguments.get("item")), 0)})})
    _answer(client, messages, max_tokens, tools=[STOCK_TOOL])


def read_tool_call(text: str, name: str) -> dict[str, Any]:
    """The arguments of a model's call of the tool `name`.

    Raises:
        CommandError: the text holds no such call.
    """
    found = _TOOL_CALL.search(text)
    try:
        call = json.loads(found[1]) if found else {}
    except ValueError as error:
        raise CommandError(f"the model's tool call is not JSON: {error}") from error
    arguments = call.get("arguments")
    if call.get("name") != name or not isinstance(arguments, dict):
        raise CommandError(f"the model did not call {name}")
    return arguments


def _answer(
    client: Client,
    messages: Sequence[Message],
    max_tokens: int,
    *,
    thinking: bool = False,
    tools: Sequence[Mapping[str, str]] = (),
) -> str:
    """Show the last message, stream the answer to it, say what it took, and return its text."""
    print(f"\n{messages[-1]['role']}: {messages[-1]['content']}\n")
    chat = build_chat(messages, enable_thinking=thinking)
    for tool in tools:
        chat.tools.add(**tool)
    # Generate takes no tools until calls come as messages of their own, but Tokenize shows what the template makes of
    # them: a prompt like any other.
    prompt = client.tokenize(chat, timeout=ANSWER_TIMEOUT_S).token_ids if tools else chat
    generation = client.generate(prompt, max_tokens=max_tokens, temperature=0, timeout=ANSWER_TIMEOUT_S)
    pieces: list[str] = []
    for piece in generation.pieces():
        pieces.append(piece)
        print(coloured(piece) if sys.stdout.isatty() else printable(piece), end="", flush=True)
    print(_NO_COLOUR if sys.stdout.isatty() else "")
    if generation.finished is None or generation.finished.usage.output_tokens == 0:
        raise CommandError("the answer ended without a finish, or without a token")
    print(f"\n({summary(generation.finished)})")
    return "".join(pieces)


def coloured(piece: str) -> str:
    """A piece of output as a terminal shows it: thoughts dimmed, tool calls in a colour. A tag is one token: whole."""
    return _TAG.sub(lambda tag: _COLOURS[tag[1]] + tag[0] if tag[1] else tag[0] + _NO_COLOUR, printable(piece))


# -- the server --------------------------------------------------------------------------------------------------------


@contextmanager
def _server() -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A server on free ports and its ready line's facts; its progress goes to our standard error."""
    # A model so small is faster on one thread than on several that wait for each other.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    ports = ["--port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "service.cli", "serve", "--device", "cpu", "--log-level", "warning", *ports]
    _step("$ lightqwen serve " + " ".join(command[4:]))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            facts = _wait_ready(process)
            watchdog.cancel()
            yield process, facts
        finally:
            watchdog.cancel()
            process.terminate()


def _wait_ready(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout is not None, "standard output is a pipe"
    for line in process.stdout:
        print(line, end="", flush=True)
        if (facts := read_ready_line(line)) is not None:
            return facts
    raise CommandError(f"the server ended with exit code {process.wait()} before it was ready")


def _show_metrics(url: str) -> None:
    _step(f"$ curl {url} | grep ...")
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    shown = [line for line in lines if line.startswith(SHOWN_METRICS)]
    if not shown:
        raise CommandError("the metrics do not tell of the answer")
    print("\n".join(shown))


def _stop(process: subprocess.Popen[str]) -> None:
    _step(f"$ kill -TERM {process.pid}")
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise CommandError(f"the server did not end within {STOP_TIMEOUT_S:.0f} s") from None
    if code != 0:
        raise CommandError(f"the server ended with exit code {code}")
    print("the server ended cleanly (exit code 0)")


def _step(line: str) -> None:
    """Say what comes now: a command, or a comment."""
    print(f"\n{line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
