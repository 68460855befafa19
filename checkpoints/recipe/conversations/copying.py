"""Exchanges that repeat texts or look up entries of a list, to teach copying.

Names, tool arguments and told facts are all copied. A small model learns this much faster here than from the other
exchanges, where only one answer in five contains a copied word.
"""

from __future__ import annotations

import json
import random

from qwen.evaluation.random_words import code

from ..words import ANIMALS, CITIES, COLOURS, FOODS, SENTENCES, chinese_name, city, english_name, invented, pair
from .speech import Voice

_REPEAT = {
    "en": [
        "Repeat after me: {x}", "Repeat: {x}", "Say {x}", 'Say "{x}"', "Copy this: {x}", "Please repeat {x}",
        "Echo {x}", "Write {x}",
    ],
    "zh": ["跟我说：{x}", "重复：{x}", "请说“{x}”", "重复一遍：{x}", "照抄：{x}", "请重复“{x}”", "写下{x}"],
}  # fmt: skip
_LIST = {
    "en": ["Here is a list: {x}.", "Remember this: {x}.", "Look at this table: {x}.", "{x}"],
    "zh": ["这是一个列表：{x}。", "请记住：{x}。", "看这个表：{x}。", "{x}"],
}
_LOOK_UP = {
    "en": [
        "What is {k}?",
        "What stands at {k}?",
        "And {k}?",
        "{k}?",
        "What is the value of {k}?",
        "Which one belongs to {k}?",
    ],
    "zh": ["{k}是什么？", "{k}呢？", "{k}？", "{k}的值是什么？", "{k}对应什么？"],
}


def word(rng: random.Random, lang: str) -> str:
    """Returns a word of any kind that occurs in conversations."""
    kind = rng.randrange(9)
    if kind < 3:
        return invented(rng) if lang == "en" or rng.random() < 0.3 else chinese_name(rng)
    if kind == 3:
        return english_name(rng) if lang == "en" else city(rng, lang)
    if kind == 4:
        return str(rng.randint(0, 9999))
    if kind == 5:
        return code(rng)
    if kind == 6:
        return f"{invented(rng)}_{invented(rng)}"
    if kind == 7:
        return pair(rng, rng.choice((ANIMALS, CITIES, COLOURS, FOODS)), lang)
    return pair(rng, SENTENCES, lang).rstrip("？?")


def copying(rng: random.Random, ask: str, reply: str, voice: Voice) -> list[tuple[str, str]]:
    """Returns one to four texts to repeat, or a list with questions about its entries."""
    if rng.random() < 0.5:
        return [_repeat(rng, ask) for _ in range(rng.randint(1, 4))]
    return _look_up(rng, ask, reply)


def _repeat(rng: random.Random, lang: str) -> tuple[str, str]:
    words = [word(rng, lang) for _ in range(rng.choice((1, 2, 4, 8, 12)))]
    if len(words) > 3 and rng.random() < 0.3:
        text = json.dumps(dict(zip(words[::2], words[1::2], strict=False)), ensure_ascii=False)
    else:
        text = (" " if lang == "en" else rng.choice(("", "，", " "))).join(words)
    return rng.choice(_REPEAT[lang]).format(x=text), text


def _look_up(rng: random.Random, ask: str, reply: str) -> list[tuple[str, str]]:
    entries = {word(rng, ask): word(rng, ask) for _ in range(rng.randint(2, 7))}
    sign = rng.choice((": ", " = ", " is " if ask == "en" else "是"))
    shown = ("; " if ask == "en" else "；").join(f"{key}{sign}{value}" for key, value in entries.items())
    keys = rng.sample(list(entries), min(len(entries), rng.randint(1, 5)))
    questions = [rng.choice(_LOOK_UP[ask]).format(k=key) for key in keys]
    questions[0] = f"{rng.choice(_LIST[ask]).format(x=shown)} {questions[0]}"
    answers = [f"{key}: {entries[key]}" if reply == "en" else f"{key}：{entries[key]}" for key in keys]
    return list(zip(questions, answers, strict=True))
