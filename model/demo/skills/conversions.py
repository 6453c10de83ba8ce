"""Units, dates and times of day."""

from __future__ import annotations

from datetime import date, timedelta

from model.demo.skills.arithmetic import multiply_steps
from model.demo.skills.question import Check, Question, Random, ask, ends_with, is_chinese, is_text, says_number
from model.demo.skills.words import DAYS, MONTHS

SKILL = "conversions"

# from, to, factor, largest amount; in both languages
_UNITS = (
    ("kilometres", "metres", "公里", "米", 1000, 99),
    ("metres", "centimetres", "米", "厘米", 100, 99),
    ("centimetres", "millimetres", "厘米", "毫米", 10, 999),
    ("kilograms", "grams", "公斤", "克", 1000, 99),
    ("litres", "millilitres", "升", "毫升", 1000, 99),
    ("hours", "minutes", "小时", "分钟", 60, 48),
    ("minutes", "seconds", "分钟", "秒", 60, 90),
    ("days", "hours", "天", "小时", 24, 40),
    ("weeks", "days", "周", "天", 7, 99),
    ("years", "months", "年", "个月", 12, 60),
)
_DAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")


def conversions(rng: Random) -> Question:
    """One conversion of a unit, a date or a time."""
    return rng.choice((_unit, _unit, _unit, _temperature, _weekday, _date_format, _date_later, _clock, _time_later))(
        rng
    )


def _ask(key: str, prompt: str, thought: str, answer: str, check: Check) -> Question:
    return ask(SKILL, key, prompt, thought, answer, check)


def _calculate(key: str, prompt: str, thought: str, answer: str, check: Check) -> Question:
    """As `_ask`, for what takes some steps: without a thought, the answer shows them."""
    direct = ", ".join([*thought.splitlines(), f"so {answer}"])
    return ask(SKILL, key, prompt, thought, answer, check, direct=direct)


def _unit(rng: Random) -> Question:
    big, small, big_zh, small_zh, factor, most = rng.choice(_UNITS)
    zh = is_chinese(rng)
    if zh:
        big, small = big_zh, small_zh
    amount = rng.randint(2, most)
    result = amount * factor
    down = rng.random() < 0.4
    if down:
        amount, result, big, small = result, amount, small, big
    if zh:
        prompt = rng.choice((f"{amount} {big}等于多少{small}？", f"把 {amount} {big}换算成{small}。"))
        answer = f"{amount} {big} = {result} {small}"
    else:
        prompt = rng.choice(
            (
                f"How many {small} are {amount} {big}?",
                f"Convert {amount} {big} to {small}.",
                f"{amount} {big} in {small}?",
            )
        )
        answer = f"{amount} {big} = {result} {small}"
    thought = f"{amount} / {factor} = {result}" if down else _times(amount, factor)
    return _calculate(f"{amount} {big} {small}", prompt, thought, answer, says_number(result))


def _times(amount: int, factor: int) -> str:
    """The working of a product: a power of ten at once, anything else digit by digit."""
    if factor in (10, 100, 1000):
        return f"{amount} * {factor} = {amount * factor}"
    tens, ones = divmod(factor, 10)
    lines = [multiply_steps(amount, digit) for digit in (tens, ones) if digit]
    if tens:
        lines.append(f"{amount * tens * 10} + {amount * ones} = {amount * factor}")
    return "\n".join(lines)


def _temperature(rng: Random) -> Question:
    celsius = rng.randint(0, 40) * 5
    ninths = celsius // 5 * 9
    fahrenheit = ninths + 32
    zh = is_chinese(rng)
    if rng.random() < 0.6:
        thought = f"{celsius} / 5 = {celsius // 5}\n{celsius // 5} * 9 = {ninths}\n{ninths} + 32 = {fahrenheit}"
        answer, result = f"{celsius} °C = {fahrenheit} °F", fahrenheit
        prompt = f"{celsius} 摄氏度是多少华氏度？" if zh else f"Convert {celsius} degrees Celsius to Fahrenheit."
    else:
        thought = f"{fahrenheit} - 32 = {ninths}\n{ninths} / 9 = {celsius // 5}\n{celsius // 5} * 5 = {celsius}"
        answer, result = f"{fahrenheit} °F = {celsius} °C", celsius
        prompt = f"{fahrenheit} 华氏度是多少摄氏度？" if zh else f"Convert {fahrenheit} degrees Fahrenheit to Celsius."
    return _calculate(answer, prompt, thought, answer, says_number(result))


def _weekday(rng: Random) -> Question:
    start, days = rng.randrange(7), rng.randint(1, 60)
    rest = days % 7
    result = (start + rest) % 7
    names = _DAYS_ZH if is_chinese(rng) else DAYS
    if names is _DAYS_ZH:
        prompt = f"今天是{names[start]}，{days} 天后是星期几？"
    else:
        prompt = f"Today is {names[start]}. What day of the week is it in {days} days?"
    way = ", ".join(names[(start + step) % 7] for step in range(rest + 1))
    thought = f"{days} = {days // 7} * 7 + {rest}\n{way}"
    return _calculate(f"{start} {days}", prompt, thought, names[result], ends_with(names[result]))


def _any_date(rng: Random) -> date:
    return date(rng.randint(1900, 2099), 1, 1) + timedelta(days=rng.randrange(365))


def _date_format(rng: Random) -> Question:
    day = _any_date(rng)
    long, iso = f"{day.day} {MONTHS[day.month - 1]} {day.year}", day.isoformat()
    zh = is_chinese(rng)
    if zh:
        long = f"{day.year}年{day.month}月{day.day}日"
    thought = f"month {day.month}, day {day.day}"
    if rng.random() < 0.6:
        prompt = f"把日期 {long} 写成 YYYY-MM-DD 的格式。" if zh else f"Write the date {long} as YYYY-MM-DD."
        return _ask(f"iso {iso}", prompt, thought, iso, is_text(iso))
    prompt = f"把日期 {iso} 用中文写出来。" if zh else f"Write the date {iso} in words."
    return _ask(f"long {iso}", prompt, thought, long, is_text(long))


def _date_later(rng: Random) -> Question:
    """Some days later, in a year that is not a leap year."""
    start = date(2001, 1, 1) + timedelta(days=rng.randrange(365))
    days = rng.randint(1, 25)
    end = start + timedelta(days=days)
    month = MONTHS[start.month - 1]
    length = (date(start.year + start.month // 12, start.month % 12 + 1, 1) - timedelta(days=1)).day
    total = start.day + days
    lines = [f"{month} has {length} days", f"{start.day} + {days} = {total}"]
    if total > length:
        lines.append(f"{total} - {length} = {total - length}")
    answer = f"{end.day} {MONTHS[end.month - 1]}"
    prompt = f"Which date is {days} days after {start.day} {month}? It is not a leap year."
    return _calculate(f"{start.month}-{start.day}+{days}", prompt, "\n".join(lines), answer, ends_with(answer))


def _clock(rng: Random) -> Question:
    hour, minute = rng.randrange(24), rng.randrange(60)
    half, twelve = ("pm" if hour >= 12 else "am"), hour % 12 or 12
    full, short = f"{hour:02}:{minute:02}", f"{twelve}:{minute:02} {half}"
    zh = is_chinese(rng)
    if rng.random() < 0.5:
        prompt = f"把 {full} 换成 12 小时制。" if zh else f"Write {full} in 12-hour format."
        return _ask(f"12 {full}", prompt, f"{half}", short, is_text(short))
    prompt = f"把 {short} 换成 24 小时制。" if zh else f"Write {short} in 24-hour format."
    return _ask(f"24 {full}", prompt, f"hour {hour}", full, is_text(full))


def _time_later(rng: Random) -> Question:
    hour, minute, later = rng.randrange(24), rng.randrange(60), rng.randint(1, 24) * 5
    total = minute + later
    end = (hour + total // 60) % 24
    answer = f"{end:02}:{total % 60:02}"
    if is_chinese(rng):
        prompt = f"现在是 {hour:02}:{minute:02}，{later} 分钟后是几点？"
    else:
        prompt = f"It is {hour:02}:{minute:02}. What time is it {later} minutes later?"
    thought = f"{minute} + {later} = {total}\n{total} = {total // 60} * 60 + {total % 60}"
    return _calculate(f"{hour}:{minute}+{later}", prompt, thought, answer, ends_with(answer))
