"""Hand-written questions of the evaluation, which are not in the training data, and what a right answer contains.

The generators leave out the questions in `HELD_QUESTIONS`. Arithmetic, memory and tools also use held-out facts, names
and words.
"""

from __future__ import annotations

from .conversations.speech import normalised
from .phrases import phrases

_QUESTIONS = phrases("questions")
# category → [question, keyword of a right answer (lower case), alternative keyword, ...]
TALK: dict[str, list[list[str]]] = _QUESTIONS["talk"]
# operation → language → phrases around {a} and {b}
SUMS: dict[str, dict[str, list[str]]] = _QUESTIONS["sums"]
# kind of fact → language → (statement, question); {v} is a held-out value
FACTS: dict[str, dict[str, list[list[str]]]] = _QUESTIONS["facts"]
NEVER_TOLD: dict[str, list[str]] = _QUESTIONS["never_told"]
# (system prompt, rule, expected value of the rule); {v} is a held-out name or word
SYSTEMS: list[list[str]] = _QUESTIONS["systems"]["all"]

HELD_QUESTIONS = frozenset(
    normalised(text)
    for text in [
        *(question for items in TALK.values() for question, *_ in items),
        *(question for items in NEVER_TOLD.values() for question in items),
        *(asking for kinds in FACTS.values() for pairs in kinds.values() for _, asking in pairs),
    ]
)
