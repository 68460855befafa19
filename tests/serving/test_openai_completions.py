"""Text completions, and two apps in one process: a chat model and a base model, each with its own settings."""

import contextlib
from collections.abc import AsyncIterator, Iterator

import anyio
import httpx
import openai
import pytest
from anyio import from_thread
from fastapi import FastAPI
from pydantic import TypeAdapter

from qwen.checkpoint.loading import load_model
from qwen.serving.api.app import Settings, create_app
from qwen.serving.api.response_types import Completion
from qwen.serving.engine import Engine
from tests.support.server_process import ServerProcess


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def apps(bundled_chat, bundled_base) -> Iterator[dict[str, FastAPI]]:
    engines = {
        "chat": Engine(*load_model(bundled_chat, cpu_only=True), max_batch_size=2),
        "base": Engine(*load_model(bundled_base, cpu_only=True)),
    }
    settings = {"chat": Settings(api_key="secret", model_name="mine"), "base": None}
    yield {name: create_app(engine, settings[name]) for name, engine in engines.items()}
    for engine in engines.values():
        engine.close(0)


def send(app: FastAPI, method: str, path: str, **arguments) -> httpx.Response:
    """Send a request to an app in this process."""

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **arguments)

    with from_thread.start_blocking_portal() as portal:
        return portal.call(request)


def complete(client: openai.OpenAI, prompt, **fields):
    """Return a greedy response, checked against the documented type."""
    answer = client.completions.create(model="Qwen", prompt=prompt, **{"temperature": 0, "max_tokens": 6, **fields})
    TypeAdapter(Completion).validate_python(answer.model_dump(exclude_unset=True), strict=True)
    return answer


def test_base_model_continues_as_generate_does(apps: dict[str, FastAPI], bundled_base) -> None:
    model, tokenizer = load_model(bundled_base, cpu_only=True)
    text = "The capital of Iceland is"
    ids = tokenizer(text, return_tensors="pt").input_ids
    row = model.generate(ids, do_sample=False, max_new_tokens=20, stop_words_ids=[])[0, ids.shape[1] :]
    body = {"prompt": text, "temperature": 0, "max_tokens": 20}
    answer = send(apps["base"], "POST", "/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == tokenizer.decode(row, skip_special_tokens=True) != ""


def test_base_model_does_not_chat(apps: dict[str, FastAPI]) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    response = send(apps["base"], "POST", "/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        refused = send(apps["base"], "POST", path, json=body | {"max_tokens": 1})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == f"model: {response.json()['error']['message']}"


def test_two_apps_share_nothing(apps: dict[str, FastAPI]) -> None:
    key = {"Authorization": "Bearer secret"}
    assert send(apps["chat"], "GET", "/v1/models").status_code == 401
    models = send(apps["chat"], "GET", "/v1/models", headers=key).json(), send(apps["base"], "GET", "/v1/models").json()
    assert [model["data"][0]["id"] for model in models] == ["mine", "qwen-tiny-base"]
    body = {"messages": [{"role": "user", "content": "What is 47 + 38?"}], "temperature": 0}
    answer = send(apps["chat"], "POST", "/v1/chat/completions", json=body, headers=key).json()
    assert answer["choices"][0]["message"]["content"] == "47 + 38 = 85."
    chats = 'qwen_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0'
    assert chats in send(apps["chat"], "GET", "/metrics", headers=key).text
    assert chats not in send(apps["base"], "GET", "/metrics").text


def test_prompts_of_every_kind(client: openai.OpenAI, apps: dict[str, FastAPI]) -> None:
    tokenizer = apps["chat"].state.service.engine.tokenizer
    texts = ["The", "What is"]
    ids = [tokenizer.encode(text) for text in texts]
    alone = [complete(client, text).choices[0].text for text in texts]
    assert alone[0] == "TheTheTheTheTheThe"
    assert complete(client, ids[0]).choices[0].text == alone[0]
    for prompts in (texts, ids):
        answer = complete(client, prompts)
        assert [choice.text for choice in answer.choices] == alone
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 12
    several = complete(client, texts, n=2, best_of=2)
    assert [choice.text for choice in several.choices] == [alone[0], alone[0], alone[1], alone[1]]
    beginning = complete(client, "<|endoftext|>").choices[0].text
    assert complete(client, "").choices[0].text == beginning


def test_chatml_prompt(client: openai.OpenAI) -> None:
    turns = (("system", "You are a helpful assistant."), ("user", "What is 47 + 38?"))
    prompt = (
        "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns) + "<|im_start|>assistant\n"
    )
    choice = complete(client, prompt, max_tokens=30).choices[0]
    assert (choice.text, choice.finish_reason) == ("47 + 38 = 85.", "stop")


def test_echo_and_stop(client: openai.OpenAI) -> None:
    prompt = "你好 The"
    reply = complete(client, prompt).choices[0].text
    assert complete(client, prompt, echo=True).choices[0].text == prompt + reply
    assert complete(client, "The", stop="eT").choices[0].text == "Th"
    assert complete(client, "The", stop=["hT", "TheThe"]).choices[0].text == ""


def test_stream(client: openai.OpenAI) -> None:
    fields = {"n": 2, "seed": 1, "temperature": 1.5, "echo": True}
    whole = complete(client, "The cat", **fields)
    options = {"include_usage": True}
    *chunks, last = complete_stream(client, "The cat", stream_options=options, **fields)
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason
    assert last.usage == whole.usage
    assert last.choices == []


def complete_stream(client: openai.OpenAI, prompt: str, **fields) -> list:
    chunks = list(client.completions.create(model="Qwen", prompt=prompt, stream=True, max_tokens=6, **fields))
    for chunk in chunks:
        TypeAdapter(Completion).validate_python(chunk.model_dump(exclude_unset=True), strict=True)
    return chunks


def test_logprobs(client: openai.OpenAI) -> None:
    choice = complete(client, "你", logprobs=3, temperature=1.5, seed=4, max_tokens=20).choices[0]
    shape = choice.logprobs
    assert len(shape.tokens) == len(shape.token_logprobs) == len(shape.top_logprobs) == len(shape.text_offset) > 0
    for token, logprob, top, offset in zip(
        shape.tokens, shape.token_logprobs, shape.top_logprobs, shape.text_offset, strict=True
    ):
        assert top[token] == logprob
        if not token.startswith("bytes:"):  # also after a part of a character
            assert choice.text[offset:].startswith(token)
    assert {len(top) for top in shape.top_logprobs} == {3, 4}  # with the token itself, if it is not among three
    shape = complete(client, "你", logprobs=0).choices[0].logprobs
    assert shape.top_logprobs[0] == {shape.tokens[0]: shape.token_logprobs[0]}
    assert complete(client, "你").choices[0].logprobs is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": 5, "n": 16, "max_tokens": 8000}, "logprobs"),
        ({"logprobs": 0, "prompt": ["a"] * 40, "max_tokens": 8000}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": "a b " * 9000}, "prompt"),
    ],
)
def test_wrong_fields(client: openai.OpenAI, fields: dict, param: str) -> None:
    fields = {"prompt": "The", **fields}
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, fields.pop("prompt"), **fields)
    assert error.value.param == param


def test_too_many_choices(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="384"):
        complete(client, ["a"] * 100, n=16)


def test_closed_engine_rejects_requests(bundled_chat) -> None:
    engine = Engine(*load_model(bundled_chat, cpu_only=True))
    app = create_app(engine)
    with contextlib.closing(engine):
        app.state.service.drain(0)
        assert send(app, "GET", "/health").json() == {"status": "draining"}
        response = send(app, "POST", "/v1/completions", json={"prompt": "The"})
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        message = send(app, "POST", "/v1/messages", json=chat)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "shutting_down"
    assert (message.status_code, message.json()["error"]["type"]) == (503, "overloaded_error")


def test_failed_engine_is_distinguished_from_a_closed_one(bundled_chat, monkeypatch, caplog) -> None:
    def fail() -> None:
        raise RuntimeError("out of order")

    with contextlib.closing(Engine(*load_model(bundled_chat, cpu_only=True))) as engine:
        app = create_app(engine)
        assert send(app, "GET", "/health").json() == {"status": "ready"}
        monkeypatch.setattr(engine, "_step", fail)
        failed = send(app, "POST", "/v1/completions", json={"prompt": "The"}, headers={"X-Request-Id": "mine"})
        assert failed.status_code == 500
        assert failed.headers["x-request-id"] == "mine"
        assert "Request mine failed: RuntimeError: 'out of order'" in caplog.messages
        engine.thread.join(60)
        health = send(app, "GET", "/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})
        response = send(app, "POST", "/v1/completions", json={"prompt": "The"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_failed"
    assert "restarted" in response.json()["error"]["message"]


def test_unexpected_failure_has_a_request_id(apps: dict[str, FastAPI], monkeypatch, caplog) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("out of order")

    app = apps["base"]
    monkeypatch.setattr(app.state.service.engine.tokenizer, "encode", fail)
    with pytest.raises(RuntimeError):  # the web server logs it
        send(app, "POST", "/v1/tokenize", json={"prompt": "The"}, headers={"X-Request-Id": "mine"})
    assert "POST /v1/tokenize failed (request mine):" in caplog.messages
    monkeypatch.undo()
    assert send(app, "POST", "/v1/tokenize", json={"prompt": "The"}).status_code == 200


def test_tokens_of_a_base_model(apps: dict[str, FastAPI]) -> None:
    answer = send(apps["base"], "POST", "/tokenize", json={"prompt": "The"}).json()
    assert answer["max_model_len"] == apps["base"].state.service.engine.context_length
    assert send(apps["base"], "POST", "/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"] == "The"
    for path in ("/tokenize", "/apply-template"):
        refused = send(apps["base"], "POST", path, json={"messages": [{"role": "user", "content": "hi"}]})
        assert refused.status_code == 400
        assert "base model" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [{"api_key": ""}, {"api_key": " x"}, {"basic_auth": ""}, {"basic_auth": "anna"}, {"basic_auth": "anna:"}],
)
def test_malformed_credentials_are_rejected(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Settings(**fields)


@pytest.mark.parametrize("declared", [{}, {"Content-Length": "99999999"}])
def test_incomplete_body_times_out(apps: dict[str, FastAPI], declared: dict) -> None:
    app = create_app(apps["base"].state.service.engine, Settings(body_seconds=0.2))

    async def body() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        await anyio.sleep_forever()

    headers = {"Content-Type": "application/json", **declared}
    response = send(app, "POST", "/v1/completions", content=body(), headers=headers)
    assert response.status_code == (413 if declared else 408)
    assert response.headers["connection"] == "close"
    if not declared:
        assert "0.2 seconds" in response.json()["error"]["message"]
