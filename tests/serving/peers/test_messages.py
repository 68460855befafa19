"""Anthropic's Messages API: what the tests of vLLM and llama.cpp ask of it, checked with the types of its client."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent

from tests.support.openai_types import check_type
from tests.support.server_process import ServerProcess

SUM = [{"role": "user", "content": "What is 47 + 38?"}]
BOSTON = [{"role": "user", "content": "What is the weather like in Boston?"}]
WEATHER = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location.",
    "input_schema": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}


def post(server: ServerProcess, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
    """Send a greedy request."""
    body = {"model": "claude", "max_tokens": 100, "temperature": 0} | fields
    response = httpx.post(f"{server.url}{path}", json=body, headers={"anthropic-version": "2023-06-01"}, timeout=60)
    assert response.status_code == 200, response.text
    return response


def ask(server: ServerProcess, **fields: Any) -> dict:
    """Return a message that has all fields of the documented type, and no others."""
    message = post(server, **fields).json()
    check_type(Message, message)
    return message


def stream(server: ServerProcess, **fields: Any) -> list[dict]:
    """Return the events of a message, without pings."""
    events = []
    for block in post(server, stream=True, **fields).text.strip().split("\n\n"):
        name, data = (line.partition(": ")[2] for line in block.splitlines())
        event = json.loads(data)
        assert event["type"] == name
        if name != "ping":
            check_type(RawMessageStreamEvent, event)
            events.append(event)
    return events


@pytest.fixture
def client(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_messages_shape(server: ServerProcess) -> None:
    message = ask(server, messages=SUM)
    assert message["id"].startswith("msg_")
    assert message["role"] == "assistant"
    assert message["content"] == [{"type": "text", "text": "47 + 38 = 85."}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    assert message["usage"]["input_tokens"] > 0
    assert message["usage"]["output_tokens"] > 0
    assert ask(server, messages=SUM, max_tokens=3)["stop_reason"] == "max_tokens"


def test_messages_streamed(server: ServerProcess) -> None:
    events = stream(server, messages=SUM)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    whole = ask(server, messages=SUM)
    assert text == whole["content"][0]["text"]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert '"type":"ping"' in post(server, messages=SUM, stream=True).text


def test_messages_tools(server: ServerProcess) -> None:
    message = ask(server, messages=BOSTON, tools=[WEATHER])
    (call,) = message["content"]
    assert call["id"].startswith("toolu_")
    assert (call["type"], call["name"]) == ("tool_use", "get_current_weather")
    assert call["input"] == {"location": "Boston"}
    assert message["stop_reason"] == "tool_use"

    result = {"type": "tool_result", "tool_use_id": call["id"], "content": '{"temperature": 22}'}
    history = [*BOSTON, {"role": "assistant", "content": message["content"]}, {"role": "user", "content": [result]}]
    answer = ask(server, messages=history, tools=[WEATHER])
    assert "22" in answer["content"][0]["text"]
    assert answer["stop_reason"] == "end_turn"


def test_messages_tools_streamed(server: ServerProcess) -> None:
    events = stream(server, messages=BOSTON, tools=[WEATHER])
    (start,) = [event for event in events if event["type"] == "content_block_start"]
    assert start["content_block"]["name"] == "get_current_weather"
    assert start["content_block"]["input"] == {}
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert len(deltas) > 1
    assert json.loads("".join(delta["partial_json"] for delta in deltas)) == {"location": "Boston"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_messages_tool_choice(server: ServerProcess) -> None:
    calculator = {"name": "calculator", "input_schema": {"type": "object", "properties": {"sum": {"type": "string"}}}}
    fields = {"messages": BOSTON, "tools": [WEATHER, calculator]}
    assert ask(server, **fields, tool_choice={"type": "any"})["content"][-1]["type"] == "tool_use"
    named = ask(server, **fields, tool_choice={"type": "tool", "name": "calculator", "disable_parallel_tool_use": True})
    assert named["content"][-1]["name"] == "calculator"
    none = ask(server, **fields, tool_choice={"type": "none"})
    assert none["content"] == ask(server, messages=BOSTON)["content"]


def test_messages_count_tokens(server: ServerProcess) -> None:
    for fields in (
        {"messages": SUM},
        {"messages": SUM, "system": "You are a pirate."},
        {"messages": BOSTON, "tools": [WEATHER], "tool_choice": {"type": "any"}},
    ):
        count = post(server, "/v1/messages/count_tokens", **fields).json()
        check_type(MessageTokensCount, count)
        usage = ask(server, **fields, max_tokens=1)["usage"]
        assert count["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_messages_system(server: ServerProcess) -> None:
    blocks = [{"type": "text", "text": "You are a pirate.", "cache_control": {"type": "ephemeral"}}]
    text = ask(server, messages=SUM, system="You are a pirate.")
    assert ask(server, messages=SUM, system=blocks)["content"] == text["content"]
    total = [sum(ask(server, messages=SUM, **system)["usage"].values()) for system in ({}, {"system": "a " * 50})]
    assert total[1] > total[0] + 20


def test_messages_stop_sequences(server: ServerProcess) -> None:
    message = ask(server, messages=SUM, stop_sequences=["=", "nowhere"])
    assert message["content"] == [{"type": "text", "text": "47 + 38"}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "=")
    events = stream(server, messages=SUM, stop_sequences=["=", "nowhere"])
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "="}


def test_messages_prefill(server: ServerProcess) -> None:
    message = ask(server, messages=[*SUM, {"role": "assistant", "content": "47 + 38 ="}])
    assert message["content"][0]["text"].strip() == "85."


def test_messages_content_blocks(server: ServerProcess) -> None:
    blocks = [{"type": "text", "text": "What is 47 + 38?", "cache_control": {"type": "ephemeral"}}]
    assert (
        ask(server, messages=[{"role": "user", "content": blocks}])["content"] == ask(server, messages=SUM)["content"]
    )


def test_messages_output_format(server: ServerProcess) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Boston", "Paris"]}}, "required": ["city"]}
    output = {"format": {"type": "json_schema", "schema": schema}}
    (block,) = ask(server, messages=BOSTON, output_config=output)["content"]
    assert json.loads(block["text"])["city"] in ("Boston", "Paris")


def test_messages_client(client: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {"model": "claude", "max_tokens": 100, "extra_body": {"temperature": 0}}
    message = client.messages.create(messages=SUM, **fields)
    assert message.content[0].text == "47 + 38 = 85."
    with client.messages.stream(messages=SUM, **fields) as events:
        assert "".join(events.text_stream) == message.content[0].text
    with client.messages.stream(messages=BOSTON, tools=[WEATHER], thinking={"type": "adaptive"}, **fields) as events:
        called = events.get_final_message()
    thought, call = called.content
    assert "get_current_weather" in thought.thinking
    assert call.input == {"location": "Boston"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "22 degrees"}]}
    history = [*BOSTON, called.to_param(), {"role": "user", "content": [result]}]
    answer = client.messages.create(messages=history, tools=[WEATHER], **fields)
    assert "22" in answer.content[0].text
    count = client.messages.count_tokens(model="claude", messages=history, tools=[WEATHER]).input_tokens
    assert count == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_messages_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens: should be") as caught:
        client.messages.create(model="claude", max_tokens=-1, messages=SUM)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id.startswith("req_")
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.batches.retrieve("msgbatch_1")
    assert caught.value.type == "not_found_error"
