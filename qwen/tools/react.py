"""The ReAct text format: markers, tool prompts and the text the model writes."""

import json
from typing import NamedTuple

# Markers at the start of a line.
THOUGHT = "Thought:"
ACTION = "Action:"
ACTION_INPUT = "Action Input:"
FINAL_ANSWER = "Final Answer:"
# Generation stops here, so that the observation comes from the tool and not from the model.
STOP_WORD = "Observation:"
MARKERS = (THOUGHT, ACTION, ACTION_INPUT, STOP_WORD, FINAL_ANSWER)

# The models were trained on exactly this text: changing a word or blank line costs accuracy.
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


class MalformedConversation(ValueError):
    """Messages or tools cannot be converted to a prompt. The message says which one and what to change."""


class Tool(NamedTuple):
    """A tool as described in a prompt. `parameters` is a JSON schema or Qwen's own list of parameters; may be empty."""

    name: str
    human: str
    description: str
    parameters: dict | list


def tool_prompt(query: str, functions: list[dict]) -> str:
    """Return the user turn that offers tools, ending in `Question: {query}`. Raises the same errors as `read_tools`."""
    tools = read_tools(functions)
    described = (
        _TOOL.format(**tool._asdict() | {"parameters": json.dumps(tool.parameters, ensure_ascii=False)})
        for tool in tools
    )
    return _INSTRUCTION.format(tools="\n\n".join(described), names=", ".join(tool.name for tool in tools), query=query)


def read_tools(functions: list[dict]) -> list[Tool]:
    """Parse tools in Qwen's or OpenAI's format.

    A tool is `{"name_for_model", "name_for_human", "description_for_model", "parameters"}`, or
    `{"name", "description", "parameters"}`, the latter also wrapped as `{"type": "function", "function": {…}}`.
    Only the name is required. Fields without a place in the prompt, like `strict`, are ignored.

    Raises:
        MalformedConversation: a tool has no name.
    """
    return [_read_tool(function, index) for index, function in enumerate(functions)]


def tool_call_text(thought: str, name: str, arguments: str) -> str:
    """Return the text of a tool call, up to and including the stop word that precedes the result."""
    return f"{call_step(thought, name, arguments)}\n{STOP_WORD}"


def observation_text(result: str) -> str:
    """Return the text after `tool_call_text` in the same assistant turn: the tool's result and "Thought:"."""
    return f" {result}\n{THOUGHT}"


def final_answer_text(answer: str) -> str:
    """Return the text of an answer that needs no (further) tool."""
    return f"{THOUGHT} I now know the final answer.\n{FINAL_ANSWER} {answer}"


def call_step(thought: str, name: str, arguments: str) -> str:
    """Return the text of a thought and its tool call, without the stop word."""
    return f"{THOUGHT} {thought}\n{ACTION} {name}\n{ACTION_INPUT} {arguments}"


def extend_stop_words(stop: list[str]) -> list[str]:
    """Append the stop words without leading newlines, since the tokenizer may merge a newline with its neighbours."""
    bare = (word.lstrip("\n") for word in stop)
    return list(dict.fromkeys([*stop, *(word for word in bare if word)]))


def _read_tool(function: dict, index: int) -> Tool:
    path = f"functions[{index}]"
    if isinstance(function, dict) and isinstance(function.get("function"), dict):
        path, function = f"tools[{index}].function", function["function"]
    name = (function.get("name_for_model") or function.get("name")) if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise MalformedConversation(f"{path} needs a 'name' (or 'name_for_model'), a non-empty string.")
    return Tool(
        name=name,
        human=function.get("name_for_human") or name,
        description=function.get("description_for_model") or function.get("description") or "",
        parameters=function.get("parameters") or {},
    )
