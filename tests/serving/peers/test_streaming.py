"""Streams: what the tests of vLLM, llama.cpp and SGLang ask of them."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.server_process import ServerProcess

SUM = [{"role": "user", "content": "What is 47 + 38?"}]
LONG = {"prompt": "The", "temperature": 0, "max_tokens": 6000}  # the model repeats it up to max_tokens


def post(server: ServerProcess, fields: dict, path: str = "/v1/chat/completions") -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=fields, timeout=60)


def stream(server: ServerProcess, **fields) -> list[dict]:
    """Return the chunks of a greedy chat completion."""
    response = post(server, {"messages": SUM, "temperature": 0, "stream": True} | fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text(chunks: list[dict]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def test_stream_is_the_answer(server: ServerProcess) -> None:
    answer = post(server, {"messages": SUM, "temperature": 0}).json()["choices"][0]["message"]["content"]
    assert text(stream(server)) == answer == "47 + 38 = 85."


def test_stream_roles_and_ends(server: ServerProcess) -> None:
    chunks = stream(server)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert not any("role" in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    heads = [{name: chunk[name] for name in ("id", "created", "model", "object")} for chunk in chunks]
    assert heads == [heads[0]] * len(chunks)
    assert heads[0]["object"] == "chat.completion.chunk"


def test_stream_usage(server: ServerProcess) -> None:
    *chunks, last = stream(server, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    assert not any("usage" in chunk for chunk in stream(server))


def test_stream_usage_all_along(server: ServerProcess) -> None:
    fields = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "max_tokens": 5}
    *chunks, last = stream(server, **fields, stop="85")
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    with_text = [count for chunk, count in zip(chunks, counts, strict=True) if text([chunk])]
    assert counts[0] == 0
    assert with_text == sorted(set(with_text))  # each chunk with text has more
    assert counts[-1] == last["usage"]["completion_tokens"]
    for chunk in (*chunks, last):
        assert chunk["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"]
        assert chunk["usage"]["total_tokens"] == chunk["usage"]["prompt_tokens"] + chunk["usage"]["completion_tokens"]
    assert last["choices"] == []


def test_usage_all_along_without_the_last_chunk(server: ServerProcess) -> None:
    chunks = stream(server, stream_options={"continuous_usage_stats": True})
    assert all(chunk["usage"]["prompt_tokens"] > 0 and chunk["choices"] for chunk in chunks)
    assert not any("token_ids" in chunk["choices"][0] for chunk in chunks)
    fields = LONG | {"max_tokens": 3, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    *events, _, _ = post(server, fields, "/v1/completions").text.split("\n\n")
    usage = [json.loads(event.removeprefix("data: "))["usage"] for event in events]
    assert [each["completion_tokens"] for each in usage] == [1, 2, 3, 3]


def test_stream_options_need_stream(server: ServerProcess) -> None:
    response = post(server, {"messages": SUM, "stream_options": {"include_usage": True}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_options"
    wrong = {"messages": SUM, "stream": True, "stream_options": {"continuous_usage_stats": "yes"}}
    assert post(server, wrong).json()["error"]["param"] == "stream_options.continuous_usage_stats"


def test_stream_error_is_a_status(server: ServerProcess) -> None:
    response = post(server, {"messages": SUM, "stream": True, "temperature": 3})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"


def test_stream_keeps_characters_whole(server: ServerProcess) -> None:
    question = [{"role": "user", "content": "你好，你是谁？"}]
    chunks = stream(server, messages=question)
    answer = post(server, {"messages": question, "temperature": 0}).json()["choices"][0]["message"]["content"]
    assert text(chunks) == answer
    assert not any("\ufffd" in text([chunk]) for chunk in chunks)


def test_streams_side_by_side(server: ServerProcess) -> None:
    questions = [[{"role": "user", "content": f"What is {number} + 38?"}] for number in range(40, 52)]
    alone = [text(stream(server, messages=question)) for question in questions]
    with ThreadPoolExecutor(len(questions)) as pool:
        together = list(pool.map(lambda question: text(stream(server, messages=question)), questions))
    assert together == alone


def lines(server: ServerProcess, client: httpx.Client) -> Iterator[str]:
    with client.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}) as response:
        yield from response.iter_lines()


@pytest.mark.parametrize("first_lines", [1, 20])
def test_left_stream_is_stopped(server: ServerProcess, first_lines: int) -> None:
    server.until_load(0)
    before = server.metric("qwen_completion_tokens_total")
    with httpx.Client(timeout=60) as client:
        reading = lines(server, client)
        for _ in range(first_lines):
            next(reading)
        reading.close()
    server.until_load(0)
    assert server.metric("qwen_completion_tokens_total") - before < LONG["max_tokens"]


def test_left_request_is_stopped(server: ServerProcess) -> None:
    server.until_load(0)
    before = server.metric("qwen_completion_tokens_total")
    address = urlsplit(server.url)
    body = json.dumps(LONG).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.until_load(1)
    server.until_load(0)
    assert server.metric("qwen_completion_tokens_total") - before < LONG["max_tokens"]
