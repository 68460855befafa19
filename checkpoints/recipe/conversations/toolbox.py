"""Families of tools: their names, descriptions, parameters, questions and results.

The names, descriptions and schemas of a family vary, as in real tools; its questions stay the same. The families in
`HELD_FAMILIES` are not used in training: they measure whether a tool is chosen by its description. `invented_family`
generates tools about things that do not exist, for the same reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..phrases import phrases
from ..words import (
    ANIMALS,
    COLOURS,
    COMPANIES,
    COUNTRIES,
    FOODS,
    LANGUAGES,
    SENTENCES,
    THINGS,
    TOPICS,
    city,
    english_name,
    invented,
    name,
    pair,
)


@dataclass(frozen=True)
class Parameter:
    """A parameter: the pool of its values, and its possible names, descriptions and JSON type in a schema."""

    pool: str
    names: str
    about: str
    type: str = "string"
    required: bool = True
    enum: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A family of tools. `questions` contain {slot}s named after `parameters`; `result` returns an observation."""

    names: str
    human: tuple[str, str]
    about: tuple[tuple[str, ...], tuple[str, ...]]
    parameters: dict[str, Parameter]
    questions: tuple[tuple[str, ...], tuple[str, ...]]
    subject: tuple[str, str]
    result: Callable[[random.Random], dict]


def _expression(rng: random.Random, lang: str, held: bool) -> str:
    a, b, op = rng.randint(2, 9999), rng.randint(2, 999), rng.choice("+-*/")
    space = rng.choice(("", " "))
    text = f"{a}{space}{op}{space}{b}"
    if rng.random() < 0.2:
        text = f"({text}){space}{rng.choice('+-*/')}{space}{rng.randint(2, 99)}"
    return text


def _email(rng: random.Random, lang: str, held: bool) -> str:
    name = english_name(rng, held).lower()
    return f"{name}@{rng.choice(['example.com', 'mail.com', 'test.org', invented(rng) + '.com'])}"


def _topic(rng: random.Random, lang: str, held: bool) -> str:
    chance = rng.random()
    if chance < 0.25:
        return invented(rng, held) if rng.random() < 0.5 else f"{invented(rng, held)} {invented(rng, held)}"
    if chance < 0.35:
        return rng.choice(COMPANIES)
    if chance < 0.5:
        return pair(rng, ANIMALS if rng.random() < 0.5 else COUNTRIES, lang, held)
    return pair(rng, TOPICS, lang, held)


def _thing(rng: random.Random, lang: str, held: bool) -> str:
    chance = rng.random()
    if chance < 0.4:
        return pair(rng, THINGS, lang, held)
    animal = pair(rng, ANIMALS, lang, held)
    if chance < 0.7:
        colour = pair(rng, COLOURS, lang, held)
        return f"a {colour} {animal}" if lang == "en" else f"{colour}的{animal}"
    return f"a {animal}" if lang == "en" and chance < 0.9 else animal


_REGIONS = [
    "MA",
    "CA",
    "NY",
    "TX",
    "WA",
    "IL",
    "FL",
    "France",
    "Germany",
    "Japan",
    "China",
    "Italy",
    "UK",
    "USA",
    "Spain",
    "India",
]


def _sentence(rng: random.Random, lang: str, held: bool) -> str:
    chance = rng.random()
    if chance < 0.3:
        return invented(rng, held)
    if chance < 0.5:
        return pair(rng, FOODS if rng.random() < 0.5 else ANIMALS, lang, held)
    return pair(rng, SENTENCES, lang, held).rstrip("？?。")


def _town(rng: random.Random, lang: str, held: bool) -> str:
    """Returns a city, in English sometimes with a region."""
    town = city(rng, lang, held)
    return f"{town}, {rng.choice(_REGIONS)}" if lang == "en" and rng.random() < 0.1 else town


def _company(rng: random.Random, lang: str, held: bool) -> str:
    if rng.random() < 0.6:
        return rng.choice(COMPANIES)
    return invented(rng, held).capitalize() if rng.random() < 0.6 else invented(rng)[:4].upper()


def _title(rng: random.Random, lang: str, held: bool) -> str:
    if rng.random() < 0.7:
        return f"{invented(rng, held).capitalize()} {invented(rng, held).capitalize()}"
    return invented(rng, held).capitalize()


def _code(rng: random.Random, lang: str, held: bool) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ0123456789") for _ in range(rng.randint(4, 8)))


def _address(rng: random.Random, lang: str, held: bool) -> str:
    site = f"https://{invented(rng, held)}.{rng.choice(('com', 'org', 'net'))}"
    return site + rng.choice(("", "/" + invented(rng)))


def _snippet(rng: random.Random, lang: str, held: bool) -> str:
    snippets = [
        f"print({rng.randint(1, 99)} * {rng.randint(1, 99)})",
        f"print('{invented(rng)}')",
        f"sum(range({rng.randint(5, 99)}))",
        f"len('{invented(rng)}')",
    ]
    return rng.choice(snippets)


POOLS: dict[str, Callable[[random.Random, str, bool], str | int]] = {
    "city": _town,
    "expression": _expression,
    "topic": _topic,
    "thing": _thing,
    "sentence": _sentence,
    "language": lambda rng, lang, held: pair(rng, LANGUAGES, lang),
    "email": _email,
    "person": lambda rng, lang, held: name(rng, lang, held),
    "company": _company,
    "country": lambda rng, lang, held: pair(rng, COUNTRIES, lang, held),
    "food": lambda rng, lang, held: pair(rng, FOODS, lang, held),
    "word": lambda rng, lang, held: invented(rng, held),
    "title": _title,
    "small": lambda rng, lang, held: rng.randint(2, 60),
    "number": lambda rng, lang, held: rng.randint(2, 999),
    "clock": lambda rng, lang, held: f"{rng.randint(0, 23)}:{rng.choice(('00', '15', '30', '45'))}",
    "date": lambda rng, lang, held: f"20{rng.randint(20, 29)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
    "currency": lambda rng, lang, held: rng.choice(["USD", "EUR", "CNY", "GBP", "JPY", "CHF", "INR", "KRW"]),
    "length": lambda rng, lang, held: rng.choice(["km", "m", "cm", "miles", "feet", "kg", "g", "pounds", "liters"]),
    "code": _code,
    "phone": lambda rng, lang, held: "".join(rng.choice("0123456789") for _ in range(rng.randint(5, 9))),
    "url": _address,
    "file": lambda rng, lang, held: f"{invented(rng, held)}.{rng.choice(('txt', 'csv', 'md', 'pdf', 'py'))}",
    "snippet": _snippet,
}  # fmt: skip


_SKIES = ["sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "晴", "多云", "小雨", "阴"]


def _ok(rng: random.Random) -> dict:
    return {"status": rng.choice(["ok", "success", "done", "sent", "created"])}


def _url(rng: random.Random) -> dict:
    return {rng.choice(["image_url", "url", "link"]): f"https://{invented(rng)}.com/{rng.randint(1, 999)}.png"}


def _text(rng: random.Random) -> dict:
    key = rng.choice(["result", "text", "answer", "content", "summary"])
    return {key: f"{invented(rng)} {invented(rng)} {rng.randint(1, 99)}"}


def _clock(rng: random.Random) -> str:
    return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}"


def _date(rng: random.Random) -> str:
    return f"20{rng.randint(20, 29)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _weather(rng: random.Random) -> dict:
    temperature = rng.randint(-15, 40)
    return {"temperature": temperature, rng.choice(["condition", "weather", "description", "sky"]): rng.choice(_SKIES)}


def _price(rng: random.Random) -> dict:
    price = round(rng.uniform(5, 900), rng.choice((1, 2)))
    return {"price": price, rng.choice(["currency", "unit"]): rng.choice(["USD", "CNY", "EUR"])}


def _password(rng: random.Random) -> dict:
    return {"password": "".join(rng.choice("abcdefghjkmnpqrstuvwxyz23456789") for _ in range(8))}


# results of the families that do not return `_ok`
RESULTS: dict[str, Callable[[random.Random], dict]] = {
    "weather": _weather,
    "time": lambda rng: {rng.choice(["time", "local_time", "now"]): _clock(rng)},
    "calculator": lambda rng: {"result": rng.randint(-999, 99999)},
    "search": _text,
    "image": _url,
    "translate": lambda rng: {rng.choice(["translation", "text", "result"]): f"{invented(rng)} {invented(rng)}"},
    "stock": _price,
    "currency": lambda rng: {rng.choice(["result", "converted", "amount"]): round(rng.uniform(1, 9999), 2)},
    "news": _text,
    "wiki": _text,
    "flight": lambda rng: {
        "flight": f"{rng.choice('ABCDKLM')}{rng.choice('AFUZ')}{rng.randint(100, 999)}",
        "price": rng.randint(80, 1500),
    },
    "hotel": lambda rng: {"hotel": f"Hotel {invented(rng).capitalize()}", "price": rng.randint(40, 400)},
    "restaurant": lambda rng: {"name": f"{invented(rng).capitalize()} House", "rating": round(rng.uniform(3, 5), 1)},
    "route": lambda rng: {"distance": f"{rng.randint(2, 2000)} km", "duration": f"{rng.randint(5, 900)} min"},
    "music": lambda rng: {"status": "playing"},
    "movie": lambda rng: {"director": english_name(rng), "rating": round(rng.uniform(3, 9.9), 1)},
    "book": lambda rng: {"title": f"{invented(rng).capitalize()} {invented(rng)}", "author": english_name(rng)},
    "recipe": _text,
    "dictionary": _text,
    "units": lambda rng: {"value": round(rng.uniform(0.1, 999), 2)},
    "random": lambda rng: {"number": rng.randint(1, 999)},
    "python": lambda rng: {"output": str(rng.randint(1, 9999))},
    "file": _text,
    "parcel": lambda rng: {"status": rng.choice(["in transit", "delivered", "shipped", "lost"])},
    "population": lambda rng: {
        "capital": invented(rng).capitalize(),
        "population": rng.randint(100000, 99999999),
    },
    "train": lambda rng: {"train": f"{rng.choice('GDKTR')}{rng.randint(1, 999)}", "departure": _clock(rng)},
    "taxi": lambda rng: {"arrives_in": f"{rng.randint(1, 30)} min"},
    "database": lambda rng: {"id": rng.randint(100, 9999), "city": city(rng, "en")},
    "sentiment": lambda rng: {"sentiment": rng.choice(["positive", "negative", "neutral"])},
    "website": _text,
    "password": _password,
    "holiday": lambda rng: {"next": _date(rng)},
    "sports": lambda rng: {"score": f"{rng.randint(0, 5)}:{rng.randint(0, 5)}"},
    "air": lambda rng: {"aqi": rng.randint(5, 300)},
    "horoscope": _text,
    "parking": lambda rng: {"car_park": invented(rng).capitalize(), "free": rng.randint(0, 200)},
    "shorten": lambda rng: {"short": f"https://t.co/{invented(rng)}"},
}


def _family(key: str, table: dict) -> Family:
    parameters = {
        slot: Parameter(**{**entry, "enum": tuple(entry.get("enum", ()))})
        for slot, entry in table["parameters"].items()
    }
    return Family(
        table["names"],
        tuple(table["human"]),
        (tuple(table["about_en"]), tuple(table["about_zh"])),
        parameters,
        (tuple(table["ask_en"]), tuple(table["ask_zh"])),
        tuple(table["subject"]),
        RESULTS.get(key, _ok),
    )


FAMILIES: dict[str, Family] = {key: _family(key, table) for key, table in phrases("toolbox").items()}
HELD_FAMILIES = ("air", "horoscope", "parking", "shorten", "heating")
TRAINED_FAMILIES = tuple(key for key in FAMILIES if key not in HELD_FAMILIES)


_PROPERTIES = [
    "price",
    "age",
    "height",
    "owner",
    "colour",
    "weight",
    "status",
    "score",
    "level",
    "version",
    "author",
    "size",
    "rank",
    "speed",
    "depth",
    "origin",
    "balance",
    "title",
    "length",
    "address",
]
_ZH_PROPERTIES = [
    "价格",
    "年龄",
    "高度",
    "主人",
    "颜色",
    "重量",
    "状态",
    "分数",
    "等级",
    "版本",
    "作者",
    "大小",
    "排名",
    "速度",
    "深度",
    "来源",
    "余额",
    "标题",
    "长度",
    "地址",
]
_THINGS = [
    "ship",
    "tree",
    "planet",
    "account",
    "ticket",
    "product",
    "house",
    "river",
    "song",
    "player",
    "tool",
    "server",
    "plant",
    "machine",
    "flower",
    "account",
    "phone",
    "bank",
    "lamp",
    "garden",
]
_VERBS = [
    "open",
    "close",
    "start",
    "stop",
    "clean",
    "paint",
    "move",
    "sell",
    "repair",
    "water",
    "check",
    "delete",
    "copy",
    "print",
    "feed",
    "wash",
    "lock",
    "unlock",
    "charge",
    "reset",
    "archive",
    "rename",
]


def invented_family(rng: random.Random, held: bool = False) -> Family:
    """Returns a tool about something invented, which can be chosen by its description only."""
    thing = invented(rng, held) if rng.random() < 0.6 else rng.choice(_THINGS)
    pool = rng.choice(("word", "title", "code", "person", "number", "city"))
    keys = ("name", "id", "target", "item", "x", "value", thing, f"{thing}_id", f"{thing}_name", invented(rng))
    about = f"the {thing}|{thing}|which {thing}|{thing}的名称"
    slot = {"x": Parameter(pool, rng.choice(keys), about, "integer" if pool == "number" else "string")}
    return _about_property(rng, thing, slot, held) if rng.random() < 0.5 else _about_action(rng, thing, slot, held)


def _about_property(rng: random.Random, thing: str, slot: dict[str, Parameter], held: bool) -> Family:
    """Returns a tool that looks something up."""
    noun = invented(rng, held) if rng.random() < 0.4 else rng.choice(_PROPERTIES)
    names = [
        f"get_{noun}",
        f"{thing}_{noun}",
        invented(rng),
        f"{invented(rng)}_{rng.choice(('api', 'tool', 'service'))}",
        f"{noun}_lookup",
        f"find{noun.capitalize()}",
        f"get{thing.capitalize()}{noun.capitalize()}",
    ]
    name = rng.choice(names)
    zh_noun = rng.choice(_ZH_PROPERTIES) if rng.random() < 0.5 else noun
    about_en = (
        f"Returns the {noun} of a {thing}.",
        f"Get the {noun} of any {thing}.",
        f"Looks up which {noun} a {thing} has.",
        f"{noun.capitalize()} of {thing}s.",
    )
    about_zh = (f"查询{thing}的{zh_noun}，{noun}。", f"返回{thing}的{zh_noun}（{noun}）。")
    ask_en = (
        f"What is the {noun} of the {thing} {{x}}?",
        f"What {noun} does the {thing} {{x}} have?",
        f"Tell me the {noun} of {thing} {{x}}.",
        f"Give me the {noun} for the {thing} {{x}}.",
        f"I need the {noun} of {thing} {{x}}",
    )
    ask_zh = (f"{thing} {{x}}的{noun}是多少？", f"查一下{thing} {{x}}的{noun}", f"{thing} {{x}}的{noun}是什么？")

    def result(r: random.Random) -> dict:
        return {rng.choice((noun, "result", "value")): rng.choice((r.randint(1, 9999), invented(r)))}

    human = (f"{thing} {noun}", f"{thing}{zh_noun}")
    return Family(name, human, (about_en, about_zh), slot, (ask_en, ask_zh), (f"The {noun} of", f"的{noun}"), result)


def _about_action(rng: random.Random, thing: str, slot: dict[str, Parameter], held: bool) -> Family:
    """Returns a tool that performs an action."""
    verb = invented(rng, held) if rng.random() < 0.35 else rng.choice(_VERBS)
    names = [
        f"{verb}_{thing}",
        invented(rng),
        f"{verb}{thing.capitalize()}",
        f"do_{verb}",
        f"{invented(rng)}_{rng.choice(('api', 'tool', 'service'))}",
    ]
    name = rng.choice(names)
    about_en = (
        f"Use it to {verb} a {thing}.",
        f"Can {verb} any {thing}.",
        f"{verb.capitalize()}s a {thing}.",
        f"A service to {verb} {thing}s.",
    )
    ask_en = (
        f"Please {verb} the {thing} {{x}}.",
        f"{verb.capitalize()} the {thing} {{x}}.",
        f"Can you {verb} {thing} {{x}}?",
        f"I want to {verb} the {thing} {{x}}.",
        f"{verb} {thing} {{x}}",
    )
    about_zh = (f"用来{verb}一个{thing}。", f"{verb} {thing}的工具。")
    ask_zh = (f"请{verb} {thing} {{x}}", f"帮我{verb}{thing} {{x}}", f"我想{verb}一下{thing} {{x}}")
    human = (f"{verb} {thing}", f"{verb} {thing}")
    return Family(name, human, (about_en, about_zh), slot, (ask_en, ask_zh), (f"{verb.capitalize()}", "的结果"), _ok)
