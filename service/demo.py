"""`make demo`: serve the bundled checkpoint, stream one answer, look at the metrics, stop; 0 if all of it worked.

A program like any user's: it starts `lightqwen serve`, waits for its ready line, and talks to it through the client.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from lightqwen.client import Client, LightqwenError
from service.talk import summary
from service.terminal import CommandError, printable, read_ready_line

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 60.0
SHOWN_METRICS = ("lightqwen_generation_tokens_total", "lightqwen_requests_finished_total", "lightqwen_kv_blocks_")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m service.demo", description="Serve, stream, measure, stop.")
    parser.add_argument("--prompt", default="Please tell me a short story about the sea.", help="what to ask")
    parser.add_argument("--max-tokens", type=int, default=160, help="output tokens at most")
    arguments = parser.parse_args()
    try:
        with _server() as (process, facts):
            _stream(facts["address"], arguments.prompt, arguments.max_tokens)
            _show_metrics(facts["metrics"])
            _stop(process)
    except (CommandError, LightqwenError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _server() -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A server on free ports and its ready line's facts; its progress goes to our standard error."""
    ports = ["--port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "service.cli", "serve", "--device", "cpu", "--log-level", "warning", *ports]
    _step("lightqwen serve " + " ".join(command[4:]))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
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


def _stream(address: str, prompt: str, max_tokens: int) -> None:
    _step(f'lightqwen generate --target {address} --max-tokens {max_tokens} "{prompt}"')
    began = time.monotonic()
    with Client(address) as client:
        generation = client.chat(prompt, max_tokens=max_tokens, seed=1, timeout=ANSWER_TIMEOUT_S)
        for piece in generation.pieces():
            print(printable(piece), end="", flush=True)
    seconds = time.monotonic() - began
    if generation.finished is None or generation.finished.usage.output_tokens == 0:
        raise CommandError("the answer ended without a finish, or without a token")
    print(f"\n\n{summary(generation.finished)}; {seconds:.2f} s in all, seen from here")


def _show_metrics(url: str) -> None:
    _step(f"curl {url} | grep ...")
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    shown = [line for line in lines if line.startswith(SHOWN_METRICS)]
    if not shown:
        raise CommandError("the metrics do not tell of the answer")
    print("\n".join(shown))


def _stop(process: subprocess.Popen[str]) -> None:
    _step(f"kill -TERM {process.pid}")
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise CommandError(f"the server did not end within {STOP_TIMEOUT_S:.0f} s") from None
    if code != 0:
        raise CommandError(f"the server ended with exit code {code}")
    print("the server ended cleanly (exit code 0)")


def _step(command: str) -> None:
    print(f"\n$ {command}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
