"""Converts API-style messages to (query, history, system)."""

from dataclasses import dataclass, field

from ..model.qwen_generation_utils import DEFAULT_SYSTEM
from .react import STOP_WORD, THOUGHT, MalformedConversation, call_step, final_answer_text, tool_prompt


def parse_messages(messages: list[dict], functions: list[dict] | None) -> tuple[str | None, list[tuple[str, str]], str]:
    """Convert API messages to (query, history, system).

    Messages have a role and a content, a string or a list of `{"type": "text", "text"}` parts, joined as lines:

    - system or developer: only at the beginning; several are joined by a blank line.
    - user.
    - assistant: may have `tool_calls: [{"id", "function": {"name", "arguments"}}]` or the older
      `function_call: {"name", "arguments"}`; then the content is optional.
    - tool or function: the result of a call in the preceding assistant message. `tool_call_id` selects the call and
      is optional if there is only one. Every call needs a result.

    Returns:
        `query` is None if the conversation ends in a tool result or an assistant message: the last assistant turn of
        the history is then to be continued. After a tool result it ends in "Thought:".
        `history` has (user turn, assistant turn) pairs. Assistant turns include tool calls and their results, in the
        order of the calls.

    Raises:
        MalformedConversation: messages are in an invalid order, lack fields or have content other than text.
    """
    preamble: list[str] = []
    exchanges: list[_Exchange] = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        exchange = exchanges[-1] if exchanges else None
        if role in ("tool", "function"):
            if exchange is None or not exchange.steps:
                raise MalformedConversation(
                    f"messages[{index}] is a tool result with no assistant message before it: "
                    "insert the assistant message that called the tool."
                )
            exchange.add_result(message, index)
            continue
        if exchange is not None:
            exchange.check_answered()
        if role in ("system", "developer"):
            if exchange is not None:
                raise MalformedConversation(
                    f"messages[{index}] has role {role!r}: only the first messages can, before any user message."
                )
            preamble.append(_content(message, index))
        elif role == "user":
            if exchange is not None and not exchange.steps:
                raise MalformedConversation(
                    f"messages[{index}] is a second user message in a row: insert the assistant's reply between "
                    "them, or merge them into one message."
                )
            exchanges.append(_Exchange(_content(message, index)))
        elif role == "assistant":
            if exchange is None:
                raise MalformedConversation(
                    f"messages[{index}] is an assistant message with no user message before it: insert one."
                )
            exchange.add_assistant(message, index, react=bool(functions))
        else:
            raise MalformedConversation(
                f"messages[{index}] needs a role: system, developer, user, assistant, tool or function, "
                f"not {_repr(role)}."
            )
    if not exchanges:
        raise MalformedConversation("The messages contain no user message: add at least one.")
    exchanges[-1].check_answered()

    history = [(exchange.query, exchange.turn) for exchange in exchanges if exchange.steps]
    query = None if exchanges[-1].steps else exchanges[-1].query
    if messages[-1]["role"] in ("tool", "function"):
        history[-1] = (history[-1][0], f"{history[-1][1]}\n{THOUGHT}")
    if functions:
        # The models expect the tools before the last query that has a reply, not before a newer query.
        if history:
            history[-1] = (tool_prompt(history[-1][0], functions), history[-1][1])
        else:
            query = tool_prompt(exchanges[-1].query, functions)
    return query, history, DEFAULT_SYSTEM if not preamble else "\n\n".join(preamble)


@dataclass
class _Call:
    """A tool call in a message, and its result once a later message has it."""

    path: str
    id: str | None
    step: str
    result: str | None = None


@dataclass
class _Exchange:
    """A user message with the assistant messages and tool results that follow it."""

    query: str
    steps: list[str | _Call] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)  # of the last assistant message
    used_tools: bool = False

    @property
    def turn(self) -> str:
        return "\n".join(
            step if isinstance(step, str) else f"{step.step}\n{STOP_WORD} {step.result}" for step in self.steps
        )

    def add_assistant(self, message: dict, index: int, react: bool) -> None:
        """Add an assistant message. `react`: tools are offered, so answers are written in ReAct format."""
        self.calls = _calls(message, index)
        self.steps += self.calls
        if not self.calls:
            content = _content(message, index)
            self.steps.append(final_answer_text(content) if react or self.used_tools else content)
        self.used_tools |= bool(self.calls)

    def add_result(self, message: dict, index: int) -> None:
        """Add a tool result."""
        id_ = message.get("tool_call_id")
        call: _Call | None
        if not self.calls:
            raise MalformedConversation(
                f"messages[{index}] is a tool result, but the assistant message before it calls no tool: "
                "add the call to that message, or remove the result."
            )
        if len(self.calls) == 1 and (id_ is None or self.calls[0].id is None):
            call = self.calls[0]
        elif id_ is None:
            raise MalformedConversation(
                f"messages[{index}].tool_call_id is missing: the assistant message before it makes "
                f"{len(self.calls)} calls. Set it to the id of the call that this is the result of."
            )
        else:
            call = next((call for call in self.calls if call.id == id_), None)
        if call is None:
            raise MalformedConversation(
                f"messages[{index}].tool_call_id is {_repr(id_)}, but the assistant message before it has no such "
                f"call: use one of {_repr([call.id for call in self.calls])}."
            )
        if call.result is not None:
            raise MalformedConversation(
                f"messages[{index}] is a second result of {call.path}: send one result per call."
            )
        call.result = _content(message, index)

    def check_answered(self) -> None:
        for call in self.calls:
            if call.result is None:
                id_ = "" if call.id is None else f" and tool_call_id {_repr(call.id)}"
                raise MalformedConversation(
                    f"{call.path} has no result: run it and insert its result right after the assistant message, "
                    f"as a message with role 'tool'{id_} (role 'function' for the older function_call)."
                )


def _calls(message: dict, index: int) -> list[_Call]:
    path = f"messages[{index}].tool_calls"
    tool_calls, function_call = message.get("tool_calls") or [], message.get("function_call")
    if function_call is not None:
        if tool_calls:
            raise MalformedConversation(f"{path} and function_call are both given: keep tool_calls.")
        functions, ids = {f"messages[{index}].function_call": function_call}, [None]
    elif isinstance(tool_calls, list) and all(isinstance(call, dict) for call in tool_calls):
        functions = {f"{path}[{n}].function": call.get("function") for n, call in enumerate(tool_calls)}
        ids = [call.get("id") for call in tool_calls]
    else:
        raise MalformedConversation(f'{path} must be a list of {{"id", "type", "function"}}, not {_repr(tool_calls)}.')
    if len(ids) > 1 and (None in ids or len(set(map(str, ids))) < len(ids)):
        raise MalformedConversation(
            f"{path} need an id each, all different, to match results to calls, not {_repr(ids)}."
        )

    calls: list[_Call] = []
    thought = "" if message.get("content") is None or not functions else _content(message, index)
    for (path, call), id_ in zip(functions.items(), ids, strict=True):
        if not isinstance(call, dict) or not all(isinstance(call.get(key), str) for key in ("name", "arguments")):
            raise MalformedConversation(
                f'{path} must be {{"name": string, "arguments": JSON string}}, not {_repr(call)}.'
            )
        # The thought led to all of the calls, so only the first one has it.
        calls.append(_Call(path, id_, call_step("" if calls else thought, call["name"], call["arguments"])))
    return calls


def _content(message: dict, index: int) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_text_part(part, f"messages[{index}].content[{n}]") for n, part in enumerate(content))
    if not isinstance(content, str):
        raise MalformedConversation(
            f"messages[{index}].content must be a string or a list of text parts, not {type(content).__name__}."
        )
    return content.lstrip("\n").rstrip()  # keep the first line's indentation, it may be code


def _text_part(part: object, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind != "text":
        raise MalformedConversation(
            f'{path} has type {_repr(kind)}: the model supports text only; send {{"type": "text", "text": …}}.'
        )
    if not isinstance(part.get("text"), str):
        raise MalformedConversation(f"{path}.text must be a string, not {type(part.get('text')).__name__}.")
    return part["text"]


def _repr(value: object) -> str:
    """Return the repr of an untrusted value, cut to 200 characters."""
    return text if len(text := repr(value)) <= 200 else f"{text[:200]}…"
