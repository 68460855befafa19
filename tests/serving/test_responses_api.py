"""Tests of the Responses API beyond tests/serving/peers: conversations, the store, bad input, Codex, failures."""

import json
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent

from qwen.serving.api.errors import interrupted_by_shutdown, invalid_request, rename_fields
from qwen.serving.api.request_types import ChatCompletionRequest
from qwen.serving.api.responses_api.convert import new_response, to_chat_request
from qwen.serving.api.responses_api.events import ResponseWriter
from qwen.serving.api.responses_api.store import ResponseStore, Turn
from qwen.serving.api.responses_api.types import ResponseRequest
from qwen.serving.engine.sampling_params import SamplingParams
from tests.support import ROOT
from tests.support.openai_types import check_type
from tests.support.server_process import ServerProcess

SUM = "What is 47 + 38?"
BOSTON = "What is the weather like in Boston?"
WEATHER = {
    "type": "function",
    "name": "get_current_weather",
    "description": "Get the current weather in a given location.",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
CALL = {
    "type": "function_call",
    "call_id": "call_1",
    "name": "get_current_weather",
    "arguments": '{"location": "Rome"}',
}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
SUMMARY = [{"type": "summary_text", "text": "x"}]
LONG = {"input": "hi", "logit_bias": {"64": 100}, "max_output_tokens": 6000}  # one token again and again


def post(server: ServerProcess, fields: dict, path: str = "/v1/responses") -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"temperature": 0, **fields}, timeout=60)


def ask(server: ServerProcess, **fields: Any) -> Response:
    answer = post(server, fields)
    assert answer.status_code == 200, answer.text
    return check_type(Response, answer.json())


def events_of(text: str) -> list[dict]:
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    for event in events:
        check_type(ResponseStreamEvent, event)
    return events


def convert(**fields: Any) -> list[dict]:
    """Return the messages of the chat completion that a request is converted to."""
    request, _ = to_chat_request(ResponseRequest.model_validate(fields), [])
    return [message.model_dump(exclude_unset=True) for message in request.messages]


# Conversion


def test_items_become_messages() -> None:
    messages = convert(
        instructions="Be brief.",
        input=[
            {
                "role": "developer",
                "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
            },
            {"type": "message", "role": "user", "content": "hi", "id": "msg_1", "status": "completed"},
            {
                "type": "message",
                "id": "msg_2",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "Hello!", "annotations": [], "logprobs": []},
                    {"type": "refusal", "refusal": "No."},
                ],
            },
            {"role": "assistant", "content": None},
        ],
    )
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "a\nb"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello!\nNo."},
        {"role": "assistant", "content": ""},
    ]


def test_calls_in_a_row_are_one_message() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {"role": "assistant", "content": "I will look."}
    output = {**OUTPUT, "output": [{"type": "input_text", "text": "sun"}, {"type": "input_text", "text": "ny"}]}
    items = [{"role": "user", "content": "hi"}, said, thought, CALL, {**CALL, "call_id": "call_2"}]
    items += [output, {**OUTPUT, "call_id": "call_2"}, CALL, OUTPUT]
    _, message, first, second, third, last = convert(input=items)
    assert message["content"] == "I will look."
    assert message["reasoning_content"] == "Hm."
    assert [call["id"] for call in message["tool_calls"]] == ["call_1", "call_2"]
    assert first == {"role": "tool", "content": "sun\nny", "tool_call_id": "call_1"}
    assert second["tool_call_id"] == "call_2"
    assert [call["id"] for call in third["tool_calls"]] == ["call_1"]
    assert last == {"role": "tool", "content": "sunny", "tool_call_id": "call_1"}


def test_items_without_effect_are_left_out() -> None:
    items = [
        {"role": "user", "content": "hi"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "x"}],
            "encrypted_content": "y",
        },
        {"type": "custom_tool_call", "call_id": "call_1", "name": "apply_patch", "input": "*** Begin Patch"},
        {"type": "custom_tool_call_output", "call_id": "call_1", "output": "Done"},
        {"type": "local_shell_call", "call_id": "call_2", "status": "completed", "action": {"type": "exec"}},
        {"type": "function_call_output", "call_id": "call_2", "output": "sent so by older versions of Codex"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}},
        {"type": "item_reference", "id": "msg_unknown"},
        {"id": "msg_unknown"},
    ]
    assert convert(input=items) == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("status", "is_continued"), [(None, False), ("completed", False), ("incomplete", True), ("in_progress", True)]
)
def test_only_unfinished_messages_are_continued(status: str | None, is_continued: bool) -> None:
    """Agents hand over conversations that end in a reply: the next one answers with a message of its own."""
    items = [{"role": "user", "content": SUM}, {"role": "assistant", "content": "47 + 38 =", "status": status}]
    for end, expected in (([], is_continued), ([{"role": "user", "content": "hi"}], False), ([CALL, OUTPUT], False)):
        request, _ = to_chat_request(ResponseRequest(input=[*items, *end]), [])
        assert request.continue_final_message is expected


def test_cut_off_response_is_continued(server: ServerProcess) -> None:
    begun = ask(server, input=SUM, max_output_tokens=5)
    rest = ask(server, input=[{"role": "user", "content": SUM}, *begun.model_dump(exclude_none=True)["output"]])
    assert f"{begun.output_text} {rest.output_text.strip()}".replace(" ", "") == "47+38=85."
    again = ask(server, input=[{"role": "user", "content": SUM}, {"role": "assistant", "content": "47 + 38 = 85."}])
    assert again.output_text


def test_other_tools_are_dropped_from_a_choice() -> None:
    tools = [{"type": "web_search"}, WEATHER, {"type": "custom", "name": "apply_patch"}]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}, {**WEATHER}]}
    request, names = to_chat_request(ResponseRequest(input="hi", tools=tools, tool_choice=allowed), [])
    assert request.tools is not None
    assert [tool.function.name for tool in request.tools] == ["get_current_weather"]
    assert request.tool_choice.model_dump()["allowed_tools"] == {  # type: ignore[union-attr]
        "mode": "required",
        "tools": [{"type": "function", "function": {"name": "get_current_weather"}}],
    }
    assert names["tools.0"] == "tools.1"
    assert names["tool_choice.allowed_tools.tools.0"] == "tool_choice.tools.1"
    only_search = {**allowed, "mode": "auto", "tools": [{"type": "web_search"}]}
    request, _ = to_chat_request(ResponseRequest(input="hi", tools=tools, tool_choice=only_search), [])
    assert request.tool_choice == "none"


def test_sampling_fields_are_those_of_a_chat() -> None:
    fields = {"top_k": 5, "repetition_penalty": 1.1, "seed": 7, "stop": ["x"], "cache_salt": "s", "top_p": 0.5}
    request, _ = to_chat_request(ResponseRequest(input="hi", max_output_tokens=9, top_logprobs=2, **fields), [])
    assert request.model_dump(include=set(fields)) == fields
    assert (request.max_completion_tokens, request.logprobs, request.top_logprobs) == (9, True, 2)


def test_fields_are_renamed_in_errors() -> None:
    names = {"messages": "input", "messages.1": "input.0", "messages.1.content": "input.0.output"}
    error = rename_fields(invalid_request("messages[1].content is odd, messages.1.role too. No messages.", "x"), names)
    message = "input.0.output is odd, input.0.role too. No messages."
    assert error.body["error"] == {"message": message, "type": "invalid_request_error", "param": "x", "code": None}
    error = rename_fields(invalid_request("messages: too many.", "messages"), names)
    assert (error.body["error"]["message"], error.body["error"]["param"]) == ("input: too many.", "input")


# Conversations


def test_conversation_by_ids(server: ServerProcess) -> None:
    first = ask(server, input="My name is Alice.", instructions="Answer in French.")
    second = ask(server, input=SUM, previous_response_id=first.id)
    third = ask(server, input="What is my name?", previous_response_id=second.id)
    assert second.output_text == "47 + 38 = 85."
    assert third.output_text == "Your name is Alice."
    by_hand = [{"role": "user", "content": "My name is Alice."}, *[item.model_dump() for item in first.output]]
    by_hand += [{"role": "user", "content": SUM}, *[item.model_dump() for item in second.output]]
    whole = ask(server, input=[*by_hand, {"role": "user", "content": "What is my name?"}])
    assert whole.usage is not None
    assert third.usage is not None
    assert whole.usage.input_tokens == third.usage.input_tokens  # without the instructions of the first
    items = httpx.get(f"{server.url}/v1/responses/{third.id}/input_items", params={"order": "asc"}).json()
    listed = check_type(ResponseItemList, items).data
    texts = ["My name is Alice.", first.output_text, SUM, second.output_text, "What is my name?"]
    assert [item.content[0].text for item in listed] == texts
    # Another branch, from a response whose earlier one is deleted.
    assert httpx.delete(f"{server.url}/v1/responses/{first.id}").status_code == 200
    assert ask(server, input="What is my name?", previous_response_id=second.id).output_text == third.output_text


def test_call_is_continued_by_id(server: ServerProcess) -> None:
    first = ask(server, input=BOSTON, tools=[WEATHER])
    thought, call = first.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert "get_current_weather" in thought.content[0].text
    assert thought.id.startswith("rs_")
    assert call.type == "function_call"
    assert first.usage is not None
    assert 0 < first.usage.output_tokens_details.reasoning_tokens < first.usage.output_tokens
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 22 degrees"}
    second = ask(server, input=[output], tools=[WEATHER], previous_response_id=first.id)
    assert "sunny" in second.output_text
    # The prompt is the text that the model wrote, so that it is in the cache.
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens // 16 * 16
    missing = post(server, {"input": "hi", "tools": [WEATHER], "previous_response_id": first.id})
    assert missing.status_code == 400
    assert missing.json()["error"]["param"] == "previous_response_id"


def test_thought_streams(server: ServerProcess) -> None:
    events = events_of(post(server, {"input": BOSTON, "tools": [WEATHER], "stream": True}).text)
    thought = "".join(event["delta"] for event in events if event["type"] == "response.reasoning_text.delta")
    item = events[-1]["response"]["output"][0]
    assert item["content"] == [{"type": "reasoning_text", "text": thought}]
    kinds = [event["type"] for event in events if event.get("output_index") == 0 and "delta" not in event]
    assert kinds == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]


def test_references_stand_for_stored_items(server: ServerProcess) -> None:
    """As the AI SDK for TypeScript sends earlier answers."""
    first = ask(server, input="My name is Alice.")
    question = {"role": "user", "content": "What is my name?"}
    items = [{"role": "user", "content": "My name is Alice."}, {"type": "item_reference", "id": first.output[0].id}]
    by_hand = [items[0], *[item.model_dump() for item in first.output], question]
    usage, expected = (ask(server, input=each).usage for each in ([*items, question], by_hand))
    assert usage is not None
    assert expected is not None
    assert usage.input_tokens == expected.input_tokens


def test_references_to_too_much_are_400(server: ServerProcess) -> None:
    """A request of a few kilobytes must not make the server read gigabytes."""
    long = ask(server, **LONG | {"max_output_tokens": 300}, top_logprobs=20)
    refusal = post(server, {"input": [{"type": "item_reference", "id": long.output[0].id}] * 1000})
    assert refusal.status_code == 400
    assert "Send the last items themselves" in refusal.json()["error"]["message"]
    assert refusal.json()["error"]["param"].startswith("input.")


def test_pages_of_input_items(server: ServerProcess) -> None:
    texts = [f"Text {number}" for number in range(5)]
    response = ask(server, input=[{"role": "user", "content": text} for text in texts], max_output_tokens=1)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        for order, expected in (("asc", texts), ("desc", texts[::-1])):
            page = client.responses.input_items.list(response.id, limit=2, order=order)
            assert [item.content[0].text for item in page.data] == expected[:2]
            assert [item.content[0].text for item in page] == expected  # follows the pages
    url = f"{server.url}/v1/responses/{response.id}/input_items"
    for params, param in [({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"order": "x"}, "order")]:
        refusal = httpx.get(url, params=params)
        assert refusal.status_code == 400
        assert refusal.json()["error"]["param"] == param
    assert httpx.get(url, params={"after": "msg_unknown"}).json()["error"]["param"] == "after"


def test_fields_are_returned(server: ServerProcess) -> None:
    fields = {
        "metadata": {"key": "value"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "tools": [WEATHER, {"type": "web_search"}],
        "tool_choice": {"type": "function", "name": "get_current_weather"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "truncation": "auto",
        "max_tool_calls": 3,
        "max_output_tokens": 50,
        "user": "anna",
        "top_p": 0.5,
    }
    response = ask(server, input=BOSTON, **fields)
    returned = response.model_dump(include=set(fields), exclude_unset=True)
    assert returned == fields | {"tools": [WEATHER | {"strict": False}]}
    assert response.temperature == 0
    plain = ask(server, input="hi", max_output_tokens=1)
    assert (plain.metadata, plain.tools, plain.tool_choice) == ({}, [], "auto")
    assert plain.parallel_tool_calls is True


# The store


def test_unstored_responses(server: ServerProcess) -> None:
    response = ask(server, input="hi", store=False, max_output_tokens=1)
    url = f"{server.url}/v1/responses/{response.id}"
    for answer in (httpx.get(url), httpx.delete(url), httpx.get(f"{url}/input_items")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "response_not_found"
    assert post(server, {"input": "hi", "previous_response_id": response.id}).status_code == 404


def test_streamed_response_is_stored(server: ServerProcess) -> None:
    last = events_of(post(server, {"input": SUM, "stream": True}).text)[-1]["response"]
    url = f"{server.url}/v1/responses/{last['id']}"
    assert httpx.get(url).json() == last
    assert httpx.get(url, params={"stream": "true"}).status_code == 400
    cancelled = httpx.post(f"{url}/cancel")
    assert cancelled.status_code == 400
    assert "background" in cancelled.json()["error"]["message"]
    assert httpx.post(f"{server.url}/v1/responses/resp_unknown/cancel").status_code == 404


def test_server_without_store(start_server: Callable[..., ServerProcess], bundled_chat) -> None:
    server = start_server("-c", str(bundled_chat), "--response-store", "0")
    response = ask(server, input=SUM, store=True)
    assert response.output_text == "47 + 38 = 85."
    for answer in (
        httpx.get(f"{server.url}/v1/responses/{response.id}"),
        httpx.delete(f"{server.url}/v1/responses/{response.id}"),
        post(server, {"input": "hi", "previous_response_id": response.id}),
    ):
        assert answer.status_code == 404
        assert "--response-store 0" in answer.json()["error"]["message"]


def turn(size: int, previous: Turn | None = None, *ids: str) -> Turn:
    return Turn(b"x" * size, b"", list(ids), previous)


def test_store_is_bounded_by_count() -> None:
    store = ResponseStore(2)
    for id in "abc":
        store.add(id, b"", turn(1))
        store.get("a")
    assert [store.get(id) is not None for id in "abc"] == [True, False, True]
    assert len(store) == 2
    assert store.bytes == 2


def test_store_is_bounded_by_size() -> None:
    store = ResponseStore(100, max_bytes=100)
    first = turn(40)
    store.add("a", b"r" * 10, first)
    store.add("b", b"r" * 10, second := turn(30, first))
    assert store.bytes == 90  # the first turn is counted once
    store.add("large", b"", turn(101))
    store.add("conversation", b"r" * 20, turn(20, second))  # with the turns before it
    assert store.get("large") is None
    assert store.get("conversation") is None
    store.add("c", b"r" * 10, turn(10))
    assert [store.get(id) is not None for id in "abc"] == [False, True, True]
    assert store.bytes == 100  # "b" still needs the turn of "a"


def test_turns_of_deleted_responses_are_kept_while_needed() -> None:
    store = ResponseStore(100)
    first = turn(1, None, "msg_1")
    second = turn(10, first, "msg_2")
    store.add("a", b"", first)
    store.add("b", b"", second)
    assert store.delete("a")
    assert not store.delete("a")
    assert store.get("a") is None
    assert store.bytes == 11
    found = store.get("b")
    assert found is not None
    assert found.turn.conversation() == [first, second]
    assert store.find_turn("msg_1") is first
    store.delete("b")
    assert (store.bytes, store.find_turn("msg_1"), store.find_turn("msg_2")) == (0, None, None)
    store.add("c", b"", turn(100, second))  # was continued meanwhile
    assert store.bytes == 111
    assert store.find_turn("msg_1") is first
    store.delete("c")
    assert store.bytes == 0


def test_store_of_many_threads() -> None:
    store = ResponseStore(10)

    def work(name: str) -> None:
        last = None
        for number in range(200):
            last = turn(1, last, f"msg_{name}_{number}")
            store.add(f"{name}{number}", b"12", last)
            store.get(f"{name}{number - 3}")
            store.delete(f"{name}{number - 5}")

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store) <= 10
    for name in "abcd":
        for number in range(200):
            store.delete(f"{name}{number}")
    assert (len(store), store.bytes) == (0, 0)


# Bad input


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": None}, "input", ""),
        ({"input": 5}, "input", "string"),
        ({"input": [5]}, "input.0", "object"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"role": "robot", "content": "hi"}]}, "input.0.role", "'assistant'"),
        ({"input": [{"role": "user", "content": 5}]}, "input.0.content", "string"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text", "required"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
            "input.0.content.0",
            "'input_image' is not supported",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0", "'input_file'"),
        ({"input": [{"type": "function_call_outputs", "output": "x"}]}, "input.0.type", "function_call_outputs"),
        ({"input": [{"type": "function_call", "call_id": "1"}]}, "input.0.name", "required"),
        ({"input": [CALL]}, "input.0", "has no result"),
        ({"input": [{"role": "user", "content": "hi"}, CALL, CALL]}, "input.1", "all different"),
        ({"input": [OUTPUT]}, "input.0", "no assistant message"),
        ({"input": [CALL, {**OUTPUT, "call_id": "x"}]}, "input.1.call_id", "'x'"),
        ({"input": [{**OUTPUT, "output": 5}]}, "input.0.output", "string"),
        ({"input": [{**OUTPUT, "output": [{"type": "input_image"}]}]}, "input.0.output.0", "'input_image'"),
        ({"input": [CALL, *[{**CALL, "call_id": str(n)} for n in range(128)]]}, "input.0", "128"),
        ({"input": [{"role": "user", "content": "hi"}] * 1025}, "input", "Too many messages"),
        ({"input": "a b " * 9000}, "input", "8192"),
        ({"instructions": 5}, "instructions", "string"),
        ({"previous_response_id": "resp_0"}, "previous_response_id", "not found"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1"),
        ({"max_tool_calls": "1"}, "max_tool_calls", "integer"),
        ({"temperature": 2.1}, "temperature", "2"),
        ({"top_k": 1.5}, "top_k", "integer"),
        ({"n": 2}, "n", "1"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"top_logprobs": 20, "max_length": 5}, "max_length", "prompt"),
        ({"include": ["everything"]}, "include.0", "'message.output_text.logprobs'"),
        ({"store": "yes"}, "store", "boolean"),
        ({"stream": 1}, "stream", "boolean"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "stream"),
        ({"background": True}, "background", "omit it"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "instructions"),
        ({"return_token_ids": True}, "return_token_ids", "not supported"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "not supported"),
        ({"response_format": {"type": "text"}, "text": {"format": {"type": "text"}}}, "text.format", "both given"),
        ({"truncation": "maybe"}, "truncation", "'auto'"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "16"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "512"),
        ({"user": "x" * 1025}, "user", "1024"),
        ({"reasoning": "low"}, "reasoning", "object"),
        ({"tools": [WEATHER] * 129}, "tools", "128"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "unique"),
        ({"tools": [5]}, "tools.0", "object"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "required"),
        ({"tools": [{"type": "custom"}, {**WEATHER, "name": "a\nb"}]}, "tools.1.name", "match"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice", "'required'"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice", "'web_search'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "listen"}}, "tool_choice", "listen"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "web_search"}, {"type": "function", "name": "listen"}],
                },
            },
            "tool_choice.tools.1",
            "listen",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}]}},
            "tool_choice.tools",
            "function",
        ),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "'json_schema'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "required"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "number!"}}}},
            "text.format.schema",
            "number!",
        ),
        ({"text": {"verbosity": "loud"}}, "text.verbosity", "'high'"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ],
)
def test_wrong_fields_are_named(server: ServerProcess, fields: dict, param: str, message: str) -> None:
    for path in ("/v1/responses", "/v1/responses/input_tokens"):
        if path.endswith("tokens") and fields.keys() & {"stream_options"}:
            continue
        answer = post(server, {"input": "hi", "max_output_tokens": 1, **fields}, path)
        if path.endswith("tokens") and param == "input" and message == "8192":
            continue  # can be counted
        assert answer.status_code == (404 if message == "not found" else 400), answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert message in error["message"]
        assert not error["message"].startswith("messages")


def test_fields_of_chats_are_not_taken_for_others(server: ServerProcess) -> None:
    answer = post(server, {"input": "hi", "background": False, "conversation": None, "prompt": None, "n": 1})
    assert answer.status_code == 200
    assert post(server, {"messages": []}).json()["error"]["param"] == "input"


def test_dropped_tools_and_items_are_logged_once(server: ServerProcess) -> None:
    tools = [{"type": "image_generation"}, {"type": "evil\n" + "x" * 100}]
    items = [{"role": "user", "content": "hi"}, {"type": "image_generation_call", "id": "ig_1"}]
    for _ in range(2):
        ask(server, input=items, tools=tools, max_output_tokens=1)
    lines = [line for line in server.output().splitlines() if "are not supported and left out" in line]
    assert len([line for line in lines if "tools of type 'image_generation'" in line]) == 1
    assert len([line for line in lines if "items of type 'image_generation_call'" in line]) == 1
    assert len([line for line in lines if "tools of type 'evil\\n" in line]) == 1


def test_base_model(start_server: Callable[..., ServerProcess], bundled_base) -> None:
    server = start_server("-c", str(bundled_base))
    for path in ("/v1/responses", "/v1/responses/input_tokens"):
        answer = post(server, {"input": "hi"}, path)
        assert answer.status_code == 400
        assert "base model" in answer.json()["error"]["message"]


# Codex


def test_codex(server: ServerProcess) -> None:
    """Requests of the kind that Codex sends, with much shorter instructions."""
    shell = {
        "type": "function",
        "name": "shell",
        "description": "Runs a shell command and returns its output.",
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": {
                "command": {"type": "array", "items": {"type": "string"}},
                "workdir": {"type": "string"},
                "timeout_ms": {"type": "number"},
            },
            "required": ["command"],
            "additionalProperties": False,
        },
    }
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: begin_patch hunk+ end_patch"}
    body = {
        "model": "gpt-5-codex",
        "instructions": "You are a coding agent running in the Codex CLI. " * 80,
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "<permissions instructions>read only</permissions>"}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "<environment_context>\n  <cwd>/tmp</cwd>\n</environment_context>"}
                ],
            },
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List the files."}]},
        ],
        "tools": [
            shell,
            {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": grammar},
            {"type": "local_shell"},
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199a213-81c0-7800-8aa1-bbab2a035a53",
        "text": {"verbosity": "low"},
        "client_metadata": {"x-codex-installation-id": "1"},
    }
    headers = {"originator": "codex_cli_rs", "session_id": "1", "accept": "text/event-stream"}
    answer = httpx.post(f"{server.url}/v1/responses", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    events = events_of(answer.text)
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"]
    # The next turn: what it sends back of a turn with calls of both kinds.
    body["input"] += [
        {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "x"}],
            "content": None,
            "encrypted_content": "y",
        },
        {"type": "function_call", "name": "shell", "arguments": '{"command": ["ls"]}', "call_id": "call_1"},
        {"type": "custom_tool_call", "status": "completed", "call_id": "call_2", "name": "apply_patch", "input": "*"},
        {"type": "function_call_output", "call_id": "call_1", "output": '{"output": "a.txt", "metadata": {}}'},
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": "Done"},
    ]
    answer = httpx.post(f"{server.url}/v1/responses", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    assert events_of(answer.text)[-1]["type"] in ("response.completed", "response.incomplete")


# Failures and disconnecting clients


def test_failed_response() -> None:
    response = new_response(ResponseRequest(input="hi"), "toy", SamplingParams(max_tokens=1))
    writer = ResponseWriter(response)
    chunk = {"index": 0, "delta": {"content": "Hel"}, "logprobs": None, "finish_reason": None}
    events = [*writer.begin(), *writer.write(chunk), *writer.fail(interrupted_by_shutdown())]  # type: ignore[arg-type]
    *_, error, failed = [check_type(ResponseStreamEvent, event) for event in events]
    assert (error.type, error.code) == ("error", "shutting_down")
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert failed.response.error is not None
    assert failed.response.error.code == "server_error"
    assert "shutting down" in failed.response.error.message
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_empty_reply_is_an_empty_message() -> None:
    writer = ResponseWriter(new_response(ResponseRequest(input="hi"), "toy", SamplingParams(max_tokens=1)))
    list(writer.write({"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}))  # type: ignore[typeddict-item]
    (message,) = writer.response["output"]
    assert message["status"] == "completed"
    assert message["content"][0]["text"] == ""  # type: ignore[typeddict-item]


@pytest.mark.parametrize("stream", [True, False])
def test_draining_server(start_server: Callable[..., ServerProcess], bundled_chat, stream: bool) -> None:
    server = start_server("-c", str(bundled_chat), "--drain-seconds", "0.2")

    def stop_while_running() -> None:
        server.until_load(1)
        server.signal(signal.SIGTERM)

    stopping = threading.Thread(target=stop_while_running)
    stopping.start()
    answer = httpx.post(f"{server.url}/v1/responses", json=LONG | {"stream": stream}, timeout=120)
    stopping.join()
    if stream:
        error, failed = events_of(answer.text)[-2:]
        assert (error["type"], error["code"]) == ("error", "shutting_down")
        assert failed["type"] == "response.failed"
    else:
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"
    assert server.wait() == 0
    assert "Traceback" not in server.output()


@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_client_frees_its_place(server: ServerProcess, stream: bool) -> None:
    server.until_load(0)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(LONG | {"stream": stream}).encode()
    head = b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        server.until_load(1)
    server.until_load(0)


def test_documentation_lists_all_fields_and_existing_tests() -> None:
    page = (ROOT / "docs" / "openai_api.md").read_text(encoding="utf-8")
    section = page.split("## The Responses API\n")[1].split("\n## ")[0]
    own = ResponseRequest.model_fields.keys() - ChatCompletionRequest.model_fields.keys()
    assert {
        field for field in own | {"tools", "tool_choice", "top_logprobs", "n"} if f"`{field}`" not in section
    } == set()
    source = "".join(
        (ROOT / path).read_text(encoding="utf-8")
        for path in ("tests/serving/test_responses_api.py", "tests/serving/peers/test_responses.py")
    )
    for name in section.split("`"):
        assert not name.startswith("test_") or f"def {name}(" in source, name
