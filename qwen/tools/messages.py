"""API-style messages, folded into (query, history, system)."""

from dataclasses import dataclass, field

from ..model.qwen_generation_utils import DEFAULT_SYSTEM
from .react import STOP_WORD, THOUGHT, MalformedConversation, call_step, final_answer_text, tool_prompt


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
    preamble: list[str] = []
    exchanges: list[_Exchange] = []
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
            query = tool_prompt(exchanges[-1].query, functions)
    return query, history, DEFAULT_SYSTEM if not preamble else "\n\n".join(preamble)


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
        call: _Call | None
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
    if len(ids) > 1 and (None in ids or len(set(map(str, ids))) < len(ids)):
        raise MalformedConversation(
            f"{where} need an id each, all different, to tell their results apart, not {_shown(ids)}."
        )

    calls: list[_Call] = []
    thought = "" if message.get("content") is None or not functions else _content(message, index)
    for (name, call), id_ in zip(functions.items(), ids, strict=True):
        if not isinstance(call, dict) or not all(isinstance(call.get(key), str) for key in ("name", "arguments")):
            raise MalformedConversation(
                f'{name} must be {{"name": string, "arguments": string of JSON}}, not {_shown(call)}.'
            )
        # The thought led to all of them and is said once.
        calls.append(_Call(name, id_, call_step("" if calls else thought, call["name"], call["arguments"])))
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
    if not isinstance(part, dict) or kind != "text":
        raise MalformedConversation(
            f'{where} has type {_shown(kind)}: the model reads text only; send {{"type": "text", "text": …}}.'
        )
    if not isinstance(part.get("text"), str):
        raise MalformedConversation(f"{where}.text must be a string, not {type(part.get('text')).__name__}.")
    return part["text"]


def _shown(value: object) -> str:
    """A stranger's value as an error quotes it: not at any length."""
    return text if len(text := repr(value)) <= 200 else f"{text[:200]}…"
