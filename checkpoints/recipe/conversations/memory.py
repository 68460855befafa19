"""Facts about the user: told, acknowledged, asked for some turns later, changed, or never told."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..phrases import phrases
from ..words import (
    ANIMALS,
    COLOURS,
    COUNTRIES,
    FOODS,
    HOBBIES,
    JOBS,
    MONTHS,
    SEASONS,
    city,
    english_name,
    invented,
    name,
    pair,
)
from .speech import ask_as


def _number(low: int, high: int):
    return lambda rng, lang, held: str(rng.randint(low, high))


def _from(pool):
    return lambda rng, lang, held: pair(rng, pool, lang, held)


def _word(rng, lang, held):
    return invented(rng, held)


def _name(rng, lang, held):
    return name(rng, lang, held)


# generators of values by kind of fact: (rng, language, held out?) -> text
VALUES: dict[str, Callable[[random.Random, str, bool], str]] = {
    "name": _name, "colour": _from(COLOURS), "city": lambda rng, lang, held: city(rng, lang, held),
    "country": _from(COUNTRIES), "age": _number(5, 99), "pet": _name, "animal": _from(ANIMALS), "job": _from(JOBS),
    "food": _from(FOODS), "hobby": _from(HOBBIES), "number": _number(2, 999), "code": _word, "friend": _name,
    "sibling": _name, "birthday": _from(MONTHS), "season": _from(SEASONS),
}  # fmt: skip
KINDS: dict[str, dict] = phrases("memory")  # nouns, statements and questions of each kind
_COMMON = ["name"] * 6 + ["colour", "city", "city", "age", "pet", "job", "food", "number", "code"]


_CHANGES = {
    "en": ["Actually, ", "I was wrong: ", "No, ", "Correction: ", "Sorry, "],
    "zh": ["不对，", "我说错了，", "更正一下，", "其实", "抱歉，"],
}
_REMINDERS = {
    "en": [
        " Remember that.",
        " Please remember it.",
        " Don't forget it!",
        " Keep that in mind.",
        " Nice to meet you!",
    ],
    "zh": ["请记住。", "记住哦。", "别忘了！", "要记住。"],
}


def kind_of(rng: random.Random) -> str:
    return rng.choice(_COMMON) if rng.random() < 0.5 else rng.choice(list(KINDS))


def value_of(rng: random.Random, kind: str, lang: str, held: bool = False) -> str:
    """Returns a value of that kind, sometimes an invented one, which has to be copied and cannot be guessed."""
    if rng.random() < 0.12 and kind not in ("age", "number", "birthday", "season"):
        return english_name(rng, held) if kind in ("city", "country") else invented(rng, held)
    return VALUES[kind](rng, lang, held)


def tell(rng: random.Random, kind: str, value: str, lang: str, reply: str, change: bool = False) -> tuple[str, str]:
    """The user tells (or changes) a fact, the assistant repeats it."""
    text = rng.choice(KINDS[kind][f"tell_{lang}"]).format(v=value)
    if change:
        plain = text if lang == "zh" or text.startswith("I") else text[0].lower() + text[1:]
        text = rng.choice(_CHANGES[lang]) + plain
    elif rng.random() < 0.12:
        text += rng.choice(_REMINDERS[lang])
    return ask_as(rng, text, lang, lead=0.08), acknowledge(kind, value, reply)


def acknowledge(kind: str, value: str, reply: str) -> str:
    if kind == "name":
        return f"Nice to meet you, {value}!" if reply == "en" else f"很高兴认识你，{value}！"
    noun = KINDS[kind][f"noun_{reply}"]
    return f"I will remember that: your {noun} is {value}." if reply == "en" else f"我记住了：你的{noun}是{value}。"


def recall(rng: random.Random, kind: str, value: str | None, lang: str, reply: str) -> tuple[str, str]:
    """The user asks for a fact; `value` is None if it was never told."""
    question = ask_as(rng, rng.choice(KINDS[kind][f"ask_{lang}"]), lang, lead=0.15)
    noun = KINDS[kind][f"noun_{reply}"]
    if value is None:
        return question, f"You have not told me your {noun} yet." if reply == "en" else f"你还没有告诉我你的{noun}。"
    return question, f"Your {noun} is {value}." if reply == "en" else f"你的{noun}是{value}。"


def tell_two(
    rng: random.Random, first: tuple[str, str], second: tuple[str, str], lang: str, reply: str
) -> tuple[str, str]:
    """Two facts in one message."""
    told = [rng.choice(KINDS[kind][f"tell_{lang}"]).format(v=value) for kind, value in (first, second)]
    if lang == "en":
        rest = told[1] if told[1].startswith("I") else told[1][0].lower() + told[1][1:]
        text = rng.choice([f"{told[0]} {told[1]}", f"{told[0].rstrip('.')} and {rest}"])
    else:
        text = rng.choice([f"{told[0]}{told[1]}", f"{told[0].rstrip('。')}，{told[1]}"])
    nouns = [KINDS[kind][f"noun_{reply}"] for kind, _ in (first, second)]
    if reply == "en":
        answer = f"I will remember that: your {nouns[0]} is {first[1]} and your {nouns[1]} is {second[1]}."
    else:
        answer = f"我记住了：你的{nouns[0]}是{first[1]}，你的{nouns[1]}是{second[1]}。"
    return ask_as(rng, text, lang, lead=0.05), answer
