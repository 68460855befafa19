"""Converts a request of Anthropic's Messages API to a chat completion request.

`to_chat_request` converts the conversation, the tools and the settings. Tool results, which are blocks of a user
message here, become messages of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..errors import invalid_request, validate_converted
from ..request_types import MAX_TOOLS, ChatCompletionRequest, JSONObject
from .types import (
    AnthropicTool,
    AssistantMessage,
    CountTokensRequest,
    MessagesRequest,
    NamedToolChoice,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)

TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# Path in the chat completion request → path in the request.
FIELD_NAMES = {"response_format.json_schema.schema": "output_config.format.schema"}


def to_chat_request(request: CountTokensRequest) -> ChatCompletionRequest:
    """Convert a request, without the tools that Anthropic defines.

    Raises:
        ApiError: a tool result without its call, a call without its result, or too many calls.
    """
    tools = [tool for tool in request.tools or [] if not isinstance(tool, AnthropicTool)]
    fields: dict[str, Any] = {
        "messages": _messages(request),
        "tools": [{"type": "function", "function": _function(tool.model_dump(exclude_none=True))} for tool in tools],
        "tool_choice": _tool_choice(request, has_tools=bool(tools)),
    }
    if request.output_config is not None and (json_format := request.output_config.format) is not None:
        json_schema = {"name": "answer", "schema": json_format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    if isinstance(request, MessagesRequest):
        fields["stop"] = request.stop_sequences
        for name in ("max_tokens", "temperature", "top_p", "top_k", "cache_salt"):
            fields[name] = getattr(request, name)
    return validate_converted(ChatCompletionRequest, fields)


def _function(tool: JSONObject) -> JSONObject:
    return {"parameters": tool.pop("input_schema"), **tool}


def _tool_choice(request: CountTokensRequest, has_tools: bool) -> object:
    choice = request.tool_choice
    if choice is not None and choice.type == "any" and not has_tools:
        raise invalid_request("tool_choice: 'any' requires tools, and the request has none.", "tool_choice")
    if isinstance(choice, NamedToolChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return None if choice is None else TOOL_CHOICES[choice.type]


def _messages(request: CountTokensRequest) -> list[JSONObject]:
    messages: list[JSONObject] = []
    if request.system:
        messages.append({"role": "system", "content": _content(request.system)})
    calls: dict[str, str] = {}  # ids of calls without a result → their paths
    for index, message in enumerate(request.messages):
        path = f"messages.{index}"
        if isinstance(message, UserMessage):
            messages += _user_messages(message, path, calls)
            _check_answered(calls)
        else:
            _check_answered(calls)
            if isinstance(message, AssistantMessage):
                messages.append(_assistant_message(message, path, calls))
            else:
                messages.append({"role": "system", "content": _content(message.content)})
    _check_answered(calls)
    return messages


def _user_messages(message: UserMessage, path: str, calls: dict[str, str]) -> list[JSONObject]:
    """Return the tool results of a message, then the rest of it. Removes their calls from `calls`."""
    blocks = [] if isinstance(message.content, str) else message.content
    messages: list[JSONObject] = []
    for index, block in enumerate(blocks):
        if isinstance(block, ToolResultBlock):
            if calls.pop(block.tool_use_id, None) is None:
                param = f"{path}.content.{index}.tool_use_id"
                raise invalid_request(
                    f"{param}: the message before it is not an assistant message with a tool_use block of this id, or "
                    "has a result already. Send one tool_result per tool_use, in the next message.",
                    param,
                )
            content = _content(block.content or "")
            if block.is_error:
                content = [_part("Error:"), *([_part(content)] if isinstance(content, str) else content)]
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
    content = message.content if isinstance(message.content, str) else _parts(blocks)
    if content or not messages:
        messages.append({"role": "user", "content": content})
    return messages


def _assistant_message(message: AssistantMessage, path: str, calls: dict[str, str]) -> JSONObject:
    """Return a message with its calls, and add these to `calls`."""
    if isinstance(message.content, str):
        return {"role": "assistant", "content": message.content}
    tool_calls = []
    for index, block in enumerate(message.content):
        if isinstance(block, ToolUseBlock):
            if block.id in calls:
                param = f"{path}.content.{index}.id"
                raise invalid_request(f"{param}: another tool_use block has the same id. Use different ones.", param)
            calls[block.id] = f"{path}.content.{index}"
            # As the models write JSON, so that a call that comes back is the text that was generated.
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            tool_calls.append({"id": block.id, "type": "function", "function": function})
    if not tool_calls:
        return {"role": "assistant", "content": _parts(message.content)}
    if len(tool_calls) > MAX_TOOLS:
        raise invalid_request(
            f"{path}.content: should have at most {MAX_TOOLS} tool_use blocks, not {len(tool_calls)}.",
            f"{path}.content",
        )
    thought = "\n".join(block.thinking for block in message.content if isinstance(block, ThinkingBlock))
    content = _parts(message.content) or None
    return {"role": "assistant", "content": content, "reasoning_content": thought or None, "tool_calls": tool_calls}


def _check_answered(calls: dict[str, str]) -> None:
    for path in calls.values():
        raise invalid_request(
            f"{path}: this tool_use has no result. Begin the next message, the user's, with a tool_result for it.",
            path,
        )


def _content(content: str | Sequence[TextBlock]) -> str | list[JSONObject]:
    return content if isinstance(content, str) else _parts(content)


def _parts(blocks: Sequence[object]) -> list[JSONObject]:
    """Return the text blocks as parts of a chat message."""
    return [_part(block.text) for block in blocks if isinstance(block, TextBlock)]


def _part(text: str) -> JSONObject:
    return {"type": "text", "text": text}
