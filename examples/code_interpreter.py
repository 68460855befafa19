#!/usr/bin/env python
"""A code interpreter: the model writes Python, a sandbox runs it, the model reads what came out and goes on.

    python examples/code_interpreter.py "What is 1234 * 56?"
    python examples/code_interpreter.py -c Qwen/Qwen-7B-Chat            # asks for questions, until Ctrl-D
    python examples/code_interpreter.py -c Qwen/Qwen-7B-Chat --folder data "Plot the columns of data.csv."

Revolves around one conversation and one sandbox, in which variables live on from question to question. It folds
API-style messages into prompts with `qwen.react`, as the server does; examples/react_demo.py does the same with bare
text. What the sandbox protects against, and what not, stands in sandbox/__init__.py.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # qwen, where it is not installed

import torch
from sandbox import Limits, Sandbox, SandboxUnavailable

from qwen.loading import load_model_quietly
from qwen.qwen_generation_utils import make_context
from qwen.react import STOP_WORD, extend_stop_words, parse_messages, parse_response

MAX_STEPS = 8  # a model that runs code without end is stopped
MAX_NEW_TOKENS = 1024  # a step
OUTPUT_BYTES = 4000  # of a cell's output; all of it has to fit into the context

TOOL = {
    "name_for_model": "code_interpreter",
    "name_for_human": "Code Interpreter",
    "description_for_model": "Runs Python code and returns what it prints. Variables stay for the next call.",
    "parameters": {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "the code"}},
        "required": ["code"],
    },
}
FENCED = re.compile(r"```(?:py(?:thon)?3?\b)?[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)


def code_of(action_input: str) -> str:
    """The Python in an action's input: in a fenced block, as JSON {"code": …}, or bare."""
    try:
        value = json.loads(action_input, strict=False)  # models leave newlines in strings as they are
    except ValueError:
        value = None
    if isinstance(value, dict) and isinstance(value.get("code"), str):
        action_input = value["code"]
    block = FENCED.search(action_input)
    return (block[1] if block else action_input).strip("\n")


def next_step(model: Any, tokenizer: Any, messages: list[dict]) -> tuple[str, bool]:
    """What the model writes next, up to "Observation:" or its end, and whether it goes on in an open turn."""
    query, history, system = parse_messages(messages, [TOOL])
    start = ""
    if query is None:  # the last turn is the model's own and has just received a result
        (query, start), history = history[-1], history[:-1]
    _, ids = make_context(tokenizer, query, history, system=system, reply_start=start)
    limit = max(model.config.max_position_embeddings, model.config.seq_length)
    if len(ids) >= limit:
        raise ValueError(f"The conversation has {len(ids)} tokens and the model takes fewer than {limit}.")
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        stop_words_ids=[tokenizer.encode(word) for word in extend_stop_words([f"\n{STOP_WORD}"])],
        eos_token_id=[tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        **dict.fromkeys(("temperature", "top_k", "top_p")),  # settings of sampling, without a meaning here
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True), bool(start)


def answer(model: Any, tokenizer: Any, sandbox: Sandbox, messages: list[dict]) -> str:
    """Answer the last of the messages, printing thoughts, code and output; the messages grow by what was said."""
    for _ in range(MAX_STEPS):
        step, continues = next_step(model, tokenizer, messages)
        reply = parse_response(step, continues=continues)
        if reply.function_call is None:
            messages.append({"role": "assistant", "content": reply.content})
            return reply.content
        name, arguments = reply.function_call["name"], reply.function_call["arguments"]
        code = code_of(arguments)
        print(f"{reply.content}\n\n{_indented(code)}\n")
        if name == TOOL["name_for_model"]:
            output = sandbox.run(code).output or "(no output)"
        else:
            output = f"There is no tool {name}, only {TOOL['name_for_model']}."
        print(f"{_indented(output)}\n", flush=True)
        messages += [
            {"role": "assistant", "content": reply.content, "function_call": reply.function_call},
            {"role": "function", "name": name, "content": output},
        ]
    messages.append({"role": "assistant", "content": "I could not finish."})
    return f"(no answer after {MAX_STEPS} runs)"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"a number of seconds above 0 is needed, not {text!r}")


def _questions(given: list[str]) -> Iterator[str]:
    yield from given
    while not given:
        try:
            question = input("Question: " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if question.strip():
            yield question


def main() -> int:
    """Returns the exit status: 0, or 1 where the sandbox or the model is not to be had."""
    parser = argparse.ArgumentParser(description="Ask a model that may run Python in a sandbox.")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="without one, they are read from the terminal")
    parser.add_argument(
        "-c", "--checkpoint-path", metavar="NAME", help="a folder or a hub id (default: the bundled toy)"
    )
    parser.add_argument("--cpu-only", action="store_true", help="run on the CPU even if there is a GPU")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the code reads and writes files (default: a temporary one, removed at the end)",
    )
    parser.add_argument("--seconds", type=_seconds, default=30.0, help="that a run may take (default: %(default)g)")
    parser.add_argument(
        "--allow-weaker-sandbox",
        action="store_true",
        help="run the code also where this machine cannot keep it from your files or the network",
    )
    arguments = parser.parse_args()
    limits = Limits(wall_seconds=arguments.seconds, output_bytes=OUTPUT_BYTES)
    try:
        with Sandbox(arguments.folder, limits=limits, allow_weaker=arguments.allow_weaker_sandbox) as sandbox:
            sandbox.start()  # no use in loading a model if this fails
            for sentence in sandbox.missing:
                print(f"The sandbox is weaker than it should be. {sentence}", file=sys.stderr)
            model, tokenizer = load_model_quietly(arguments.checkpoint_path, chat=True, cpu_only=arguments.cpu_only)
            messages: list[dict] = []
            for question in _questions(arguments.questions):
                messages.append({"role": "user", "content": question})
                print(f"{answer(model, tokenizer, sandbox, messages)}\n", flush=True)
    except SandboxUnavailable as error:
        print(f"{error} (--allow-weaker-sandbox)", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
