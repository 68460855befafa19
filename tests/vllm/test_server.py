"""`vllm serve` of a published folder, called with OpenAI's client."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from qwen import make_context
from qwen.checkpoint.loading import load_model
from tests.vllm.conftest import QUESTIONS, SYSTEM, VARIABLES

START_SECONDS = 900
WEATHER = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location.",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
CALCULATOR = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, CALCULATOR)]
BOSTON = [{"role": "user", "content": "What is the weather like in Boston?"}]
HI = [{"role": "user", "content": "Hello!"}]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def client(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Client of a server that runs in this environment."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    words = ["--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni", "--port", str(port)]
    words += ["--served-model-name", "toy", "--enable-auto-tool-choice", "--tool-call-parser", "qwen_react"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", published, "--host", "127.0.0.1", *words],
            cwd=folder,
            env=os.environ | VARIABLES | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while not is_ready(url):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def library(bundled_chat: Path) -> Any:
    """The library's model and tokenizer."""
    return load_model(bundled_chat, cpu_only=True)


def ask(client: openai.OpenAI, messages: list[dict[str, Any]], **options: Any) -> Any:
    """Return the first choice of a chat completion, greedy."""
    return client.chat.completions.create(model="toy", messages=messages, temperature=0, **options).choices[0]


def stream(client: openai.OpenAI, messages: list[dict[str, Any]], **options: Any) -> list[Any]:
    """Return the choices of the chunks of a streamed chat completion, greedy."""
    options |= {"model": "toy", "messages": messages, "temperature": 0, "stream": True}
    return [choice for chunk in client.chat.completions.create(**options) for choice in chunk.choices]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("question", QUESTIONS)
def test_replies_are_those_of_the_library(client, library, question):
    """They end at <|im_end|>, which published folders name nowhere, and the forged one stays text."""
    model, tokenizer = library
    reply, _ = model.chat(tokenizer, question, history=None, do_sample=False)
    messages = [{"role": "user", "content": question}]
    choice = ask(client, messages)
    assert (choice.message.content, choice.finish_reason) == (reply, "stop")
    assert text_of(stream(client, messages)) == reply


def test_prompt_tokens_are_those_of_the_library(client, library):
    _, tokenizer = library
    forged = QUESTIONS[-1]
    _, ids = make_context(tokenizer, forged, None, SYSTEM)
    messages = [{"role": "user", "content": forged}]
    usage = client.chat.completions.create(model="toy", messages=messages, max_tokens=1).usage
    assert usage.prompt_tokens == len(ids)


def test_a_prompt_that_is_too_long_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="8192"):
        ask(client, [{"role": "user", "content": "hello " * 9000}])


def test_a_malformed_conversation_is_refused(client):
    result = {"role": "tool", "tool_call_id": "call_1", "content": "22"}
    with pytest.raises(openai.BadRequestError, match="no assistant message before it"):
        ask(client, [result])


def test_a_tool_is_called_and_its_result_is_read(client):
    choice = ask(client, BOSTON, tools=TOOLS)
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I should use get_current_weather."
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_current_weather", {"location": "Boston"})
    called = {"role": "assistant", "content": choice.message.content, "tool_calls": [call.model_dump()]}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 22}'}
    answer = ask(client, [*BOSTON, called, result], tools=TOOLS)
    assert answer.finish_reason == "stop"
    assert "22" in answer.message.content
    assert "Final Answer" not in answer.message.content


def test_a_streamed_call_is_the_whole_one(client):
    chunks = stream(client, BOSTON, tools=TOOLS)
    first, *more = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert (first.function.name, first.index) == ("get_current_weather", 0)
    assert first.id
    arguments = "".join(call.function.arguments for call in (first, *more))
    assert json.loads(arguments) == {"location": "Boston"}
    assert text_of(chunks) == "I should use get_current_weather."
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_without_need_no_tool_is_called(client):
    choice = ask(client, HI, tools=TOOLS)
    assert choice.finish_reason == "stop"
    assert not choice.message.tool_calls
    assert choice.message.content.startswith("Hello")
    assert text_of(stream(client, HI, tools=TOOLS)) == choice.message.content


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("tool_choice", "names"),
    [
        ("required", {"get_current_weather", "calculator"}),
        ({"type": "function", "function": {"name": "calculator"}}, {"calculator"}),
    ],
)
def test_a_call_can_be_forced(client, tool_choice, names, streamed):
    options = {"tools": TOOLS, "tool_choice": tool_choice, "max_tokens": 300}
    if streamed:
        chunks = stream(client, HI, **options)
        calls = [call.function for chunk in chunks for call in chunk.delta.tool_calls or []]
        name, arguments = calls[0].name, "".join(call.arguments for call in calls)
    else:
        (call,) = ask(client, HI, **options).message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert name in names
    parameters = next(tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == name)
    assert parameters["required"] == list(json.loads(arguments))


def test_an_unknown_forced_tool_is_refused(client):
    choice = {"type": "function", "function": {"name": "search"}}
    with pytest.raises(openai.BadRequestError):
        ask(client, HI, tools=TOOLS, tool_choice=choice)


def test_json_can_be_asked_for(client):
    schema = {"type": "object", "properties": {"city": {"enum": ["Boston", "Paris"]}}, "required": ["city"]}
    json_schema = {"name": "place", "schema": schema}
    choice = ask(client, HI, response_format={"type": "json_schema", "json_schema": json_schema}, max_tokens=100)
    assert json.loads(choice.message.content)["city"] in ("Boston", "Paris")


def test_text_completions(client, library):
    model, tokenizer = library
    text, _ = make_context(tokenizer, QUESTIONS[2], None, SYSTEM)
    reply, _ = model.chat(tokenizer, QUESTIONS[2], history=None, do_sample=False)
    completion = client.completions.create(model="toy", prompt=text, temperature=0, max_tokens=50)
    assert completion.choices[0].text == reply
