"""Generates the conversations of the chat stage: a seeded, endless stream of samples in the fine-tuning format.

Each sample is {"conversations": [{"from", "value"}, ...], "system": text, "unlearned": n}; the first n are context.
A conversation has several topics, so that a fact is asked for after sums and small talk, and a system prompt applies to
all of them. Questions of the evaluation (`HELD_QUESTIONS`) are left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from .arithmetic import arithmetic
from .copying import copying
from .little_tasks import little_task
from .memory import KINDS, kind_of, recall, tell, tell_two, value_of
from .small_talk import identity, small_talk, unknown
from .speech import normalised
from .system_prompts import any_voice, plain_voice
from .tools import tool_conversation


def mixed_conversation(rng: random.Random) -> dict:
    """Returns a chat without tools, on several topics."""
    voice = any_voice(rng)
    home = rng.choice(("en", "zh"))
    turns: list[dict] = []
    told: dict[str, str] = {}
    special = bool(voice.name or voice.role)
    exchanges = rng.randint(2, 7) if voice.system != "You are a helpful assistant." else rng.randint(2, 9)
    steady = rng.random() < 0.75
    copies = rng.random() < 0.03
    drill = rng.random() < 0.5  # mostly sums, because they are short and each fact occurs only a few times
    exchanges += 5 if drill else 0

    def add(pairs: list[tuple[str, str]], reply: str) -> None:
        for question, answer in pairs:
            turns.append({"from": "user", "value": question})
            turns.append({"from": "assistant", "value": voice.style(answer, reply)})

    if copies:
        for _ in range(rng.randint(1, 3)):
            add(copying(rng, home, voice.reply or home, voice), voice.reply or home)
    for index in range(exchanges):
        ask = home if steady or rng.random() < 0.6 else ("zh" if home == "en" else "en")
        reply = voice.reply or ask
        chance = rng.random()
        if special and rng.random() < (0.45 if index == 0 else 0.15):
            add(identity(rng, ask, reply, voice), reply)
        elif index == 0 and chance < 0.15:
            add(small_talk(rng, ask, reply, voice, "greeting"), reply)
        elif chance < 0.32 or (drill and rng.random() < 0.75):
            for _ in range(rng.choice((1, 1, 2))):
                add(arithmetic(rng, ask, reply, voice), reply)
        elif chance < 0.54:
            _remember(rng, told, add, ask, reply)
        elif chance < 0.62:
            add(unknown(rng, ask, reply, voice), reply)
        elif chance < 0.65:
            add(little_task(rng, ask, reply, voice), reply)
        elif chance < 0.71:
            add(identity(rng, ask, reply, voice), reply)
        else:
            add(small_talk(rng, ask, reply, voice), reply)
    if told and rng.random() < 0.5:
        kind = rng.choice(list(told))
        reply = voice.reply or home
        add([recall(rng, kind, told[kind], home, reply)], reply)
    return {"conversations": turns, "system": voice.system, "unlearned": 0}


def _remember(rng: random.Random, told: dict[str, str], add, ask: str, reply: str) -> None:
    """Adds an exchange that tells, changes or asks for a fact, depending on what has been told."""
    chance = rng.random()
    if told and chance < 0.55:
        kind = rng.choice(list(told))
        add([recall(rng, kind, told[kind], ask, reply)], reply)
    elif chance < 0.65:
        kind = rng.choice(list(KINDS))
        add([recall(rng, kind, told.get(kind), ask, reply)], reply)
    elif told and chance < 0.7:
        kind = rng.choice(list(told))
        told[kind] = value_of(rng, kind, ask)
        add([tell(rng, kind, told[kind], ask, reply, change=True)], reply)
    else:
        first, second = kind_of(rng), kind_of(rng)
        told[first] = value_of(rng, first, ask)
        if first != second and rng.random() < 0.2:
            told[second] = value_of(rng, second, ask)
            add([tell_two(rng, (first, told[first]), (second, told[second]), ask, reply)], reply)
        else:
            add([tell(rng, first, told[first], ask, reply)], reply)


def conversation(rng: random.Random, tools: float = 0.2) -> dict:
    """Returns one sample. `tools` is the share of conversations with tools, which are about three times as long."""
    if rng.random() < tools:
        return tool_conversation(rng, plain_voice(rng) if rng.random() < 0.85 else any_voice(rng))
    return mixed_conversation(rng)


def conversations(seed: int, tools: float = 0.2) -> Iterator[dict]:
    """Yields samples endlessly, reproducibly by seed, without the evaluation's questions."""
    from ..questions import HELD_QUESTIONS

    rng = random.Random(seed)
    while True:
        sample = conversation(rng, tools)
        if not any(normalised(_question(turn["value"])) in HELD_QUESTIONS for turn in sample["conversations"][::2]):
            yield sample


def _question(text: str) -> str:
    """Returns the user's question without the preceding tool instruction."""
    return text.rsplit("\n\nQuestion: ", 1)[-1]
