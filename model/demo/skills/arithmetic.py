"""Sums, differences, products, quotients and word problems, up to three digits."""

from __future__ import annotations

from model.demo.skills.question import Question, Random, ask, assistant, is_chinese, says_number, user
from model.demo.skills.words import FRUITS, FRUITS_ZH, NAMES, NAMES_ZH

SKILL = "arithmetic"


def arithmetic(rng: Random) -> Question:
    """One operation on numbers of up to three digits, a chain of two, a comparison, or a word problem."""
    kinds = (_sum, _sum, _sum, _difference, _difference, _difference, _product, _product, _quotient, _larger, _shopping)
    return rng.choice(kinds)(rng)


def follow_up(rng: Random) -> Question:
    """A second operation on the result of the first, which stands in the conversation."""
    first, second, third = (rng.randint(2, 300) for _ in range(3))
    total = first + second
    zh = is_chinese(rng)
    before = [
        user(f"{first} + {second} 等于多少？" if zh else f"What is {first} + {second}?"),
        assistant(f"{first} + {second} = {total}"),
    ]
    if rng.random() < 0.5:
        result, sign, wording = total + third, "+", (f"再加 {third} 呢？" if zh else f"And if you add {third}?")
        thought = add_trace(total, third)
    else:
        result, sign, wording = total - third, "-", (f"再减 {third} 呢？" if zh else f"Now subtract {third}.")
        thought = subtract_trace(total, third)
    answer = f"{total} {sign} {third} = {result}"
    return ask("multi-turn", answer, [*before, user(wording)], thought, answer, says_number(result))


def add_trace(left: int, right: int) -> str:
    """Column addition from the right, one line for each digit."""
    lines, carry = [f"{left} + {right}"], 0
    width = max(len(str(left)), len(str(right)))
    for a, b in _columns(left, right, width):
        total = a + b + carry
        carried = f" + {carry}" if carry else ""
        line = f"{a} + {b}{carried} = {total}"
        carry = total // 10
        lines.append(f"{line}, write {total % 10}, carry {carry}" if carry else f"{line}, write {total}")
    if carry:
        lines.append(f"write {carry}")
    return "\n".join([*lines, f"{left} + {right} = {left + right}"])


def subtract_trace(left: int, right: int) -> str:
    """Column subtraction from the right; of a negative difference, the other way round."""
    if left < right:
        return "\n".join(
            [f"{left} < {right}, so it is negative", subtract_trace(right, left), f"{left} - {right} = {left - right}"]
        )
    lines, borrow = [f"{left} - {right}"], 0
    for a, b in _columns(left, right, len(str(left))):
        borrowed = f" - {borrow}" if borrow else ""
        difference = a - b - borrow
        borrow = int(difference < 0)
        more = f" + 10 = {difference + 10}, borrow 1" if borrow else ""
        lines.append(f"{a} - {b}{borrowed} = {difference}{more}, write {difference % 10}")
    return "\n".join([*lines, f"{left} - {right} = {left - right}"])


def _columns(left: int, right: int, width: int) -> list[tuple[int, int]]:
    """The digits of both, from the right."""
    pairs = zip(f"{left:0{width}}", f"{right:0{width}}", strict=True)
    return [(int(a), int(b)) for a, b in pairs][::-1]


def multiply_steps(left: int, digit: int) -> str:
    """A product with one digit, as a chain: 347 * 6 = 1800 + 240 + 42 = 2040 + 42 = 2082."""
    digits = str(left)
    parts = [int(d) * 10 ** (len(digits) - 1 - i) * digit for i, d in enumerate(digits) if d != "0"]
    chain = [f"{left} * {digit}"]
    while parts:
        chain.append(" + ".join(map(str, parts)))
        parts = [parts[0] + parts[1], *parts[2:]] if len(parts) > 1 else []
    return " = ".join(chain)


def _any_number(rng: Random) -> int:
    return rng.randint(0, 10 ** rng.choice((1, 2, 3, 3, 3)) - 1)


def _sum(rng: Random) -> Question:
    left, right = _any_number(rng), _any_number(rng)
    return _ask(rng, left, "+", right, left + right, add_trace(left, right))


def _difference(rng: Random) -> Question:
    left, right = _any_number(rng), _any_number(rng)
    if left < right and rng.random() < 0.8:
        left, right = right, left
    return _ask(rng, left, "-", right, left - right, subtract_trace(left, right))


def _product(rng: Random) -> Question:
    if rng.random() < 0.5:
        left, right = rng.randint(2, 999), rng.randint(2, 9)
        steps = multiply_steps(left, right)
        return _ask(rng, left, "*", right, left * right, steps, direct=steps)
    left, right = rng.randint(11, 99), rng.randint(11, 99)
    tens, ones = divmod(right, 10)
    lines = [
        f"{right} = {tens * 10} + {ones}",
        multiply_steps(left, tens),
        f"{left} * {tens * 10} = {left * tens * 10}",
    ]
    if ones:
        lines.append(multiply_steps(left, ones))
    lines.append(f"{left * tens * 10} + {left * ones} = {left * right}")
    direct = f"{left} * {right} = {left * tens * 10} + {left * ones} = {left * right}"
    return _ask(rng, left, "*", right, left * right, "\n".join(lines), direct=direct)


def _quotient(rng: Random) -> Question:
    divisor = rng.randint(2, 9)
    quotient = rng.randint(2, 999 // divisor)
    dividend = divisor * quotient
    steps, rest = [], 0
    for digit in str(dividend):
        current = rest * 10 + int(digit)
        rest = current % divisor
        steps.append(f"{current} = {current // divisor} * {divisor} + {rest}")
    thought = "\n".join([f"{dividend} / {divisor}", *steps])
    direct = f"{', '.join(steps)}, so {dividend} / {divisor} = {quotient}"
    return _ask(rng, dividend, "/", divisor, quotient, thought, direct=direct)


_WORDINGS = {
    "+": ("{a} + {b}", "{a} plus {b}", "the sum of {a} and {b}"),
    "-": ("{a} - {b}", "{a} minus {b}", "the difference {a} - {b}"),
    "*": ("{a} * {b}", "{a} times {b}", "{a} × {b}"),
    "/": ("{a} / {b}", "{a} divided by {b}", "{a} ÷ {b}"),
}
_WORDINGS_ZH = {
    "+": ("{a} + {b}", "{a} 加 {b}"),
    "-": ("{a} - {b}", "{a} 减 {b}"),
    "*": ("{a} * {b}", "{a} 乘以 {b}", "{a} × {b}"),
    "/": ("{a} / {b}", "{a} 除以 {b}", "{a} ÷ {b}"),
}
_REQUESTS = ("What is {}?", "What is {}?", "Calculate {}.", "How much is {}?", "{} = ?", "Please work out {}.")
_REQUESTS_ZH = ("{} 等于多少？", "请计算 {}。", "{} 是多少？", "算一下 {}。")


def _ask(rng: Random, left: int, sign: str, right: int, result: int, thought: str, direct: str = "") -> Question:
    zh = is_chinese(rng)
    wording = rng.choice((_WORDINGS_ZH if zh else _WORDINGS)[sign]).format(a=left, b=right)
    prompt = rng.choice(_REQUESTS_ZH if zh else _REQUESTS).format(wording)
    answer = f"{left} {sign} {right} = {result}"
    return ask(SKILL, answer, prompt, thought, answer, says_number(result), direct=direct or answer)


def _larger(rng: Random) -> Question:
    left = _any_number(rng)
    right = left + rng.choice((-1, 1)) * rng.randint(1, 99)
    left, right = abs(left), abs(right)
    if left == right:
        right += 1
    larger = rng.random() < 0.5
    result = max(left, right) if larger else min(left, right)
    if is_chinese(rng):
        prompt = f"{left} 和 {right}，哪个更{'大' if larger else '小'}？"
    else:
        prompt = f"Which number is {'larger' if larger else 'smaller'}, {left} or {right}?"
    thought = f"{left} {'>' if left > right else '<'} {right}"
    key = f"{'larger' if larger else 'smaller'} {left} {right}"
    return ask(SKILL, key, prompt, thought, str(result), says_number(result))


def _shopping(rng: Random) -> Question:
    start, more, fewer = rng.randint(10, 300), rng.randint(2, 99), rng.randint(2, 9)
    total, result = start + more, start + more - fewer
    key = f"{start}+{more}-{fewer}"
    thought = f"{start} + {more} = {total}\n{total} - {fewer} = {result}"
    if is_chinese(rng):
        name, other = rng.sample(NAMES_ZH, 2)
        fruit = rng.choice(FRUITS_ZH)
        prompt = (
            f"{name}有 {start} 个{fruit}，又买了 {more} 个，然后给了{other} {fewer} 个。{name}现在有多少个{fruit}？"
        )
        answer = f"{name}现在有 {result} 个{fruit}。"
        direct = f"{start} + {more} = {total}，{total} - {fewer} = {result}。{answer}"
    else:
        name, other = rng.sample(NAMES, 2)
        fruit = rng.choice(FRUITS)
        things = {"cherry": "cherries", "berry": "berries", "peach": "peaches", "mango": "mangoes"}.get(
            fruit, fruit + "s"
        )
        prompt = (
            f"{name} has {start} {things}, buys {more} more and then gives {fewer} to {other}. "
            f"How many {things} does {name} have now?"
        )
        answer = f"{name} has {result} {things} now."
        direct = f"{start} + {more} = {total}, {total} - {fewer} = {result}. {answer}"
    return ask(SKILL, key, prompt, thought, answer, says_number(result), direct=direct)
