"""JSON that follows a schema, calls of tools, and answers that use what a tool returned."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from model.demo.skills.question import (
    Message,
    Question,
    Random,
    Tool,
    ask,
    assistant,
    calls,
    is_chinese,
    is_json,
    mentions,
    refuses,
    user,
)
from model.demo.skills.words import CITIES, CITIES_ZH, COLORS, FRUITS, HOBBIES, JOBS, NAMES, NAMES_ZH, OBJECTS, PLACES

JSON = "JSON by schema"
CALL = "tool calls"
RESULT = "tool results"


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


# -- JSON -------------------------------------------------------------------------------------------------------------

Field = Callable[[Random], tuple[dict[str, Any], Any, str]]
"""Draws the schema of a property, its value, and the sentence that tells the value."""


def _string(values: list[str], *sentences: str) -> Field:
    def draw(rng: Random) -> tuple[dict[str, Any], Any, str]:
        value = rng.choice(values)
        return {"type": "string"}, value, rng.choice(sentences).format(value)

    return draw


def _integer(low: int, high: int, *sentences: str) -> Field:
    def draw(rng: Random) -> tuple[dict[str, Any], Any, str]:
        value = rng.randint(low, high)
        return {"type": "integer"}, value, rng.choice(sentences).format(value)

    return draw


def _boolean(yes: str, no: str) -> Field:
    def draw(rng: Random) -> tuple[dict[str, Any], Any, str]:
        value = rng.random() < 0.5
        return {"type": "boolean"}, value, yes if value else no

    return draw


def _array(values: list[str], sentence: str) -> Field:
    def draw(rng: Random) -> tuple[dict[str, Any], Any, str]:
        items = rng.sample(values, rng.randint(1, 4))
        return {"type": "array", "items": {"type": "string"}}, items, sentence.format(" and ".join(items))

    return draw


def _enum(values: list[str], sentence: str) -> Field:
    def draw(rng: Random) -> tuple[dict[str, Any], Any, str]:
        allowed = rng.sample(values, rng.randint(2, len(values)))
        value = rng.choice(allowed)
        return {"type": "string", "enum": allowed}, value, sentence.format(value)

    return draw


_FIELDS: dict[str, dict[str, Field]] = {
    "person": {
        "name": _string(NAMES, "The name is {}.", "This person is called {}."),
        "age": _integer(18, 99, "The age is {}.", "{} years old."),
        "city": _string(CITIES, "Lives in {}.", "The city is {}."),
        "job": _string(JOBS, "The profession is {}.", "The job is {}."),
        "hobbies": _array(HOBBIES, "Likes {}."),
        "member": _boolean("Is a member.", "Is not a member."),
        "level": _enum(["beginner", "advanced", "expert"], "The level is {}."),
    },
    "product": {
        "product": _string(OBJECTS, "The product is a {}.", "We sell a {}."),
        "color": _string(COLORS, "The colour is {}.", "It comes in {}."),
        "price": _integer(2, 999, "It costs {} euros.", "The price is {}."),
        "quantity": _integer(1, 99, "There are {} of them.", "The quantity is {}."),
        "in_stock": _boolean("It is in stock.", "It is not in stock."),
        "size": _enum(["small", "medium", "large"], "The size is {}."),
        "tags": _array(FRUITS, "The tags are {}."),
    },
    "order": {
        "customer": _string(NAMES, "The customer is {}.", "{} made the order."),
        "order_id": _integer(1000, 9999, "The order number is {}.", "It is order {}."),
        "destination": _string(CITIES, "Send it to {}.", "The destination is {}."),
        "items": _array(FRUITS, "It contains {}."),
        "paid": _boolean("It has been paid.", "It has not been paid yet."),
        "shipping": _enum(["standard", "express", "pickup"], "The shipping is {}."),
    },
}


def json_by_schema(rng: Random) -> Question:
    """A few sentences and a schema; the answer is the object, its properties in the schema's order."""
    fields = _FIELDS[rng.choice(list(_FIELDS))]
    names = rng.sample(list(fields), rng.randint(2, 5))
    drawn = {name: fields[name](rng) for name in names}
    required = list(names)
    schema = {
        "type": "object",
        "properties": {name: schema for name, (schema, _, _) in drawn.items()},
        "required": required,
        "additionalProperties": False,
    }
    expected = {name: value for name, (_, value, _) in drawn.items()}
    sentences = [sentence for _, _, sentence in drawn.values()]
    rng.shuffle(sentences)
    text = " ".join(sentences)
    wording = (
        "用符合这个 JSON schema 的对象回答："
        if is_chinese(rng, 0.15)
        else rng.choice(
            (
                "Answer with a JSON object that follows this schema:",
                "Extract the data as JSON that follows this schema:",
                "Return JSON for this schema:",
            )
        )
    )
    prompt = f"{text}\n\n{wording}\n{_dump(schema)}" if rng.random() < 0.5 else f"{wording}\n{_dump(schema)}\n\n{text}"
    thought = f"The fields are {', '.join(names)}."
    return ask(JSON, f"{text} {_dump(schema)}", prompt, thought, _dump(expected), is_json(schema, expected))


# -- tools ------------------------------------------------------------------------------------------------------------

Use = Callable[[Random, bool], tuple[dict[str, Any], str, dict[str, Any], str, tuple[str, ...]]]
"""Draws arguments, what the user says, what the tool returns, the answer, and what the answer must mention."""


def _tool(name: str, description: str, /, **properties: dict[str, Any]) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_TEXT = {"type": "string"}
_WHOLE = {"type": "integer"}


def _weather(rng: Random, zh: bool) -> Any:
    city = rng.choice(CITIES_ZH if zh else CITIES)
    degrees, sky = rng.randint(-9, 39), rng.choice(("sunny", "cloudy", "rainy", "windy"))
    result = {"temperature": degrees, "sky": sky}
    if zh:
        said = rng.choice((f"{city}今天天气怎么样？", f"{city}的天气如何？"))
        return {"city": city}, said, result, f"{city}现在 {degrees} 度，天气：{sky}。", (city, str(degrees), sky)
    said = rng.choice((f"What is the weather in {city}?", f"How is the weather in {city} today?"))
    return {"city": city}, said, result, f"In {city} it is {degrees} degrees and {sky}.", (city, str(degrees), sky)


def _time(rng: Random, zh: bool) -> Any:
    city, time = rng.choice(CITIES_ZH if zh else CITIES), f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    if zh:
        return {"city": city}, f"{city}现在几点？", {"time": time}, f"{city}现在是 {time}。", (city, time)
    return {"city": city}, f"What time is it in {city}?", {"time": time}, f"It is {time} in {city}.", (city, time)


def _timer(rng: Random, zh: bool) -> Any:
    minutes, number = rng.randint(1, 90), rng.randint(100, 999)
    said = f"定一个 {minutes} 分钟的计时器。" if zh else f"Set a timer for {minutes} minutes."
    answer = f"计时器 {number} 已经设好。" if zh else f"Timer {number} is set."
    return {"minutes": minutes}, said, {"timer": number}, answer, (str(number),)


def _message(rng: Random, zh: bool) -> Any:
    name = rng.choice(NAMES_ZH if zh else NAMES)
    thing, place = rng.choice(OBJECTS), rng.choice(PLACES)
    text = rng.choice((f"The {thing} is in the {place}", f"I am at the {place}", f"Please bring the {thing}"))
    said = f"给{name}发消息：{text}" if zh else f'Send this message to {name}: "{text}"'
    answer = f"消息已经发给{name}。" if zh else f"The message to {name} has been sent."
    return {"recipient": name, "text": text}, said, {"sent": True}, answer, (name,)


def _currency(rng: Random, zh: bool) -> Any:
    amount, result = rng.randint(2, 999), rng.randint(2, 9999)
    source, target = rng.sample(("EUR", "USD", "GBP", "JPY", "CNY", "CHF"), 2)
    said = f"{amount} {source} 是多少 {target}？" if zh else f"How much is {amount} {source} in {target}?"
    answer = f"{amount} {source} = {result} {target}"
    return {"amount": amount, "from": source, "to": target}, said, {"result": result}, answer, (str(result), target)


def _search(rng: Random, zh: bool) -> Any:
    query, pages = f"{rng.choice(COLORS)} {rng.choice(OBJECTS)}", rng.randint(2, 999)
    title = f"All about the {query}"
    said = f"搜索“{query}”。" if zh else f'Search for "{query}".'
    answer = (
        f"找到 {pages} 个结果，第一个是“{title}”。" if zh else f'There are {pages} results, the first is "{title}".'
    )
    return {"query": query}, said, {"results": pages, "first": title}, answer, (str(pages), title)


def _table(rng: Random, zh: bool) -> Any:
    people, time, name = (
        rng.randint(2, 12),
        f"{rng.randint(11, 22)}:{rng.choice(('00', '15', '30', '45'))}",
        rng.choice(NAMES),
    )
    number = rng.randint(1, 99)
    said = (
        f"以 {name} 的名字订 {people} 个人 {time} 的桌子。"
        if zh
        else f"Book a table for {people} people at {time} for {name}."
    )
    answer = f"订好了，桌号是 {number}。" if zh else f"The table is booked, its number is {number}."
    return {"people": people, "time": time, "name": name}, said, {"table": number}, answer, (str(number),)


def _stock(rng: Random, zh: bool) -> Any:
    item, count = rng.choice(FRUITS), rng.randint(0, 999)
    said = f"仓库里有多少 {item}？" if zh else f"How many pieces of {item} are in the warehouse?"
    answer = f"仓库里有 {count} 个 {item}。" if zh else f"There are {count} pieces of {item} in the warehouse."
    return {"item": item}, said, {"count": count}, answer, (item, str(count))


def _lamp(rng: Random, zh: bool) -> Any:
    room, on = rng.choice(("kitchen", "bedroom", "office", "garage", "hall")), rng.random() < 0.5
    state = "on" if on else "off"
    said = f"把 {room} 的灯{'打开' if on else '关上'}。" if zh else f"Turn {state} the light in the {room}."
    answer = f"{room} 的灯{'开' if on else '关'}了。" if zh else f"The light in the {room} is {state} now."
    return {"room": room, "on": on}, said, {"ok": True}, answer, (room,)


_TOOLS: tuple[tuple[Tool, Use], ...] = (
    (_tool("get_weather", "Get the current weather of a city", city=_TEXT), _weather),
    (_tool("get_time", "Get the local time of a city", city=_TEXT), _time),
    (_tool("set_timer", "Start a timer", minutes=_WHOLE), _timer),
    (_tool("send_message", "Send a message to a person", recipient=_TEXT, text=_TEXT), _message),
    (_tool("convert_currency", "Convert an amount of money", amount=_WHOLE, **{"from": _TEXT, "to": _TEXT}), _currency),
    (_tool("search", "Search the web", query=_TEXT), _search),
    (_tool("book_table", "Book a table in the restaurant", people=_WHOLE, time=_TEXT, name=_TEXT), _table),
    (_tool("count_stock", "Count an item in the warehouse", item=_TEXT), _stock),
    (_tool("switch_light", "Switch a light on or off", room=_TEXT, on={"type": "boolean"}), _lamp),
)
_PREFIXES = ("", "", "", "my_", "app_", "v2_", "home_", "api_")
_RENAMED = {
    "city": ("location", "place", "town"),
    "minutes": ("duration",),
    "recipient": ("to", "name"),
    "query": ("text", "q"),
}


def _variant(rng: Random, index: int) -> tuple[Tool, dict[str, str]]:
    """The tool under another name and with other names of parameters, so that they have to be read; old -> new."""
    function = _TOOLS[index][0]["function"]
    parameters = function["parameters"]["properties"]
    renamed = {old: rng.choice(_RENAMED[old]) if old in _RENAMED and rng.random() < 0.4 else old for old in parameters}
    if len(set(renamed.values())) < len(renamed):
        renamed = {old: old for old in parameters}
    properties = {renamed[old]: schema for old, schema in parameters.items()}
    return _tool(rng.choice(_PREFIXES) + function["name"], function["description"], **properties), renamed


def _scene(rng: Random) -> tuple[list[Tool], Tool, dict[str, Any], str, dict[str, Any], str, tuple[str, ...], bool]:
    """Tools of which one fits: all, that one, arguments, what is said, result, answer, what it mentions, if Chinese."""
    zh = is_chinese(rng, 0.2)
    chosen = rng.sample(range(len(_TOOLS)), rng.randint(1, 3))
    variants = {index: _variant(rng, index) for index in chosen}
    tool, renamed = variants[chosen[0]]
    arguments, said, result, answer, mentioned = _TOOLS[chosen[0]][1](rng, zh)
    arguments = {renamed[old]: value for old, value in arguments.items()}
    tools = [variant for variant, _ in variants.values()]
    rng.shuffle(tools)
    return tools, tool, arguments, said, result, answer, mentioned, zh


def _call_text(tool: Tool, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{_dump({'name': tool['function']['name'], 'arguments': arguments})}\n</tool_call>"


def tool_calls(rng: Random) -> Question:
    """A request that one of the tools fits; the answer is the call."""
    tools, tool, arguments, said, *_ = _scene(rng)
    call, name = _call_text(tool, arguments), tool["function"]["name"]
    return ask(CALL, f"{said} {_dump(tools)}", said, f"I can use {name}.", call, calls(tool, arguments), tools=tools)


def tool_results(rng: Random) -> Question:
    """A call has been answered; the reply says what came back. Or none of the tools helps, and the reply admits it."""
    tools, tool, arguments, said, result, answer, mentioned, zh = _scene(rng)
    if rng.random() < 0.2:
        others = [other for other in tools if other is not tool] or [_variant(rng, _other_index(rng, tool))[0]]
        reply = "我不知道，没有合适的工具。" if zh else "I don't know, none of my tools can tell."
        return ask(RESULT, f"no tool {said} {_dump(others)}", said, "No tool fits.", reply, refuses, tools=others)
    returned = _dump(result)
    messages: list[Message] = [
        user(said),
        {
            **assistant(""),
            "tool_calls": [
                {"type": "function", "function": {"name": tool["function"]["name"], "arguments": arguments}}
            ],
        },
        {"role": "tool", "content": returned},
    ]
    return ask(
        RESULT, f"{said} {returned}", messages, "The tool has answered.", answer, mentions(*mentioned), tools=tools
    )


def _other_index(rng: Random, tool: Tool) -> int:
    description = tool["function"]["description"]
    return rng.choice([i for i, (other, _) in enumerate(_TOOLS) if other["function"]["description"] != description])
