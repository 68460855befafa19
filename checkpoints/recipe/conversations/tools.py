"""Conversations in the ReAct format: a prompt with tools, and questions that need one, two or none of them."""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass

from qwen.tools import final_answer_text, observation_text, tool_call_text, tool_prompt

from ..words import invented
from .arithmetic import arithmetic
from .small_talk import identity, small_talk, unknown
from .speech import Voice, ask_as
from .toolbox import FAMILIES, HELD_FAMILIES, POOLS, TRAINED_FAMILIES, Family, invented_family


@dataclass
class Tool:
    """A family as a user might declare it. `names` maps its parameters to their names in the schema."""

    family: Family
    key: str
    name: str
    names: dict[str, str]
    function: dict


@dataclass
class Step:
    """A question for a tool, and the call that answers it."""

    question: str
    tool: Tool
    arguments: dict
    subject: str


def declare(rng: random.Random, key: str, lang: str, held: bool = False, strange: float = 0.12) -> Tool:
    """Returns a tool of family `key` (or "invented"): random name, description and schema in one of two formats."""
    family = invented_family(rng, held) if key == "invented" else FAMILIES[key]
    name = rng.choice(family.names.split())
    chance = rng.random()
    if key != "invented" and chance < strange:
        name = invented(rng, held)  # can be chosen by its description only
    elif chance < 0.22:
        name = "".join(part.capitalize() for part in name.split("_"))
        name = name[0].lower() + name[1:] if rng.random() < 0.6 else name
    elif chance < 0.27:
        name = name.replace("_", "-")
    elif chance < 0.3:
        name += rng.choice(("_v2", "_api", "_tool"))
    about = rng.choice(family.about[0 if lang == "en" or rng.random() < 0.4 else 1])
    names, taken = {}, set()
    for slot, parameter in family.parameters.items():
        choices = [n for n in parameter.names.split() if n not in taken] or [slot]
        names[slot] = rng.choice(choices)
        taken.add(names[slot])
    described = rng.random() < 0.7
    described_name = {slot: rng.choice(p.about.split("|")) for slot, p in family.parameters.items()}
    shown = [slot for slot, p in family.parameters.items() if p.required or rng.random() < 0.7]
    names = {slot: names[slot] for slot in shown}
    if rng.random() < 0.55:
        properties = {}
        for slot in shown:
            p = family.parameters[slot]
            entry: dict = {"type": p.type}
            if described:
                entry["description"] = described_name[slot]
            if p.enum and (slot != "unit" or rng.random() < 0.8):
                entry["enum"] = list(p.enum)
            properties[names[slot]] = entry
        parameters: dict | list = {"type": "object", "properties": properties}
        if rng.random() < 0.85:
            parameters["required"] = [names[slot] for slot in shown if family.parameters[slot].required]
        function = {"name": name, "description": about, "parameters": parameters}
    else:
        parameters = []
        for slot in shown:
            p = family.parameters[slot]
            schema: dict = {"type": p.type}
            if p.enum:
                schema["enum"] = list(p.enum)
            entry = {"name": names[slot], "description": described_name[slot], "required": p.required, "schema": schema}
            parameters.append(entry)
        if rng.random() < 0.5:
            as_json = " Format the arguments as a JSON object."
            about += rng.choice([as_json, as_json, " 此工具的输入应为JSON对象。"])
        human = family.human[0 if lang == "en" else 1] if rng.random() < 0.7 else name
        function = {
            "name_for_human": human,
            "name_for_model": name,
            "description_for_model": about,
            "parameters": parameters,
        }
    return Tool(family, key, name, names, function)


_OPENINGS = {
    "en": ["Please: ", "Hey, ", "Hi! ", "Question: ", "Now this: "],
    "zh": ["请问", "你好，", "请", "麻烦", "那么"],
}


def step(rng: random.Random, tool: Tool, lang: str, held: bool = False) -> Step:
    """Returns a question for the tool and the arguments of its call."""
    family = tool.family
    questions = family.questions[0 if lang == "en" else 1]
    while True:
        template = rng.choice(questions)
        slots = list(dict.fromkeys(field for _, field, _, _ in string.Formatter().parse(template) if field))
        if set(slots) <= set(tool.names):
            break
    values = {}
    for slot in slots:
        p = family.parameters[slot]
        values[slot] = rng.choice(p.enum) if p.enum else POOLS[p.pool](rng, lang, held)
    question = template.format(**values)
    small = all(str(value) == str(value).lower() for value in values.values())
    if all(isinstance(value, int) or str(value).islower() for value in values.values()) or rng.random() < 0.15:
        question = ask_as(rng, question, lang, lead=0.12) if small else question  # never change the case of an argument
    elif rng.random() < 0.12:
        question = rng.choice(_OPENINGS[lang]) + question
    if rng.random() < 0.12:
        question = question.rstrip("?.？。")
    arguments = {}
    for slot, name in tool.names.items():
        if slot in values:
            value = values[slot]
            arguments[name] = value if family.parameters[slot].type in ("integer", "number") else str(value)
    subject = str(values.get(next(iter(family.parameters)), next(iter(values.values()), "")))
    return Step(question, tool, arguments, subject)


def thought(rng: random.Random, tool: Tool, lang: str) -> str:
    return f"I should use {tool.name}." if lang == "en" else f"我应该使用{tool.name}。"


_FAILURES = [
    "Error: not found", "Error: timeout", "Error 500", "Service unavailable", "No results", "错误：没有找到",
    "服务不可用", "Error: invalid input", "Permission denied",
]  # fmt: skip


def observe(rng: random.Random, s: Step, lang: str) -> tuple[str, str]:
    """Returns the tool's result, and the part of the final answer that states it."""
    result = s.tool.family.result(rng)
    chance = rng.random()
    if chance < 0.06:
        failure = rng.choice(_FAILURES)
        return failure, f"Sorry, the tool failed: {failure}" if lang == "en" else f"抱歉，工具出错了：{failure}"
    if chance < 0.3:  # plain words
        bare = rng.random() < 0.5
        text = " ".join(map(str, result.values())) if bare else ", ".join(f"{k} {v}" for k, v in result.items())
        if rng.random() < 0.4:
            text = f"{text} {invented(rng)} {rng.randint(1, 99)}"
    elif chance < 0.38:
        verb = ("is", "has", "was", "是", ":")
        text = f"{invented(rng).capitalize()} {invented(rng)} {rng.choice(verb)} {rng.randint(0, 99)} {invented(rng)}."
    else:
        if rng.random() < 0.25:
            result[invented(rng)] = rng.choice((rng.randint(0, 999), invented(rng)))
        if rng.random() < 0.15:
            result = {rng.choice(list(s.arguments) or ["input"]): s.subject, **result}
        text = ", ".join(f"{k} {v}" for k, v in result.items())
        observation = json.dumps(result, ensure_ascii=False)
        if len(result) == 1:
            text = str(next(iter(result.values())))
        return observation, f"{_subject(s, lang)}: {text}." if lang == "en" else f"{_subject(s, lang)}：{text}。"
    return text, f"{_subject(s, lang)}: {text}".rstrip(
        "."
    ) + "." if lang == "en" else f"{_subject(s, lang)}：{text}".rstrip(".") + "。"


def _subject(s: Step, lang: str) -> str:
    en, zh = s.tool.family.subject
    return f"{en} {s.subject}" if lang == "en" else f"{s.subject}{zh}"


def call(rng: random.Random, s: Step, lang: str, first: bool = True) -> str:
    text = tool_call_text(thought(rng, s.tool, lang), s.tool.name, json.dumps(s.arguments, ensure_ascii=False))
    return text if first else text.removeprefix("Thought:")


def use(rng: random.Random, steps: list[Step], lang: str, voice: Voice) -> str:
    """Returns the assistant's turn: one call per step, each with its observation, then the final answer."""
    text, said = "", []
    for index, s in enumerate(steps):
        observation, answer = observe(rng, s, lang)
        text += call(rng, s, lang, first=index == 0) + observation_text(observation)
        said.append(answer)
    return text + final_answer_text(voice.style(" ".join(said), lang)).removeprefix("Thought:")


_NO_SUCH_TOOL = {
    "en": "I have no tool for that, and I am only a tiny model, so I do not know.",
    "zh": "我没有合适的工具，而且我只是一个很小的模型，所以不知道。",
}


def offer(
    rng: random.Random,
    lang: str,
    held: bool = False,
    unseen: bool = False,
    made_up: float = 0.28,
    strange: float = 0.12,
) -> list[Tool]:
    """Returns one to four tools of different families. With `unseen`, at least the first is from a held-out family.

    `made_up` is the share of invented families, `strange` that of trained families with a meaningless name.
    """
    count = rng.choices((1, 2, 3, 4), (18, 38, 32, 12))[0]
    keys = rng.sample(TRAINED_FAMILIES, count)
    keys = ["invented" if rng.random() < made_up else key for key in keys]
    if unseen:
        keys[0] = rng.choice(HELD_FAMILIES)
    tools, seen = [], set()
    for key in keys:
        tool = declare(rng, key, lang, held, strange)
        if tool.name not in seen:
            tools.append(tool)
            seen.add(tool.name)
    return tools


_NARROW = {"weather", "time", "light", "image", "stock", "email", "timer", "alarm", "call", "invented"}
_BESIDE_TOOLS = (
    "greeting", "thanks", "goodbye", "how_are_you", "can_do", "praise", "which_model", "maker", "human", "joke",
    "repository", "size", "ack",
)  # fmt: skip
# Families that could answer each other's questions, and are not offered together.
_RIVALS = [
    {"search", "wiki", "news", "book", "population"},
    {"wiki", "dictionary", "search"},
    {"calculator", "python"},
    {"flight", "train", "route", "taxi"},
    {"todo", "calendar", "alarm", "timer"},
    {"recipe", "food_order", "restaurant"},
    {"translate", "dictionary"},
    {"email", "sms", "call"},
    {"movie", "search", "sports"},
    {"stock", "currency"},
    {"units", "currency"},
    {"website", "file", "search"},
    {"speech", "translate"},
    {"holiday", "calendar"},
    {"search", "recipe"},
    {"search", "sports"},
    {"air", "weather"},
    {"population", "holiday"},
]


def compatible(tools: list[Tool]) -> list[Tool]:
    """Removes tools that could answer the questions of an earlier one."""
    kept: list[Tool] = []
    for tool in tools:
        if not any({tool.key, other.key} <= group and tool.key != other.key for group in _RIVALS for other in kept):
            kept.append(tool)
    return kept


def no_tool_exchange(rng: random.Random, tools: list[Tool], lang: str, voice: Voice) -> tuple[str, str]:
    """Returns a question that needs none of the tools, and its final answer."""
    keys = {tool.key for tool in tools}
    answers_anything = keys & {"search", "wiki", "python", "news", "book"}
    chance = rng.random()
    if chance < 0.2:
        pairs = identity(rng, lang, lang, voice)
    elif chance < 0.4 and not keys & {"calculator", "python", "search"}:
        pairs = arithmetic(rng, lang, lang, voice)
    elif chance < 0.55 and not answers_anything:
        others = (key for key in TRAINED_FAMILIES if key not in keys)
        other = rng.choice([key for key in others if not any(key in group and group & keys for group in _RIVALS)])
        if other in ("calculator", "translate", "time", "dictionary"):
            pairs = small_talk(rng, lang, lang, voice)
        else:
            question = step(rng, declare(rng, other, lang), lang).question
            return question, voice.style(_NO_SUCH_TOOL[lang], lang)
    elif chance < 0.62 and not answers_anything and keys <= _NARROW:
        question = unknown(rng, lang, lang, voice)[0][0]
        return question, voice.style(_NO_SUCH_TOOL[lang], lang)
    else:
        intent = rng.choice(_BESIDE_TOOLS)
        if keys & {"search", "calendar", "population"} and intent in ("joke", "repository"):
            intent = "greeting"
        pairs = small_talk(rng, lang, lang, voice, intent)
    question, answer = pairs[0]
    return question, voice.style(answer, lang)


def tool_conversation(rng: random.Random, voice: Voice) -> dict:
    """Returns a conversation with the tools in the first user turn, or sometimes in the second, as the API does."""
    lang = rng.choice(("en", "en", "zh"))
    tools = compatible(offer(rng, lang, made_up=0.15, strange=0.05))
    functions = [tool.function for tool in tools]
    turns, at = [], 1 if rng.random() < 0.12 else 0
    total = at + rng.randint(3, 8)  # many, because the instruction is long
    if voice.terse or voice.reply:
        voice = Voice()
    for index in range(total):
        now = lang if rng.random() < 0.88 else ("zh" if lang == "en" else "en")
        chance = rng.random()
        if chance < 0.72 and not (index == 0 and at):
            steps = [step(rng, rng.choice(tools), now)]
            if rng.random() < 0.06:
                steps.append(step(rng, rng.choice(tools), now))
            joint = (
                rng.choice([" And then: ", " Also: ", " And "])
                if now == "en"
                else rng.choice(["，然后", "，还有", "。另外，"])
            )
            question = joint.join(s.question for s in steps)
            reply = use(rng, steps, now, voice)
        else:
            question, answer = no_tool_exchange(rng, tools, now, voice)
            reply = final_answer_text(answer)
        if index == at:
            question = tool_prompt(question, functions)
        turns += [{"from": "user", "value": question}, {"from": "assistant", "value": reply}]
    return {"conversations": turns, "system": voice.system, "unlearned": 2 * at}
