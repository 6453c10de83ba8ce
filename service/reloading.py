"""Files that may change while the server runs: certificates and tokens, as secret managers rotate them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from worker.config import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BYTES = 1 << 20


class Reloaded(Generic[T]):
    """What some files hold, as of the moment of asking. Safe to ask on any thread.

    They are parsed again when one of them is another file, or has another size or time, than at the last look. What
    cannot be read or parsed then is told once in the log, and the last good state stays.

    Args:
        paths: the files.
        parse: makes the value of their contents; raises ConfigError.

    Raises:
        ConfigError: they are no good at the start.
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[list[bytes]], T]) -> None:
        self._paths = tuple(paths)
        self._parse = parse
        self._lock = threading.Lock()
        self._signature = self._sign()
        self._value = self._load()

    def now(self) -> T:
        with self._lock:
            signature = self._sign()
            if signature != self._signature:
                self._reload(signature)
            return self._value

    def _reload(self, signature: tuple[object, ...]) -> None:
        try:
            value = self._load()
        except ConfigError as error:
            if self._sign() == signature:  # else somebody is writing: the next look sees more
                self._signature = signature
                logger.error("what was read before stays in use: %s", error)
            return
        if self._sign() == signature:
            self._signature, self._value = signature, value
            logger.info("read again: %s", ", ".join(map(str, self._paths)))

    def _load(self) -> T:
        return self._parse([_read(path) for path in self._paths])

    def _sign(self) -> tuple[object, ...]:
        return tuple(_sign(path) for path in self._paths)


def _sign(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if not data.strip():
        raise ConfigError(f"{path} is empty")
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes")
    return data
