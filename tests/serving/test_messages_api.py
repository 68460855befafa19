"""Anthropic's Messages API: conversion of requests, errors, and requests as Claude Code sends them.

tests/serving/peers/test_messages.py has what its clients expect of answers.
"""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from qwen.checkpoint.loading import load_model
from qwen.serving.api.app import create_app
from qwen.serving.api.messages_api.convert import to_chat_request
from qwen.serving.api.messages_api.events import MessageWriter, merge_events
from qwen.serving.api.messages_api.types import CountTokensRequest, MessagesRequest
from qwen.serving.api.response_types import ChatChunkChoice, MessageDelta
from qwen.serving.engine import Engine
from tests.support import ROOT
from tests.support.server_process import ServerProcess

HI = [{"role": "user", "content": "hi"}]
TOOL = {"name": "look", "input_schema": {"type": "object", "properties": {}}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "köln", "n": [1, 2]}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "a church"}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}


def post(server: ServerProcess, body: dict, path: str = "/v1/messages", **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"max_tokens": 1} | body, headers=headers, timeout=60)


def error_of(response: httpx.Response) -> dict:
    """Return the error of a response, which must have Anthropic's format."""
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert set(body["error"]) == {"type", "message"}
    return body["error"]


def convert(*messages: dict, **fields: Any) -> list[dict]:
    """Return the messages of the chat request."""
    request = CountTokensRequest.model_validate({"messages": list(messages), **fields})
    return [message.model_dump(exclude_none=True) for message in to_chat_request(request).messages]


def user(*content: dict) -> dict:
    return {"role": "user", "content": list(content)}


def assistant(*content: dict) -> dict:
    return {"role": "assistant", "content": list(content)}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


# Conversion


def test_blocks_become_messages() -> None:
    thinking = {"type": "thinking", "thinking": "I look.", "signature": "x"}
    converted = convert(
        user(text("Where?") | {"cache_control": {"type": "ephemeral"}}),
        assistant(thinking, text("Let me see."), CALL, {"type": "redacted_thinking", "data": "x"}),
        user(text("And then?"), RESULT | {"content": [text("a"), text("church")]}),
        {"role": "assistant", "content": "There."},
        {"role": "system", "content": "Be brief."},
        user(),
        system=[text("You are a guide."), text("Be polite.")],
    )
    assert [message["role"] for message in converted] == [
        *("system", "user", "assistant", "tool", "user", "assistant", "system", "user")
    ]
    system, _, called, result, follow_up, *_, empty = converted
    assert system["content"] == [text("You are a guide."), text("Be polite.")]
    assert (called["reasoning_content"], called["content"]) == ("I look.", [text("Let me see.")])
    (call,) = called["tool_calls"]
    assert call["id"] == "toolu_1"
    assert call["function"] == {"name": "look", "arguments": '{"at": "köln", "n": [1, 2]}'}
    assert result == {"role": "tool", "tool_call_id": "toolu_1", "content": [text("a"), text("church")]}
    assert follow_up["content"] == [text("And then?")]
    assert empty["content"] == []


@pytest.mark.parametrize(
    ("content", "converted"),
    [
        ("no such place", [text("Error:"), text("no such place")]),
        ([text("no"), text("place")], [text("Error:"), text("no"), text("place")]),
        (None, [text("Error:"), text("")]),
    ],
)
def test_failed_tools_are_errors_to_the_model(content: object, converted: list) -> None:
    result = RESULT | {"content": content, "is_error": True}
    assert convert(*HI, assistant(CALL), user(result))[-1]["content"] == converted


def test_thought_without_a_call_is_left_out() -> None:
    thinking = {"type": "thinking", "thinking": "I look.", "signature": "x"}
    assert convert(*HI, assistant(thinking, text("There.")))[1] == {"role": "assistant", "content": [text("There.")]}


def test_fields_become_those_of_a_chat() -> None:
    schema = {"type": "object"}
    fields = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop_sequences": ["x"], "cache_salt": "s"}
    choice = {"type": "tool", "name": "look", "disable_parallel_tool_use": True}
    config = {"effort": "high", "format": {"type": "json_schema", "schema": schema}}
    tools = [TOOL | {"description": "Look.", "strict": True, "type": "custom"}, SEARCH]
    chat = to_chat_request(
        MessagesRequest.model_validate(
            {"messages": HI, "tools": tools, "tool_choice": choice, "output_config": config, **fields}
        )
    )
    assert (chat.max_tokens, chat.temperature, chat.top_p, chat.top_k) == (7, 0.5, 0.9, 3)
    assert (chat.stop, chat.cache_salt) == (["x"], "s")
    (tool,) = chat.tools or []
    function = {"name": "look", "description": "Look.", "parameters": TOOL["input_schema"], "strict": True}
    assert tool.function.model_dump() == function
    assert chat.model_dump(include={"tool_choice"})["tool_choice"]["function"] == {"name": "look"}
    assert chat.response_format is not None
    assert chat.response_format.model_dump(by_alias=True)["json_schema"]["schema"] == schema


# Replies


def chunk(delta: MessageDelta, finish_reason: Any = None, **fields: Any) -> ChatChunkChoice:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason, **fields}


def merge(*chunks: ChatChunkChoice, stop: tuple[str, ...] = (), shows_thought: bool = True) -> dict:
    """Return the message that a reply of these chunks becomes."""
    usage: Any = {"prompt_tokens": 20, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 16}}
    writer = MessageWriter("qwen", stop, shows_thought)
    events = [*writer.begin(usage), *(event for part in chunks for event in writer.write(part)), *writer.end(usage)]
    return merge_events(events)


def call_chunk(arguments: str, **named: str) -> ChatChunkChoice:
    start = {"id": "call_1", "type": "function"} if named else {}
    return chunk({"tool_calls": [{"index": 0, **start, "function": {**named, "arguments": arguments}}]})


def test_kinds_of_text_are_blocks() -> None:
    chunks = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Well"}),
        chunk({"content": ". "}),
        chunk({"reasoning_content": "I look.", "reasoning": "I look."}),
        call_chunk("", name="look"),
        call_chunk('{"at": '),
        call_chunk('"here"}'),
        chunk({}, "tool_calls"),
    ]
    message = merge(*chunks)
    assert message["content"] == [
        {"type": "text", "text": "Well. "},
        {"type": "thinking", "thinking": "I look.", "signature": ""},
        {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "here"}},
    ]
    assert message["stop_reason"] == "tool_use"
    assert message["usage"] == {
        "input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 16,
        "output_tokens": 5,
    }
    assert [block["type"] for block in merge(*chunks, shows_thought=False)["content"]] == ["text", "tool_use"]


@pytest.mark.parametrize(
    ("thinking", "shown"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "adaptive"}, True),
        ({"type": "between_tools"}, True),
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive", "display": "omitted"}, False),
    ],
)
def test_thought_is_shown_if_asked_for(thinking: dict | None, shown: bool) -> None:
    request = MessagesRequest.model_validate({"messages": HI, "max_tokens": 1, "thinking": thinking})
    assert request.shows_thought == shown


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("", {}),
        ('{"a": 1, "b": "tw', {"a": 1}),
        ('{"a": 1, "b"', {"a": 1}),
        ("{a: 1}", {}),
        ("[1]", {}),
        ("Boston", {}),
    ],
)
def test_input_is_an_object(arguments: str, value: dict) -> None:
    message = merge(call_chunk("", name="look"), call_chunk(arguments), chunk({}, "length"))
    assert message["content"][0]["input"] == value
    assert message["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("matched", "reason", "sequence"),
    [
        ("x", "stop_sequence", "x"),
        (None, "end_turn", None),
        ("\nObservation:", "end_turn", None),
        (7, "end_turn", None),
    ],
)
def test_only_stop_sequences_of_the_request_are_named(matched: object, reason: str, sequence: str | None) -> None:
    message = merge(chunk({"content": "hi"}), chunk({}, "stop", stop_reason=matched), stop=("x",))
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens: should be a valid integer."),
        ({"max_tokens": 0}, "max_tokens: should be greater than or equal to 1, not 0."),
        ({"max_tokens": "9"}, "max_tokens: should be a valid integer"),
        ({"temperature": 1.1}, "temperature: should be less than or equal to 1"),
        ({"top_p": -1}, "top_p: "),
        ({"top_k": -1}, "top_k: "),
        ({"top_k": 2**31}, "top_k: "),
        ({"stop_sequences": "x"}, "stop_sequences: "),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences: should have at most 16 items"),
        ({"stop_sequences": ["x" * 1001]}, "stop_sequences.0: "),
        ({"stream": "yes"}, "stream: "),
        ({"cache_salt": ""}, "cache_salt: "),
        ({"system": 5}, "system: "),
        ({"system": [{"type": "image"}]}, "system.0.type: "),
        ({"messages": []}, "messages: should have at least 1 item"),
        ({"messages": "hi"}, "messages: "),
        (
            {"messages": [{"role": "tool", "content": "hi"}]},
            "messages.0: 'tool' is not supported",
        ),
        ({"messages": [{"content": "hi"}]}, "messages.0: needs a 'role'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: required but missing."),
        ({"messages": [user({"type": "image", "source": {}})]}, "messages.0.content.0: 'image' is not supported"),
        ({"messages": [user({"type": "document"})]}, "messages.0.content.0: 'document' is not supported"),
        ({"messages": [user({"type": "text"})]}, "messages.0.content.0.text: required but missing."),
        ({"messages": [user(CALL)]}, "messages.0.content.0: 'tool_use' is not supported"),
        ({"messages": [*HI, assistant(RESULT)]}, "messages.1.content.0: 'tool_result' is not supported"),
        ({"messages": [*HI, assistant(CALL | {"input": "x"})]}, "messages.1.content.0.input: should be an object"),
        ({"messages": [*HI, assistant(CALL)]}, "messages.1.content.0: this tool_use has no result."),
        ({"messages": [*HI, assistant(CALL), *HI]}, "messages.1.content.0: this tool_use has no result."),
        ({"messages": [*HI, assistant(CALL), assistant(CALL)]}, "messages.1.content.0: this tool_use has no result."),
        (
            {"messages": [*HI, assistant(CALL, CALL)]},
            "messages.1.content.1.id: another tool_use block",
        ),
        ({"messages": [user(RESULT)]}, "messages.0.content.0.tool_use_id: the message before"),
        (
            {"messages": [*HI, assistant(CALL), user(RESULT, RESULT)]},
            "messages.2.content.1.tool_use_id: the message",
        ),
        (
            {"messages": [*HI, assistant(CALL), user(RESULT | {"content": [{"type": "image"}]})]},
            "messages.2.content.0.content.0.type: should be 'text', not",
        ),
        (
            {"messages": [*HI, assistant(*(CALL | {"id": str(n)} for n in range(129)))]},
            "messages.1.content: should have at most 128 tool_use blocks, not 129.",
        ),
        ({"messages": [user(text("a b " * 9000))]}, "messages: prompt is too long: 18027 tokens > 8191 maximum."),
        ({"messages": HI * 1025}, "messages: Too many messages: 1025"),
        ({"tools": [{"name": "look"}]}, "tools.0.input_schema: required but missing."),
        ({"tools": [TOOL | {"name": "a\nb"}]}, "tools.0.name: "),
        ({"tools": [{"type": 5}]}, "tools.0.type: "),
        ({"tools": [TOOL, TOOL]}, "tools: duplicate name 'look'."),
        ({"tools": [TOOL] * 129}, "tools: should have at most 128 items"),
        ({"tools": [TOOL | {"strict": True, "input_schema": {"type": "array"}}]}, "tools: "),
        (
            {"tool_choice": {"type": "required"}},
            "tool_choice: 'required' is not supported, expected one of",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice: 'any' requires tools"),
        ({"tool_choice": {"type": "any"}, "tools": [SEARCH]}, "tool_choice: 'any' requires tools"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]}, "tool_choice: unknown name 'x'"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, "tool_choice.disable_parallel_tool_use: "),
        ({"thinking": {"type": "on"}}, "thinking.type: "),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens: "),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type: "),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema: required but missing."),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "num"}}}},
            "output_config.format.schema: ",
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "num"}}}, "tools": [TOOL]},
            "output_config.format.schema: ",
        ),
    ],
)
def test_wrong_fields_are_named(server: ServerProcess, fields: dict, message: str) -> None:
    response = post(server, {"messages": HI, **fields})
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(message)
    if "max_tokens" not in fields and not {"temperature", "top_p", "top_k", "stop_sequences", "stream"} & set(fields):
        counted = post(server, {"messages": HI, **fields}, "/v1/messages/count_tokens")
        assert counted.status_code == (200 if "cache_salt" in fields or "too long" in message else 400)


def test_missing_max_tokens(server: ServerProcess) -> None:
    response = httpx.post(f"{server.url}/v1/messages", json={"messages": HI})
    assert response.status_code == 400
    assert error_of(response)["message"] == "max_tokens: required but missing."


def test_every_error_has_the_format(server: ServerProcess) -> None:
    url = f"{server.url}/v1/messages"
    json_type = {"Content-Type": "application/json"}
    for response, status, kind in (
        (httpx.post(url, content=b"{", headers=json_type), 400, "invalid_request_error"),
        (httpx.post(url, content=b"[1]", headers=json_type), 400, "invalid_request_error"),
        (httpx.post(url, content=b"[" * 100_000, headers=json_type), 400, "invalid_request_error"),
        (httpx.post(url, content=b"{}"), 415, "invalid_request_error"),
        (httpx.get(url), 405, "invalid_request_error"),
        (httpx.post(f"{url}/batches", json={}), 404, "not_found_error"),
        (httpx.post(url, content=b"x" * 5 * 2**20, headers=json_type), 413, "request_too_large"),
    ):
        assert response.status_code == status
        assert error_of(response)["type"] == kind
    assert set(httpx.post(f"{server.url}/v1/message", json={}).json()) == {"error"}  # OpenAI's format


def test_failure_during_streaming_is_an_event(bundled_chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("out of order")

    async def ask(app: FastAPI) -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return (await client.post("/v1/messages", json={"messages": HI, "max_tokens": 1, "stream": True})).text

    with contextlib.closing(Engine(*load_model(bundled_chat, cpu_only=True))) as engine:
        monkeypatch.setattr(engine, "_step", fail)
        *_, event, rest = anyio.run(ask, create_app(engine)).split("\n\n")
    assert rest == ""
    name, data = event.split("\n")
    error = json.loads(data.removeprefix("data: "))
    assert (name, error["type"], error["error"]["type"]) == ("event: error", "error", "api_error")
    assert error["request_id"].startswith("req_")


WRONG = [1] * 500_000


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": WRONG},
        {"messages": [{"role": "user", "content": WRONG}]},
        {"messages": [user(RESULT | {"content": WRONG})]},
        {"messages": HI, "tools": WRONG, "stop_sequences": WRONG, "system": WRONG},
        {"messages": HI * 500_000},
    ],
)
def test_half_a_million_mistakes_report_few_errors(fields: dict) -> None:
    with pytest.raises(ValidationError) as error:
        MessagesRequest.model_validate(fields)
    assert error.value.error_count() <= 10


# Clients and documentation


def test_documentation_lists_all_fields_and_existing_tests() -> None:
    document = (ROOT / "docs" / "openai_api.md").read_text(encoding="utf-8")
    section = document.split("## The Messages API\n")[1].split("\n## ")[0]
    assert set(MessagesRequest.model_fields) <= set(re.findall(r"`(\w+)`", section))
    files = [Path(__file__), Path(__file__).parent / "peers" / "test_messages.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    for name in re.findall(r"`(test_\w+)`", section):
        assert f"def {name}(" in source, name


def test_other_paths_and_headers(server: ServerProcess) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a-2025-01-01,b", "x-api-key": "anything"}
    for path in ("/v1/messages?beta=true", "/messages", "//v1/messages/"):
        response = post(server, {"messages": HI}, path, **headers)
        assert response.status_code == 200
        assert response.headers["request-id"].startswith("req_")


def test_claude_code(server: ServerProcess) -> None:
    """A request of the kind that Claude Code sends, with fewer and shorter tools, since its own are 12,000 tokens."""
    cache = {"cache_control": {"type": "ephemeral"}}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "command": {"type": "string", "description": "The command to execute. " * 2},
            "timeout": {"type": "number", "description": "Timeout in milliseconds"},
            "run_in_background": {"type": "boolean", "default": False},
        },
        "required": ["command"],
        "additionalProperties": False,
    }
    tools = [{"name": name, "description": "Use it well. " * 5, "input_schema": schema} for name in ("Bash", "Read")]
    body = {
        "model": "claude-opus-4-1",
        "system": [text("You are a command line tool.") | cache, text("Answer briefly. " * 5) | cache],
        "messages": [
            user(text("<system-reminder>Today is Monday.</system-reminder>"), text("List the files.") | cache),
            assistant(
                {"type": "thinking", "thinking": "I should use Bash.", "signature": "EqQB"},
                CALL | {"name": "Bash", "input": {"command": "ls"}},
            ),
            user(RESULT | {"content": "README.md"} | cache, text("<system-reminder>Go on.</system-reminder>")),
        ],
        "tools": [*tools, SEARCH],
        "metadata": {"user_id": "user_0_account__session_1"},
        "max_tokens": 32_000,
        "thinking": {"type": "enabled", "budget_tokens": 31_999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "temperature": 1,
        "stream": True,
        "stop_sequences": ["\n\n"],  # the toy may not end by itself
    }
    response = post(server, body, "/v1/messages?beta=true", **{"anthropic-version": "2023-06-01"})
    assert response.status_code == 200
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[0]["message"]["usage"]["input_tokens"] > 400
    assert events[-1] == {"type": "message_stop"}
    assert server.output().count("tools of type 'web_search_20250305' are not supported and left out") == 1
