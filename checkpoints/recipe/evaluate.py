"""Scores a chat checkpoint on held-out questions: `python -m checkpoints.recipe.evaluate checkpoints/qwen-tiny-chat`.

Replies are decoded greedily in batches and scored by exact rules. A reply that reaches the token limit is wrong. The
questions use what training holds out: arithmetic facts, names, words, phrasings and whole families of tools.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.model.qwen_generation_utils import make_context
from qwen.model.tokenization_qwen import QWenTokenizer
from qwen.tools import observation_text, parse_response, tool_prompt

from .conversations.arithmetic import Fact, fact, worked
from .conversations.memory import VALUES, acknowledge, recall, tell
from .conversations.small_talk import INTENTS
from .conversations.speech import DEFAULT_SYSTEM, Voice
from .conversations.tools import call, compatible, no_tool_exchange, observe, offer, step
from .questions import FACTS, NEVER_TOLD, SUMS, SYSTEMS, TALK
from .words import invented, name

MAX_NEW_TOKENS = 160


@dataclass
class Case:
    """A scored reply: its prompt and its rule. `started` is the beginning of an assistant turn to continue."""

    category: str
    query: str
    right: Callable[[str], bool]
    system: str = DEFAULT_SYSTEM
    history: list[tuple[str, str]] = field(default_factory=list)
    started: str | None = None
    stops_at_observation: bool = False
    reply: str = ""
    ended: bool = False


def is_chinese(text: str) -> bool:
    return len(re.findall(r"[\u4e00-\u9fff]", text)) >= 2


def last_number(text: str) -> int | None:
    numbers = re.findall(r"-?\d+", text.replace("−", "-").replace(",", ""))
    return int(numbers[-1]) if numbers else None


def talk_cases() -> list[Case]:
    """Hand-written questions: the answer contains a key phrase and is in the language of the question."""

    def rule(reply: str, keys: list[str], chinese: bool) -> bool:
        return any(key in reply.lower() for key in keys) and is_chinese(reply) == chinese

    return [
        Case(
            f"talk: {category}",
            question,
            partial(rule, keys=keys, chinese=bool(re.search("[\u4e00-\u9fff]", question))),
        )
        for category, items in TALK.items()
        for question, *keys in items
    ]


def arithmetic_cases(rng: random.Random, count: int = 60) -> list[Case]:
    """Held-out facts: `count` each for +, - and × by one digit, half of that for ÷ and × by two digits."""
    cases = []
    for title, op, number, fits in (
        ("addition", "+", count, lambda f: True),
        ("subtraction", "-", count, lambda f: True),
        ("× one digit", "*", count, lambda f: min(f.a, f.b) < 10),
        ("÷ one digit", "/", count // 2, lambda f: True),
        ("× two digits", "*", count // 2, lambda f: min(f.a, f.b) >= 10),
    ):
        for _ in range(number):
            while not fits(f := fact(rng, op, held=True)):
                pass
            lang = rng.choice(("en", "zh"))
            question = rng.choice(SUMS[op][lang]).format(a=f.a, b=f.b)
            cases.append(Case(f"arithmetic: {title}", question, lambda reply, f=f: last_number(reply) == f.value))
    return cases


def _filler(rng: random.Random, lang: str) -> tuple[str, str]:
    """Returns an unrelated exchange, placed between telling and asking."""
    if rng.random() < 0.5:
        f = Fact(rng.randint(10, 99), "+", rng.randint(10, 99))
        return (
            (f"What is {f.a} + {f.b}?", worked(f) + ".")
            if lang == "en"
            else (f"{f.a}加{f.b}等于几？", worked(f) + "。")
        )
    intent = rng.choice(("greeting", "can_do", "how_are_you", "joke", "repository"))
    return (
        (INTENTS[intent]["ask_en"][0], INTENTS[intent]["answer_en"][0])
        if lang == "en"
        else (INTENTS[intent]["ask_zh"][0], INTENTS[intent]["answer_zh"][0])
    )


def memory_cases(rng: random.Random) -> list[Case]:
    cases = []
    for kind, languages in FACTS.items():
        for lang, pairs in languages.items():
            for telling, asking in pairs:
                for _ in range(2):
                    value = VALUES[kind](rng, lang, True)
                    history = [(telling.format(v=value), acknowledge(kind, value, lang))]
                    history += [_filler(rng, lang) for _ in range(rng.choice((1, 2)))]
                    cases.append(
                        Case("memory: told", asking, lambda r, v=value: v.lower() in r.lower(), history=history)
                    )
    for lang, questions in NEVER_TOLD.items():
        for question in questions:
            key = "not told" if lang == "en" else "没有告诉"
            history = [_filler(rng, lang)] if rng.random() < 0.5 else []
            cases.append(Case("memory: never told", question, lambda r, k=key: k in r, history=history))
    for _ in range(20):  # two facts in two turns, then a question about the first
        lang = rng.choice(("en", "zh"))
        first, second = rng.sample(["name", "colour", "city", "age", "code"], 2)
        values = {kind: VALUES[kind](rng, lang, True) for kind in (first, second)}
        history = [tell(rng, kind, value, lang, lang) for kind, value in values.items()]
        question = recall(rng, first, values[first], lang, lang)[0]
        cases.append(
            Case("memory: two facts", question, lambda r, v=values[first]: v.lower() in r.lower(), history=history)
        )
    return cases


_RULES: dict[str, Callable[[str, str], bool]] = {
    "name": lambda reply, wanted: wanted in reply.lower(),
    "upper": lambda reply, wanted: reply == reply.upper(),
    "lower": lambda reply, wanted: reply == reply.lower(),
    "contains": lambda reply, wanted: any(part in reply.lower() for part in wanted.split("|")),
    "ends": lambda reply, wanted: reply.rstrip(".!。！").lower().endswith(wanted),
    "starts": lambda reply, wanted: reply.lower().startswith(wanted),
    "zh": lambda reply, wanted: is_chinese(reply) or not re.search("[a-z]", reply),
    "en": lambda reply, wanted: not re.search("[\u4e00-\u9fff]", reply),
}
_ASKED = {
    "name": {
        "en": ["Who are you?", "What is your name?", "Tell me your name please"],
        "zh": ["你是谁？", "你叫什么名字？", "请告诉我你的名字"],
    },
    "style": {
        "en": ["Who are you?", "What can you do?", "What is 31 + 16?"],
        "zh": ["你是谁？", "你能做什么？", "31加16等于几？"],
    },
}


def system_cases(rng: random.Random) -> list[Case]:
    """Each system prompt with three questions. If it sets a language, the questions are in the other one."""
    cases = []
    for system, kind, expected in SYSTEMS:
        topic = "name" if kind == "name" else "style"
        lang = {"en": "zh", "zh": "en", "upper": "en", "lower": "en"}.get(kind, "zh" if is_chinese(system) else "en")
        for question in _ASKED[topic][lang]:
            value = name(rng, lang, held=True) if topic == "name" else invented(rng, held=True)
            wanted = expected.format(v=value).lower()
            rule = partial(_obeys, kind=kind, wanted=wanted)
            cases.append(Case(f"system: {topic}", question, rule, system=system.format(v=value)))
    return cases


def _obeys(reply: str, kind: str, wanted: str) -> bool:
    return _RULES[kind](reply, wanted)


def tool_cases(rng: random.Random, count: int = 60) -> list[Case]:
    """Choice and arguments of tools from trained, invented and unseen families; no tool needed; use of a result."""
    cases = []
    for title in ("choice", "unseen tools"):
        for _ in range(count):
            lang = rng.choice(("en", "zh"))
            tools = compatible(offer(rng, lang, held=True, unseen=title == "unseen tools"))
            s = step(rng, tools[0], lang, held=True)
            rng.shuffle(tools)
            functions = [tool.function for tool in tools]
            prompt = tool_prompt(s.question, functions)
            for scope, rule in (("name and arguments", _calls), ("name alone", _names)):
                right = partial(rule, tool=s.tool.name, arguments=s.arguments)
                cases.append(Case(f"tools: {title}, {scope}", prompt, right, stops_at_observation=True))
            if title == "choice":
                result, said = observe(rng, s, lang)
                text = call(rng, s, lang) + observation_text(result)
                right = partial(_uses, values=re.findall(r"[^\s,:，：。.]+", re.split(": |：", said, maxsplit=1)[-1]))
                cases.append(Case("tools: uses the observation", prompt, right, started=text))
                prompt = tool_prompt(no_tool_exchange(rng, tools, lang, Voice())[0], functions)
                cases.append(Case("tools: none needed", prompt, _calls_none, stops_at_observation=True))
    return cases


def _calls(reply: str, tool: str, arguments: dict) -> bool:
    made = parse_response(reply).function_call
    if made is None or made["name"] != tool:
        return False
    try:
        return json.loads(made["arguments"]) == arguments
    except ValueError:
        return False


def _names(reply: str, tool: str, arguments: dict) -> bool:
    return (parse_response(reply).function_call or {}).get("name") == tool


def _calls_none(reply: str) -> bool:
    return parse_response(reply).function_call is None


def _uses(reply: str, values: list[str]) -> bool:
    return "Final Answer:" in reply and all(value in reply for value in values)


def all_cases(seed: int = 20) -> list[Case]:
    rng = random.Random(seed)
    return talk_cases() + arithmetic_cases(rng) + memory_cases(rng) + system_cases(rng) + tool_cases(rng)


@torch.inference_mode()
def answer(cases: list[Case], model: QWenLMHeadModel, tokenizer: QWenTokenizer, batch_size: int = 48) -> None:
    """Sets `reply` and `ended` of all cases. Cases with the same prompt are answered once."""
    prompts: dict[tuple[int, ...], list[Case]] = {}
    for case in cases:
        _, ids = make_context(tokenizer, case.query, case.history, system=case.system, max_window_size=6144)
        if case.started is not None:
            ids += tokenizer.encode(case.started, allowed_special=set())
        prompts.setdefault(tuple(ids), []).append(case)
    observation = tokenizer.encode("Observation")[0]
    queue = sorted(prompts, key=len)
    for start in range(0, len(queue), batch_size):
        batch = queue[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[tokenizer.eod_id] * (longest - len(p)) + list(p) for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        made = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=tokenizer.eod_id, eos_token_id=[tokenizer.im_end_id, tokenizer.eod_id, observation],
        )[:, longest:].tolist()  # fmt: skip
        for prompt, new in zip(batch, made, strict=True):
            ends = [i for i, token in enumerate(new) if token in (tokenizer.im_end_id, observation)]
            for case in prompts[prompt]:
                case.ended = bool(ends) and (new[ends[0]] == tokenizer.im_end_id or case.stops_at_observation)
                case.reply = tokenizer.decode(new[: ends[0]] if ends else new)
                if ends and new[ends[0]] == observation:
                    case.reply += "Observation:"


def score(cases: list[Case]) -> dict[str, tuple[int, int]]:
    """Returns (right, asked) by category, by the group before the colon, and overall.

    The groups and "overall" do not count "name alone", which scores the same replies again.
    """
    table: dict[str, list[int]] = {}
    for case in cases:
        right = case.ended and case.right(case.reply)
        keys = [case.category]
        if not case.category.endswith("name alone"):
            keys += [case.category.split(":")[0], "overall"]
        for key in keys:
            counts = table.setdefault(key, [0, 0])
            counts[0] += right
            counts[1] += 1
    return {key: (right, asked) for key, (right, asked) in sorted(table.items())}


def markdown(table: dict[str, tuple[int, int]]) -> str:
    lines = ["| held-out questions | right | asked | score |", "|---|---|---|---|"]
    lines += [f"| {key} | {right} | {asked} | {100 * right / asked:.1f}% |" for key, (right, asked) in table.items()]
    return "\n".join(lines)


def load(folder: Path) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    return QWenLMHeadModel.from_pretrained(folder, dtype=torch.float32).eval(), QWenTokenizer(
        str(folder / "qwen.tiktoken")
    )


def load_snapshot(path: Path, vocabulary: Path) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """Loads a training snapshot, rounded to bf16 like a published model."""
    from .train import config

    model = QWenLMHeadModel(config("chat"))
    state = torch.load(path, weights_only=True)["model"]
    model.load_state_dict({key: tensor.to(torch.bfloat16).float() for key, tensor in state.items()})
    return model.eval(), QWenTokenizer(str(vocabulary))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint, or a training snapshot (.pt)")
    parser.add_argument("--json", type=Path, help="file to write the scores to")
    parser.add_argument("--only", default="", help="prefix of the categories to run")
    parser.add_argument("--every", type=int, default=1, help="ask every n-th question only")
    parser.add_argument("--show", action="store_true", help="print the wrong answers")
    arguments = parser.parse_args()
    if arguments.checkpoint.suffix == ".pt":
        model, tokenizer = load_snapshot(arguments.checkpoint, Path("checkpoints/qwen-tiny-base/qwen.tiktoken"))
    else:
        model, tokenizer = load(arguments.checkpoint)
    cases = [case for case in all_cases() if case.category.startswith(arguments.only)][:: arguments.every]
    began = time.time()
    answer(cases, model, tokenizer)
    table = score(cases)
    if arguments.show:
        for case in cases:
            if not (case.ended and case.right(case.reply)):
                print(f"[{case.category}] {case.system!r} {case.query[-120:]!r} -> {case.reply!r} ended={case.ended}")
    print(markdown(table))
    print(f"{len(cases)} questions in {time.time() - began:.0f} s")
    if arguments.json:
        content = {key: {"right": right, "asked": asked} for key, (right, asked) in table.items()}
        arguments.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
