"""Word pools: names, places and things for the slots of the generated conversations.

A fixed hash holds out a tenth of every open pool (names, cities, ...): training never draws these words, the evaluation
draws only these. Invented words are mixed in, so that the model learns to copy a slot instead of memorizing a list.
"""

from __future__ import annotations

import random
from functools import lru_cache

from qwen.evaluation.random_words import held_out, invented

from .phrases import phrases

_WORDS = phrases("words")
EN_NAMES: list[str] = _WORDS["english_names"]
ZH_SURNAMES: str = _WORDS["chinese_surnames"]
ZH_GIVEN: list[str] = _WORDS["chinese_given_names"]
ZH_NICK: list[str] = _WORDS["chinese_nicknames"]
COMPANIES: list[str] = _WORDS["companies"]
# English → Chinese
CITIES, COLOURS, ANIMALS, FOODS, JOBS, HOBBIES, LANGUAGES, COUNTRIES, SEASONS, MONTHS, THINGS, TOPICS, SENTENCES = (
    _WORDS[pool]
    for pool in (
        "cities", "colours", "animals", "foods", "jobs", "hobbies", "languages", "countries", "seasons", "months",
        "things", "topics", "sentences",
    )
)  # fmt: skip


def pick(rng: random.Random, pool, held: bool = False):
    """Returns a random item of the training or held-out part of a pool (of the whole pool if that part is empty)."""
    return rng.choice(_part(tuple(pool), held))


@lru_cache(maxsize=256)
def _part(pool: tuple, held: bool) -> tuple:
    return tuple(item for item in pool if held_out(str(item)) == held) or pool


def english_name(rng: random.Random, held: bool = False) -> str:
    return invented(rng, held).capitalize() if rng.random() < 0.4 else pick(rng, EN_NAMES, held)


def chinese_name(rng: random.Random, held: bool = False) -> str:
    if rng.random() < 0.35:
        return pick(rng, ZH_NICK, held)
    while True:
        name = rng.choice(ZH_SURNAMES) + rng.choice(ZH_GIVEN)
        if held_out(name) == held:
            return name


def name(rng: random.Random, lang: str, held: bool = False) -> str:
    """Returns a person's name; 15% of the names in Chinese conversations are English."""
    return chinese_name(rng, held) if lang == "zh" and rng.random() < 0.85 else english_name(rng, held)


def city(rng: random.Random, lang: str, held: bool = False) -> str:
    """Returns a city in `lang`; some English ones are invented."""
    if rng.random() < 0.15 and lang == "en":
        return invented(rng, held).capitalize()
    english = pick(rng, CITIES, held)
    return CITIES[english] if lang == "zh" else english


def pair(rng: random.Random, pool: dict[str, str], lang: str, held: bool = False) -> str:
    """Returns an entry of an English → Chinese pool in `lang`."""
    english = pick(rng, pool, held)
    return pool[english] if lang == "zh" else english
