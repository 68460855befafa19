"""System prompts that set a name, a role, a language or a style, with their voices."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..phrases import phrases
from ..words import JOBS, ZH_NICK, english_name, invented, name, pick
from .speech import DEFAULT_SYSTEM, Voice

_PHRASES = phrases("system_prompts")
_ADJECTIVES: dict[str, str] = _PHRASES["adjectives"]  # English → Chinese
_NOUNS: dict[str, str] = {**_PHRASES["nouns"], **JOBS}
_PLAIN = [DEFAULT_SYSTEM] * 11 + _PHRASES["plain"]


def _role(rng: random.Random, lang: str) -> dict[str, str]:
    chance = rng.random()
    if chance < 0.2 and lang == "en":
        noun = pick(rng, _NOUNS)
        article = "an" if noun[0] in "aeiou" else "a"
        x = invented(rng).capitalize()
        helper = rng.choice(list(_ADJECTIVES))
        roles = [
            f"{article} {noun} from {x}",
            f"{article} {noun} who loves {x}",
            f"the {noun} of {x}",
            f"{article} {noun} at {x}",
            f"the assistant of the {x} shop",
            f"the {helper} helper of {x}",
        ]
        return {"en": rng.choice(roles)}
    if chance < 0.2:
        x = name(rng, "zh")
        first, second = _NOUNS[pick(rng, _NOUNS)], _NOUNS[pick(rng, _NOUNS)]
        return {"zh": rng.choice([f"{x}的{first}", f"{x}公司的客服", f"来自{x}的{second}"])}
    noun = pick(rng, _NOUNS)
    if rng.random() < 0.25:
        english = noun
        chinese = f"一个{_NOUNS[noun]}"
    else:
        adjective = rng.choice(list(_ADJECTIVES))
        english, chinese = f"{adjective} {noun}", f"一个{_ADJECTIVES[adjective]}{_NOUNS[noun]}"
    return {"en": ("an " if english[0] in "aeiou" else "a ") + english, "zh": chinese}


def _pirate(text: str, lang: str) -> str:
    return f"Arr, matey! {text}" if lang == "en" else f"啊哈，伙计！{text}"


def _polite(text: str, lang: str) -> str:
    return f"With great pleasure, dear user. {text}" if lang == "en" else f"尊敬的用户，非常荣幸为您服务。{text}"


def _ends(word: str) -> Callable[[str, str], str]:
    return lambda text, lang: f"{text} {word}" if word.isascii() or lang == "en" else f"{text}{word}"


def _starts(word: str) -> Callable[[str, str], str]:
    return lambda text, lang: f"{word} {text}" if word.isascii() or lang == "en" else f"{word}{text}"


_STYLES: dict[str, Callable[[str, str], str]] = {
    "upper": lambda text, lang: text.upper(),
    "lower": lambda text, lang: text.lower(),
    "pirate": _pirate,
    "polite": _polite,
}


def plain_voice(rng: random.Random) -> Voice:
    return Voice(system=rng.choice(_PLAIN))


def named_voice(rng: random.Random, held: bool = False) -> Voice:
    """Returns a voice with a name, a role, or both."""
    lang = rng.choice(("en", "en", "zh"))
    who = name(rng, lang, held) if rng.random() < 0.75 else invented(rng, held).capitalize()
    if lang == "zh" and rng.random() < 0.4:
        who = pick(rng, ZH_NICK, held)
    role = _role(rng, lang)
    chance = rng.random()
    if chance < 0.5:
        system = rng.choice(_PHRASES["named"][lang]).format(n=who)
        return Voice(system=system + _extra(rng, lang), name=who)
    if chance < 0.88:
        system = rng.choice(_PHRASES["named_role"][lang]).format(n=who, r=role[lang])
        return Voice(system=system + _extra(rng, lang), name=who, role=role)
    return Voice(system=rng.choice(_PHRASES["only_role"][lang]).format(r=role[lang]), role=role)


def _extra(rng: random.Random, lang: str) -> str:
    """Returns further sentences of a system prompt, without effect on the answers."""
    count = rng.choices((0, 1, 2), (65, 25, 10))[0]
    chosen = [text.format(x=invented(rng).capitalize()) for text in rng.sample(_PHRASES["extra"][lang], count)]
    return (" " if lang == "en" and chosen else "") + (" " if lang == "en" else "").join(chosen)


def styled_voice(rng: random.Random, held: bool = False) -> Voice:
    """Returns a voice with a style, a first or last word, a language, or brevity; about half also have the default
    prompt or a name.
    """
    lang = rng.choice(("en", "en", "zh"))
    chance, who, reply, terse, style = rng.random(), None, None, False, lambda text, lang: text
    if chance < 0.4:
        kind, style = rng.choice(list(_STYLES.items()))
        rule = rng.choice(_PHRASES["styles"][kind])
    elif chance < 0.68:
        if rng.random() < 0.45:
            word = invented(rng, held)
        else:
            word = rng.choice(_PHRASES["emoji"]) if rng.random() < 0.2 else pick(rng, _PHRASES["words"][lang], held)
        if rng.random() < 0.65:
            rule, style = rng.choice(_PHRASES["ends"][lang]).format(w=word), _ends(word)
        else:
            rule, style = rng.choice(_PHRASES["starts"][lang]).format(w=word), _starts(word)
    elif chance < 0.9:
        reply = rng.choice(("zh", "en"))
        rule = rng.choice(_PHRASES["only"][reply])
    else:
        terse, rule = True, rng.choice(_PHRASES["terse"])
    before = rng.random()
    system = rule
    if before < 0.3:
        system = f"{DEFAULT_SYSTEM} {rule}"
    elif before < 0.5:
        who = english_name(rng, held)
        system = rng.choice(_PHRASES["named"]["en"][:4]).format(n=who) + " " + rule
    elif before < 0.55:
        system = f"{rule} {DEFAULT_SYSTEM}"
    return Voice(system=system, name=who, reply=reply, terse=terse, style=style)


def any_voice(rng: random.Random) -> Voice:
    chance = rng.random()
    return plain_voice(rng) if chance < 0.68 else named_voice(rng) if chance < 0.82 else styled_voice(rng)
