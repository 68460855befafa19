"""Converts a request of the Responses API: to a chat completion request, to a response, and to items to store."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence

from pydantic import TypeAdapter
from pydantic_core import to_json

from ...engine.sampling_params import SamplingParams
from ..errors import ApiError, invalid_request, rename_fields, validate_converted
from ..request_types import ChatCompletionRequest, GenerationRequest, JSONObject, RequestModel
from .types import (
    AllowedTools,
    Content,
    FunctionCall,
    FunctionCallOutput,
    FunctionChoice,
    FunctionTool,
    InputItem,
    Message,
    OtherChoice,
    OtherItem,
    Reasoning,
    RefusalPart,
    Response,
    ResponseRequest,
)

MAX_TYPE = 50  # characters of an unsupported type in messages
LOGPROBS = "message.output_text.logprobs"
# Fields of a chat completion request that have another name here.
FIELD_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "tool_choice.allowed_tools": "tool_choice",
    "tools": "tools",
}
# These control how the reply is sent, which the Responses API does in its own way.
OWN_FIELDS = {"stream", "stream_options"}
ITEM_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}

ConversationItems = TypeAdapter(list[InputItem])


def new_id(prefix: str) -> str:
    """Return an id that nobody can guess: 128 random bits."""
    return f"{prefix}_{secrets.token_hex(16)}"


def to_chat_request(
    request: ResponseRequest, history: Sequence[InputItem]
) -> tuple[ChatCompletionRequest, dict[str, str]]:
    """Convert a request.

    Args:
        history: items of the conversation before the request's own.

    Returns:
        The request for a chat completion, and which of its fields come from which field of the Responses request, for
        `errors.rename_fields`.

    Raises:
        ApiError: a field is out of range, or the choice of a tool that is not a function.
    """
    conversation = _Conversation()
    if request.instructions:
        conversation.add_message("system", request.instructions, "instructions")
    conversation.add_items((item, "previous_response_id") for item in history)
    if isinstance(request.input, str):
        conversation.add_message("user", request.input, "input")
    else:
        conversation.add_items((item, f"input.{index}") for index, item in enumerate(request.input))

    inherited = set(GenerationRequest.model_fields) - OWN_FIELDS
    fields = request.model_dump(include=inherited, exclude_none=True, by_alias=True)
    fields["messages"] = conversation.messages
    fields["continue_final_message"] = conversation.is_unfinished
    names = {**FIELD_NAMES, **conversation.names}
    if request.max_output_tokens is not None:
        fields["max_completion_tokens"] = request.max_output_tokens
    if request.top_logprobs or LOGPROBS in (request.include or []):
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    if request.text is not None and request.text.format is not None:
        if request.response_format is not None:
            raise invalid_request("text.format and response_format are both given: keep text.format.", "text.format")
        names["response_format"] = names["response_format.json_schema"] = "text.format"
        fields["response_format"] = _response_format(request.text.format.model_dump(by_alias=True, exclude_none=True))
    tools: list[JSONObject] = []
    for index, tool in enumerate(request.tools or []):
        if isinstance(tool, FunctionTool):
            names[f"tools.{len(tools)}"] = names[f"tools.{len(tools)}.function"] = f"tools.{index}"
            tools.append({"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)})
    fields["tools"] = tools
    fields["tool_choice"] = _tool_choice(request.tool_choice, names)
    try:
        return validate_converted(ChatCompletionRequest, fields), names
    except ApiError as error:
        raise rename_fields(error, names) from error


def new_response(request: ResponseRequest, model: str, params: SamplingParams) -> Response:
    """Return the response to a request before anything was generated.

    Args:
        model: id of the model.
        params: the settings in use, for fields that the request omits.
    """
    text = {"format": {"type": "text"}}
    if request.text is not None:
        text |= request.text.model_dump(by_alias=True, exclude_none=True)
    choice = request.tool_choice
    tools = [tool for tool in request.tools or [] if isinstance(tool, FunctionTool)]
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None} if request.reasoning is None else request.reasoning.model_dump(),
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "temperature": params.temperature if request.temperature is None else request.temperature,
        "text": text,
        "tool_choice": choice.model_dump() if isinstance(choice, RequestModel) else choice or "auto",
        "tools": [tool.model_dump() | {"strict": tool.strict is True} for tool in tools],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": params.top_p if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
    }


def stored_input(request: ResponseRequest) -> bytes:
    """Return the items of a request as they are listed and stored, each with an id: a JSON array."""
    items: Iterable[InputItem] = (
        [Message(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    )
    return to_json([_stored_item(item) for item in items])


def _stored_item(item: InputItem) -> JSONObject:
    stored = item.model_dump(exclude_none=True)
    kind = stored["type"] = item.type or "message"
    stored.setdefault("id", new_id(ITEM_PREFIXES.get(kind, "item")))
    if isinstance(item, Message):
        stored["content"] = _stored_content(item)
    if isinstance(item, Message | FunctionCall | FunctionCallOutput):
        stored.setdefault("status", "completed")
    if isinstance(item, Reasoning):
        stored.setdefault("summary", [])
    return stored


def _stored_content(message: Message) -> list[JSONObject]:
    text_type = "output_text" if message.role == "assistant" else "input_text"
    more: JSONObject = {"annotations": []} if message.role == "assistant" else {}
    return [{"type": text_type, "text": text, **more} for text in _texts(message.content)]


def _texts(content: Content | None) -> list[str]:
    if content is None or isinstance(content, str):
        return [content] if content else []
    return [part.refusal if isinstance(part, RefusalPart) else part.text for part in content]


class _Conversation:
    """The messages of a chat completion while items are added.

    `names` maps the paths of messages, and of fields inside, to the paths of the items that they are from.
    """

    def __init__(self) -> None:
        self.messages: list[JSONObject] = []
        self.names: dict[str, str] = {}
        self.ignored_calls: set[str] = set()  # ids of calls of tools that are not functions
        self.is_unfinished = False  # the last message is an assistant's that was cut off

    def add_items(self, items: Iterable[tuple[InputItem, str]]) -> None:
        """Add items with their paths. Those without effect are left out."""
        thought = ""
        for item, path in items:
            if isinstance(item, FunctionCall):
                self._add_call(item, path, thought)
            elif isinstance(item, FunctionCallOutput):
                # Older versions of Codex send the output of a call of `local_shell` so.
                if item.call_id not in self.ignored_calls:
                    self.add_message("tool", item.output, path, tool_call_id=item.call_id)
            elif isinstance(item, Message):
                self.add_message(item.role, item.content, path)
                self.is_unfinished = item.role == "assistant" and item.status in ("in_progress", "incomplete")
            elif isinstance(item, OtherItem) and item.call_id is not None:
                self.ignored_calls.add(item.call_id)
            thought = "\n".join(part.text for part in item.content or []) if isinstance(item, Reasoning) else ""

    def add_message(self, role: str, content: Content | None, path: str, **fields: str) -> None:
        message = f"messages.{len(self.messages)}"
        self.names[message] = path
        if not path.startswith("input."):  # this is one field
            self.names[f"{message}.content"] = self.names[f"{message}.tool_call_id"] = path
        elif role == "tool":
            self.names[f"{message}.content"] = f"{path}.output"
            self.names[f"{message}.tool_call_id"] = f"{path}.call_id"
        self.messages.append({"role": role, "content": "\n".join(_texts(content)), **fields})
        self.is_unfinished = False

    def _add_call(self, item: FunctionCall, path: str, thought: str) -> None:
        """Add a call to the assistant message before it, or to a new one."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.add_message("assistant", None, path)
        message, field = self.messages[-1], f"messages.{len(self.messages) - 1}.tool_calls"
        calls = message.setdefault("tool_calls", [])
        if not calls:
            self.names[field] = path
            if thought:
                message["reasoning_content"] = thought
        call = f"{field}.{len(calls)}"
        self.names[call] = self.names[f"{call}.function"] = path
        function = {"name": item.name, "arguments": item.arguments}
        calls.append({"id": item.call_id, "type": "function", "function": function})


def _response_format(text_format: JSONObject) -> JSONObject:
    if text_format["type"] != "json_schema":
        return text_format
    kind = text_format.pop("type")
    return {"type": kind, "json_schema": text_format}


def _tool_choice(choice: object, names: dict[str, str]) -> object:
    """Return the tool choice of a chat completion, and add to `names` which tools it names.

    Raises:
        ApiError: it requires a tool that is not a function.
    """
    if isinstance(choice, OtherChoice):
        raise invalid_request(
            f"tool_choice: tools of type {choice.type[:MAX_TYPE]!r} are not supported, use a function.",
            "tool_choice",
        )
    if isinstance(choice, FunctionChoice):
        return {"type": "function", "function": {"name": choice.name}}
    if not isinstance(choice, AllowedTools):
        return choice
    functions: list[JSONObject] = []
    for index, tool in enumerate(choice.tools):
        if isinstance(tool, FunctionChoice):
            names[f"tool_choice.allowed_tools.tools.{len(functions)}"] = f"tool_choice.tools.{index}"
            functions.append({"type": "function", "function": {"name": tool.name}})
    if functions:
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": functions}}
    if choice.mode == "required":
        raise invalid_request(
            "tool_choice.tools: one of these tools is required, but none of them is a function.", "tool_choice.tools"
        )
    return "none"
