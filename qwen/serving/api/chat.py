"""Chat completions: `build_plan` converts a request for the engine, `ChatWriter` converts the reply to chunks.

The model uses tools in its own format (qwen.tools), which is converted to OpenAI's `tools` or the older `functions`.
"""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from pydantic_core import from_json

from ...model.qwen_generation_utils import MAX_WINDOW_SIZE, Turn, content_text, encode_turns, strips_reply
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
    ThoughtDelta,
    parse_turns,
)
from ..engine import Engine
from ..engine.detokenizer import Piece, TokenLogprob
from ..engine.grammar import ConstraintFactory, GrammarConstraint
from .errors import invalid_request
from .generation import Choice, Envelope, Plan, check_num_choices
from .logprobs import chat_logprobs, format_prompt_logprobs
from .request_types import (
    AllowedToolsChoice,
    ChatCompletionRequest,
    JSONObject,
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
    StopReason,
    TextFinishReason,
    ToolDelta,
)
from .sampling import check_length, fewest_tokens, sampling_params, truncate_prompt
from .structured_output import RequestedGrammar, requested_grammar

ApiStyle = Literal["tools", "functions"]


class ToolChoice(NamedTuple):
    """The tools that a request offers to the model.

    Args:
        functions: tools as qwen.tools takes them; empty if the request has none or sets the choice to "none".
        api_style: request field that they came in; the response uses the same format.
        required: the model must call a tool.
        names: the tools that it may call; None for all.
    """

    functions: list[JSONObject]
    api_style: ApiStyle
    required: bool = False
    names: list[str] | None = None


class Prompt(NamedTuple):
    """The prompt of a request.

    Args:
        ids: token ids.
        continued: the message that the reply continues; None if the reply is a new one.
        is_in_thought: whether it ends in "Thought:" after a tool result.
    """

    ids: list[int]
    continued: str | None
    is_in_thought: bool


def build_plan(
    request: ChatCompletionRequest, engine: Engine, constraints: ConstraintFactory, *, any_length: bool = False
) -> Plan:
    """Build the generation plan of a request. Encodes the prompt and builds grammars, which may be slow.

    Args:
        any_length: also encode a prompt that is much too long to be answered.

    Raises:
        ApiError: incompatible fields, a malformed conversation, or a base checkpoint.
        PromptTooLong: the prompt is much too long; one that is a little too long is refused by the engine.
    """
    _check_request(request, engine)
    check_num_choices(engine, request.num_choices)
    tool_choice = _read_tool_choice(request)
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    any_length = any_length or request.truncate_prompt_tokens is not None
    prompt = _encode_prompt(request, messages, tool_choice.functions, engine, any_length)
    max_tokens = request.max_completion_tokens or request.max_tokens
    prompt_ids = truncate_prompt(engine, request, prompt.ids, max_tokens)
    wanted = requested_grammar(request)
    constraint = _build_constraint(wanted, tool_choice, prompt.is_in_thought, constraints)
    # The grammar describes the whole reply, its whitespace included, unless it is one of tool calls.
    is_verbatim = constraint is not None and not tool_choice.functions
    uses_react = not is_verbatim and (
        bool(tool_choice.functions)
        or any(
            message["role"] in ("tool", "function") or message.get("tool_calls") or message.get("function_call")
            for message in messages
        )
    )
    # Also if no tools are offered: the model may call one of an earlier turn.
    end_strings = [f"\n{STOP_WORD}"] if uses_react else []
    top_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    (settings,) = sampling_params(
        engine,
        request,
        [len(prompt_ids)],
        max_tokens=max_tokens,
        top_logprobs=top_logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )
    lstrip = not is_verbatim and (prompt.continued is None or strips_reply(prompt.continued))
    fields: dict[str, object] = {"prompt_token_ids": prompt_ids} if request.return_token_ids else {}
    choices = []
    for index, params in enumerate(settings):
        if index:  # one score of the prompt serves all
            params = dataclasses.replace(params, prompt_logprobs=None)
        reader = ReplyReader(prompt.is_in_thought) if uses_react else None
        writer = ChatWriter(
            index,
            engine.tokenizer,
            reader,
            tool_choice,
            fields,
            echo=(prompt.continued or "") if request.echo else "",
            return_token_ids=bool(request.return_token_ids),
            as_ids=bool(request.return_tokens_as_token_ids),
        )
        choice_constraint = None if constraint is None else constraint.copy()
        choices.append(
            Choice(
                prompt_ids,
                params,
                writer,
                request.stop_strings,
                lstrip,
                rstrip=not is_verbatim,
                end_strings=end_strings,
                constraint=choice_constraint,
            )
        )
    grammar_param = tool_choice.api_style if wanted is None else wanted.param
    return Plan(choices, len(prompt_ids), "messages", request.cache_salt, grammar_param if constraint else None, fields)


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
    allowed: dict[str, str] = {}  # with their paths
    required = choice == "required"
    if isinstance(choice, AllowedToolsChoice):
        for index, tool in enumerate(choice.allowed_tools.tools):
            allowed[tool.function.name] = f"{param}.allowed_tools.tools.{index}"
        required = choice.allowed_tools.mode == "required"
    elif isinstance(choice, NamedTool | NamedFunction):
        allowed[choice.function.name if isinstance(choice, NamedTool) else choice.name] = param
        required = True
    for name, path in allowed.items():
        if name not in names:
            known = f"expected one of {', '.join(names)}" if names else f"the request has no {api_style}"
            raise invalid_request(f"{path}: unknown name {name!r}, {known}.", path)
    if required and not names:
        raise invalid_request("tool_choice is 'required' but the request has no tools.", param)
    return ToolChoice(functions, api_style, required, list(allowed) or None)


def _encode_prompt(
    request: ChatCompletionRequest,
    messages: list[JSONObject],
    functions: list[JSONObject],
    engine: Engine,
    any_length: bool,
) -> Prompt:
    continued = _continued_message(request, messages[-1])
    reply_start: str | None
    try:
        turns, reply_start = parse_turns(messages, functions)
    except MalformedConversation as error:
        raise invalid_request(str(error), _error_param(str(error))) from error
    window = getattr(engine.model.generation_config, "max_window_size", None)
    if messages[-1]["role"] == "assistant" and continued is None:
        turns, reply_start = [*turns, ("assistant", reply_start)], ""
    if request.add_generation_prompt is False and continued is None:
        reply_start = None
    turns = _without_long_history(turns, window, engine.tokenizer)
    if not any_length:
        last = _last_exchange(turns)
        kept = [text for index, (role, text) in enumerate(turns) if role == "system" or index >= last]
        check_length(engine, [*kept, reply_start or ""])
    _, ids = encode_turns(engine.tokenizer, turns, window, reply_start)
    return Prompt(ids, continued, messages[-1]["role"] in ("tool", "function"))


def _last_exchange(turns: list[Turn]) -> int:
    """Return the index of the last turn of the user, and 0 without any."""
    return max((index for index, (role, _) in enumerate(turns) if role == "user"), default=0)


def _without_long_history(turns: list[Turn], window: int | None, tokenizer: QWenTokenizer) -> list[Turn]:
    """Return turns without those that `encode_turns` drops because one of them alone exceeds the window.

    `encode_turns` would encode that one first, which may take seconds.
    """
    limit = MAX_WINDOW_SIZE if window is None else window
    later = _last_exchange(turns)
    for index in reversed(range(later)):
        role, text = turns[index]
        if role != "system" and fewest_tokens(tokenizer, [text], limit) > limit:
            return [turn for place, turn in enumerate(turns) if place >= later or turn[0] == "system"]
        if role == "user":
            later = index
    return turns


def _continued_message(request: ChatCompletionRequest, last: JSONObject) -> str | None:
    """Return the last message's text if the reply continues it.

    By default it continues an assistant's message without a name: a name tells that several agents speak, and that the
    last of them has finished.
    """
    continues, adds = request.continue_final_message, request.add_generation_prompt
    if continues and adds:
        raise invalid_request(
            "continue_final_message and add_generation_prompt cannot both be true: the reply either continues the last "
            "message or is a new one.",
            "continue_final_message",
        )
    if continues and last["role"] != "assistant":
        raise invalid_request(
            f"continue_final_message needs a last message of the assistant to continue, not of role {last['role']!r}.",
            "continue_final_message",
        )
    if adds is False and last["role"] in ("tool", "function"):
        raise invalid_request(
            "add_generation_prompt cannot be false after a tool result, which the assistant's message goes on from.",
            "add_generation_prompt",
        )
    if continues is None:
        continues = adds is None and not last.get("name")
    if last["role"] != "assistant" or not continues:
        return None
    return content_text(last.get("content"), "messages")


def _error_param(message: str) -> str:
    """Return the field that an error of qwen.tools names: "messages[1].tool_calls[0]" → "messages.1.tool_calls.0"."""
    found = re.match(r"(messages|tools|functions)\[[\w.\[\]]*", message)
    return re.sub(r"\[(\d+)\]", r".\1", found[0]) if found else "messages"


def _build_constraint(
    wanted: RequestedGrammar | None, tool_choice: ToolChoice, is_in_thought: bool, constraints: ConstraintFactory
) -> GrammarConstraint | None:
    """Return the grammar that the reply must follow, if any."""
    functions, names = tool_choice.functions, tool_choice.names
    if not functions:
        return None if wanted is None else wanted.create(constraints)
    if wanted is not None and wanted.kind != "json":
        raise invalid_request(
            f"{wanted.param} cannot be combined with {tool_choice.api_style} that may be called: ask for JSON, or set "
            "tool_choice to 'none'.",
            wanted.param,
        )
    strict = any(function.get("strict") for function in functions)
    limited = names is not None and len(names) < len(functions)
    if not (tool_choice.required or strict or limited or wanted is not None):
        return None
    try:
        return constraints.tool_call(
            functions,
            names=names,
            answer_schema=None if wanted is None else wanted.value,
            call_required=tool_choice.required,
            continues=is_in_thought,
        )
    except ValueError as error:
        if wanted is not None:
            wanted.create(constraints)  # names its field if the error is there
        raise invalid_request(str(error), tool_choice.api_style) from error


class ChatWriter:
    """Converts the text pieces of one reply to chunks.

    Args:
        index: index of the choice.
        reader: parser of the models' tool format; None if the reply cannot be in it.
        tool_choice: the offered tools, and the format for calls.
        fields: receives the fields of the response that are known only after the prompt was encoded.
        echo: text to put before the reply.
        return_token_ids: the chunks have the ids of their tokens.
        as_ids: write ids in place of the tokens' texts in the log-probabilities.
    """

    def __init__(
        self,
        index: int,
        tokenizer: QWenTokenizer,
        reader: ReplyReader | None,
        tool_choice: ToolChoice,
        fields: dict[str, object],
        *,
        echo: str = "",
        return_token_ids: bool = False,
        as_ids: bool = False,
    ):
        self.index, self.tokenizer, self.reader, self.tool_choice = index, tokenizer, reader, tool_choice
        self.fields, self.echo, self.return_token_ids, self.as_ids = fields, echo, return_token_ids, as_ids
        self.tokens: list[TokenLogprob] = []  # not sent yet
        self.token_ids: list[int] = []  # the same
        self.reasoning_tokens = 0
        self.arguments: list[str] | None = None  # of the call, if there is one
        self.has_content = False

    def begin(self) -> Iterable[ChatChunkChoice]:
        yield self._chunk({"role": "assistant", "content": ""})
        if self.echo:
            yield self._chunk({"content": self.echo})

    def write(self, piece: Piece) -> Iterable[ChatChunkChoice]:
        if piece.prompt is not None:
            self.fields["prompt_logprobs"] = format_prompt_logprobs(self.tokenizer, piece.prompt)
        self.tokens += piece.tokens
        self.token_ids += piece.token_ids
        if self.reader is not None:
            return self._chunks(self.reader.feed(piece.text))
        return self._chunks([ContentDelta(piece.text)] if piece.text else [])

    def end(self, reason: TextFinishReason, stop_reason: StopReason) -> Iterable[ChatChunkChoice]:
        yield from self._chunks(self.reader.finish() if self.reader is not None else [])
        finish_reason: ChatFinishReason = reason
        if reason == "stop" and self._has_complete_call(stop_reason):
            finish_reason = "tool_calls" if self.tool_choice.api_style == "tools" else "function_call"
        yield {**self._chunk({}, finish_reason), "stop_reason": stop_reason}

    def _chunks(self, deltas: Iterable[Delta]) -> Iterator[ChatChunkChoice]:
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                if not self.tool_choice.required:  # then it is a thought that was cut off before the call
                    self.has_content = True
                    yield self._chunk({"content": delta.text})
            elif isinstance(delta, ThoughtDelta):
                yield from self._thought_chunks(delta.text)
            elif self.tool_choice.functions:
                yield from map(self._chunk, self._call_deltas(delta))
            elif not self.has_content:  # a tool of an earlier turn: send the call as text rather than nothing
                prefix = "" if delta.name is None else f"{ACTION} {delta.name}\n{ACTION_INPUT} "
                yield self._chunk({"content": prefix + delta.arguments})

    def _thought_chunks(self, thought: str) -> Iterator[ChatChunkChoice]:
        if not self.tool_choice.functions:  # there will be no call: the thought is what is left of the reply
            self.has_content = True
            yield self._chunk({"content": thought})
            return
        self.reasoning_tokens += len(self.tokenizer.encode(thought, allowed_special=set()))
        if not self.tool_choice.required:  # of a forced call nobody expects one
            thought = thought.lstrip()
            yield self._chunk({"reasoning_content": thought, "reasoning": thought})

    def _has_complete_call(self, stop_reason: StopReason) -> bool:
        """Return whether the reply has a call that was not cut off by what the request gave to end it."""
        if self.arguments is None:
            return False
        try:
            from_json("".join(self.arguments))
        except ValueError:
            return stop_reason is None  # the model ended the call, with invalid JSON
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
        chunk: ChatChunkChoice = {
            "index": self.index,
            "delta": delta,
            "logprobs": chat_logprobs(self.tokenizer, tokens, self.as_ids) if tokens else None,
            "finish_reason": finish_reason,
        }
        if self.return_token_ids:
            chunk["token_ids"], self.token_ids = self.token_ids, []
        return chunk


def merge_chunks(chunks: list[ChatChunkChoice]) -> ChatChoice:
    """Merge the chunks of one choice."""
    content: list[str] = []
    thought: list[str] = []
    call_id: str | None = None
    call: list[FunctionDelta] = []
    for delta in (chunk["delta"] for chunk in chunks):
        content.append(delta.get("content", ""))
        thought.append(delta.get("reasoning_content", ""))
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
    if reasoning := "".join(thought):
        message["reasoning_content"] = message["reasoning"] = reasoning
    if call:
        function: CalledFunction = {"name": call[0]["name"], "arguments": "".join(part["arguments"] for part in call)}
        if call_id is None:
            message["function_call"] = function
        else:
            message["tool_calls"] = [{"id": call_id, "type": "function", "function": function}]
    finish_reason = chunks[-1]["finish_reason"]
    assert finish_reason is not None  # the last chunk ends the choice
    parts = [chunk["logprobs"]["content"] for chunk in chunks if chunk["logprobs"] is not None]
    choice: ChatChoice = {
        "index": chunks[0]["index"],
        "message": message,
        "logprobs": {"content": [entry for part in parts for entry in part], "refusal": None} if parts else None,
        "finish_reason": finish_reason,
        "stop_reason": chunks[-1].get("stop_reason"),
    }
    if "token_ids" in chunks[0]:
        choice["token_ids"] = [token for chunk in chunks for token in chunk["token_ids"]]
    return choice


ENVELOPE = Envelope("chat.completion", "chat.completion.chunk", "chatcmpl-", merge_chunks)
