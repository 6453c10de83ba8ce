"""What the command line reads and writes: progress, the ready line, text of a model, and the error that ends it."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from io import TextIOWrapper
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from worker.control import Progress

READY = "lightqwen ready:"
SPARSE_SECONDS = 5.0


class CommandError(Exception):
    """A command failed for a reason that its user can see or mend: a readable line, or one for each problem."""


class Terminal:
    """What a command shows while it works: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._live = stream.isatty()
        self._open = False  # a line that may change is on the screen
        self._last_topic = ""
        self._last_at = -SPARSE_SECONDS

    def progress(self, process: str, progress: Progress) -> None:
        """Show where `process` is."""
        amount = f" {progress.done}/{progress.total}" if progress.total else ""
        self.update(f"{process}: {progress.what}{amount}", topic=f"{process}: {progress.what}")

    def update(self, line: str, topic: str = "") -> None:
        """Show a line in the place of the one before. Without a terminal: where the topic is new, or after a while."""
        if self._live:
            width = shutil.get_terminal_size().columns
            self._stream.write(f"\r\x1b[2K{line[: width - 1]}")
            self._stream.flush()
            self._open = True
        elif topic != self._last_topic or self._clock() - self._last_at >= SPARSE_SECONDS:
            self._last_topic, self._last_at = topic, self._clock()
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.close()
        self._stream.write(f"lightqwen: {line}\n")
        self._stream.flush()

    def close(self) -> None:
        """Take the changing line off the screen."""
        if self._open:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._open = False


def ready_line(facts: Mapping[str, str | int | float], seconds: float) -> str:
    """`lightqwen ready: address=… …`, each value quoted as a shell would want it; `read_ready_line` reads it."""
    items = {**facts, "ready_s": f"{seconds:.2f}"}
    return f"{READY} " + " ".join(f"{key}={shlex.quote(str(value))}" for key, value in items.items())


def read_ready_line(line: str) -> dict[str, str] | None:
    """Return the facts of a ready line; None for any other line."""
    if not line.startswith(READY):
        return None
    return dict(part.split("=", 1) for part in shlex.split(line.removeprefix(READY)))


def accept_any_text() -> None:
    """Let nothing that is read or printed fail for its encoding.

    What is no text when it is read shows when it is sent. What the terminal's encoding lacks is printed as an escape.
    Whether Python does so by itself depends on the locale.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):  # and not closed, or replaced by who calls `main`
            stream.reconfigure(errors=errors)


def printable(text: str) -> str:
    """Replace control characters, so that no output of a model can steer the terminal; line ends and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
