"""Operating a server: what the tests of vLLM, llama.cpp and SGLang ask of its models, health, metrics and headers."""

import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

import qwen
from tests.support.server_process import ServerProcess

HI = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 4}


def post(server: ServerProcess, fields: dict, path: str = "/v1/chat/completions", **options) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=fields, timeout=60, **options)


def error_code(response: httpx.Response) -> str | None:
    return response.json()["error"]["code"]


def test_health_without_key(start_server, bundled_chat) -> None:
    guarded = start_server("-c", str(bundled_chat), "--api-key", "secret")
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    assert error_code(httpx.get(f"{guarded.url}/v1/models")) == "invalid_api_key"


def test_models_list(server: ServerProcess) -> None:
    models = httpx.get(f"{server.url}/v1/models").json()
    assert models["object"] == "list"
    (card,) = models["data"]
    assert {"id": "qwen-tiny-chat", "object": "model", "owned_by": "qwen"}.items() <= card.items()


def test_model_by_id(server: ServerProcess) -> None:
    (card,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert httpx.get(f"{server.url}/v1/models/{card['id']}").json() == card
    assert error_code(httpx.get(f"{server.url}/v1/models/gpt-4o")) == "model_not_found"


def test_models_say_context_length(server: ServerProcess) -> None:
    (card,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert card["max_model_len"] == card["meta"]["n_ctx"] == 8192
    assert card["meta"] == {"n_vocab": 3584, "n_ctx": 8192, "n_ctx_train": 1024, "n_embd": 256}


def test_any_model_name_or_404(server: ServerProcess) -> None:
    response = post(server, HI | {"model": "some other name"})
    assert response.status_code == 200
    assert response.json()["model"] == "qwen-tiny-chat"


def test_usage_has_details(server: ServerProcess) -> None:
    usage = [post(server, HI | {"cache_salt": "usage"}).json()["usage"] for _ in range(2)]
    assert [each["prompt_tokens_details"]["cached_tokens"] for each in usage] == [0, 16]
    assert usage[0]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_metrics_count_tokens(server: ServerProcess) -> None:
    names = [f"qwen_{name}_tokens_total" for name in ("prompt", "cached_prompt", "completion")]
    before = [server.metric(name) for name in names]
    usage = post(server, HI).json()["usage"]
    grown = [server.metric(name) - old for name, old in zip(names, before, strict=True)]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert grown == [usage["prompt_tokens"], cached, usage["completion_tokens"]]


def test_openapi_document(server: ServerProcess) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/tokenize", "/version"} <= set(paths)


def test_unknown_path_is_404_json(server: ServerProcess) -> None:
    response = post(server, {}, "/v1/no/such/path")
    assert response.status_code == 404
    assert error_code(response) == "unknown_url"


def test_wrong_method_is_405_json(server: ServerProcess) -> None:
    response = httpx.get(f"{server.url}/v1/chat/completions")
    assert response.status_code == 405
    assert error_code(response) == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_embeddings_work_or_say_no(server: ServerProcess) -> None:
    response = post(server, {"input": "hi", "model": "x"}, "/v1/embeddings")
    assert response.status_code == 404
    assert "POST /v1/embeddings" in response.json()["error"]["message"]


def test_server_load(server: ServerProcess) -> None:
    """Many requests at once are all answered, and the load is zero afterwards."""
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: post(server, HI).json(), range(24)))
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    server.until_load(0, 0)


def test_version(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/version").json() == {"version": qwen.__version__}


def test_request_id_header(server: ServerProcess) -> None:
    own = post(server, HI, headers={"X-Request-Id": "mine-1"})
    assert own.headers.get_list("x-request-id") == ["mine-1"]
    ids = {post(server, HI).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("req_[0-9a-f]{32}", each) for each in ids)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        fields = {"model": "x", "messages": HI["messages"], "max_tokens": 1}
        assert client.chat.completions.create(**fields)._request_id.startswith("req_")
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**fields, temperature=3)
        assert error.value.request_id.startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        ("POST", "/chat/completions", HI),
        ("POST", "/completions", {"prompt": "The", "max_tokens": 1}),
        ("POST", "/responses", {"input": "hi", "max_output_tokens": 1}),
        ("POST", "/messages", {"model": "x", "messages": HI["messages"], "max_tokens": 1}),
        ("POST", "/messages/count_tokens", {"model": "x", "messages": HI["messages"]}),
        ("POST", "/tokenize", {"prompt": "hi"}),
        ("POST", "/detokenize", {"tokens": [1]}),
        ("POST", "/apply-template", {"messages": HI["messages"]}),
        ("GET", "/models", None),
        ("GET", "/models/qwen-tiny-chat", None),
    ],
)
def test_paths_without_v1(server: ServerProcess, method: str, path: str, fields: dict | None) -> None:
    for prefix in ("", "/v1"):
        assert httpx.request(method, server.url + prefix + path, json=fields, timeout=60).status_code == 200
