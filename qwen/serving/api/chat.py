"""Chat completions: `build_plan` converts a request for the engine, `ChatWriter` converts the reply to chunks.

The model uses tools in its own format (qwen.tools), which is converted to OpenAI's `tools` or the older `functions`.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from pydantic_core import from_json

from ...model.qwen_generation_utils import content_text, encode_turns, strips_reply
from ...model.tokenization_qwen import QWenTokenizer
from ...tools import (
    ACTION,
    ACTION_INPUT,
    STOP_WORD,
    CallDelta,
    ContentDelta,
    Delta,
    MalformedConversation,
    ReplyReader,
    parse_turns,
)
from ..engine import Engine
from ..engine.detokenizer import Piece, TokenLogprob
from ..engine.grammar import ConstraintFactory, GrammarConstraint
from .errors import invalid_request
from .generation import Choice, Envelope, Plan, check_num_choices, sampling_params
from .logprobs import chat_logprobs
from .request_types import (
    ChatCompletionRequest,
    JSONObject,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedFunction,
    NamedTool,
)
from .response_types import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatFinishReason,
    FunctionDelta,
    MessageDelta,
    TextFinishReason,
    ToolDelta,
)

ApiStyle = Literal["tools", "functions"]
ANY_OBJECT = {"type": "object"}


class ToolChoice(NamedTuple):
    """The tools that a request offers to the model.

    Args:
        functions: tools as qwen.tools takes them; empty if the request has none or sets the choice to "none".
        api_style: request field that they came in; the response uses the same format.
        required: the model must call a tool.
        name: the tool that it must call.
    """

    functions: list[JSONObject]
    api_style: ApiStyle
    required: bool = False
    name: str | None = None


def build_plan(request: ChatCompletionRequest, engine: Engine, constraints: ConstraintFactory) -> Plan:
    """Build the generation plan of a request. Encodes the prompt and builds grammars, which may be slow.

    Raises:
        ApiError: incompatible fields, a malformed conversation, or a base checkpoint.
    """
    _check_request(request, engine)
    check_num_choices(engine, request.num_choices)
    tool_choice = _read_tool_choice(request)
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    prompt_ids, continues = _encode_prompt(messages, tool_choice.functions, engine)
    uses_react = bool(tool_choice.functions) or any(
        message["role"] in ("tool", "function") or message.get("tool_calls") or message.get("function_call")
        for message in messages
    )
    # Also if no tools are offered: the model may call one of an earlier turn.
    stop = [*request.stop_strings, f"\n{STOP_WORD}"] if uses_react else request.stop_strings
    top_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = request.max_completion_tokens or request.max_tokens
    (settings,) = sampling_params(engine, request, [len(prompt_ids)], max_tokens=max_tokens, top_logprobs=top_logprobs)
    continues_message = messages[-1]["role"] == "assistant"
    lstrip = not continues_message or strips_reply(content_text(messages[-1].get("content"), "messages"))
    constraint = _build_constraint(request, tool_choice, continues, constraints)
    choices = []
    for index, params in enumerate(settings):
        reader = ReplyReader(continues) if uses_react else None
        writer = ChatWriter(index, engine.tokenizer, reader, tool_choice, bool(request.stop_strings))
        choice_constraint = None if constraint is None else constraint.copy()
        choices.append(Choice(prompt_ids, params, writer, stop, lstrip, True, choice_constraint))
    return Plan(choices, len(prompt_ids), "messages", request.cache_salt)


def _check_request(request: ChatCompletionRequest, engine: Engine) -> None:
    chat_format = getattr(engine.model.generation_config, "chat_format", None)
    if chat_format != "chatml":
        raise invalid_request(
            "This server runs a base model, which cannot chat: send a prompt to /v1/completions, or start the server "
            "with a chat checkpoint, for example Qwen/Qwen-7B-Chat.",
            "model",
        )
    if request.top_logprobs and not request.logprobs:
        raise invalid_request("top_logprobs requires logprobs to be true.", "top_logprobs")


def _read_tool_choice(request: ChatCompletionRequest) -> ToolChoice:
    if request.tools and request.functions:
        raise invalid_request("functions is the old name of tools: send only one of them.", "functions")
    has_tool_choice = request.tool_choice not in (None, "none", "auto")  # the defaults of some clients
    if request.function_call is not None and (request.tools or has_tool_choice):
        raise invalid_request("function_call requires functions. With tools, use tool_choice.", "function_call")
    if request.tool_choice is not None and request.functions:
        raise invalid_request("tool_choice requires tools. With functions, use function_call.", "tool_choice")

    api_style: ApiStyle = "functions" if request.functions else "tools"
    param = "function_call" if request.function_call is not None else "tool_choice"
    choice = request.tool_choice if request.function_call is None else request.function_call
    if request.functions:
        functions = [function.model_dump(exclude_none=True) for function in request.functions]
    else:
        functions = [tool.function.model_dump(exclude_none=True) for tool in request.tools or []]
    names = [function.get("name_for_model") or function["name"] for function in functions]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise invalid_request(f"{api_style}: duplicate name {duplicates[0]!r}. Names must be unique.", api_style)
    if choice == "none":
        return ToolChoice([], api_style)
    name = None
    if isinstance(choice, NamedTool | NamedFunction):
        name = choice.function.name if isinstance(choice, NamedTool) else choice.name
        if name not in names:
            known = f"expected one of {', '.join(names)}" if names else f"the request has no {api_style}"
            raise invalid_request(f"{param}: unknown name {name!r}, {known}.", param)
    if choice == "required" and not names:
        raise invalid_request("tool_choice is 'required' but the request has no tools.", param)
    return ToolChoice(functions, api_style, choice == "required" or name is not None, name)


def _encode_prompt(messages: list[JSONObject], functions: list[JSONObject], engine: Engine) -> tuple[list[int], bool]:
    """Return the token ids, and whether they end in "Thought:" after a tool result, for the model to continue."""
    try:
        turns, reply_start = parse_turns(messages, functions)
    except MalformedConversation as error:
        raise invalid_request(str(error), _error_param(str(error))) from error
    window = getattr(engine.model.generation_config, "max_window_size", None)
    _, ids = encode_turns(engine.tokenizer, turns, window, reply_start)
    return ids, messages[-1]["role"] in ("tool", "function")


def _error_param(message: str) -> str:
    """Return the field that an error of qwen.tools names: "messages[1].tool_calls[0]" → "messages.1.tool_calls.0"."""
    found = re.match(r"(messages|tools|functions)\[[\w.\[\]]*", message)
    return re.sub(r"\[(\d+)\]", r".\1", found[0]) if found else "messages"


def _build_constraint(
    request: ChatCompletionRequest, tool_choice: ToolChoice, continues: bool, constraints: ConstraintFactory
) -> GrammarConstraint | None:
    """Return the grammar that the reply must follow, if any."""
    response_format = request.response_format
    schema, param = None, "response_format"
    if isinstance(response_format, JsonObjectFormat):
        schema = ANY_OBJECT
    elif isinstance(response_format, JsonSchemaFormat):
        schema, param = response_format.json_schema.schema_ or ANY_OBJECT, "response_format.json_schema.schema"
    strict = any(function.get("strict") for function in tool_choice.functions)
    try:
        if tool_choice.required or (tool_choice.functions and (schema is not None or strict)):
            names = None if tool_choice.name is None else [tool_choice.name]
            param = tool_choice.api_style if schema is None else f"{param} or {tool_choice.api_style}"
            return constraints.tool_call(
                tool_choice.functions,
                names=names,
                answer_schema=schema,
                call_required=tool_choice.required,
                continues=continues,
            )
        if isinstance(response_format, JsonObjectFormat):
            return constraints.json_object()
        return None if schema is None else constraints.json_schema(schema)
    except ValueError as error:
        raise invalid_request(str(error), param) from error


class ChatWriter:
    """Converts the text pieces of one reply to chunks.

    Args:
        index: index of the choice.
        reader: parser of the models' tool format; None if the reply cannot be in it.
        tool_choice: the offered tools, and the format for calls.
        has_stop: the request has its own stop strings, which may cut off a call.
    """

    def __init__(
        self,
        index: int,
        tokenizer: QWenTokenizer,
        reader: ReplyReader | None,
        tool_choice: ToolChoice,
        has_stop: bool = False,
    ):
        self.index, self.tokenizer, self.reader, self.tool_choice, self.has_stop = (
            index,
            tokenizer,
            reader,
            tool_choice,
            has_stop,
        )
        self.tokens: list[TokenLogprob] = []  # not sent yet
        self.arguments: list[str] | None = None  # of the call, if there is one
        self.has_content = False

    def begin(self) -> Iterable[ChatChunkChoice]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def write(self, piece: Piece) -> Iterable[ChatChunkChoice]:
        self.tokens += piece.tokens
        if self.reader is not None:
            return self._chunks(self.reader.feed(piece.text))
        return self._chunks([ContentDelta(piece.text)] if piece.text else [])

    def end(self, reason: TextFinishReason) -> Iterable[ChatChunkChoice]:
        yield from self._chunks(self.reader.finish() if self.reader is not None else [])
        if reason == "stop" and self._has_complete_call():
            yield self._chunk({}, "tool_calls" if self.tool_choice.api_style == "tools" else "function_call")
        else:
            yield self._chunk({}, reason)

    def _chunks(self, deltas: Iterable[Delta]) -> Iterator[ChatChunkChoice]:
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self.has_content = True
                yield self._chunk({"content": delta.text})
            elif self.tool_choice.functions:
                yield from map(self._chunk, self._call_deltas(delta))
            elif not self.has_content:  # a tool of an earlier turn: send the call as text rather than nothing
                prefix = "" if delta.name is None else f"{ACTION} {delta.name}\n{ACTION_INPUT} "
                yield self._chunk({"content": prefix + delta.arguments})

    def _has_complete_call(self) -> bool:
        """Return whether the reply has a call that was not cut off by a stop string of the request."""
        if self.arguments is None:
            return False
        try:
            from_json("".join(self.arguments))
        except ValueError:
            return not self.has_stop  # without stop strings it is a call with invalid JSON
        return True

    def _call_deltas(self, delta: CallDelta) -> Iterator[MessageDelta]:
        if delta.name is not None or self.arguments is None:
            self.arguments = []
        self.arguments.append(delta.arguments)
        function: FunctionDelta = {"arguments": delta.arguments}
        tool: ToolDelta = {"index": 0, "function": function}
        if delta.name is not None:
            function = {"name": delta.name, "arguments": delta.arguments}
            tool = {"index": 0, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        if self.tool_choice.api_style == "functions":
            yield {"function_call": function}
        else:
            yield {"tool_calls": [tool]}

    def _chunk(self, delta: MessageDelta, finish_reason: ChatFinishReason | None = None) -> ChatChunkChoice:
        tokens, self.tokens = self.tokens, []
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": chat_logprobs(self.tokenizer, tokens) if tokens else None,
            "finish_reason": finish_reason,
        }


def merge_chunks(chunks: list[ChatChunkChoice]) -> ChatChoice:
    """Merge the chunks of one choice."""
    content: list[str] = []
    call_id: str | None = None
    call: list[FunctionDelta] = []
    for delta in (chunk["delta"] for chunk in chunks):
        content.append(delta.get("content", ""))
        for part in delta.get("tool_calls", []):  # at most one
            call_id = part.get("id", call_id)
            call.append(part["function"])
        if "function_call" in delta:
            call.append(delta["function_call"])
    message: AssistantMessage = {
        "role": "assistant",
        "content": "".join(content) or (None if call else ""),
        "refusal": None,
    }
    if call:
        function: CalledFunction = {"name": call[0]["name"], "arguments": "".join(part["arguments"] for part in call)}
        if call_id is None:
            message["function_call"] = function
        else:
            message["tool_calls"] = [{"id": call_id, "type": "function", "function": function}]
    finish_reason = chunks[-1]["finish_reason"]
    assert finish_reason is not None  # the last chunk ends the choice
    parts = [chunk["logprobs"]["content"] for chunk in chunks if chunk["logprobs"] is not None]
    return {
        "index": chunks[0]["index"],
        "message": message,
        "logprobs": {"content": [entry for part in parts for entry in part], "refusal": None} if parts else None,
        "finish_reason": finish_reason,
    }


ENVELOPE = Envelope("chat.completion", "chat.completion.chunk", "chatcmpl-", merge_chunks)
