"""Tools to prompt, reply to tool call.

Revolves around one text format, ReAct, that the models learned to call tools in:

    Question: … → Thought: … → Action: … → Action Input: … → Observation: … → Thought: … → Final Answer: …

and around API-style messages, which it folds into (query, history, system). It knows text only: nothing of tokens,
of models, or of HTTP.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from .qwen_generation_utils import DEFAULT_SYSTEM

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

_LINES = re.compile(r"[^\n]*\n|[^\n]+")
# An answer this long (in characters) is sent and stays; a shorter one may still be replaced.
_OPENING = 32


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


class Tool(NamedTuple):
    """What a prompt says of a tool. `parameters` is a JSON schema, or Qwen's own list of parameters; perhaps empty."""

    name: str
    human: str
    description: str
    parameters: dict | list


class ContentDelta(NamedTuple):
    """The next piece of a reply's content, never empty."""

    text: str


class CallDelta(NamedTuple):
    """The next piece of a tool call: first its whole name and no arguments, then arguments only (name None)."""

    name: str | None
    arguments: str


Delta = ContentDelta | CallDelta


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
    return f"{_call_step(thought, name, arguments)}\n{STOP_WORD}"


def observation_text(result: str) -> str:
    """What follows `tool_call_text` in the same assistant turn: the tool's result, and the cue to go on thinking."""
    return f" {result}\n{THOUGHT}"


def final_answer_text(answer: str) -> str:
    """What the model writes once it needs no (further) tool."""
    return f"{THOUGHT} I now know the final answer.\n{FINAL_ANSWER} {answer}"


def parse_messages(messages: list[dict], functions: list[dict] | None) -> tuple[str | None, list[tuple[str, str]], str]:
    """Folds API messages into (query, history, system).

    Messages have a role and a content, a string or a list of `{"type": "text", "text"}` parts, which become lines:

    - system or developer: only in front; several are joined by a blank line.
    - user.
    - assistant: may carry `tool_calls: [{"id", "function": {"name", "arguments"}}]` or the older
      `function_call: {"name", "arguments"}`, and then needs no content.
    - tool or function: the result of a call of the assistant message before it. `tool_call_id` says which one; it
      may be left out where there was only one. Every call needs its result.

    `history` holds (user turn, assistant turn) pairs, tool calls and their results folded into the assistant turn,
    those of one message one after another in the order of the calls. `query` is None where the conversation ends in
    a tool result or an assistant message: the last assistant turn of the history is to be continued. After a tool
    result it ends in "Thought:".

    Raises MalformedConversation for messages in an impossible order, with missing fields or with more than text.
    """
    preamble, exchanges = [], []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        exchange = exchanges[-1] if exchanges else None
        if role in ("tool", "function"):
            if exchange is None or not exchange.steps:
                raise MalformedConversation(
                    f"messages[{index}] is a tool result with no assistant message before it: "
                    "put the assistant message that called the tool in front of it."
                )
            exchange.answer(message, index)
            continue
        if exchange is not None:
            exchange.check_answered()
        if role in ("system", "developer"):
            if exchange is not None:
                raise MalformedConversation(
                    f"messages[{index}] has role {role!r}: only the first messages may, before the user's."
                )
            preamble.append(_content(message, index))
        elif role == "user":
            if exchange is not None and not exchange.steps:
                raise MalformedConversation(
                    f"messages[{index}] is a second user message in a row: put the assistant's reply between them, "
                    "or make them one message."
                )
            exchanges.append(_Exchange(_content(message, index)))
        elif role == "assistant":
            if exchange is None:
                raise MalformedConversation(
                    f"messages[{index}] is an assistant message with no user message before it: start with the user's."
                )
            exchange.say(message, index, react=bool(functions))
        else:
            raise MalformedConversation(
                f"messages[{index}] needs a role out of system, developer, user, assistant, tool and function, "
                f"not {_shown(role)}."
            )
    if not exchanges:
        raise MalformedConversation("The messages hold no user message: add at least one.")
    exchanges[-1].check_answered()

    history = [(exchange.query, exchange.turn) for exchange in exchanges if exchange.steps]
    query = None if exchanges[-1].steps else exchanges[-1].query
    if messages[-1]["role"] in ("tool", "function"):
        history[-1] = (history[-1][0], f"{history[-1][1]}\n{THOUGHT}")
    if functions:
        # The models expect the tools in front of the last exchange that has a reply; a newer query stays bare.
        if history:
            history[-1] = (tool_prompt(history[-1][0], functions), history[-1][1])
        else:
            query = tool_prompt(query, functions)
    return query, history, DEFAULT_SYSTEM if not preamble else "\n\n".join(preamble)


def parse_response(response: str, continues: bool = False) -> Reply:
    """Reads a model's whole reply as a tool call, a final answer or plain text, by the rules of ReplyReader."""
    reader = ReplyReader(continues)
    content, call = [], None
    for delta in [*reader.feed(response), *reader.finish()]:
        if isinstance(delta, ContentDelta):
            content.append(delta.text)
        elif delta.name is not None:
            call = {"name": delta.name, "arguments": []}
        else:
            call["arguments"].append(delta.arguments)
    if call is None:
        return Reply("".join(content), None, "stop")
    return Reply("".join(content), call | {"arguments": "".join(call["arguments"])}, "function_call")


def extend_stop_words(stop: list[str]) -> list[str]:
    """The stop words and, after them, those that start with newlines once more without: the tokenizer merges a newline
    into its neighbours, so that the ids of "\\nObservation:" alone may never come up."""
    bare = (word.lstrip("\n") for word in stop)
    return list(dict.fromkeys([*stop, *(word for word in bare if word)]))


class _State(Enum):
    PLAIN = auto()
    THINKING = auto()
    CALLING = auto()
    ANSWERING = auto()
    DONE = auto()


class ReplyReader:
    """Reads a reply as it grows. What the deltas add up to does not depend on how the text was cut.

    The words of the format count at the start of a line, and before the first of them there may be blanks.

    - A call is an `Action:` line with a name and, but for blank lines, right below it `Action Input:`. Its arguments
      go on to an `Observation:` or `Final Answer:` line and are trimmed. The first call counts, and nothing after it.
    - What follows `Thought:` is held back until it is known what it leads to: before a call it is the content,
      trimmed; before a final answer it is dropped.
    - What follows `Final Answer:` is the content, trimmed, whatever it holds. Only while it is no longer than 32
      characters, a further `Final Answer:` line starts it anew: models like to fill in the form twice.
    - Anything else is plain text: content as it stands and as it comes, up to a call, a thought or a final answer.
      A thought that leads nowhere is plain text, too. No text raises.

    Text that was sent stays in front of what follows.

    Args:
        continues: the reply goes on right after the "Thought:" that the prompt ended in.
    """

    def __init__(self, continues: bool = False):
        self._state = _State.THINKING if continues else _State.PLAIN
        self._blank = True  # nothing but blanks so far
        self._line_start = True
        self._head = ""  # the start of a line that may yet become a marker
        self._action: str | None = None  # an "Action:" line, and blanks below it, that may yet become a call
        self._thought: list[str] = []
        self._opening: str | None = ""  # of an answer, until it is long enough to be sent
        self._gap = ""  # blanks that are sent if and when more text follows
        self._sent = False

    def feed(self, text: str) -> list[Delta]:
        """The next piece of the reply → what it makes certain, perhaps nothing."""
        return [delta for marker, rest in self._split(text) for delta in self._read(marker, rest)]

    def finish(self) -> list[Delta]:
        """The end of the reply → what was held back until now. What is fed later is ignored."""
        deltas = list(self._read("", self._head))
        if self._action is not None:
            deltas += self._add(self._action)
            self._action = None
        if self._state is _State.THINKING:
            deltas += self._content(self._gap + "".join(self._thought))
        elif self._state is _State.PLAIN:
            deltas += self._content(self._gap)
        elif self._state is _State.ANSWERING and self._opening:
            deltas += self._content(self._gap + self._opening.rstrip())
        self._state = _State.DONE
        return deltas

    def _split(self, text: str) -> Iterator[tuple[str, str]]:
        """Text → (marker, "") and ("", text within one line)."""
        for piece in _LINES.findall(text):
            if self._blank:
                body = piece.lstrip()
                yield "", piece[: len(piece) - len(body)]
                piece, self._blank = body, not body
                if not body:
                    continue
            if self._line_start:
                piece, self._head = self._head + piece, ""
                marker = next((marker for marker in MARKERS if piece.startswith(marker)), "")
                if not marker and any(marker.startswith(piece) for marker in MARKERS):
                    self._head = piece
                    continue
                if marker:
                    yield marker, ""
                    piece = piece[len(marker) :]
            self._line_start = piece.endswith("\n")
            yield "", piece

    def _read(self, marker: str, text: str) -> Iterator[Delta]:
        if self._state in (_State.PLAIN, _State.THINKING):
            yield from self._look_out(marker, text)
        elif self._state is _State.CALLING:
            if marker in (STOP_WORD, FINAL_ANSWER):
                self._state = _State.DONE
            else:
                text = marker + text
                if arguments := self._flow(text if self._sent else text.lstrip()):
                    yield CallDelta(None, arguments)
        elif self._state is _State.ANSWERING:
            yield from self._answer(marker, text)

    def _look_out(self, marker: str, text: str) -> Iterator[Delta]:
        if self._action is not None:
            name, _, below = (self._action + text).removeprefix(ACTION).partition("\n")
            if marker == ACTION_INPUT and name.strip():
                yield from self._content(self._thought_before_call())
                yield CallDelta(name.strip(), "")
                self._state, self._action, self._gap, self._sent = _State.CALLING, None, "", False
                return
            if not marker and not below.strip():
                self._action += text
                return
            action, self._action = self._action, None
            if marker != FINAL_ANSWER:
                yield from self._add(action)
        if marker == ACTION:
            self._action = marker
        elif marker == FINAL_ANSWER:
            self._state, self._gap = _State.ANSWERING, self._gap if self._sent else ""
        else:
            if marker == THOUGHT:
                self._state = _State.THINKING
            yield from self._add(marker + text)

    def _thought_before_call(self) -> str:
        thought = "".join(self._thought).strip().removeprefix(THOUGHT).strip()
        return self._gap + thought if thought and self._sent else thought

    def _answer(self, marker: str, text: str) -> Iterator[Delta]:
        text = marker + text
        if self._opening is not None:
            self._opening = "" if marker == FINAL_ANSWER else (self._opening + text).lstrip()
            if len(self._opening) <= _OPENING:
                return
            text, self._opening = self._opening, None
        yield from self._content(self._flow(text))

    def _add(self, text: str) -> Iterator[Delta]:
        """Text that means nothing in the format."""
        if self._state is _State.THINKING:
            self._thought.append(text)
        else:
            yield from self._content(self._flow(text))

    def _flow(self, text: str) -> str:
        """Text → all of it that may be sent now; blanks at its end wait for more."""
        text = self._gap + text
        body = text.rstrip()
        self._gap = text[len(body) :]
        self._sent |= bool(body)
        return body

    @staticmethod
    def _content(text: str) -> Iterator[Delta]:
        if text:
            yield ContentDelta(text)


@dataclass
class _Call:
    """A tool call among messages, and its result once a later message brings it."""

    where: str
    id: str | None
    step: str
    result: str | None = None


@dataclass
class _Exchange:
    """A user message and all that the assistant and its tools said to it."""

    query: str
    steps: list[str | _Call] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)  # of the last assistant message
    used_tools: bool = False

    @property
    def turn(self) -> str:
        return "\n".join(
            step if isinstance(step, str) else f"{step.step}\n{STOP_WORD} {step.result}" for step in self.steps
        )

    def say(self, message: dict, index: int, react: bool) -> None:
        """An assistant message. `react`: tools are on offer, so that answers take the form of the format."""
        self.calls = _calls(message, index)
        self.steps += self.calls
        if not self.calls:
            content = _content(message, index)
            self.steps.append(final_answer_text(content) if react or self.used_tools else content)
        self.used_tools |= bool(self.calls)

    def answer(self, message: dict, index: int) -> None:
        """A tool's result."""
        id_ = message.get("tool_call_id")
        if not self.calls:
            raise MalformedConversation(
                f"messages[{index}] is a tool result, but the assistant message before it calls no tool: "
                "add the call to that message, or leave the result out."
            )
        if len(self.calls) == 1 and (id_ is None or self.calls[0].id is None):
            call = self.calls[0]
        elif id_ is None:
            raise MalformedConversation(
                f"messages[{index}].tool_call_id is missing: the assistant message before it makes "
                f"{len(self.calls)} calls, so say which one this is the result of."
            )
        else:
            call = next((call for call in self.calls if call.id == id_), None)
        if call is None:
            raise MalformedConversation(
                f"messages[{index}].tool_call_id is {_shown(id_)}, of which the assistant message before it knows "
                f"nothing: use one of {_shown([call.id for call in self.calls])}."
            )
        if call.result is not None:
            raise MalformedConversation(
                f"messages[{index}] is a second result of {call.where}: send one result a call."
            )
        call.result = _content(message, index)

    def check_answered(self) -> None:
        for call in self.calls:
            if call.result is None:
                id_ = "" if call.id is None else f" and tool_call_id {_shown(call.id)}"
                raise MalformedConversation(
                    f"{call.where} has no result: run it and put its result right after the assistant message, "
                    f"as a message with role 'tool'{id_} (role 'function' for an old function_call)."
                )


def _call_step(thought: str, name: str, arguments: str) -> str:
    return f"{THOUGHT} {thought}\n{ACTION} {name}\n{ACTION_INPUT} {arguments}"


def _calls(message: dict, index: int) -> list[_Call]:
    where = f"messages[{index}].tool_calls"
    tool_calls, function_call = message.get("tool_calls") or [], message.get("function_call")
    if function_call is not None:
        if tool_calls:
            raise MalformedConversation(f"{where} and function_call say the same: keep tool_calls.")
        functions, ids = {f"messages[{index}].function_call": function_call}, [None]
    elif isinstance(tool_calls, list) and all(isinstance(call, dict) for call in tool_calls):
        functions = {f"{where}[{n}].function": call.get("function") for n, call in enumerate(tool_calls)}
        ids = [call.get("id") for call in tool_calls]
    else:
        raise MalformedConversation(
            f'{where} must be a list of {{"id", "type", "function"}}, not {_shown(tool_calls)}.'
        )
    if len(ids) > 1 and (None in ids or any(ids.count(id_) > 1 for id_ in ids)):
        raise MalformedConversation(
            f"{where} need an id each, all different, to tell their results apart, not {_shown(ids)}."
        )

    calls = []
    thought = "" if message.get("content") is None or not functions else _content(message, index)
    for (name, call), id_ in zip(functions.items(), ids, strict=True):
        if not isinstance(call, dict) or not all(isinstance(call.get(key), str) for key in ("name", "arguments")):
            raise MalformedConversation(
                f'{name} must be {{"name": string, "arguments": string of JSON}}, not {_shown(call)}.'
            )
        # The thought led to all of them and is said once.
        calls.append(_Call(name, id_, _call_step("" if calls else thought, call["name"], call["arguments"])))
    return calls


def _content(message: dict, index: int) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_text_part(part, f"messages[{index}].content[{n}]") for n, part in enumerate(content))
    if not isinstance(content, str):
        raise MalformedConversation(
            f"messages[{index}].content must be a string or a list of text parts, not {type(content).__name__}."
        )
    return content.lstrip("\n").rstrip()  # indentation of a first line may be code


def _text_part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise MalformedConversation(
            f'{where} has type {_shown(kind)}: the model reads text only; send {{"type": "text", "text": …}}.'
        )
    if not isinstance(part.get("text"), str):
        raise MalformedConversation(f"{where}.text must be a string, not {type(part.get('text')).__name__}.")
    return part["text"]


def _shown(value: object) -> str:
    """A stranger's value as an error quotes it: not at any length."""
    return text if len(text := repr(value)) <= 200 else f"{text[:200]}…"


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
