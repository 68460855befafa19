#!/usr/bin/env python
"""A ReAct loop on `model.generate`, with two tools and without a server or an agent library.

    python examples/react_demo.py "What time is it in Tokyo?"
    python examples/react_demo.py -c Qwen/Qwen-7B-Chat "What time is it in Tokyo, and what in London?"

The model writes a thought, a tool and its input, and is stopped at "Observation:". The tool's result is appended there,
and the model continues the same assistant turn until its final answer. examples/react_prompt.md explains the prompt.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

try:
    from qwen_cli.arguments import add_checkpoint_argument, add_cpu_only_argument, add_hub_argument
    from qwen_cli.console import explain_errors, how_to_install, quiet_imports

    quiet_imports()  # before transformers is imported

    from qwen.checkpoint.loading import load_model_quietly
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

import torch

from qwen.model.qwen_generation_utils import DEFAULT_SYSTEM, make_context
from qwen.tools import STOP_WORD, extend_stop_words, observation_text, parse_response, tool_prompt

MAX_STEPS = 5  # stops a model that calls tools forever
MAX_NEW_TOKENS = 512  # per step

ZONES = {
    **dict.fromkeys(("beijing", "shanghai", "北京", "上海"), "Asia/Shanghai"),
    **dict.fromkeys(("tokyo", "东京"), "Asia/Tokyo"),
    **dict.fromkeys(("london", "伦敦"), "Europe/London"),
    **dict.fromkeys(("paris", "巴黎"), "Europe/Paris"),
    **dict.fromkeys(("new york", "纽约"), "America/New_York"),
}


def get_current_time(city: str) -> str:
    """Return the time in a city (HH:MM) as JSON, or an error."""
    name = str(city).strip()
    try:
        zone = ZoneInfo(ZONES.get(name.lower(), name))  # the model may also pass the name of a time zone
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return f"error: the time in {name} is not known here"
    return json.dumps({"time": datetime.now(zone).strftime("%H:%M")})


def random_number(max: int) -> str:
    """Return a random integer from 1 to `max` as JSON."""
    return json.dumps({"number": random.randint(1, int(max))})


TOOLS: dict[str, Callable[..., str]] = {"get_current_time": get_current_time, "random_number": random_number}
DESCRIPTIONS = [
    {
        "name": "get_current_time",
        "description": "Get the current time in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "the city"}},
            "required": ["city"],
        },
    },
    {
        "name": "random_number",
        "description": "Returns a random number from 1 to a maximum.",
        "parameters": {
            "type": "object",
            "properties": {"max": {"type": "integer", "description": "largest number"}},
            "required": ["max"],
        },
    },
]


def run_tool(name: str, arguments: str) -> str:
    """Run the tool that the model called. Errors are returned as results, so that the model can correct its call."""
    if name not in TOOLS:
        return f"error: there is no tool {name}, only {', '.join(TOOLS)}"
    try:
        return TOOLS[name](**json.loads(arguments))
    except (ArithmeticError, TypeError, ValueError) as error:  # not JSON, or wrong arguments
        return f"error: {error}"


def next_step(model: Any, tokenizer: Any, query: str, turn: str) -> str:
    """Generate the next text of the turn, up to "Observation:" or to the end of the turn."""
    _, ids = make_context(tokenizer, query, system=DEFAULT_SYSTEM, reply_start=turn)
    limit = model.config.max_context_length
    if len(ids) >= limit:
        raise ValueError(f"The conversation has {len(ids)} tokens, but the model takes fewer than {limit}.")
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        stop_words_ids=[tokenizer.encode(word) for word in extend_stop_words([f"\n{STOP_WORD}"])],
        eos_token_id=[tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        **dict.fromkeys(("temperature", "top_k", "top_p")),  # sampling settings, unused in greedy decoding
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def answer(model: Any, tokenizer: Any, question: str, descriptions: list[dict], show: Callable[[str], None]) -> str:
    """Ask, and run the tools that the model calls until it answers. `show` receives the pieces of the turn."""
    query, turn = tool_prompt(question, descriptions), ""
    for _ in range(MAX_STEPS):
        step = next_step(model, tokenizer, query, turn)
        reply = parse_response(step, continues=bool(turn))
        if reply.function_call is None:
            show(step)
            return reply.content
        step = step.rstrip()
        if not step.endswith(STOP_WORD):  # the model ended its turn instead of writing the stop word
            step += f"\n{STOP_WORD}"
        show(step)
        observation = observation_text(run_tool(**reply.function_call))
        show(observation)
        turn += step + observation
    return f"(no answer after {MAX_STEPS} calls)"


def main() -> int:
    """Return the exit status: 0, or 1 if the model cannot be loaded or the conversation is too long."""
    parser = argparse.ArgumentParser(description="A ReAct loop with a clock and random numbers as tools.")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", default=["What time is it in Tokyo?"])
    add_checkpoint_argument(parser)
    add_hub_argument(parser)
    add_cpu_only_argument(parser)
    arguments = parser.parse_args()

    with explain_errors(install_hint=how_to_install(None, "chat")) as result:
        model, tokenizer = load_model_quietly(
            arguments.checkpoint_path, chat=True, cpu_only=arguments.cpu_only, hub=arguments.hub
        )
        for question in arguments.questions:
            print(f"Question: {question}")
            final = answer(model, tokenizer, question, DESCRIPTIONS, lambda text: print(text, end="", flush=True))
            print(f"\n=> {final}\n")
    return result.status


if __name__ == "__main__":
    sys.exit(main())
