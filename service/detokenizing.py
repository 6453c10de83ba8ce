"""From token ids to text, one token at a time: whole code points only, stop strings found wherever they fall.

Cost per token does not grow with the output. Nothing here knows gRPC or the engine.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from worker.config import ConfigError


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The bytes of every token of a byte-level BPE."""

    pieces: tuple[bytes, ...]  # by token id; empty for ids that the tokenizer does not know
    special: frozenset[int]

    @classmethod
    def from_tokenizer_json(cls, text: str) -> TokenBytes:
        """Read the table out of tokenizer.json.

        Raises:
            ConfigError: it is not a byte-level BPE.
        """
        try:
            spec = json.loads(text)
            if not _is_byte_level(spec.get("decoder")):
                raise ConfigError(
                    "tokenizer.json: only byte-level tokenizers are supported (its decoder is not ByteLevel)"
                )
            vocab: dict[str, int] = dict(spec["model"]["vocab"])
            added = spec.get("added_tokens") or []
            vocab.update((token["content"], token["id"]) for token in added)
            special = frozenset(token["id"] for token in added if token["special"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"tokenizer.json is not the file of a byte-level BPE: {error}") from error
        byte_of = _byte_of_character()
        pieces = [b""] * (max(vocab.values(), default=-1) + 1)
        for piece, token in vocab.items():
            pieces[token] = _bytes_of(piece, byte_of)
        return cls(tuple(pieces), special)

    def decode(self, ids: Iterable[int], *, skip_special: bool) -> str:
        """The whole text at once; bytes that are not UTF-8 become U+FFFD."""
        known = len(self.pieces)
        skipped = self.special if skip_special else frozenset()
        data = b"".join(self.pieces[i] for i in ids if i < known and i not in skipped)
        return data.decode("utf-8", "replace")


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        return any(_is_byte_level(part) for part in decoder.get("decoders", ()))
    return decoder.get("type") == "ByteLevel"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's reversible mapping: printable bytes stand for themselves, the other 68 for U+0100 and following.

    Source: `bytes_to_unicode` as described with the GPT-2 release (Radford et al., 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    mapping = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in mapping)
    return mapping | {chr(0x100 + i): byte for i, byte in enumerate(list(others))}


def _bytes_of(piece: str, byte_of: dict[str, int]) -> bytes:
    """An added token whose text is not spelled in the mapping's characters stands for its own UTF-8."""
    try:
        return bytes(byte_of[character] for character in piece)
    except KeyError:
        return piece.encode("utf-8")


class StopStrings:
    """Finds the stop string that is complete first; of those complete at the same character, the longest.

    One Knuth-Morris-Pratt automaton for each string: `feed` takes a character in amortized constant time per string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = sorted(set(strings), key=len, reverse=True)
        self._failures = [_failures(string) for string in self._strings]
        self._matched = [0] * len(self._strings)

    def feed(self, character: str) -> str | None:
        """Take one character; return the stop string that it completes, if any."""
        hit: str | None = None
        for i, string in enumerate(self._strings):
            length, failures = self._matched[i], self._failures[i]
            while length and (length == len(string) or string[length] != character):
                length = failures[length - 1]
            if string[length] == character:
                length += 1
            self._matched[i] = length
            if length == len(string) and hit is None:
                hit = string
        return hit

    @property
    def undecided(self) -> int:
        """Characters at the end of what was fed that may become part of a stop string."""
        return max(
            failures[length - 1] if length == len(string) else length
            for string, failures, length in zip(self._strings, self._failures, self._matched, strict=True)
        )


def _failures(string: str) -> list[int]:
    """For each prefix: the length of its longest proper prefix that is also its suffix (Knuth, Morris, Pratt 1977)."""
    table = [0] * len(string)
    length = 0
    for i in range(1, len(string)):
        while length and string[i] != string[length]:
            length = table[length - 1]
        if string[i] == string[length]:
            length += 1
        table[i] = length
    return table


class Detokenizer:
    """The text of one sequence as its tokens come.

    `push` returns the text that is decided by then: no half code point, and nothing that a stop string may still
    begin with. After `stopped` is set there is no more text.
    """

    def __init__(
        self,
        table: TokenBytes,
        *,
        skip_special: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._pieces = table.pieces
        self._skipped: frozenset[int] = table.special if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopStrings(stop) if stop else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self.stopped: str | None = None
        """The stop string that ended the text."""

    def push(self, token: int) -> str:
        """Take the next token. A stop string counts only if it is complete at `min_tokens` tokens or later."""
        self._num_tokens += 1
        if token in self._skipped or token >= len(self._pieces):
            return ""
        return self._decide(self._utf8.decode(self._pieces[token]))

    def skip(self) -> None:
        """Count a token that has no text: one that ended the sequence."""
        self._num_tokens += 1

    def flush(self) -> str:
        """The sequence is over: the rest, with U+FFFD for a code point that will not be completed."""
        rest = self._decide(self._utf8.decode(b"", True))
        if self.stopped is not None:
            return rest
        rest += self._held
        self._held = ""
        return rest

    def _decide(self, text: str) -> str:
        if self._stops is None:
            return text
        for i, character in enumerate(text):
            hit = self._stops.feed(character)
            if hit is not None and self._num_tokens >= self._min_tokens:
                self.stopped = hit
                decided = self._held + text[: i + 1]
                self._held = ""
                return decided if self._include_stop else decided[: -len(hit)]
        whole = self._held + text
        keep = len(whole) - self._stops.undecided
        self._held = whole[keep:]
        return whole[:keep]
