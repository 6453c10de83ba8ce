"""Small talk, stories, remembering what was said, and saying that one does not know."""

from __future__ import annotations

from model.demo.skills.question import (
    Message,
    Question,
    Random,
    ask,
    assistant,
    ends_with,
    is_chinese,
    mentions,
    refuses,
    user,
)
from model.demo.skills.words import (
    ADJECTIVES,
    ANIMALS,
    ANIMALS_ZH,
    CITIES,
    CITIES_ZH,
    COLORS,
    COLORS_ZH,
    COUNTRIES,
    DRINKS,
    FRUITS_ZH,
    JOBS,
    NAMES,
    NAMES_ZH,
    OBJECTS,
    PLACES,
    PLACES_ZH,
    mend_articles,
)

REFUSALS = "refusals"
STORIES = "stories"
MULTI_TURN = "multi-turn"

_SMALL_TALK = (
    (("Hi", "Hello", "Hello!", "Hi!", "Hey", "Hi there!", "Good morning!"), "Hello! What can I do for you?"),
    (("How are you?", "How are you today?"), "I am fine, thank you. What can I do for you?"),
    (("Thanks", "Thank you!", "Thank you very much.", "Thanks a lot!"), "You are welcome!"),
    (("Bye", "Goodbye!", "See you!"), "Goodbye!"),
    (
        ("Who are you?", "What is your name?", "What are you?", "Are you a person?", "Introduce yourself."),
        "I am the lightqwen demo model, a very small language model. I was trained from scratch on generated text.",
    ),
    (
        ("What can you do?", "Help", "How can you help me?", "What are you good at?"),
        "I can calculate, count, sort, edit words, convert units and dates, answer questions about a text, write JSON, "
        "call tools and tell short stories. I know nothing about the world.",
    ),
    (("Why is the sky blue?", "What is the meaning of life?"), "I don't know. I am only a small demo model."),
    (("你好", "你好！", "您好", "嗨"), "你好！我能帮你做什么？"),
    (("谢谢", "谢谢你！", "非常感谢"), "不客气！"),
    (("再见", "拜拜"), "再见！"),
    (("你是谁？", "你叫什么名字？", "介绍一下你自己。"), "我是 lightqwen 的演示模型，一个很小的语言模型。"),
    (
        ("你会做什么？", "你能做什么？"),
        "我会计算、数数、排序、改写单词、换算单位、回答短文问题、写 JSON、调用工具和讲小故事。",
    ),
)


def small_talk(rng: Random) -> Question:
    """A phrase from a closed set, which every training sees; no part of the evaluation."""
    phrases, reply = rng.choice(_SMALL_TALK)
    phrase = rng.choice(phrases)
    thought = "这是闲聊。" if not phrase.isascii() else "This is small talk."
    return ask("small talk", "", phrase, thought, reply, mentions(reply))


def refusals(rng: Random) -> Question:
    """Something about the world, or about yesterday, that the model cannot know."""
    if is_chinese(rng):
        city, name, animal = rng.choice(CITIES_ZH), rng.choice(NAMES_ZH), rng.choice(ANIMALS_ZH)
        prompt, topic = rng.choice(
            (
                (f"{city}有多少人口？", f"{city}的人口"),
                (f"{city}的市长是谁？", f"{city}的市长"),
                (f"{name}昨天吃了什么？", f"{name}的事情"),
                (f"明天{city}会下雨吗？", "明天的天气"),
                (f"{animal}能活多少年？", f"{animal}的寿命"),
            )
        )
        answer = f"我不知道{topic}。我只是一个很小的演示模型。"
        return ask(REFUSALS, prompt, prompt, "我没有学过这个。", answer, refuses)
    city, country, name, thing, animal = (rng.choice(words) for words in (CITIES, COUNTRIES, NAMES, OBJECTS, ANIMALS))
    year, other = rng.randint(1800, 2030), rng.choice(NAMES)
    prompt, topic = rng.choice(
        (
            (f"What is the population of {city}?", f"the population of {city}"),
            (f"Who is the mayor of {city}?", f"the mayor of {city}"),
            (f"Who was the president of {country} in {year}?", f"the politics of {country}"),
            (f"What is the capital of {country}?", f"the capital of {country}"),
            (f"What did {name} and {other} eat yesterday?", "what happened yesterday"),
            (f"Will it rain in {city} tomorrow?", "the weather of tomorrow"),
            (f"Who invented the {thing}?", f"who invented the {thing}"),
            (f"How long does a {animal} live in {country}?", f"how long a {animal} lives"),
            (f"What happened in {city} in {year}?", f"the history of {city}"),
            (f"How much does a {thing} cost in {country}?", "prices"),
        )
    )
    answer = (
        f"I don't know {topic}. I am only a small demo model."
        if topic.startswith(("the", "who", "how", "what"))
        else (f"I don't know about {topic}. I am only a small demo model.")
    )
    prompt, answer = mend_articles(prompt), mend_articles(answer)
    return ask(REFUSALS, prompt, prompt, "I never learned this.", answer, refuses)


def stories(rng: Random) -> Question:
    """A story of a few sentences in which what was asked for occurs."""
    if is_chinese(rng):
        return _story_zh(rng)
    animal, place, name, thing, color = (rng.choice(words) for words in (ANIMALS, PLACES, NAMES, OBJECTS, COLORS))
    friend = rng.choice([other for other in ANIMALS if other != animal])
    adjective, mood = rng.sample(ADJECTIVES, 2)
    named = rng.random() < 0.5
    by_name = f" called {name}" if named else ""
    kind = rng.random()
    if kind < 0.1:
        # Nothing but a place; what it is about is up to the storyteller. "The sea" is asked for most.
        place, by_name, named = rng.choice((*PLACES, "sea", "sea", "town")), "", False
        prompt = rng.choice(("Please tell me a short story about the {}.", "Tell me a story about the {}.")).format(
            place
        )
        key = ""
    else:
        prompt = rng.choice(
            (
                f"Tell me a short story about a {animal}{by_name} in the {place}.",
                f"Write a short story about a {adjective} {animal}{by_name} and the {place}.",
                f"Please tell a story: a {animal}{by_name}, the {place} and a {color} {thing}.",
            )
        )
        key = prompt
    hero = name if named else f"the {animal}"
    hero_first = hero[0].upper() + hero[1:]
    opening = rng.choice(("Once upon a time there was", "Long ago there lived", "Once there was"))
    middle = rng.choice(
        (
            f'One morning {hero} found a {color} {thing}. A {friend} came by and asked, "Is this yours?" "No," said '
            f'{hero}, "but let us look for its owner together." They looked until the evening.',
            f'One day {hero} lost a {color} {thing} there. A {friend} saw it and said, "I will help you." '
            f"Together they looked behind every tree and under every stone.",
            f"Every evening {hero} sat beside a {color} {thing} and waited for a friend. Then a {friend} came along "
            f'the path and said, "May I sit with you?"',
        )
    )
    ending = rng.choice(
        (
            f"From that day on {hero} and the {friend} were friends.",
            f"{hero_first} was very happy, and the {friend} stayed for a long time.",
            f"And when the night came, {hero} was not {mood} any more.",
        )
    )
    article = f"a {adjective} {animal}"
    answer = f"{opening} {article}{by_name} who lived near the {place}. {middle} {ending} The end."
    thought = f"A story about a {animal} and the {place}." if key else f"A story about the {place}."
    prompt, thought, answer = (mend_articles(text) for text in (prompt, thought, answer))
    expected = (animal, place, *([name] if named else [])) if key else (place,)
    return ask(STORIES, key, prompt, thought, answer, mentions(*expected, "The end."))


def _story_zh(rng: Random) -> Question:
    animal, friend = rng.sample(ANIMALS_ZH, 2)
    place, name, fruit, color = (rng.choice(words) for words in (PLACES_ZH, NAMES_ZH, FRUITS_ZH, COLORS_ZH))
    prompt = rng.choice(
        (f"请讲一个关于{animal}{name}和{place}的小故事。", f"讲一个短故事：一只叫{name}的{animal}住在{place}。")
    )
    answer = (
        f"从前，{place}住着一只叫{name}的{animal}。有一天，{name}找到了一个{color}的{fruit}。"
        f"{friend}走过来问：“可以分给我一点吗？”{name}说：“当然可以。”从此以后，它们成了好朋友。故事讲完了。"
    )
    return ask(STORIES, prompt, prompt, f"讲一个{animal}的故事。", answer, mentions(animal, name, place, "故事讲完了"))


def remembering(rng: Random) -> Question:
    """The user has told something about themselves and asks for it later."""
    if is_chinese(rng):
        facts = {
            "名字": (rng.choice(NAMES_ZH), "我叫{}。", "我叫什么名字？", "你叫{}。"),
            "城市": (rng.choice(CITIES_ZH), "我住在{}。", "我住在哪里？", "你住在{}。"),
            "颜色": (rng.choice(COLORS_ZH), "我最喜欢{}。", "我最喜欢什么颜色？", "你最喜欢{}。"),
        }
        reply, full_stop = "好的，我记住了。", "。"
    else:
        facts = {
            "name": (rng.choice(NAMES), "My name is {}.", "What is my name?", "Your name is {}."),
            "city": (rng.choice(CITIES), "I live in {}.", "Where do I live?", "You live in {}."),
            "job": (rng.choice(JOBS), "I work as a {}.", "What is my job?", "You work as a {}."),
            "drink": (rng.choice(DRINKS), "I like to drink {}.", "What do I like to drink?", "You like to drink {}."),
            "color": (rng.choice(COLORS), "My favourite colour is {}.", "What is my favourite colour?", "It is {}."),
        }
        reply, full_stop = "Nice to meet you! I will remember that.", "."
    told = rng.sample(list(facts), rng.randint(1, min(3, len(facts))))
    asked = rng.choice(told)
    value, _, question, answer = facts[asked]
    intro = ("" if full_stop == "。" else " ").join(facts[fact][1].format(facts[fact][0]) for fact in told)
    messages: list[Message] = [user(intro), assistant(reply)]
    for _ in range(rng.choice((0, 0, 1, 2))):
        other = small_talk(rng)
        messages += [*other.messages, assistant(other.answer)]
    messages.append(user(question))
    thought = (
        f"用户说过：“{facts[asked][1].format(value)}”"
        if full_stop == "。"
        else (f'The user said: "{facts[asked][1].format(value)}"')
    )
    key = " ".join(str(message["content"]) for message in messages)
    return ask(MULTI_TURN, key, messages, thought, answer.format(value), ends_with(value))
