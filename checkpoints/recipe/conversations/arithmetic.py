"""Two-digit arithmetic: facts, questions and worked answers.

Sums and differences are answered directly, products and quotients in steps, each a sum or a fact of the times table.
A fixed hash holds out a tenth of the facts with a two-digit operand; a × b and b × a are held out together.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from ..phrases import phrases
from ..words import FOODS, held_out, pair
from .speech import Voice, ask_as


class Fact(NamedTuple):
    """`a op b`; op is one of + - * /."""

    a: int
    op: str
    b: int

    @property
    def value(self) -> int:
        a, op, b = self
        return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]

    @property
    def held(self) -> bool:
        """Whether this fact is held out from training. One-digit facts never are."""
        a, op, b = self
        if max(a, b) < 10 or (op == "/" and (a // max(b, 1) < 10 or a // b % 10 == 0)):
            return False
        low, high = (min(a, b), max(a, b)) if op in "+*" else (a, b)
        return held_out(f"{low} {op} {high}")


def fact(rng: random.Random, op: str | None = None, held: bool = False) -> Fact:
    """Returns a random fact: + - of numbers below 100, × by one digit (sometimes by two), exact ÷ by one digit."""
    while True:
        kind = op or rng.choices("+-*/", (32, 42, 16, 10))[0]
        if kind in "+-":
            chance = rng.random()
            low = 0 if chance < 0.12 else 10
            a, b = rng.randint(low, 99), rng.randint(low, 99)
            if chance < 0.22:
                a, b = rng.choice([(a, b % 10), (b % 10, a)]) if kind == "+" else (a, b % 10)
        elif kind == "*":
            chance = rng.random()
            if chance < 0.2:
                a, b = rng.randint(0, 10), rng.randint(0, 10)
            elif chance < 0.75:
                a, b = rng.randint(10, 99), rng.randint(2, 9)
                if rng.random() < 0.3:
                    a, b = b, a
            else:
                a, b = rng.randint(10, 99), rng.randint(10, 99)
        else:
            b = rng.randint(1, 9)
            a = b * rng.randint(0 if rng.random() < 0.2 else 1, 99 // b)
        candidate = Fact(a, kind, b)
        if candidate.held == held and (held or not any(step.held for step in steps(candidate))):
            return candidate


def steps(f: Fact) -> list[Fact]:
    """Returns the intermediate facts below 100 of the worked answer, which must not be held out in training."""
    found = re.findall(r"(?=\b(\d+) ([+×÷]) (\d+)\b)", worked(f))
    facts = [Fact(int(a), {"×": "*", "÷": "/"}.get(op, op), int(b)) for a, op, b in found]
    return [g for g in facts if g != f and max(g.a, g.b) < 100]


def _times(a: int, b: int) -> str:
    """Returns the steps and the result of a two-digit by one-digit product."""
    tens, ones = a // 10 * 10, a % 10
    return f"{tens * b} + {ones * b} = {a * b}" if ones else f"{a * b}"


def worked(f: Fact) -> str:
    """Returns the fact with its steps, ending in the result (no full stop)."""
    a, op, b = f
    if op == "+":
        return f"{a} + {b} = {f.value}"
    if op == "-":
        return f"{a} - {b} = {f.value}"
    if op == "/":
        tens = (a // b) // 10 * 10 * b
        if a // b < 10 or tens == a or b == 1:
            return f"{a} ÷ {b} = {f.value}"
        return f"{a} ÷ {b} = {tens} ÷ {b} + {a - tens} ÷ {b} = {tens // b} + {(a - tens) // b} = {f.value}"
    if max(a, b) <= 10 or min(a, b) <= 1:
        return f"{a} × {b} = {f.value}"
    if min(a, b) <= 10:
        steps = _times(max(a, b), min(a, b))
        return f"{a} × {b} = {steps}"
    tens, ones = b // 10 * 10, b % 10
    first = f"{a} × {tens} = {a * (b // 10) * 10}"
    if a % 10:
        first = f"{a} × {tens} = {a // 10 * 10 * tens} + {a % 10 * tens} = {a * tens}"
    if not ones:
        return first
    return f"{first}, {a} × {ones} = {_times(a, ones)}, {a * tens} + {a * ones} = {f.value}"


_PHRASES = phrases("arithmetic")


def question(rng: random.Random, f: Fact, lang: str) -> str:
    a, op, b = f
    food = pair(rng, FOODS, lang)
    stories = a > 0 and b > 0 and f.value >= 0
    if rng.random() < 0.22 and stories:
        story = rng.choice(_PHRASES["stories"][lang][op]).format(a=a, b=b, food=food)
        return ask_as(rng, story, lang, lead=0.1)
    if lang == "zh":
        phrase, sign = rng.choice(_PHRASES["phrases"][lang]), rng.choice(_PHRASES["signs"][lang][op])
        return ask_as(rng, phrase.format(e=f"{a}{sign}{b}"), lang, lead=0.1)
    sign = rng.choice(_PHRASES["signs"][lang][op])
    space = " " if (sign[0].isalpha() and sign != "x") or rng.random() < 0.65 else ""
    expression = f"{a}{space}{sign}{space}{b}"
    return ask_as(rng, rng.choice(_PHRASES["phrases"][lang]).format(e=expression), lang, lead=0.08)


def answer(f: Fact, reply: str, voice: Voice) -> str:
    if voice.terse:
        return f"{f.value}" if f.op in "+-" or max(f.a, f.b) <= 10 else worked(f)
    return worked(f) + ("." if reply == "en" else "。")


def arithmetic(rng: random.Random, ask: str, reply: str, voice: Voice, held: bool = False) -> list[tuple[str, str]]:
    """Returns one exchange about a fact, or rarely about one that is too hard, with an answer that says so."""
    chance = 1.0 if held else rng.random()
    if chance < 0.03:
        a, b, op = rng.randint(100, 9999), rng.randint(100, 9999), rng.choice("+-*/")
        if rng.random() < 0.3:
            b = rng.randint(10, 99)
        return [(question(rng, Fact(a, op, b), ask), _PHRASES["replies"][reply]["beyond"])]
    if chance < 0.04:
        return [(question(rng, Fact(rng.randint(1, 99), "/", 0), ask), _PHRASES["replies"][reply]["by_zero"])]
    if chance < 0.055:
        b = rng.randint(2, 9)
        a = rng.randint(10, 99)
        if a % b and not Fact(a - a % b, "+", a % b).held:
            text = _PHRASES["replies"][reply]["remainder"].format(a=a, b=b, q=a // b, r=a % b, m=a - a % b)
            return [(question(rng, Fact(a, "/", b), ask), text)]
    f = fact(rng, held=held)
    return [(question(rng, f, ask), answer(f, reply, voice))]
