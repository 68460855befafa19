"""Chat completions: messages to a prompt, a reply to messages.

Revolves around `plan`, which says what the engine has to do for a request, and `ChatWriter`, which makes chunks of what
the engine says. Tools are offered and read in the models' own format (qwen.tools); this module gives them the shape of
OpenAI's `tools`, or of the `functions` before them.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from pydantic_core import from_json

from ...model.qwen_generation_utils import make_context
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
    parse_messages,
)
from ..engine import Engine
from ..engine.detokenizer import Piece, TokenLogprob
from ..engine.grammar import ConstraintFactory, GrammarConstraint
from .errors import invalid
from .generation import Choice, Chunk, Envelope, Plan, check_room, sampling_params
from .logprobs import chat_logprobs
from .requests import ChatCompletionRequest, JsonObjectFormat, JsonSchemaFormat, NamedFunction, NamedTool

Dialect = Literal["tools", "functions"]
ANY_OBJECT = {"type": "object"}


class Offer(NamedTuple):
    """The tools that a request lets the model see.

    Args:
        functions: as qwen.tools takes them; none where the request has none or does not want them used.
        dialect: in which the request speaks of them, and the answer must.
        required: the model has to call one.
        name: the one it has to call.
    """

    functions: list[dict[str, Any]]
    dialect: Dialect
    required: bool = False
    name: str | None = None


def plan(request: ChatCompletionRequest, engine: Engine, constraints: ConstraintFactory) -> Plan:
    """What the engine has to do. Encodes the prompt and builds grammars, which may take a while.

    Raises:
        ApiError: fields that do not go together, a conversation that no prompt can be made of, a checkpoint that is
            no chat model.
    """
    _check(request, engine)
    check_room(engine, request.choices)
    offer = _offer(request)
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    prompt_ids, continues = _prompt(messages, offer.functions, engine)
    uses_react = bool(offer.functions) or any(
        message["role"] in ("tool", "function") or message.get("tool_calls") or message.get("function_call")
        for message in messages
    )
    # Also without tools on offer: the model may remember those of an earlier turn.
    stop = [*request.stop_strings, f"\n{STOP_WORD}"] if uses_react else request.stop_strings
    top_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = request.max_completion_tokens or request.max_tokens
    (settings,) = sampling_params(engine, request, [len(prompt_ids)], max_tokens=max_tokens, top_logprobs=top_logprobs)
    # The blank in front of a reply that goes on from a message belongs to it, unless the message brings it along.
    said = _text(messages[-1]) if messages[-1]["role"] == "assistant" else ""
    lstrip = not said or said[-1].isspace()
    constraint = _constraint(request, offer, continues, constraints)
    choices = []
    for index, params in enumerate(settings):
        reader = ReplyReader(continues) if uses_react else None
        writer = ChatWriter(index, engine.tokenizer, reader, offer, bool(request.stop_strings))
        own = None if constraint is None else constraint.copy()
        choices.append(Choice(prompt_ids, params, writer, stop, lstrip, True, own))
    return Plan(choices, len(prompt_ids), "messages")


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _check(request: ChatCompletionRequest, engine: Engine) -> None:
    chat_format = getattr(engine.model.generation_config, "chat_format", None)
    if chat_format != "chatml":
        raise invalid(
            "This server runs a base model, which continues texts and holds no conversations: send a prompt to "
            "/v1/completions, or start the server with a chat checkpoint such as Qwen/Qwen-7B-Chat.",
            "model",
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")


def _offer(request: ChatCompletionRequest) -> Offer:
    if request.tools and request.functions:
        raise invalid("functions is the old name of tools: send one of them.", "functions")
    if request.function_call is not None and (request.tools or request.tool_choice is not None):
        raise invalid("function_call goes with functions; for tools it is tool_choice.", "function_call")
    if request.tool_choice is not None and request.functions:
        raise invalid("tool_choice goes with tools; for functions it is function_call.", "tool_choice")

    dialect: Dialect = "functions" if request.functions else "tools"
    param = "function_call" if request.function_call is not None else "tool_choice"
    choice = request.tool_choice if request.function_call is None else request.function_call
    if request.functions:
        functions = [function.model_dump(exclude_none=True) for function in request.functions]
    else:
        functions = [tool.function.model_dump(exclude_none=True) for tool in request.tools or []]
    names = [function.get("name_for_model") or function["name"] for function in functions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise invalid(f"{dialect}: {twice[0]!r} is there twice. Names must be unique.", dialect)
    if choice == "none":
        return Offer([], dialect)
    name = None
    if isinstance(choice, NamedTool | NamedFunction):
        name = choice.function.name if isinstance(choice, NamedTool) else choice.name
        if name not in names:
            known = f"it is not among {', '.join(names)}" if names else f"there are no {dialect}"
            raise invalid(f"{param} names {name!r}, and {known}.", param)
    if choice == "required" and not names:
        raise invalid("tool_choice is 'required', and there are no tools.", param)
    return Offer(functions, dialect, choice == "required" or name is not None, name)


def _prompt(messages: list[dict], functions: list[dict], engine: Engine) -> tuple[list[int], bool]:
    """The token ids, and whether they end in the "Thought:" of an assistant's turn that a tool's result left open."""
    try:
        query, history, system = parse_messages(messages, functions)
    except MalformedConversation as error:
        raise invalid(str(error), _param(str(error))) from error
    window = getattr(engine.model.generation_config, "max_window_size", None)
    arguments = {} if window is None else {"max_window_size": window}
    if query is None:
        query, arguments["reply_start"] = history.pop()
    _, ids = make_context(engine.tokenizer, query, history, system, **arguments)
    return ids, messages[-1]["role"] in ("tool", "function")


def _param(message: str) -> str:
    """The field that an error of qwen.tools is about: "messages[1].tool_calls[0]" → "messages.1.tool_calls.0"."""
    found = re.match(r"(messages|tools|functions)\[[\w.\[\]]*", message)
    return re.sub(r"\[(\d+)\]", r".\1", found[0]) if found else "messages"


def _constraint(
    request: ChatCompletionRequest, offer: Offer, continues: bool, constraints: ConstraintFactory
) -> GrammarConstraint | None:
    """What the reply may consist of, if that is prescribed."""
    wanted = request.response_format
    schema, param = None, "response_format"
    if isinstance(wanted, JsonObjectFormat):
        schema = ANY_OBJECT
    elif isinstance(wanted, JsonSchemaFormat):
        schema, param = wanted.json_schema.schema_ or ANY_OBJECT, "response_format.json_schema.schema"
    strict = any(function.get("strict") for function in offer.functions)
    try:
        if offer.required or (offer.functions and (schema is not None or strict)):
            names = None if offer.name is None else [offer.name]
            param = offer.dialect if schema is None else f"{param} or {offer.dialect}"
            return constraints.tool_call(
                offer.functions,
                names=names,
                answer_schema=schema,
                call_required=offer.required,
                continues=continues,
            )
        if isinstance(wanted, JsonObjectFormat):
            return constraints.json_object()
        return None if schema is None else constraints.json_schema(schema)
    except ValueError as error:
        raise invalid(str(error), param) from error


class ChatWriter:
    """Makes chunks of the pieces of one reply.

    Args:
        index: of the choice.
        reader: of the models' tool format, where the reply may be in it.
        offer: the tools on offer, and the dialect to speak of calls in.
        has_stop: the request has stop strings of its own, which may end a reply in the midst of a call.
    """

    def __init__(
        self, index: int, tokenizer: QWenTokenizer, reader: ReplyReader | None, offer: Offer, has_stop: bool = False
    ):
        self.index, self.tokenizer, self.reader, self.offer, self.has_stop = index, tokenizer, reader, offer, has_stop
        self.tokens: list[TokenLogprob] = []  # that no chunk has carried yet
        self.arguments: list[str] | None = None  # of the call, if there is one
        self.spoke = False

    def begin(self) -> Iterable[Chunk]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def write(self, piece: Piece) -> Iterable[Chunk]:
        self.tokens += piece.tokens
        if self.reader is not None:
            return self._chunks(self.reader.feed(piece.text))
        return self._chunks([ContentDelta(piece.text)] if piece.text else [])

    def end(self, reason: str) -> Iterable[Chunk]:
        yield from self._chunks(self.reader.finish() if self.reader is not None else [])
        if reason == "stop" and self._called():
            reason = "tool_calls" if self.offer.dialect == "tools" else "function_call"
        yield self._chunk({}, reason)

    def _chunks(self, deltas: Iterable[Delta]) -> Iterator[Chunk]:
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self.spoke = True
                yield self._chunk({"content": delta.text})
            elif self.offer.functions:
                yield from map(self._chunk, self._call(delta))
            elif not self.spoke:  # tools of an earlier turn: the model's words are more than nothing at all
                named = "" if delta.name is None else f"{ACTION} {delta.name}\n{ACTION_INPUT} "
                yield self._chunk({"content": named + delta.arguments})

    def _called(self) -> bool:
        """Whether there is a call. One that a stop string of the request cut off is none."""
        if self.arguments is None:
            return False
        try:
            from_json("".join(self.arguments))
        except ValueError:
            return not self.has_stop  # else it is what the model takes for JSON
        return True

    def _call(self, delta: CallDelta) -> Iterator[dict[str, Any]]:
        head: dict[str, Any] = {}
        if delta.name is not None or self.arguments is None:
            self.arguments = []
        if delta.name is not None:
            head = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        function = {} if delta.name is None else {"name": delta.name}
        function["arguments"] = delta.arguments
        self.arguments.append(delta.arguments)
        if self.offer.dialect == "functions":
            yield {"function_call": function}
        else:
            yield {"tool_calls": [{"index": 0, **head, "function": function}]}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> Chunk:
        tokens, self.tokens = self.tokens, []
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": chat_logprobs(self.tokenizer, tokens) if tokens else None,
            "finish_reason": finish_reason,
        }


def collect(chunks: list[Chunk]) -> dict[str, Any]:
    """The chunks of one choice put together."""
    content, call_id, call = [], None, []
    for delta in (chunk["delta"] for chunk in chunks):
        content.append(delta.get("content", ""))
        for part in delta.get("tool_calls", []):  # one at most
            call_id = part.get("id", call_id)
            call.append(part["function"])
        if "function_call" in delta:
            call.append(delta["function_call"])
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(content) or (None if call else ""),
        "refusal": None,
    }
    if call:
        function = {"name": call[0]["name"], "arguments": "".join(part["arguments"] for part in call)}
        if call_id is None:
            message["function_call"] = function
        else:
            message["tool_calls"] = [{"id": call_id, "type": "function", "function": function}]
    shown = [chunk["logprobs"]["content"] for chunk in chunks if chunk["logprobs"] is not None]
    return {
        "index": chunks[0]["index"],
        "message": message,
        "logprobs": {"content": [entry for part in shown for entry in part], "refusal": None} if shown else None,
        "finish_reason": chunks[-1]["finish_reason"],
    }


ENVELOPE = Envelope("chat.completion", "chat.completion.chunk", "chatcmpl-", collect)
