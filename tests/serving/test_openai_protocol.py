"""Responses to invalid requests; no request makes the server fail."""

import json
import logging
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from qwen.serving.api.log_once import MAX_KEYS, LogOnce
from qwen.serving.api.messages_api.types import MessagesRequest
from qwen.serving.api.request_types import ChatCompletionRequest, CompletionRequest
from qwen.serving.api.responses_api.types import ResponseRequest
from tests.support import ROOT
from tests.support.server_process import ServerProcess

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "listen"}}


def post(server: ServerProcess, fields: Any, path: str = "/v1/chat/completions") -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=fields, timeout=60)


def error_of(response: httpx.Response) -> dict:
    """Return the error of a response, which must have OpenAI's format."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    assert "Traceback" not in error["message"]
    assert ".py" not in error["message"]
    return error


MANY_PROPERTIES = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(600)}}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": "a", "regex": "(a?){1000}a{1000}"}, "regex"),
        ("/v1/chat/completions", {"messages": HI, "guided_json": MANY_PROPERTIES}, "guided_json"),
        (
            "/v1/responses",
            {"input": "a", "text": {"format": {"type": "json_schema", "name": "a", "schema": MANY_PROPERTIES}}},
            "text.format.schema",
        ),
        (
            "/v1/messages",
            {
                "messages": HI,
                "max_tokens": 900,
                "output_config": {"format": {"type": "json_schema", "schema": MANY_PROPERTIES}},
            },
            "output_config.format.schema",
        ),
    ],
)
def test_a_grammar_that_fails_in_the_reply_is_named(server: ServerProcess, path: str, fields: dict, param: str) -> None:
    response = post(server, fields, path)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith(f"{param}: ") if path == "/v1/messages" else error["param"] == param
    assert "llguidance" in error["message"]


def test_whole_floats_are_integers(server: ServerProcess) -> None:
    """As in JSON, which has one type of number."""
    fields = {"max_tokens": 2.0, "top_k": 5.0, "n": 1.0, "seed": 1e3}
    assert post(server, {"messages": HI, **fields}).json()["usage"]["completion_tokens"] == 2
    response = post(server, {"messages": HI, "max_tokens": 2.5})
    assert response.status_code == 400
    assert error_of(response)["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"top_k": 1.5}, "top_k", "integer"),
        ({"top_k": 10**400}, "top_k", "less than or equal to"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty", "0.01"),
        ({"presence_penalty": 3}, "presence_penalty", "2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "-2"),
        ({"n": 0}, "n", "1"),
        ({"n": 17}, "n", "16"),
        ({"max_tokens": 0}, "max_tokens", "1, not 0. Omit it"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "1"),
        ({"max_length": 5}, "max_length", "prompt"),
        ({"seed": "x"}, "seed", "integer"),
        ({"stop": True}, "stop", "valid string"),
        ({"stop": ["a", 5]}, "stop.1", "valid string"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "match"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "100"),
        ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias", "at most 1024"),
        ({"top_logprobs": 1}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logprobs": True, "top_logprobs": 20, "n": 16, "max_tokens": 8000}, "logprobs", "fewer"),
        ({"messages": []}, "messages", "at least 1 item, not 0."),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role", "required"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role", "'assistant'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "messages.0.content.0.type", "required"),
        ({"messages": [{"role": "user", "content": [{"type": 5}]}]}, "messages.0.content.0.type", "'text'"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0", "tool result"),
        ({"messages": [{"role": "user", "content": "a b " * 9000}]}, "messages", "8192"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a\nb"}}]}, "tools.0.function.name", "match"),
        ({"tools": [TOOL, TOOL]}, "tools", "unique"),
        ({"tools": [TOOL] * 129}, "tools", "128"),
        ({"tools": [TOOL], "tool_choice": NAMED}, "tool_choice", "listen"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice", "'required'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [TOOL], "functions": [{"name": "f"}]}, "functions", "old name"),
        ({"tools": [TOOL], "function_call": "auto"}, "function_call", "tool_choice"),
        ({"functions": [{"name": "f"}], "tool_choice": "auto"}, "tool_choice", "function_call"),
        ({"functions": [{"description": "f"}]}, "functions.0", "name"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call", "'g'"),
        ({"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "number!"}}}},
            "response_format.json_schema.schema",
            "number!",
        ),
        ({"modalities": ["audio"]}, "modalities.0", "'text'"),
    ],
)
def test_wrong_fields_are_named(server: ServerProcess, fields: dict, param: str, message: str) -> None:
    response = post(server, {"messages": HI, "max_tokens": 1, **fields})
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal", "input_text", "x" * 500])
def test_parts_other_than_text_are_named(server: ServerProcess, kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:,"}}]
    response = post(server, {"messages": [{"role": "user", "content": parts}]})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == "messages.0.content.1"
    assert error["message"] == (
        f"messages.0.content.1: parts of type {kind[:50]!r} are not supported, the model takes text only: "
        'send {"type": "text", "text": …} or a string.'
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ""},
        {"stop": False},
        {"stop": [""]},
        {"stop": [None, ""]},
        {"stop": []},
        {"top_p": 1, "temperature": 0, "presence_penalty": 0},
        {"logit_bias": {}, "model": None, "top_logprobs": 0},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": [], "functions": [], "tool_choice": "none", "function_call": "none"},
        {"modalities": ["text"], "response_format": {"type": "text"}},
    ],
)
def test_harmless_values_are_accepted(server: ServerProcess, fields: dict) -> None:
    response = post(server, {"messages": HI, "temperature": 0, **fields})
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"].startswith("Hello")


def test_empty_stop_strings_beside_others(server: ServerProcess) -> None:
    response = post(server, {"messages": HI, "temperature": 0, "stop": ["", "!", None]})
    assert response.json()["choices"][0]["message"]["content"] == "Hello"


def test_ignored_fields_are_logged_once(start_server: Callable[..., ServerProcess], bundled_chat: Path) -> None:
    server = start_server("-c", str(bundled_chat))  # of its own: other tests send ignored fields, too
    hostile = "evil\nINFO: \x1b[31m" + "x" * 10_000
    for _ in range(2):
        fields = {"messages": HI, "max_tokens": 1, "history": [["a", "b"]], hostile: 1, "reasoning_effort": None}
        assert post(server, fields).status_code == 200
    lines = [line for line in server.output().splitlines() if "ignored" in line]
    (history,) = [line for line in lines if "history" in line]
    assert history.endswith("the field 'history' is not supported and ignored. Send earlier turns in messages.")
    (evil,) = [line for line in lines if "evil" in line]
    assert f"{hostile[:50]!r}" in evil
    assert not any("reasoning_effort" in line for line in lines)


def test_number_of_logged_fields_is_limited(caplog: pytest.LogCaptureFixture) -> None:
    log_once = LogOnce(logging.getLogger("test"), "fields")
    for number in range(1000):
        log_once.warning(str(number), f"field {number}")
    assert len(caplog.messages) == MAX_KEYS + 1
    assert caplog.messages[-1] == f"More than {MAX_KEYS} fields: further ones are not logged."


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("//v1/chat/completions", 200),
        ("/v1//chat/completions", 200),
        ("/v1/chat/completions/", 200),
        ("///v1//chat///completions//", 200),
        ("/chat/completions", 200),
        ("//chat/completions/", 200),
        ("/v1/v1/chat/completions", 404),
    ],
)
def test_paths_that_clients_make(server: ServerProcess, path: str, status: int) -> None:
    response = post(server, {"messages": HI, "max_tokens": 1}, path)
    assert response.status_code == status
    if status == 404:
        assert f"Did you mean /v1/chat/completions? The base URL of this API is {server.url}/v1." in response.text


def test_normalized_paths_are_counted(server: ServerProcess) -> None:
    name = 'qwen_requests_total{endpoint="/v1/models",status="200"}'
    for path in ("/v1/models", "//v1/models/"):
        assert httpx.get(server.url + path).status_code == 200
        assert httpx.head(server.url + path).status_code == 200
    counted = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{server.url}/metrics/").text, re.MULTILINE)
    assert float(counted[1]) >= 4


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"Content-Type": "application/json; charset=utf-8"}, 200, ""),
        ({"Content-Type": "application/json", "Authorization": "Basic x", "OpenAI-Beta": "assistants=v2"}, 200, ""),
        ({"Content-Type": "application/json", "Expect": "100-continue"}, 200, ""),
        ({"Content-Type": "application/json", "Content-Encoding": "identity"}, 200, ""),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415, "uncompressed"),
        ({"Content-Type": "text/plain"}, 415, "Invalid Content-Type 'text/plain'"),
        ({}, 415, "The Content-Type is missing"),
    ],
)
def test_headers_that_clients_send(server: ServerProcess, headers: dict, status: int, message: str) -> None:
    body = json.dumps({"messages": HI, "max_tokens": 1}).encode()
    response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert response.status_code == status
    assert status == 200 or message in error_of(response)["message"]


def test_http_1_0(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"messages": HI, "max_tokens": 1}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_too_long_prompt_has_an_error_code(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "a b " * 9000}]
    error = error_of(post(server, {"messages": messages}))
    assert error["code"] == "context_length_exceeded"
    assert "prompt is too long: it has 18027 tokens." in error["message"]  # LangChain looks for this, LiteLLM for that:
    assert "This model's maximum context length is 8192 tokens" in error["message"]


def test_unknown_and_empty_fields_are_ignored(server: ServerProcess) -> None:
    names = ["n", "stop", "seed", "tools", "tool_choice", "functions", "function_call", "max_tokens", "logit_bias"]
    names += ["stream", "stream_options", "top_p", "top_k", "logprobs", "top_logprobs", "modalities", "response_format"]
    nothing = dict.fromkeys(names)
    others = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "no_such_field": [1]}
    response = post(server, {"messages": HI, "temperature": 0, **nothing, **others})
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"].startswith("Hello")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[1]",
        b"{",
        b'{"messages": "\xff"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "hi"}], "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"tools": ' + b'{"a":' * 50_000,
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_invalid_bodies(server: ServerProcess, path: str, body: bytes) -> None:
    response = httpx.post(f"{server.url}{path}", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error_of(response)


def test_numbers_of_any_size(server: ServerProcess) -> None:
    large = {"top_k": 2**31 - 1, "seed": -(10**400), "max_tokens": 10**400, "max_length": 10**400, "stop": "."}
    assert post(server, {"messages": HI, "temperature": 0, **large}).status_code == 200


WRONG = [1] * 500_000
WRONG_LISTS = [
    {"messages": WRONG},
    {"messages": [{"role": "user", "content": WRONG}]},
    {"messages": [{"role": "assistant", "tool_calls": WRONG}]},
    {"messages": HI, "tools": WRONG, "functions": WRONG, "stop": WRONG, "modalities": WRONG},
    {"messages": HI, "logit_bias": {f"x{number}": 1 for number in range(200_000)}},
    {"messages": HI * 500_000},
    {"prompt": [1.5] * 500_000},
    {"prompt": [[1.5] * 500_000]},
    {"prompt": [["x"]] * 200_000},
    {"prompt": ["x"] * 500_000},
]


@pytest.mark.parametrize("fields", WRONG_LISTS)
def test_half_a_million_mistakes_report_few_errors(fields: dict) -> None:
    with pytest.raises(ValidationError) as error:
        (CompletionRequest if "prompt" in fields else ChatCompletionRequest).model_validate(fields)
    assert error.value.error_count() <= 10


def test_half_a_million_mistakes_are_answered(server: ServerProcess) -> None:
    for fields, param in zip(
        WRONG_LISTS[:3], ("messages.0", "messages.0.content", "messages.0.tool_calls.0"), strict=True
    ):
        response = post(server, fields)
        assert response.status_code == 400
        assert error_of(response)["param"].startswith(param)


@pytest.mark.parametrize("model", [ChatCompletionRequest, CompletionRequest, ResponseRequest, MessagesRequest])
def test_every_list_stops_at_its_first_error(model: type) -> None:
    def lists(schema: Any) -> Iterator[dict]:
        if isinstance(schema, dict):
            if schema.get("type") == "list" and schema["items_schema"]["type"] != "any":
                yield schema
            schema = schema.values()
        elif not isinstance(schema, list | tuple):
            return
        for part in list(schema):
            yield from lists(part)

    found = list(lists(model.__pydantic_core_schema__))
    assert len(found) >= 4
    assert all(schema.get("fail_fast") for schema in found)


def test_other_errors(server: ServerProcess) -> None:
    for method, path, status, code in [
        ("GET", "/v2/chat", 404, "unknown_url"),
        ("GET", "/v1/models/gpt-4o", 404, "model_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ]:
        response = httpx.request(method, f"{server.url}{path}")
        assert response.status_code == status
        assert error_of(response)["code"] == code
    assert response.headers["allow"] == "GET"
    form = httpx.post(f"{server.url}/v1/chat/completions", data={"messages": "hi"})
    assert form.status_code == 415
    assert "application/json" in error_of(form)["message"]


def test_limits(server: ServerProcess) -> None:
    big = json.dumps({"messages": [{"role": "user", "content": "a" * 5 * 2**20}]}).encode()
    headers = {"Content-Type": "application/json"}
    for content in (big, iter([big[: 2**20], big[2**20 :]])):  # with and without a declared length
        response = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=60)
        assert response.status_code == 413
        assert "4194304" in error_of(response)["message"]
    response = post(server, {"messages": [*HI, {"role": "assistant", "content": "hi"}] * 600})
    assert response.status_code == 400
    assert "1024" in error_of(response)["message"]


def test_documentation_lists_all_fields_and_existing_tests() -> None:
    chat, text = (ROOT / "docs" / "openai_api.md").read_text(encoding="utf-8").split("## The fields of ")[1:]
    for part, model in ((chat, ChatCompletionRequest), (text, CompletionRequest)):
        named = set(re.findall(r"`(\w+)`", part))
        assert set(model.model_fields) <= named
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "serving").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", chat + text):
        assert f"def {name}(" in source, name
