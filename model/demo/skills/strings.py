"""Edits of words and of short texts."""

from __future__ import annotations

from model.demo.skills.question import Question, Random, ask, ends_with, is_chinese, is_text
from model.demo.skills.words import ADJECTIVES, ANIMALS, COLORS, OBJECTS, PLACES, PLAIN_WORDS, any_word

SKILL = "string edits"


def string_edits(rng: Random) -> Question:
    """One edit: of the letters of a word, or of the words of a text."""
    letters = (_spell, _reverse, _reverse, _replace_letter, _drop_letter, _initials)
    words = (_case, _case, _reverse_words, _join, _replace_word, _repeat, _unique, _pick)
    return rng.choice(letters if rng.random() < 0.45 else words)(rng)


def _spelled(word: str) -> str:
    return "-".join(word)


def _letter_edit(key: str, prompt: str, steps: list[str], result: str) -> Question:
    """The letters are written out before the word is: in the thought, or in the answer itself."""
    direct = f'{", ".join(steps)}, so "{result}"'
    return ask(SKILL, key, prompt, "\n".join(steps), f'"{result}"', ends_with(result), direct=direct)


def _spell(rng: Random) -> Question:
    word = any_word(rng)
    prompt = rng.choice(('Spell the word "{}".', 'How do you spell "{}"? Write it letter by letter.')).format(word)
    if is_chinese(rng, 0.15):
        prompt = f"请逐个字母拼写“{word}”。"
    return ask(SKILL, f"spell {word}", prompt, "letter by letter", _spelled(word), is_text(_spelled(word)))


def _reverse(rng: Random) -> Question:
    word = any_word(rng)
    result = word[::-1]
    prompt = rng.choice(('Reverse the word "{}".', 'Write "{}" backwards.', 'What is "{}" spelled backwards?')).format(
        word
    )
    if is_chinese(rng, 0.15):
        prompt = f"把“{word}”倒过来写。"
    return _letter_edit(f"reverse {word}", prompt, [_spelled(word), _spelled(result)], result)


def _replace_letter(rng: Random) -> Question:
    word = any_word(rng)
    old = rng.choice(word)
    new = rng.choice([letter for letter in "abcdefghiklmnoprstuvwz" if letter != old])
    result = word.replace(old, new)
    prompt = f'Replace every {old} with {new} in "{word}".'
    if is_chinese(rng, 0.15):
        prompt = f"把“{word}”中的 {old} 都换成 {new}。"
    return _letter_edit(f"{old}>{new} {word}", prompt, [_spelled(word), _spelled(result)], result)


def _drop_letter(rng: Random) -> Question:
    word = any_word(rng)
    letter = rng.choice(word)
    result = word.replace(letter, "")
    prompt = rng.choice(('Remove every {} from "{}".', 'Delete the letter {} from "{}".')).format(letter, word)
    return _letter_edit(f"drop {letter} {word}", prompt, [_spelled(word), _spelled(result)], result)


def _initials(rng: Random) -> Question:
    words = rng.sample(PLAIN_WORDS, rng.randint(3, 5))
    result = "".join(word[0] for word in words)
    prompt = f"Take the first letter of each word: {' '.join(words)}"
    return _letter_edit(f"initials {' '.join(words)}", prompt, [_spelled(result)], result)


def _phrase(rng: Random, low: int = 2, high: int = 5) -> list[str]:
    return rng.sample(PLAIN_WORDS, rng.randint(low, high))


def _text_edit(key: str, prompt: str, thought: str, result: str) -> Question:
    return ask(SKILL, key, prompt, thought, result, is_text(result))


def _case(rng: Random) -> Question:
    text = " ".join(_phrase(rng, 1, 4))
    name, edit, wording, wording_zh = rng.choice(
        (
            ("upper", str.upper, "Write in capital letters: {}", "改成大写字母：{}"),
            ("title", str.title, "Capitalize each word: {}", "每个单词的首字母大写：{}"),
            ("lower", str.lower, "Write in lower case: {}", "改成小写字母：{}"),
        )
    )
    source = text.upper() if name == "lower" else text
    prompt = (wording_zh if is_chinese(rng, 0.15) else wording).format(source)
    return _text_edit(f"{name} {text}", prompt, f"{len(text.split())} words", edit(source))


def _reverse_words(rng: Random) -> Question:
    words = _phrase(rng, 3, 7)
    prompt = f"Reverse the order of the words: {' '.join(words)}"
    if is_chinese(rng, 0.15):
        prompt = f"把单词的顺序倒过来：{' '.join(words)}"
    result = " ".join(reversed(words))
    return _text_edit(f"order {' '.join(words)}", prompt, f"the last word is {words[-1]}", result)


def _join(rng: Random) -> Question:
    words = _phrase(rng, 2, 6)
    name, separator = rng.choice((("hyphens", "-"), ("commas", ", "), ("underscores", "_"), ("plus signs", " + ")))
    prompt = f"Join these words with {name}: {' '.join(words)}"
    return _text_edit(f"{name} {' '.join(words)}", prompt, f"{len(words)} words", separator.join(words))


def _replace_word(rng: Random) -> Question:
    first, second = rng.sample(ANIMALS, 2)
    color, thing, adjective, place = (rng.choice(words) for words in (COLORS, OBJECTS, ADJECTIVES, PLACES))
    template = rng.choice(
        (
            f"The {adjective} {{}} found a {color} {thing} in the {place}.",
            f"In the {place} a {{}} sleeps beside the {color} {thing}.",
            f"My {{}} is {adjective} and likes the {color} {thing}.",
        )
    )
    text = template.format(first)
    prompt = rng.choice(('Replace "{a}" with "{b}": {t}', 'In this sentence, change "{a}" to "{b}": {t}'))
    prompt = prompt.format(a=first, b=second, t=text)
    if is_chinese(rng, 0.15):
        prompt = f"把句子里的“{first}”换成“{second}”：{text}"
    return _text_edit(f"{first}>{second} {text}", prompt, f"{first} becomes {second}", template.format(second))


def _repeat(rng: Random) -> Question:
    words, times = _phrase(rng, 1, 2), rng.randint(2, 6)
    text = " ".join(words)
    prompt = rng.choice(('Write "{}" {} times.', 'Repeat "{}" {} times.')).format(text, times)
    if is_chinese(rng, 0.15):
        prompt = f"把“{text}”写 {times} 遍。"
    return _text_edit(f"{times} {text}", prompt, f"{times} times", ", ".join([text] * times))


def _unique(rng: Random) -> Question:
    kinds = rng.sample(PLAIN_WORDS, rng.randint(2, 5))
    words = kinds + [rng.choice(kinds) for _ in range(rng.randint(1, 4))]
    rng.shuffle(words)
    unique = list(dict.fromkeys(words))
    prompt = f"Remove the duplicates from this list: {', '.join(words)}"
    return _text_edit(f"unique {' '.join(words)}", prompt, f"{len(unique)} different words", ", ".join(unique))


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def _pick(rng: Random) -> Question:
    words = _phrase(rng, 3, 6)
    index = rng.choice([*range(len(words)), -1])
    which = "last" if index < 0 else _ORDINALS[index]
    text = " ".join(words)
    prompt = rng.choice((f"What is the {which} word of: {text}?", f'Which word is the {which} one in "{text}"?'))
    steps = ", ".join(f"{number} {word}" for number, word in enumerate(words, 1))
    return ask(
        SKILL,
        f"{which} {text}",
        prompt,
        steps,
        words[index],
        ends_with(words[index]),
        direct=f"{steps}: {words[index]}",
    )
