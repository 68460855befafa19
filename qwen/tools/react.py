"""The text format: its words, how it describes tools, and what the model writes in it."""

import json
from typing import NamedTuple

# The words that open the lines of the format.
THOUGHT = "Thought:"
ACTION = "Action:"
ACTION_INPUT = "Action Input:"
FINAL_ANSWER = "Final Answer:"
# Where the model has to be stopped, so that the tool and not the model says what was observed.
STOP_WORD = "Observation:"
MARKERS = (THOUGHT, ACTION, ACTION_INPUT, STOP_WORD, FINAL_ANSWER)

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


class MalformedConversation(ValueError):
    """Messages or tools that no prompt can be made of; the text says which one and what to change."""


class Tool(NamedTuple):
    """What a prompt says of a tool. `parameters` is a JSON schema, or Qwen's own list of parameters; perhaps empty."""

    name: str
    human: str
    description: str
    parameters: dict | list


def tool_prompt(query: str, functions: list[dict]) -> str:
    """The user turn that offers tools: instruction, blank line, `Question: {query}`. Raises as `read_tools`."""
    tools = read_tools(functions)
    described = (
        _TOOL.format(**tool._asdict() | {"parameters": json.dumps(tool.parameters, ensure_ascii=False)})
        for tool in tools
    )
    return _INSTRUCTION.format(tools="\n\n".join(described), names=", ".join(tool.name for tool in tools), query=query)


def read_tools(functions: list[dict]) -> list[Tool]:
    """Tools in any dialect.

    A tool is `{"name_for_model", "name_for_human", "description_for_model", "parameters"}`, or
    `{"name", "description", "parameters"}`, the latter also wrapped as `{"type": "function", "function": {…}}`.
    Only the name is required; fields that the prompt has no place for, such as `strict`, are ignored. Raises
    MalformedConversation for a tool without a name.
    """
    return [_read_tool(function, index) for index, function in enumerate(functions)]


def tool_call_text(thought: str, name: str, arguments: str) -> str:
    """What the model writes to call a tool, up to and with the stop word after which the result belongs."""
    return f"{call_step(thought, name, arguments)}\n{STOP_WORD}"


def observation_text(result: str) -> str:
    """What follows `tool_call_text` in the same assistant turn: the tool's result, and the cue to go on thinking."""
    return f" {result}\n{THOUGHT}"


def final_answer_text(answer: str) -> str:
    """What the model writes once it needs no (further) tool."""
    return f"{THOUGHT} I now know the final answer.\n{FINAL_ANSWER} {answer}"


def call_step(thought: str, name: str, arguments: str) -> str:
    """A thought and the call that it leads to."""
    return f"{THOUGHT} {thought}\n{ACTION} {name}\n{ACTION_INPUT} {arguments}"


def extend_stop_words(stop: list[str]) -> list[str]:
    """The stop words and, after them, those that start with newlines once more without: the tokenizer merges a newline
    into its neighbours, so that the ids of "\\nObservation:" alone may never come up."""
    bare = (word.lstrip("\n") for word in stop)
    return list(dict.fromkeys([*stop, *(word for word in bare if word)]))


def _read_tool(function: dict, index: int) -> Tool:
    where = f"functions[{index}]"
    if isinstance(function, dict) and isinstance(function.get("function"), dict):
        where, function = f"tools[{index}].function", function["function"]
    name = (function.get("name_for_model") or function.get("name")) if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise MalformedConversation(f"{where} needs a 'name' (or 'name_for_model') that is a string.")
    return Tool(
        name=name,
        human=function.get("name_for_human") or name,
        description=function.get("description_for_model") or function.get("description") or "",
        parameters=function.get("parameters") or {},
    )
