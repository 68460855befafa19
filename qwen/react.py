"""Tools to prompt, reply to tool call.

Revolves around one text format, ReAct, that the models learned to call tools in:

    Question: … → Thought: … → Action: … → Action Input: … → Observation: … → Thought: … → Final Answer: …

and around API-style messages, which it folds into (query, history, system). It knows text only: nothing of tokens,
of models, or of HTTP.
"""

import json
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .qwen_generation_utils import DEFAULT_SYSTEM

# Where the model has to be stopped, so that the tool and not the model says what was observed.
STOP_WORD = "Observation:"

# The models were trained on this very text: a changed word or blank line costs accuracy.
_INSTRUCTION = """\
Answer the following questions as best you can. You have access to the following APIs:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {query}"""

_TOOL = (
    "{name}: Call this tool to interact with the {human} API. "
    "What is the {human} API useful for? {description} Parameters: {parameters}"
)

_CALL = re.compile(
    r"^Action:[ \t]*(?P<name>\S[^\n]*)\n\s*?^Action Input:(?P<arguments>.*?)(?:^Observation:|\Z)",
    re.DOTALL | re.MULTILINE,
)
_FINAL_ANSWER = re.compile(r"^Final Answer:", re.MULTILINE)


class MalformedConversation(ValueError):
    """Messages or tools that no prompt can be made of; the text says which one and what to change."""


class Reply(NamedTuple):
    """What a model's reply means to the caller of an API.

    `content` is the answer, or the thought that led to a tool call. `function_call` is None or
    `{"name": str, "arguments": str}`; the arguments are the model's own text, which need not be valid JSON.
    `finish_reason` is "function_call" or "stop".
    """

    content: str
    function_call: dict[str, str] | None
    finish_reason: str


def tool_prompt(query: str, functions: list[dict]) -> str:
    """The user turn that offers tools: instruction, blank line, `Question: {query}`.

    A tool is `{"name_for_model", "name_for_human", "description_for_model", "parameters"}`, or
    `{"name", "description", "parameters"}`, the latter also wrapped as `{"type": "function", "function": {…}}`.
    Only the name is required. Raises MalformedConversation for a tool without one.
    """
    fields = [_tool_fields(function, index) for index, function in enumerate(functions)]
    return _INSTRUCTION.format(
        tools="\n\n".join(_TOOL.format(**tool) for tool in fields),
        names=", ".join(tool["name"] for tool in fields),
        query=query,
    )


def tool_call_text(thought: str, name: str, arguments: str) -> str:
    """What the model writes to call a tool, up to and with the stop word after which the result belongs."""
    return f"{_call_step(thought, name, arguments)}\n{STOP_WORD}"


def observation_text(result: str) -> str:
    """What follows `tool_call_text` in the same assistant turn: the tool's result, and the cue to go on thinking."""
    return f" {result}\nThought:"


def final_answer_text(answer: str) -> str:
    """What the model writes once it needs no (further) tool."""
    return f"Thought: I now know the final answer.\nFinal Answer: {answer}"


def parse_messages(messages: list[dict], functions: list[dict] | None) -> tuple[str | None, list[tuple[str, str]], str]:
    """Folds API messages into (query, history, system).

    Messages have a role (system, user, assistant, function) and a content; an assistant message may carry
    `function_call: {"name", "arguments"}` and then needs no content. `history` holds (user turn, assistant turn)
    pairs, tool calls and their results folded into the assistant turn. `query` is None where the conversation ends
    in a tool result or an assistant message: the last assistant turn of the history is to be continued.

    Raises MalformedConversation for messages in an impossible order or with missing fields.
    """
    system, exchanges = DEFAULT_SYSTEM, []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role == "system":
            if index:
                raise MalformedConversation(f"messages[{index}] has role 'system': only the first message may.")
            system = _content(message, index)
        elif role == "user":
            if exchanges and not exchanges[-1].steps:
                raise MalformedConversation(
                    f"messages[{index}] is a second user message in a row: put the assistant's reply between them, "
                    "or make them one message."
                )
            exchanges.append(_Exchange(_content(message, index)))
        elif role == "assistant":
            if not exchanges:
                raise MalformedConversation(
                    f"messages[{index}] is an assistant message with no user message before it: start with the user's."
                )
            exchange = exchanges[-1]
            exchange.steps.append(_assistant_step(message, index, react=bool(functions) or exchange.used_tools))
            exchange.used_tools |= message.get("function_call") is not None
        elif role == "function":
            if not exchanges or not exchanges[-1].steps:
                raise MalformedConversation(
                    f"messages[{index}] is a function result with no assistant message before it: "
                    "put the assistant message that called the function in front of it."
                )
            exchanges[-1].steps.append(f"{STOP_WORD} {_content(message, index)}")
            exchanges[-1].used_tools = True
        else:
            raise MalformedConversation(
                f"messages[{index}] needs a role out of system, user, assistant and function, not {role!r}."
            )
    if not exchanges:
        raise MalformedConversation("The messages hold no user message: add at least one.")
    if messages[-1].get("function_call") is not None:
        raise MalformedConversation(
            "The messages end in a function call: run it and append its result as a message with role 'function'."
        )

    history = [(exchange.query, "\n".join(exchange.steps)) for exchange in exchanges if exchange.steps]
    query = None if exchanges[-1].steps else exchanges[-1].query
    if messages[-1]["role"] == "function":
        history[-1] = (history[-1][0], history[-1][1] + "\nThought:")
    if functions:
        # The models expect the tools in front of the last exchange that has a reply; a newer query stays bare.
        if history:
            history[-1] = (tool_prompt(history[-1][0], functions), history[-1][1])
        else:
            query = tool_prompt(query, functions)
    return query, history, system


def parse_response(response: str) -> Reply:
    """Reads a model's reply as a tool call, a final answer or plain text.

    The reply may start with `Thought:` or, as the continuation of an assistant turn, right after it. The first call
    counts, and the last final answer. Text that keeps to no format is the answer as it stands; nothing raises.
    """
    answers = list(_FINAL_ANSWER.finditer(response))
    call = _CALL.search(response, 0, answers[0].start() if answers else len(response))
    if call:
        thought = response[: call.start()].strip().removeprefix("Thought:").strip()
        function_call = {"name": call["name"].strip(), "arguments": call["arguments"].strip()}
        return Reply(thought, function_call, "function_call")
    if answers:
        return Reply(response[answers[-1].end() :].strip(), None, "stop")
    return Reply(response, None, "stop")


def extend_stop_words(stop: list[str]) -> list[str]:
    """The stop words and, after them, those that start with newlines once more without: the tokenizer merges a newline
    into its neighbours, so that the ids of "\\nObservation:" alone may never come up."""
    bare = (word.lstrip("\n") for word in stop)
    return list(dict.fromkeys([*stop, *(word for word in bare if word)]))


@dataclass
class _Exchange:
    """A user message and all that the assistant and its tools said to it, one step a message."""

    query: str
    steps: list[str] = field(default_factory=list)
    used_tools: bool = False


def _call_step(thought: str, name: str, arguments: str) -> str:
    return f"Thought: {thought}\nAction: {name}\nAction Input: {arguments}"


def _assistant_step(message: dict, index: int, react: bool) -> str:
    call = message.get("function_call")
    if call is None:
        content = _content(message, index)
        return final_answer_text(content) if react else content
    if not isinstance(call, dict) or not all(isinstance(call.get(key), str) for key in ("name", "arguments")):
        raise MalformedConversation(
            f'messages[{index}].function_call must be {{"name": string, "arguments": string of JSON}}, not {call!r}.'
        )
    thought = "" if message.get("content") is None else _content(message, index)
    return _call_step(thought, call["name"], call["arguments"])


def _content(message: dict, index: int) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise MalformedConversation(f"messages[{index}].content must be a string, not {type(content).__name__}.")
    return content.lstrip("\n").rstrip()  # indentation of a first line may be code


def _tool_fields(function: dict, index: int) -> dict[str, str]:
    if isinstance(function, dict) and isinstance(function.get("function"), dict):
        function = function["function"]
    name = (function.get("name_for_model") or function.get("name")) if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise MalformedConversation(f"functions[{index}] needs a 'name' (or 'name_for_model') that is a string.")
    return {
        "name": name,
        "human": function.get("name_for_human") or name,
        "description": function.get("description_for_model") or function.get("description") or "",
        "parameters": json.dumps(function.get("parameters") or {}, ensure_ascii=False),
    }
