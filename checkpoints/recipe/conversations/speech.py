"""Surface form of conversations: variations of questions, and the voice that a system prompt gives to answers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Voice:
    """A system prompt and its effect on the assistant.

    `name` and `role` (by language) replace the default ones; `reply` forces the language of answers; `terse` asks for
    the result only; `style(text, lang)` rewrites a finished answer.
    """

    system: str = DEFAULT_SYSTEM
    name: str | None = None
    role: dict[str, str] | None = None
    reply: str | None = None
    terse: bool = False
    style: Callable[[str, str], str] = lambda text, lang: text


def normalised(text: str) -> str:
    """Removes case, punctuation and spaces from a question; the result is the key under which it is held out."""
    return re.sub(r"[^\w+\-*/×÷]+", "", text.lower())


_EN_LEAD = [
    "Hey, ", "Ok, ", "Please tell me: ", "Excuse me, ", "So, ", "Hi! ", "Hello, ", "One question: ", "Now, ", "And ",
    "Well, ", "Sorry, ", "Quick question: ", "Could you tell me, ", "I wonder, ",
]  # fmt: skip
_ZH_LEAD = [
    "请问", "请问，", "那", "嗨，", "你好，", "麻烦问一下，", "我想知道，", "请告诉我，",
    "对了，", "问一下，", "想问一下", "那么，",
]  # fmt: skip


def ask_as(rng: random.Random, question: str, lang: str, lead: float = 0.2) -> str:
    """Returns the question as a user might type it: with an opening, in lower case, or without punctuation."""
    if lang == "en":
        if rng.random() < lead:
            opening = rng.choice(_EN_LEAD)
            first = question.split(" ")[0]
            keep = first in ("I", "I'm", "I've") or (len(first) > 1 and first.isupper())
            question = opening + (question if keep else question[0].lower() + question[1:])
        elif rng.random() < 0.03 and not question.endswith("!"):
            question = question.rstrip("?.") + ", please" + question[len(question.rstrip("?.")) :]
        chance = rng.random()
        if chance < 0.18:
            question = question.lower()
        elif chance < 0.22:
            question = question[0].lower() + question[1:]
        elif chance < 0.24:
            question = question.upper()
        chance = rng.random()
        if chance < 0.2:
            question = question.rstrip("?.!")
        elif chance < 0.23:
            question = question.rstrip("?.!") + rng.choice(["??", " ?", "!", "...", "?!"])
    else:
        if rng.random() < lead:
            question = rng.choice(_ZH_LEAD) + question
        chance = rng.random()
        if chance < 0.25:
            question = question.rstrip("？。！?.!")
        elif chance < 0.4:
            question = question.replace("？", "?").replace("，", ",")
        elif chance < 0.43 and question.endswith("？"):
            question = question[:-1] + "呢？" if not question.endswith(("吗？", "呢？", "吧？")) else question
    return question
