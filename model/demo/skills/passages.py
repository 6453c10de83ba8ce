"""Questions about a text that stands in the prompt, a few sentences long or thousands of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from model.demo.skills.question import Question, Random, ask, ends_with, is_chinese, refuses
from model.demo.skills.words import (
    ADJECTIVES,
    ANIMALS,
    ANIMALS_ZH,
    CITIES,
    CITIES_ZH,
    COLORS,
    COLORS_ZH,
    DRINKS,
    DRINKS_ZH,
    INSTRUMENTS,
    JOBS,
    JOBS_ZH,
    NAMES,
    NAMES_ZH,
    OBJECTS,
    PLACES,
    PLACES_ZH,
    mend_articles,
)

SHORT = "passage questions"
LONG = "long passages"
BACKWARD = "backward questions"


@dataclass(frozen=True, slots=True)
class Relation:
    """Something that a text says of a person."""

    values: list[str]
    facts: tuple[str, ...]  # with {n} for the name and {v} for the value
    question: str
    reverse: str  # asks for the name


_NUMBERS = [str(number) for number in range(10, 100)]
_CODES = [str(number) for number in range(1000, 10_000)]

_RELATIONS = (
    Relation(CITIES, ("{n} lives in {v}.", "The home of {n} is in {v}."), "Where does {n} live?", "Who lives in {v}?"),
    Relation(
        JOBS, ("{n} works as a {v}.", "By profession {n} is a {v}."), "What is the job of {n}?", "Who works as a {v}?"
    ),
    Relation(
        COLORS, ("The favourite colour of {n} is {v}.",), "What is the favourite colour of {n}?", "Whose colour is {v}?"
    ),
    Relation(ANIMALS, ("{n} has a pet {v}.", "At home {n} keeps a {v}."), "Which pet does {n} have?", "Who has a {v}?"),
    Relation(DRINKS, ("{n} likes to drink {v}.",), "What does {n} like to drink?", "Who likes to drink {v}?"),
    Relation(INSTRUMENTS, ("{n} plays the {v}.",), "Which instrument does {n} play?", "Who plays the {v}?"),
    Relation(_NUMBERS, ("{n} is {v} years old.",), "How old is {n}?", "Who is {v} years old?"),
    Relation(
        _CODES, ("The secret code of {n} is {v}.",), "What is the secret code of {n}?", "Whose secret code is {v}?"
    ),
)
_RELATIONS_ZH = (
    Relation(CITIES_ZH, ("{n}住在{v}。", "{n}的家在{v}。"), "{n}住在哪里？", "谁住在{v}？"),
    Relation(JOBS_ZH, ("{n}是一名{v}。", "{n}的职业是{v}。"), "{n}的职业是什么？", "谁是{v}？"),
    Relation(COLORS_ZH, ("{n}最喜欢{v}。",), "{n}最喜欢什么颜色？", "谁最喜欢{v}？"),
    Relation(ANIMALS_ZH, ("{n}养了一只{v}。",), "{n}养了什么动物？", "谁养了一只{v}？"),
    Relation(DRINKS_ZH, ("{n}爱喝{v}。",), "{n}爱喝什么？", "谁爱喝{v}？"),
    Relation(_NUMBERS, ("{n}今年{v}岁。",), "{n}今年几岁？", "谁今年{v}岁？"),
    Relation(_CODES, ("{n}的密码是{v}。",), "{n}的密码是什么？", "谁的密码是{v}？"),
)


def passage_questions(rng: Random) -> Question:
    """A text of at most 13 sentences."""
    return _question(rng, SHORT, facts=rng.randint(2, 10), fillers=rng.randint(0, 3))


def long_passages(rng: Random) -> Question:
    """A text of some hundred to about 3,600 tokens, most of it beside the point; the fact stands anywhere in it."""
    fillers = int(20 * 17 ** rng.random())
    return _question(rng, LONG, facts=rng.randint(4, 10), fillers=fillers)


def backward_questions(rng: Random) -> Question:
    """What is told of somebody is given and the name is asked for, which stands before it in the text.

    A skill of its own, for a model of this kind learns to read on from a name long before it learns to look back. So
    the working goes through the people, in the order in which the text names them, until one fits.
    """
    fillers = rng.randint(0, 3) if rng.random() < 0.9 else int(20 * 17 ** rng.random())
    return _question(rng, BACKWARD, facts=rng.randint(2, 10), fillers=fillers)


def _question(rng: Random, skill: str, facts: int, fillers: int) -> Question:
    """Few kinds of facts about several people: the name alone, or the kind alone, leads to other facts too."""
    zh = is_chinese(rng)
    relations, names = (_RELATIONS_ZH, NAMES_ZH) if zh else (_RELATIONS, NAMES)
    people = rng.sample(names, rng.randint(2, 6))
    kinds = rng.sample(range(len(relations)), rng.choice((1, 2, 3, 5)))
    told: dict[tuple[str, int], str] = {}  # who, which relation -> the value
    while len(told) < min(facts, len(people) * len(kinds) - 1):
        name, index = rng.choice(people), rng.choice(kinds)
        used = {value for (_, other), value in told.items() if other == index}
        value = rng.choice(relations[index].values)
        if (name, index) not in told and value not in used:
            told[name, index] = value
    sentences = {key: rng.choice(relations[key[1]].facts).format(n=key[0], v=value) for key, value in told.items()}
    text = list(sentences.values()) + [_filler(rng, zh) for _ in range(fillers)]
    rng.shuffle(text)
    (name, index), value = rng.choice(list(told.items()))
    relation, evidence = relations[index], sentences[name, index]
    if skill == BACKWARD:
        by_mention = dict.fromkeys(n for sentence in text for (n, _), own in sentences.items() if own == sentence)
        met = list(by_mention)[: list(by_mention).index(name) + 1]
        search = [(n, told.get((n, index), "?")) for n in met]
        return _ask_for_name(rng, zh, text, relation.reverse.format(v=value), search)
    if rng.random() < 0.15:
        name, index = rng.choice([(n, i) for n in people for i in kinds if (n, i) not in told])
        return _ask(rng, zh, skill, text, relations[index].question.format(n=name), name, "", "")
    return _ask(rng, zh, skill, text, relation.question.format(n=name), name, evidence, value)


def _ask(
    rng: Random, zh: bool, skill: str, text: list[str], question: str, topic: str, evidence: str, answer: str
) -> Question:
    """`topic` is what the question names; `evidence` is empty if the text does not answer it."""
    passage = ("" if zh else " ").join(text)
    if zh:
        thought = f"关于{topic}，短文说：“{evidence}”" if evidence else "短文里没有提到。"
        full = f"{topic}：{evidence}答案：{answer}" if evidence else "短文里没有提到。"
    else:
        passage, evidence, question = (mend_articles(part) for part in (passage, evidence, question))
        thought = f'Of {topic} the text says: "{evidence}"' if evidence else "The text says nothing about it."
        full = f"{topic}: {evidence} So: {answer}" if evidence else "The text does not say."
    prompt = _prompt(rng, zh, passage, question)
    if not evidence:
        return ask(skill, f"{question} {passage}", prompt, thought, full, refuses)
    return ask(skill, f"{question} {passage}", prompt, thought, answer, ends_with(answer), direct=full)


def _ask_for_name(rng: Random, zh: bool, text: list[str], question: str, search: list[tuple[str, str]]) -> Question:
    """`search`: those who are looked at, with what the text says of them; the last one is the answer."""
    passage = ("" if zh else " ").join(text)
    answer = search[-1][0]
    if zh:
        thought = "".join(f"{name}：{value}。" for name, value in search)
        full = f"{thought}答案：{answer}"
    else:
        passage, question = mend_articles(passage), mend_articles(question)
        thought = " ".join(f"{name}: {value}." for name, value in search)
        full = f"{thought} So: {answer}"
    prompt = _prompt(rng, zh, passage, question)
    return ask(BACKWARD, f"{question} {passage}", prompt, thought, answer, ends_with(answer), direct=full)


def _prompt(rng: Random, zh: bool, passage: str, question: str) -> str:
    if zh:
        return rng.choice((f"阅读短文并回答问题。\n\n{passage}\n\n问题：{question}", f"{passage}\n\n{question}"))
    return rng.choice(
        (f"Read the text and answer the question.\n\n{passage}\n\nQuestion: {question}", f"{passage}\n\n{question}")
    )


def _filler(rng: Random, zh: bool) -> str:
    if zh:
        animal, place = rng.choice(ANIMALS_ZH), rng.choice(PLACES_ZH)
        return rng.choice((f"{animal}在{place}休息。", f"{place}里很安静。", f"有一天，{animal}来到了{place}。"))
    adjective, animal, place, thing, color = (
        rng.choice(words) for words in (ADJECTIVES, ANIMALS, PLACES, OBJECTS, COLORS)
    )
    return rng.choice(
        (
            f"The {adjective} {animal} walked slowly to the {place}.",
            f"Near the {place} somebody had left a {color} {thing}.",
            f"It was a {adjective} day in the {place}, and nothing happened.",
            f"A {animal} looked at the {thing} and went away.",
            f"Nobody knew why the {color} {thing} was so {adjective}.",
        )
    )
