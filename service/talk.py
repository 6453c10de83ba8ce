"""`lightqwen generate` and `lightqwen chat`: talk to a running server. Runs on the base installation."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import grpc

from lightqwen.client import Client, Finished, FinishReason, Generation, LightqwenError, build_chat
from service.access import Access
from service.terminal import CommandError, printable

PASSED_ON = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "timeout")
HELP = "/reset begins anew, /quit (or Ctrl-D) ends, Ctrl-C stops an answer"

History = list[dict[str, str]]


def generate(arguments: argparse.Namespace) -> int:
    """Send one prompt and stream the answer to standard output."""
    if arguments.raw and (arguments.system is not None or arguments.thinking is not None):
        raise CommandError("--system and --thinking belong to the chat template, which --raw leaves out")
    prompt = _read_all() if arguments.prompt == "-" else arguments.prompt
    with _connect(arguments) as client:
        history = [*_beginning(arguments), {"role": "user", "content": prompt}]
        with _ask(client, prompt if arguments.raw else history, arguments) as generation:
            _show(generation)
        _show_stats(generation, arguments)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Talk with the model until the user has had enough; what was said before is sent along."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() editing and a history)
    with _connect(arguments) as client:
        print(f"{client.model(timeout=10).name}: {HELP}", file=sys.stderr)
        history = _beginning(arguments)
        for line in _lines():
            if line in ("/quit", "/exit"):
                break
            if line == "/reset":
                history = _beginning(arguments)
            elif line.startswith("/"):
                print(HELP, file=sys.stderr)
            elif line:
                history = _turn(client, history, line, arguments)
    return 0


def _turn(client: Client, history: History, line: str, arguments: argparse.Namespace) -> History:
    """Ask, show the answer, and return the history with both; without them when the server refused."""
    asked = [*history, {"role": "user", "content": line}]
    try:
        generation = _ask(client, asked, arguments)
        text = _show(generation, interruptible=True)
    except (CommandError, LightqwenError) as error:
        print(f"lightqwen: error: {error}", file=sys.stderr)
        return history
    _show_stats(generation, arguments)
    return [*asked, {"role": "assistant", "content": _answer(text)}]


def _answer(text: str) -> str:
    """Leave out what the model thought: the next turn does not need it, and chat templates drop it too."""
    return text.partition("</think>")[2].lstrip() if "</think>" in text else text


def _ask(client: Client, prompt: str | History, arguments: argparse.Namespace) -> Generation:
    """Begin an answer: to a text as it is, or to a conversation.

    Raises:
        CommandError: the contract has no room for what was typed.
    """
    try:
        asked = prompt if isinstance(prompt, str) else build_chat(prompt, enable_thinking=arguments.thinking)
        return client.generate(asked, **_options(arguments))
    except UnicodeEncodeError as error:
        raise CommandError("what you typed is not UTF-8") from error
    except ValueError as error:
        raise CommandError(str(error)) from error


def _beginning(arguments: argparse.Namespace) -> History:
    return [] if arguments.system is None else [{"role": "system", "content": arguments.system}]


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in PASSED_ON}


def _show(generation: Generation, *, interruptible: bool = False) -> str:
    """Print the text as it comes and return it. With `interruptible`, Ctrl-C ends this answer only."""
    pieces: list[str] = []
    clean = printable if sys.stdout.isatty() else str
    try:
        for piece in generation.pieces():
            pieces.append(piece)
            print(clean(piece), end="", flush=True)
    except KeyboardInterrupt:
        generation.cancel()
        if not interruptible:
            raise
    print(flush=True)
    return "".join(pieces)


def _show_stats(generation: Generation, arguments: argparse.Namespace) -> None:
    if arguments.stats and generation.finished is not None:
        print(summary(generation.finished), file=sys.stderr)


def summary(finished: Finished) -> str:
    """One line on how a request ended, what it used and how long it took, as the server measured it."""
    usage, timings = finished.usage, finished.timings
    reason = FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_").lower()
    seconds = timings.decode.ToTimedelta().total_seconds()
    # The first token comes out of the prefill: decoding made the others.
    rate = f", {(usage.output_tokens - 1) / seconds:.1f} tokens/s" if seconds > 0 and usage.output_tokens > 1 else ""
    first = timings.time_to_first_token.ToTimedelta().total_seconds()
    return (
        f"finish reason {reason}; {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
        f"{usage.output_tokens} output tokens; first token after {first * 1000:.1f} ms{rate}"
    )


def _read_all() -> str:
    if sys.stdin is None:
        raise CommandError("standard input is closed, where `-` says that the prompt comes from")
    return sys.stdin.read()


def _lines() -> Iterator[str]:
    """What the user types, line by line, until Ctrl-D; Ctrl-C forgets the line."""
    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return


@contextlib.contextmanager
def _connect(arguments: argparse.Namespace) -> Iterator[Client]:
    """A client whose failures end the command.

    Raises:
        CommandError: a call failed, or a file cannot be read.
    """
    access = Access.read(arguments)
    try:
        with access.client() as client:
            yield client
    except LightqwenError as error:
        raise CommandError(f"{access.target}: {error}{_remedy(error)}") from error


def _remedy(error: LightqwenError) -> str:
    """What helps where nobody answered: a server that is not available itself says so, or when to try again."""
    if error.code is not grpc.StatusCode.UNAVAILABLE or error.reason or error.retry_delay_s is not None:
        return ""
    return " (is a server running there? `lightqwen serve` starts one, --target names another)"
