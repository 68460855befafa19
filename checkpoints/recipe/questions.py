"""The evaluation's hand-written questions: phrasings that training never sees, and what a right answer must hold.

`HELD_QUESTIONS` is what the generators leave out. Arithmetic, memory and tools take held-out facts, names and words
besides.
"""

from __future__ import annotations

from .conversations.speech import normalised
from .phrases import phrases

_QUESTIONS = phrases("questions")
# category → [question, key that a right answer holds (lower case), another such key, ...]
TALK: dict[str, list[list[str]]] = _QUESTIONS["talk"]
# operation → language → phrases around {a} and {b}
SUMS: dict[str, dict[str, list[str]]] = _QUESTIONS["sums"]
# kind of fact → language → (telling, asking); {v} is a held-out value
FACTS: dict[str, dict[str, list[list[str]]]] = _QUESTIONS["facts"]
NEVER_TOLD: dict[str, list[str]] = _QUESTIONS["never_told"]
# (system prompt, rule, what the rule expects); {v} is a held-out name or word
SYSTEMS: list[list[str]] = _QUESTIONS["systems"]["all"]

HELD_QUESTIONS = frozenset(
    normalised(text)
    for text in [
        *(question for items in TALK.values() for question, *_ in items),
        *(question for items in NEVER_TOLD.values() for question in items),
        *(asking for kinds in FACTS.values() for pairs in kinds.values() for _, asking in pairs),
    ]
)
