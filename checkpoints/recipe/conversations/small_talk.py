"""Small talk: greetings, the model's identity and abilities, its repository, and polite refusals.

The model's statements about itself (phrases/small_talk.toml) are true: it is a tiny toy, trained from scratch on
generated data, and not one of the published models.
"""

from __future__ import annotations

import random
from dataclasses import replace

from ..phrases import phrases
from ..words import COUNTRIES, FOODS, THINGS, TOPICS, city, invented, name, pair
from .speech import Voice, ask_as

_PHRASES = phrases("small_talk")
INTENTS: dict[str, dict[str, list[str]]] = _PHRASES["intents"]
_SHORT = {"greeting", "thanks", "goodbye", "praise", "blame", "ack", "mood", "happy"}
_OFTEN = {
    **dict.fromkeys(("greeting", "can_do", "which_model", "repository"), 3),
    **dict.fromkeys(("maker", "size", "install", "start_chat", "finetune", "checkpoints", "licence"), 2),
    **dict.fromkeys(("thanks", "goodbye", "joke", "how_are_you"), 2),
}
_WEIGHTED = [intent for intent in INTENTS for _ in range(_OFTEN.get(intent, 1))]


def identity_answer(voice: Voice, reply: str) -> str:
    if voice.name is None and voice.role is None:
        return _PHRASES["identity"][f"answer_{reply}"]
    if voice.role is None:
        return f"I am {voice.name}." if reply == "en" else f"我是{voice.name}。"
    role = voice.role.get(reply)  # a role in the other language only is left out
    if role is None:
        return identity_answer(replace(voice, role=None), reply)
    if voice.name is None:
        return f"I am {role}." if reply == "en" else f"我是{role}。"
    return f"I am {voice.name}, {role}." if reply == "en" else f"我是{voice.name}，{role}。"


def identity(rng: random.Random, ask: str, reply: str, voice: Voice) -> list[tuple[str, str]]:
    question = ask_as(rng, rng.choice(_PHRASES["identity"][f"ask_{ask}"]), ask)
    return [(question, identity_answer(voice, reply))]


def small_talk(
    rng: random.Random, ask: str, reply: str, voice: Voice, intent: str | None = None
) -> list[tuple[str, str]]:
    """Returns one exchange of an intent; common intents are more frequent. A voice with a name keeps its name."""
    intent = intent or rng.choice(_WEIGHTED)
    if voice.name and intent in ("which_model", "maker"):
        return identity(rng, ask, reply, voice)
    question = rng.choice(INTENTS[intent][f"ask_{ask}"])
    question = ask_as(rng, fill(rng, question, ask), ask, lead=0.05 if intent in _SHORT else 0.2)
    return [(question, rng.choice(INTENTS[intent][f"answer_{reply}"]))]


def unknown(rng: random.Random, ask: str, reply: str, voice: Voice) -> list[tuple[str, str]]:
    """Returns one exchange about world knowledge, which the model does not have."""
    question = fill(rng, rng.choice(_PHRASES["unknown"][f"ask_{ask}"]), ask)
    return [(ask_as(rng, question, ask, lead=0.15), _PHRASES["unknown"][f"answer_{reply}"])]


def fill(rng: random.Random, text: str, lang: str) -> str:
    """Fills the slots of a question."""
    if "{" not in text:
        return text
    return text.format(
        country=pair(rng, COUNTRIES, lang),
        country2=pair(rng, COUNTRIES, lang),
        topic=pair(rng, TOPICS, lang),
        topic2=pair(rng, TOPICS, lang),
        food=pair(rng, FOODS, lang),
        thing=pair(rng, THINGS, lang),
        name=name(rng, lang),
        city=city(rng, lang),
        word=invented(rng),
        year=rng.randint(1500, 2023),
    )
