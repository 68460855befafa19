"""Converts API-style messages, with tool calls and results, to the turns of a prompt."""

import itertools
from dataclasses import dataclass, field

from ..model.qwen_generation_utils import DEFAULT_SYSTEM, Turn, content_text
from .react import STOP_WORD, THOUGHT, MalformedConversation, call_step, final_answer_text, tool_prompt


def parse_turns(messages: list[dict], functions: list[dict] | None) -> tuple[list[Turn], str]:
    """Convert API messages to the turns of a prompt, as `encode_turns` takes them.

    Messages have a role and a content: a string, None for an empty one, or a list of `{"type": "text", "text"}` parts,
    joined as lines. They may have any order, and each is a turn of its own, where it stands:

    - system or developer: the default system message comes first if the first message has another role.
    - user.
    - assistant: may have `tool_calls: [{"id", "function": {"name", "arguments"}}]` or the older
      `function_call: {"name", "arguments"}`, and `reasoning_content` (or `reasoning`), the thought that led to them.
      Without it the content beside calls is the thought.
    - tool or function: the result of a call in the preceding assistant message, part of the same turn, and so is the
      assistant message that follows. `tool_call_id` selects the call and is optional if there is only one. Every call
      needs a result.

    Returns:
        The turns, and the beginning of the reply if the conversation ends in a tool result or an assistant message,
        which the model continues. After a tool result it ends in "Thought:".

    Raises:
        MalformedConversation: no messages, an unknown role, calls and results that do not match, or content other than
            text.
    """
    turns = _read_turns(messages, functions)
    reply_start = ""
    if turns[-1].role == "assistant":
        reply_start = turns.pop().text
        if messages[-1]["role"] in ("tool", "function"):
            reply_start += f"\n{THOUGHT}"
    return [(turn.role, turn.text) for turn in turns], reply_start


def parse_messages(messages: list[dict], functions: list[dict] | None) -> tuple[str | None, list[tuple[str, str]], str]:
    """Convert API messages to (query, history, system), for conversations in which user and assistant alternate.

    Returns:
        `query` is None if the conversation ends in a tool result or an assistant message: the last assistant turn of
        the history is then to be continued, see `parse_turns`. `history` has (user turn, assistant turn) pairs.
        `system` are the system messages at the beginning, joined by blank lines.

    Raises:
        MalformedConversation: as `parse_turns`, or user and assistant do not alternate.
    """
    turns = _read_turns(messages, functions)
    preamble = list(itertools.takewhile(lambda turn: turn.role == "system", turns))
    pairs: list[list[str]] = []
    for turn in turns[len(preamble) :]:
        if turn.role == "system":
            raise MalformedConversation(
                f"messages[{turn.index}] has role 'system': only the first messages can, before any user message."
            )
        if turn.role == "user":
            if pairs and len(pairs[-1]) == 1:
                raise MalformedConversation(
                    f"messages[{turn.index}] is a second user message in a row: insert the assistant's reply between "
                    "them, or merge them into one message."
                )
            pairs.append([turn.text])
        elif not pairs:
            raise MalformedConversation(
                f"messages[{turn.index}] is an assistant message with no user message before it: insert one."
            )
        else:
            pairs[-1] = [pairs[-1][0], "\n".join([*pairs[-1][1:], turn.text])]
    if not pairs or not any(message["role"] == "user" for message in messages):
        raise MalformedConversation("The messages contain no user message: add at least one.")
    query = pairs.pop()[0] if len(pairs[-1]) == 1 else None
    if messages[-1]["role"] in ("tool", "function"):
        pairs[-1][1] += f"\n{THOUGHT}"
    history = [(asked, answered) for asked, answered in pairs]
    return query, history, "\n\n".join(turn.text for turn in preamble)


def _read_turns(messages: list[dict], functions: list[dict] | None) -> list["_Turn"]:
    """Return the turns of a conversation, with the tools in one of them. The first is a system message."""
    turns: list[_Turn] = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        last = turns[-1] if turns else None
        if role in ("tool", "function"):
            if last is None or last.role != "assistant":
                raise MalformedConversation(
                    f"messages[{index}] is a tool result with no assistant message before it: "
                    "insert the assistant message that called the tool."
                )
            last.add_result(message, index)
            continue
        if last is not None:
            last.check_answered()
        if role in ("system", "developer"):
            turns.append(_Turn("system", index, [_content(message, index)]))
        elif role == "user":
            turns.append(_Turn("user", index, [_content(message, index)]))
        elif role == "assistant":
            if last is None or not last.calls:  # otherwise the message goes on after the results
                turns.append(last := _Turn("assistant", index))
            last.add_assistant(message, index, react=bool(functions))
        else:
            raise MalformedConversation(
                f"messages[{index}] needs a role: system, developer, user, assistant, tool or function, "
                f"not {_repr(role)}."
            )
    if not turns:
        raise MalformedConversation("The list of messages is empty: add at least one.")
    turns[-1].check_answered()
    if turns[0].role != "system":
        turns.insert(0, _Turn("system", 0, [DEFAULT_SYSTEM]))
    if functions:
        _add_tools(turns, functions)
    return turns


def _add_tools(turns: list["_Turn"], functions: list[dict]) -> None:
    """Put the description of the tools before a user message.

    The models expect it before the last one that has a reply, not before a newer query. If none has, it is the last
    one, so that it stays there once it has a reply.
    """
    asked = carrier = None
    for turn in turns:
        if turn.role == "user":
            asked = turn
        elif turn.role == "assistant" and asked is not None:
            carrier = asked
    carrier = carrier or asked
    if carrier is None:
        count = next((index for index, turn in enumerate(turns) if turn.role != "system"), len(turns))
        turns.insert(count, carrier := _Turn("user", 0, [""]))
    carrier.steps = [tool_prompt(carrier.text, functions)]


@dataclass
class _Call:
    """A tool call in a message, and its result once a later message has it."""

    path: str
    id: str | None
    step: str
    result: str | None = None


@dataclass
class _Turn:
    """A message, or an assistant message with the tool results and assistant messages that belong to it."""

    role: str
    index: int
    steps: list[str | _Call] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)  # of the last assistant message
    used_tools: bool = False

    @property
    def text(self) -> str:
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
    content, thought = _thought_of_calls(message, index) if functions else ("", "")
    for (path, call), id_ in zip(functions.items(), ids, strict=True):
        if not isinstance(call, dict) or not all(isinstance(call.get(key), str) for key in ("name", "arguments")):
            raise MalformedConversation(
                f'{path} must be {{"name": string, "arguments": JSON string}}, not {_repr(call)}.'
            )
        # The thought led to all of the calls, so only the first one has it.
        step = call_step("" if calls else thought, call["name"], call["arguments"])
        calls.append(_Call(path, id_, f"{content}\n{step}" if content and not calls else step))
    return calls


def _thought_of_calls(message: dict, index: int) -> tuple[str, str]:
    """Return the content of a message with calls, and their thought: the content itself if there is no other."""
    content = "" if message.get("content") is None else _content(message, index)
    thought = next((message[key] for key in ("reasoning_content", "reasoning") if message.get(key)), None)
    if thought is None:
        return "", content
    if not isinstance(thought, str):
        raise MalformedConversation(f"messages[{index}].reasoning_content must be a string, not {_repr(thought)}.")
    return content, thought.strip()


def _content(message: dict, index: int) -> str:
    try:
        content = content_text(message.get("content"), f"messages[{index}].content")
    except ValueError as error:
        raise MalformedConversation(str(error)) from error
    return content.lstrip("\n").rstrip()  # keep the first line's indentation, it may be code


def _repr(value: object) -> str:
    """Return the repr of an untrusted value, cut to 200 characters."""
    return text if len(text := repr(value)) <= 200 else f"{text[:200]}…"
