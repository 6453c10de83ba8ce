"""The incremental detokenizer, against the tokenizer's own decode and against a naive search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from service.detokenizing import Detokenizer, StopStrings, TokenBytes
from tests.service.conftest import train_tokenizer
from worker.config import ConfigError

TOKENIZER = train_tokenizer()
TABLE = TokenBytes.from_tokenizer_json(TOKENIZER.to_str())
TOKENS = st.lists(st.integers(0, TOKENIZER.get_vocab_size() + 20), max_size=40)


@given(TOKENS, st.booleans())
def test_the_pieces_are_the_whole_text(tokens: list[int], skip_special: bool) -> None:
    detokenizer = Detokenizer(TABLE, skip_special=skip_special)
    text = "".join(detokenizer.push(token) for token in tokens) + detokenizer.flush()
    assert text == TOKENIZER.decode(tokens, skip_special_tokens=skip_special)
    assert text == TABLE.decode(tokens, skip_special=skip_special)


@given(st.text(max_size=60))
def test_every_text_survives_and_comes_in_whole_code_points(text: str) -> None:
    detokenizer = Detokenizer(TABLE)
    pieces = [detokenizer.push(token) for token in TOKENIZER.encode(text).ids]
    assert "".join(pieces) + detokenizer.flush() == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


LETTERS = st.text(alphabet="abż🙂 ", min_size=1, max_size=5)


def naive_stop(tokens: list[int], stops: list[str], min_tokens: int) -> tuple[int, str, str] | None:
    """How many tokens it takes, the text before the stop string, and the stop string; by trying every prefix."""
    seen = ""
    for count in range(1, len(tokens) + 1):
        text = TABLE.decode(tokens[:count], skip_special=True)
        text = text[: len(text) - _undecoded(tokens[:count])]
        for end in range(len(seen) + 1, len(text) + 1):
            hits = [stop for stop in stops if text[:end].endswith(stop)]
            if hits and count >= min_tokens:
                hit = max(hits, key=len)
                return count, text[: end - len(hit)], hit
        seen = text
    return None


def _undecoded(tokens: list[int]) -> int:
    """1 where the last bytes are the beginning of a code point, which a whole decode shows as one U+FFFD."""
    data = b"".join(TABLE.pieces[token] for token in tokens)
    for size in range(1, 4):
        tail = data[-size:]
        if len(tail) == size and tail[0] >= 0xC0:
            missing = (2 if tail[0] < 0xE0 else 3 if tail[0] < 0xF0 else 4) - size
            return int(missing > 0)
    return 0


@given(LETTERS.flatmap(lambda a: st.lists(st.sampled_from([a, "a", "b", "ż", "🙂", " ", "ab"]), max_size=20)),
       st.lists(LETTERS, min_size=1, max_size=4), st.integers(0, 8), st.booleans())  # fmt: skip
def test_stop_strings_are_found_as_a_naive_search_finds_them(
    words: list[str], stops: list[str], min_tokens: int, include_stop: bool
) -> None:
    # One byte per token: every border that there can be.
    tokens = [TABLE.pieces.index(bytes([byte])) for byte in "".join(words).encode()]
    expected = naive_stop(tokens, stops, min_tokens)
    detokenizer = Detokenizer(TABLE, stop=stops, include_stop=include_stop, min_tokens=min_tokens)
    text, count = "", 0
    for token in tokens:
        count += 1
        text += detokenizer.push(token)
        if detokenizer.stopped is not None:
            break
    if expected is None:
        assert detokenizer.stopped is None
        assert text + detokenizer.flush() == "".join(words)
    else:
        wanted_count, before, stop = expected
        assert (count, text, detokenizer.stopped) == (wanted_count, before + stop * include_stop, stop)


@given(TOKENS, st.lists(LETTERS, min_size=1, max_size=3))
def test_only_what_a_stop_string_may_begin_with_is_held_back(tokens: list[int], stops: list[str]) -> None:
    detokenizer, plain = Detokenizer(TABLE, stop=stops), Detokenizer(TABLE)
    held, given_out = "", ""
    for token in tokens:
        held += plain.push(token)
        given_out += detokenizer.push(token)
        if detokenizer.stopped is not None:
            return
        kept = held[len(given_out) :]
        assert held.startswith(given_out)
        assert not kept or any(stop.startswith(kept) for stop in stops)


def test_the_longest_of_the_stop_strings_that_end_together_wins() -> None:
    stops = StopStrings(["c", "abc", "bc"])
    assert [stops.feed(character) for character in "xabc"] == [None, None, None, "abc"]


def test_a_repetitive_stop_string_is_followed_all_the_way() -> None:
    stop = "a" * 255 + "b"
    stops = StopStrings([stop])
    assert not any(stops.feed(character) for character in "a" * 5000)
    assert stops.undecided == 255
    assert stops.feed("b") == stop


@pytest.mark.parametrize(
    "broken", ["{", "[]", "{}", '{"decoder": {"type": "WordPiece"}}', '{"decoder": {"type": "ByteLevel"}, "model": {}}']
)
def test_a_file_that_is_no_byte_level_tokenizer_is_refused(broken: str) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        TokenBytes.from_tokenizer_json(broken)


def test_added_tokens_with_other_characters_stand_for_themselves() -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_tokens(["<a b>", "é"])
    table = TokenBytes.from_tokenizer_json(tokenizer.to_str())
    for token in range(tokenizer.get_vocab_size()):
        assert table.decode([token], skip_special=False) == tokenizer.decode([token], skip_special_tokens=False)
