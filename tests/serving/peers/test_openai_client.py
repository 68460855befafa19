"""OpenAI's client with the server: parsing, types, and the helpers for streams."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, TypeAdapter

from tests.support.server_process import ServerProcess

BOSTON = [{"role": "user", "content": "What is the weather like in Boston?"}]
SUM = [{"role": "user", "content": "What is 47 + 38?"}]


class Mood(BaseModel):
    """A schema that the toy model can complete."""

    mood: Literal["good", "bad"]
    sure: bool


class GetCurrentWeather(BaseModel):
    """Get the current weather in a given location."""

    location: str


TOOL = openai.pydantic_function_tool(GetCurrentWeather, name="get_current_weather")


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_client_parses(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="Qwen", messages=SUM, temperature=0, response_format=Mood)
    assert isinstance(answer.choices[0].message.parsed, Mood)


def test_client_parses_tools(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="Qwen", messages=BOSTON, temperature=0, tools=[TOOL])
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == GetCurrentWeather(location="Boston")


@pytest.mark.parametrize(
    ("path", "type_", "fields"),
    [
        ("chat/completions", ChatCompletion, {"messages": SUM, "logprobs": True, "top_logprobs": 2, "n": 2}),
        ("chat/completions", ChatCompletion, {"messages": BOSTON, "tools": [TOOL]}),
        ("chat/completions", ChatCompletionChunk, {"messages": SUM, "stream": True, "logprobs": True}),
        ("chat/completions", ChatCompletionChunk, {"messages": BOSTON, "tools": [TOOL], "stream": True}),
        ("completions", Completion, {"prompt": "The", "logprobs": 2, "max_tokens": 3}),
    ],
)
def test_answers_fit_the_types(server: ServerProcess, path: str, type_: Any, fields: dict) -> None:
    response = httpx.post(f"{server.url}/v1/{path}", json={"temperature": 0, **fields}, timeout=60)
    assert response.status_code == 200
    if fields.get("stream"):
        *events, end = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        assert end == "[DONE]"
        answers = list(map(json.loads, events))
    else:
        answers = [response.json()]
    for answer in answers:
        TypeAdapter(type_).validate_python(answer, strict=True)


def test_models_fit_the_type(server: ServerProcess) -> None:
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    TypeAdapter(Model).validate_python(model, strict=True)


def test_client_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="Qwen", messages=SUM, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("content.delta") > 1
    assert kinds[-1] == "content.done"
    assert final.choices[0].message.content == "47 + 38 = 85."


def test_client_streams_tools(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="Qwen", messages=BOSTON, temperature=0, tools=[TOOL]) as stream:
        events = list(stream)
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert done.parsed_arguments == GetCurrentWeather(location="Boston")
