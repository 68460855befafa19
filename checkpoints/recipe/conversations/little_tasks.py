"""Small tasks: repeat, count, compare, even or odd, next or previous number, continue from the last result."""

from __future__ import annotations

import random

from ..words import SENTENCES, english_name, invented, pair
from .arithmetic import Fact, fact, worked
from .speech import Voice, ask_as


def little_task(rng: random.Random, ask: str, reply: str, voice: Voice) -> list[tuple[str, str]]:
    return rng.choice((_repeat, _count, _compare, _parity, _neighbour, _carry_on, _carry_on))(rng, ask, reply, voice)


def _end(reply: str) -> str:
    return "." if reply == "en" else "。"


def _repeat(rng, ask, reply, voice):
    text = rng.choice(
        (invented(rng), english_name(rng), f"{invented(rng)} {invented(rng)}", pair(rng, SENTENCES, ask).rstrip("？?"))
    )
    form = rng.choice(
        [
            "Repeat after me: {x}",
            "Say {x}",
            "Repeat: {x}",
            'Say "{x}"',
            "Please repeat {x}",
            'Repeat the words "{x}"',
            "Echo {x}",
        ]
        if ask == "en"
        else ["跟我说：{x}", "重复：{x}", "请说“{x}”", "重复一遍：{x}", "说{x}", "请重复“{x}”"]
    )
    return [(form.format(x=text), text)]


def _count(rng, ask, reply, voice):
    high = rng.randint(3, 20)
    form = rng.choice(
        ["Count to {n}.", "Count from 1 to {n}.", "Can you count to {n}?", "Please count up to {n}"]
        if ask == "en"
        else ["数到{n}", "从1数到{n}", "你能数到{n}吗？", "请从一数到{n}"]
    )
    return [(ask_as(rng, form.format(n=high), ask), ", ".join(map(str, range(1, high + 1))) + _end(reply))]


def _compare(rng, ask, reply, voice):
    a, b = rng.sample(range(100), 2)
    larger = rng.random() < 0.5
    en = (
        ["Which is larger, {a} or {b}?", "Which is bigger: {a} or {b}?", "What is more, {a} or {b}?"]
        if larger
        else ["Which is smaller, {a} or {b}?", "What is less, {a} or {b}?"]
    )
    zh = (
        ["{a}和{b}哪个大？", "{a}和{b}哪个更大？", "哪个大，{a}还是{b}？"]
        if larger
        else ["{a}和{b}哪个小？", "{a}和{b}哪个更小？"]
    )
    high, low = max(a, b), min(a, b)
    if reply == "en":
        answer = f"{high} is larger than {low}." if larger else f"{low} is smaller than {high}."
    else:
        answer = f"{high}比{low}大。" if larger else f"{low}比{high}小。"
    return [(ask_as(rng, rng.choice(en if ask == "en" else zh).format(a=a, b=b), ask), answer)]


def _parity(rng, ask, reply, voice):
    n = rng.randint(0, 99)
    form = rng.choice(
        ["Is {n} even or odd?", "Is {n} an even number?", "Is {n} odd?"]
        if ask == "en"
        else ["{n}是奇数还是偶数？", "{n}是偶数吗？", "{n}是奇数吗？"]
    )
    answer = f"{n} is {'odd' if n % 2 else 'even'}." if reply == "en" else f"{n}是{'奇数' if n % 2 else '偶数'}。"
    return [(ask_as(rng, form.format(n=n), ask), answer)]


def _neighbour(rng, ask, reply, voice):
    n, after = rng.randint(1, 98), rng.random() < 0.6
    en = (
        ["What comes after {n}?", "Which number follows {n}?", "What is the next number after {n}?"]
        if after
        else ["What comes before {n}?", "Which number is before {n}?"]
    )
    zh = ["{n}后面是几？", "{n}的下一个数是多少？"] if after else ["{n}前面是几？", "{n}的前一个数是多少？"]
    other = n + 1 if after else n - 1
    if reply == "en":
        answer = f"{other} comes {'after' if after else 'before'} {n}."
    else:
        answer = f"{n}{'后面' if after else '前面'}是{other}。"
    return [(ask_as(rng, rng.choice(en if ask == "en" else zh).format(n=n), ask), answer)]


def _carry_on(rng, ask, reply, voice):
    """Returns a sum, and a second one that starts from its result."""
    from .arithmetic import answer, question

    while True:
        first = fact(rng, rng.choice("+-"))
        second = Fact(first.value, rng.choice("+-"), rng.randint(1, 50))
        if 0 <= first.value < 100 and not second.held:
            break
    en = (
        ["And plus {b}?", "Now add {b}.", "Add {b} to that.", "Plus {b}?", "What if I add {b}?"]
        if second.op == "+"
        else ["And minus {b}?", "Now subtract {b}.", "Take away {b} from that.", "Minus {b}?"]
    )
    zh = (
        ["再加{b}呢？", "再加上{b}", "加{b}呢？", "然后加{b}"]
        if second.op == "+"
        else ["再减{b}呢？", "再减去{b}", "减{b}呢？", "然后减{b}"]
    )
    follow = rng.choice(en if ask == "en" else zh).format(b=second.b)
    last = str(second.value) if voice.terse else worked(second) + _end(reply)
    return [(question(rng, first, ask), answer(first, reply, voice)), (ask_as(rng, follow, ask, lead=0.0), last)]
