"""The code interpreter: the model writes Python, a sandbox runs it, the model reads the output and continues.

A conversation of API-style messages uses one sandbox, which keeps variables between questions. As in the server,
`qwen.tools` converts the messages to prompts. Callers receive each step.
"""

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from .._renamed import old_names
from ..model.qwen_generation_utils import encode_turns
from ..sandbox import Sandbox
from . import STOP_WORD, extend_stop_words, parse_response, parse_turns

if TYPE_CHECKING:
    from ..model.modeling_qwen import QWenLMHeadModel
    from ..model.tokenization_qwen import QWenTokenizer

MAX_STEPS = 8  # calls per question, in case the model never answers
MAX_NEW_TOKENS = 1024  # per step
OUTPUT_BYTES = 4000  # of a cell's output, which must fit into the context

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
FENCED = re.compile(r"```(?:py(?:thon)?3?\b)?[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class Call(NamedTuple):
    """The model calls the tool; `content` is the text before the call."""

    content: str
    code: str


class Output(NamedTuple):
    """Result of a call. `status` is that of `qwen.sandbox.Result`, or "error" for an unknown tool."""

    text: str
    status: str


class Answer(NamedTuple):
    """The model answers the question."""

    content: str


def extract_code(action_input: str) -> str:
    """Extract the Python code from an action input: a fenced block, JSON {"code": …}, or plain code."""
    try:
        value = json.loads(action_input, strict=False)  # models do not escape newlines in strings
    except ValueError:
        value = None
    if isinstance(value, dict) and isinstance(value.get("code"), str):
        action_input = value["code"]
    block = FENCED.search(action_input)
    return (block[1] if block else action_input).strip("\n")


def next_step(model: "QWenLMHeadModel", tokenizer: "QWenTokenizer", messages: list[dict]) -> tuple[str, bool]:
    """Generate up to "Observation:" or the end of the turn.

    Returns:
        The generated text, and whether it continues the model's previous turn.

    Raises:
        ValueError: the conversation exceeds the model's context length.
    """
    turns, start = parse_turns(messages, [TOOL])
    _, ids = encode_turns(tokenizer, turns, reply_start=start)
    limit = model.config.max_context_length
    if len(ids) >= limit:
        raise ValueError(f"The conversation has {len(ids)} tokens, but the model accepts fewer than {limit}.")
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        stop_words_ids=[tokenizer.encode(word) for word in extend_stop_words([f"\n{STOP_WORD}"])],
        eos_token_id=[tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        repetition_penalty=1.0,  # code repeats itself
        **dict.fromkeys(("temperature", "top_k", "top_p")),  # unused: no sampling
    )
    return tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True), bool(start)


def run_conversation(
    model: "QWenLMHeadModel", tokenizer: "QWenTokenizer", sandbox: Sandbox, messages: list[dict]
) -> Iterator[Call | Output | Answer]:
    """Answer the last message. Appends the new messages to `messages`.

    Yields:
        Each call and its output, and then the answer. No answer after MAX_STEPS calls.

    Raises:
        ValueError: the conversation exceeds the model's context length.
        SandboxUnavailable: the sandbox does not start.
    """
    for _ in range(MAX_STEPS):
        step, continues = next_step(model, tokenizer, messages)
        reply = parse_response(step, continues=continues)
        if reply.function_call is None:
            messages.append({"role": "assistant", "content": reply.content})
            yield Answer(reply.content)
            return
        name, code = reply.function_call["name"], extract_code(reply.function_call["arguments"])
        yield Call(reply.content, code)
        if name == TOOL["name_for_model"]:
            result = sandbox.run(code)
            output = Output(result.output or "(no output)", result.status)
        else:
            output = Output(f"There is no tool {name}, only {TOOL['name_for_model']}.", "error")
        messages += [
            {"role": "assistant", "content": reply.content, "function_call": reply.function_call},
            {"role": "function", "name": name, "content": output.text},
        ]
        yield output
    messages.append({"role": "assistant", "content": "I could not finish."})


__getattr__ = old_names(__name__, {"code_of": "extract_code", "solve": "run_conversation"})
