"""OpenAI's Responses API: what the tests of vLLM, SGLang and llama.cpp ask of it, checked with the published types."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.responses import InputTokenCountResponse, Response, ResponseItemList, ResponseStreamEvent
from pydantic import BaseModel

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
MOOD = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "sure": {"type": "boolean"}},
    "required": ["mood", "sure"],
    "additionalProperties": False,
}
LIFECYCLE = ["response.created", "response.in_progress"]
CALL_EVENTS = ["response.output_item.added", "response.function_call_arguments.delta"]
CALL_EVENTS += ["response.function_call_arguments.done", "response.output_item.done"]
MESSAGE_EVENTS = ["response.output_item.added", "response.content_part.added", "response.output_text.delta"]
MESSAGE_EVENTS += ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def ask(server: ServerProcess, input: Any, **fields: Any) -> Response:
    """Return the greedy response to an input."""
    body = {"input": input, "temperature": 0, **fields}
    answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return check_type(Response, answer.json())


def stream(server: ServerProcess, input: Any, **fields: Any) -> list[dict]:
    """Return the events of a greedy response."""
    body = {"input": input, "temperature": 0, "stream": True, **fields}
    answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for number, block in enumerate(filter(None, answer.text.split("\n\n"))):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        check_type(ResponseStreamEvent, event)
        events.append(event)
    return events


def kinds(events: list[dict]) -> list[str]:
    """Return the types of events; several deltas in a row count as one."""
    types = [event["type"] for event in events]
    return [kind for kind, before in zip(types, [None, *types], strict=False) if kind != before]


def test_response_shape(server: ServerProcess) -> None:
    response = ask(server, SUM)
    assert response.id.startswith("resp_")
    assert len(response.id) == len("resp_") + 32
    assert (response.object, response.status, response.model) == ("response", "completed", "qwen-tiny-chat")
    (message,) = response.output
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    (part,) = message.content
    assert (part.type, part.text, part.annotations) == ("output_text", "47 + 38 = 85.", [])
    assert response.output_text == part.text
    assert response.usage is not None
    assert response.usage.input_tokens + response.usage.output_tokens == response.usage.total_tokens
    assert response.usage.output_tokens > 5
    assert response.error is None
    assert response.incomplete_details is None


def test_response_is_the_chat(server: ServerProcess) -> None:
    messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": SUM}]
    body = {"messages": messages, "temperature": 0}
    chat = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    parts = [{"type": "input_text", "text": SUM}]
    items = [{"role": "user", "content": parts}]
    response = ask(server, items, instructions="You are a helpful assistant.")
    assert response.output_text == chat["choices"][0]["message"]["content"]
    assert response.usage is not None
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert response.instructions == "You are a helpful assistant."


def test_response_history(server: ServerProcess) -> None:
    first = ask(server, "My name is Alice.")
    items = [
        {"type": "message", "role": "user", "content": "My name is Alice."},
        *[item.model_dump(exclude_unset=True) for item in first.output],
        {"role": "user", "content": [{"type": "input_text", "text": "What is my name?"}]},
    ]
    assert ask(server, items).output_text == "Your name is Alice."


def test_response_streamed(server: ServerProcess) -> None:
    events = stream(server, SUM)
    assert kinds(events) == [*LIFECYCLE, *MESSAGE_EVENTS, "response.completed"]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    response = check_type(Response, events[-1]["response"])
    assert text == response.output_text == ask(server, SUM).output_text
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    (done,) = [event for event in events if event["type"] == "response.output_item.done"]
    assert done["item"] == events[-1]["response"]["output"][0]


def test_response_cut_off(server: ServerProcess) -> None:
    response = ask(server, SUM, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 3
    assert response.output[0].status == "incomplete"
    last = stream(server, SUM, max_output_tokens=3)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_response_format(server: ServerProcess) -> None:
    text_format = {"type": "json_schema", "name": "mood", "schema": MOOD, "strict": True}
    response = ask(server, "I am happy!", text={"format": text_format})
    answer = json.loads(response.output_text)
    assert answer["mood"] in ("good", "bad")
    assert isinstance(answer["sure"], bool)
    del text_format["schema"]
    body = {"input": "I am happy!", "text": {"format": text_format}}
    refusal = httpx.post(f"{server.url}/v1/responses", json=body)
    assert refusal.status_code == 400
    assert refusal.json()["error"]["param"] == "text.format.schema"


def test_response_calls_a_tool(server: ServerProcess) -> None:
    first = ask(server, BOSTON, tools=[WEATHER], tool_choice="required")
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert call.id is not None
    assert call.id.startswith("fc_")
    assert call.call_id.startswith("call_")
    assert (call.name, call.status) == ("get_current_weather", "completed")
    assert json.loads(call.arguments) == {"location": "Boston"}
    items = [
        {"role": "user", "content": BOSTON},
        *[item.model_dump(exclude_unset=True) for item in first.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 22 degrees"},
    ]
    second = ask(server, items, tools=[WEATHER])
    assert [item.type for item in second.output if item.type != "reasoning"] == ["message"]
    assert "sunny" in second.output_text


def test_response_streams_a_call(server: ServerProcess) -> None:
    events = stream(server, BOSTON, tools=[WEATHER], tool_choice="required")
    assert kinds(events) == [*LIFECYCLE, *CALL_EVENTS, "response.completed"]
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta")
    (done,) = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    (item,) = events[-1]["response"]["output"]
    assert deltas == done["arguments"] == item["arguments"]
    assert done["name"] == item["name"]
    assert json.loads(deltas) == {"location": "Boston"}
    (added,) = [event for event in events if event["type"] == "response.output_item.added"]
    assert added["item"] == item | {"status": "in_progress", "arguments": ""}


def test_response_goes_on(server: ServerProcess) -> None:
    first = ask(server, "My name is Alice.")
    second = ask(server, "What is my name?", previous_response_id=first.id)
    assert second.output_text == "Your name is Alice."
    assert second.previous_response_id == first.id
    body = {"input": SUM, "previous_response_id": "resp_unknown"}
    unknown = httpx.post(f"{server.url}/v1/responses", json=body)
    assert unknown.status_code == 404
    assert unknown.json()["error"]["param"] == "previous_response_id"


def test_response_is_kept(server: ServerProcess) -> None:
    response = ask(server, SUM)
    url = f"{server.url}/v1/responses/{response.id}"
    assert check_type(Response, httpx.get(url).json()) == response
    items = check_type(ResponseItemList, httpx.get(f"{url}/input_items").json())
    assert [part.text for part in items.data[0].content] == [SUM]
    deleted = httpx.delete(url)
    assert deleted.status_code == 200
    assert deleted.json() == {"id": response.id, "object": "response", "deleted": True}
    assert httpx.get(url).status_code == httpx.delete(url).status_code == 404


def test_response_logprobs(server: ServerProcess) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = ask(server, SUM, **fields)
    part = response.output[0].content[0]
    assert "".join(entry.token for entry in part.logprobs).startswith("47 + 38 = 85.")
    assert {len(entry.top_logprobs) for entry in part.logprobs} == {2}
    assert ask(server, SUM).output[0].content[0].logprobs == []
    events = stream(server, SUM, **fields)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    tokens = [entry["token"] for event in deltas for entry in event["logprobs"]]
    assert tokens == [entry.token for entry in part.logprobs][: len(tokens)]
    assert "".join(tokens) == "47 + 38 = 85."


def test_response_input_tokens(server: ServerProcess) -> None:
    response = ask(server, SUM, tools=[WEATHER])
    body = {"input": SUM, "tools": [WEATHER]}
    answer = httpx.post(f"{server.url}/v1/responses/input_tokens", json=body)
    assert response.usage is not None
    assert check_type(InputTokenCountResponse, answer.json()).input_tokens == response.usage.input_tokens


class Mood(BaseModel):
    mood: Literal["good", "bad"]
    sure: bool


def test_client_responses(client: openai.OpenAI) -> None:
    response = client.responses.create(model="Qwen", input=SUM, temperature=0)
    assert response.output_text == "47 + 38 = 85."
    assert client.responses.retrieve(response.id).output_text == response.output_text
    assert [item.type for item in client.responses.input_items.list(response.id)] == ["message"]
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    parsed = client.responses.parse(model="Qwen", input="I am happy!", temperature=0, text_format=Mood)
    assert isinstance(parsed.output_parsed, Mood)
    with client.responses.stream(model="Qwen", input=SUM, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == response.output_text
    assert client.responses.input_tokens.count(model="Qwen", input=SUM).input_tokens > 10
