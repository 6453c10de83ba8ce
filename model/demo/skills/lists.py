"""Counting what is in a list or a word, and sorting numbers and words."""

from __future__ import annotations

from collections.abc import Sequence

from model.demo.skills.question import Question, Random, ask, is_chinese, is_text, says_number
from model.demo.skills.words import (
    ANIMALS,
    ANIMALS_ZH,
    CITIES,
    COLORS,
    COLORS_ZH,
    FRUITS,
    FRUITS_ZH,
    NAMES,
    PLAIN_WORDS,
    any_word,
)

COUNTING = "counting"
SORTING = "sorting"


def counting(rng: Random) -> Question:
    """Letters of a word, entries of a list, occurrences of an entry, or even numbers."""
    return rng.choice((_letters, _letters, _entries, _occurrences, _even))(rng)


def sorting(rng: Random) -> Question:
    """Numbers, up or down, or words in the order of the alphabet."""
    return _numbers(rng) if rng.random() < 0.55 else _words(rng)


def _letters(rng: Random) -> Question:
    word = any_word(rng)
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    steps = _tally(list(word), letter)
    count = word.count(letter)
    if is_chinese(rng, 0.15):
        prompt = f"“{word}”这个词里有几个字母 {letter}？"
    else:
        prompt = rng.choice(
            (
                f'How many times does the letter {letter} occur in "{word}"?',
                f'How many {letter}\'s are in the word "{word}"?',
                f'Count the letter {letter} in "{word}".',
            )
        )
    return ask(
        COUNTING, f"{letter} in {word}", prompt, steps, str(count), says_number(count), direct=f"{steps}: {count}"
    )


def _tally(entries: Sequence[str], wanted: str) -> str:
    """The entries, those that are wanted with a running number: a, b (1), c, b (2)."""
    count, parts = 0, []
    for entry in entries:
        if entry == wanted:
            count += 1
            parts.append(f"{entry} ({count})")
        else:
            parts.append(entry)
    return ", ".join(parts)


def _entries(rng: Random) -> Question:
    zh = is_chinese(rng)
    pool = rng.choice((FRUITS_ZH, ANIMALS_ZH) if zh else (FRUITS, ANIMALS, PLAIN_WORDS, NAMES, CITIES))
    entries = [rng.choice(pool) for _ in range(rng.randint(2, 12))]
    text = ("、" if zh else ", ").join(entries)
    count = len(entries)
    steps = ", ".join(f"{number} {entry}" for number, entry in enumerate(entries, 1))
    if zh:
        prompt = rng.choice(("这里有几个词：{}？", "数一数下面有几项：{}")).format(text)
    else:
        prompt = rng.choice(("How many words are in this list: {}?", "How many items are here? {}", "Count these: {}"))
        prompt = prompt.format(text)
    return ask(COUNTING, text, prompt, steps, str(count), says_number(count), direct=f"{steps}: {count}")


def _occurrences(rng: Random) -> Question:
    zh = is_chinese(rng)
    kinds = rng.sample(rng.choice((COLORS_ZH, FRUITS_ZH) if zh else (COLORS, FRUITS, ANIMALS)), rng.randint(2, 4))
    entries = [rng.choice(kinds) for _ in range(rng.randint(4, 14))]
    wanted = rng.choice(kinds)
    text = ("、" if zh else ", ").join(entries)
    steps, count = _tally(entries, wanted), entries.count(wanted)
    if zh:
        prompt = f"“{wanted}”在下面出现了几次：{text}"
    else:
        prompt = rng.choice(
            (f'How often does "{wanted}" appear here: {text}?', f'How many times is "{wanted}" in this list? {text}')
        )
    return ask(
        COUNTING, f"{wanted} in {text}", prompt, steps, str(count), says_number(count), direct=f"{steps}: {count}"
    )


def _even(rng: Random) -> Question:
    numbers = [rng.randint(1, 99) for _ in range(rng.randint(3, 9))]
    remainder = rng.randint(0, 1)
    kind = ("even", "odd")[remainder]
    text = ", ".join(map(str, numbers))
    matching = [str(number) for number in numbers if number % 2 == remainder]
    steps = ", ".join(f"{number} ({index})" for index, number in enumerate(matching, 1)) or "none"
    prompt = f"How many of these numbers are {kind}? {text}"
    if is_chinese(rng):
        prompt = f"下面有几个{('偶数', '奇数')[remainder]}：{text}"
    count = len(matching)
    return ask(COUNTING, f"{kind} {text}", prompt, steps, str(count), says_number(count), direct=f"{steps}: {count}")


def _numbers(rng: Random) -> Question:
    digits = rng.choice((1, 2, 2, 3, 3))
    count = rng.randint(3, 8)
    numbers = rng.sample(range(10**digits), count)
    if digits == 3 and rng.random() < 0.5:
        numbers = [number // rng.choice((1, 10, 100)) for number in numbers]
    numbers = list(dict.fromkeys(numbers))
    down = rng.random() < 0.4
    text = ", ".join(map(str, numbers))
    answer = ", ".join(map(str, sorted(numbers, reverse=down)))
    by_width = {width: [n for n in numbers if len(str(n)) == width] for width in (1, 2, 3)}
    groups = sorted(((width, group) for width, group in by_width.items() if group), reverse=down)
    thought = "\n".join(f"{width} digits: {', '.join(map(str, group))}" for width, group in groups)
    if is_chinese(rng):
        prompt = f"把这些数字从{'大到小' if down else '小到大'}排列：{text}"
    elif down:
        prompt = rng.choice(("Sort these numbers from largest to smallest: {}", "Sort in descending order: {}")).format(
            text
        )
    else:
        prompt = rng.choice(
            ("Sort these numbers: {}", "Sort in ascending order: {}", "Put these numbers in order, smallest first: {}")
        ).format(text)
    return ask(SORTING, f"{down} {text}", prompt, thought, answer, is_text(answer))


def _words(rng: Random) -> Question:
    pool = rng.choice((FRUITS, ANIMALS, NAMES, CITIES, PLAIN_WORDS, PLAIN_WORDS))
    words = rng.sample(pool, rng.randint(3, 7))
    text, answer = ", ".join(words), ", ".join(sorted(words))
    initials = sorted({word[0] for word in words})
    thought = "\n".join(f"{initial}: {', '.join(word for word in words if word[0] == initial)}" for initial in initials)
    prompt = rng.choice(("Sort these words alphabetically: {}", "Put these in alphabetical order: {}")).format(text)
    if is_chinese(rng, 0.15):
        prompt = f"把这些词按字母顺序排列：{text}"
    return ask(SORTING, text, prompt, thought, answer, is_text(answer))
