"""Tokens and their log-probabilities: what the tests of vLLM, llama.cpp and SGLang ask of them."""

import json
import math

import httpx
import pytest

from qwen.checkpoint.loading import load_tokenizer
from tests.support.server_process import ServerProcess

HI = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
MIXED = "Hi <|im_end|> 媽 and 🤗"  # control token, characters of several tokens


@pytest.fixture(scope="module")
def tokenizer(bundled_chat):
    return load_tokenizer(bundled_chat)


def post(server: ServerProcess, path: str, **fields) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=fields, timeout=60)


def answer(server: ServerProcess, path: str, **fields) -> dict:
    response = post(server, path, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def chat(server: ServerProcess, **fields) -> dict:
    """Return the answer to a greedy chat completion."""
    return answer(server, "/v1/chat/completions", **({"messages": HI, "temperature": 0, "max_tokens": 5} | fields))


def stream(server: ServerProcess, path: str, **fields) -> list[dict]:
    *events, done, rest = post(server, path, stream=True, **fields).text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


# Log-probabilities


def test_no_logprobs(server: ServerProcess) -> None:
    assert chat(server)["choices"][0]["logprobs"] is None


def test_chat_logprobs(server: ServerProcess) -> None:
    response = chat(server, logprobs=True, top_logprobs=5)
    content = response["choices"][0]["logprobs"]["content"]
    assert len(content) == response["usage"]["completion_tokens"] == 5
    for entry in content:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 5
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_chat_logprobs_alone(server: ServerProcess) -> None:
    content = chat(server, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in content] == [[]] * 5
    assert post(server, "/v1/chat/completions", messages=HI, top_logprobs=1).status_code == 400


def test_too_many_logprobs(server: ServerProcess) -> None:
    response = post(server, "/v1/chat/completions", messages=HI, logprobs=True, top_logprobs=21)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "top_logprobs"


def test_chat_logprobs_streamed(server: ServerProcess) -> None:
    fields = {"messages": HI, "temperature": 0, "max_tokens": 5, "logprobs": True, "top_logprobs": 1}
    chunks = [chunk["choices"][0]["logprobs"] for chunk in stream(server, "/v1/chat/completions", **fields)]
    content = [entry for chunk in chunks if chunk is not None for entry in chunk["content"]]
    assert content == chat(server, **fields)["choices"][0]["logprobs"]["content"]


def test_logprobs_are_finite_json(server: ServerProcess) -> None:
    fields = {"logprobs": True, "top_logprobs": 20, "logit_bias": {"1": -100, "2": 100}}
    content = chat(server, **fields)["choices"][0]["logprobs"]["content"]
    assert all(math.isfinite(likely["logprob"]) for entry in content for likely in entry["top_logprobs"])


def test_tokens_as_ids(server: ServerProcess, tokenizer) -> None:
    plain = chat(server, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    fields = {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True}
    content = chat(server, **fields)["choices"][0]["logprobs"]["content"]
    ids = [int(entry["token"].removeprefix("token_id:")) for entry in content]
    assert [tokenizer.decode([token]) for token in ids] == [entry["token"] for entry in plain]
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    text = answer(server, "/v1/completions", prompt="The", max_tokens=3, logprobs=2, return_tokens_as_token_ids=True)
    logprobs = text["choices"][0]["logprobs"]
    assert all(token.startswith("token_id:") for token in logprobs["tokens"])
    assert [len(likely) for likely in logprobs["top_logprobs"]] == [2] * 3
    assert logprobs["tokens"][0] in logprobs["top_logprobs"][0]


# Token ids


def test_reasoning_tokens_are_those_of_the_thought(server: ServerProcess, tokenizer) -> None:
    boston = [{"role": "user", "content": "What is the weather like in Boston?"}]
    function = {"name": "get_current_weather", "description": "Get the current weather in a given location."}
    properties = {"location": {"type": "string"}}
    function["parameters"] = {"type": "object", "properties": properties, "required": ["location"]}
    fields = {"messages": boston, "tools": [{"type": "function", "function": function}], "max_tokens": None}
    response = chat(server, **fields)
    message = response["choices"][0]["message"]
    details = response["usage"]["completion_tokens_details"]
    assert message["tool_calls"]
    assert details["reasoning_tokens"] == len(tokenizer.encode(" " + message["reasoning_content"]))
    assert 0 < details["reasoning_tokens"] < response["usage"]["completion_tokens"]
    required = chat(server, **fields, tool_choice="required")  # the thought is not shown
    assert required["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_token_ids_of_completions(server: ServerProcess, tokenizer) -> None:
    prompts = ["The", "I am"]
    fields = {"prompt": prompts, "temperature": 0, "max_tokens": 4, "return_token_ids": True}
    response = answer(server, "/v1/completions", **fields)
    for prompt, choice in zip(prompts, response["choices"], strict=True):
        assert choice["prompt_token_ids"] == tokenizer.encode(prompt)
        assert tokenizer.decode(choice["token_ids"]) == choice["text"]
        assert len(choice["token_ids"]) == 4
    assert "token_ids" not in answer(server, "/v1/completions", prompt="The", max_tokens=1)["choices"][0]


def test_token_ids_of_streamed_completions(server: ServerProcess) -> None:
    fields = {"prompt": ["The", "I am"], "temperature": 0, "max_tokens": 4, "return_token_ids": True}
    whole = answer(server, "/v1/completions", **fields)
    chunks = [chunk["choices"][0] for chunk in stream(server, "/v1/completions", **fields)]
    for choice in whole["choices"]:
        first, *rest = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert first["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any("prompt_token_ids" in chunk for chunk in rest)
        assert [token for chunk in (first, *rest) for token in chunk["token_ids"]] == choice["token_ids"]


def test_token_ids_of_chat(server: ServerProcess, tokenizer) -> None:
    response = chat(server, return_token_ids=True)
    prompt = response["prompt_token_ids"]
    assert len(prompt) == response["usage"]["prompt_tokens"]
    assert tokenizer.decode(prompt).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    (choice,) = response["choices"]
    assert tokenizer.decode(choice["token_ids"]) == choice["message"]["content"]
    assert not {"prompt_token_ids", "token_ids"} & {*chat(server), *chat(server)["choices"][0]}


def test_token_ids_of_streamed_chat(server: ServerProcess, tokenizer) -> None:
    fields = {"messages": HI, "temperature": 0, "return_token_ids": True}
    whole = chat(server, **fields, max_tokens=None)
    first, *rest = stream(server, "/v1/chat/completions", **fields)
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in rest)
    choices = [chunk["choices"][0] for chunk in (first, *rest)]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["choices"][0]["token_ids"]
    for choice in choices:
        assert tokenizer.decode(choice["token_ids"]) == choice["delta"].get("content", "")


def test_token_ids_include_a_stop_string(server: ServerProcess, tokenizer) -> None:
    """All tokens that were generated, so that a conversation can be continued or trained on token by token."""
    response = chat(server, max_tokens=None, stop=[" I help"], return_token_ids=True)
    (choice,) = response["choices"]
    assert tokenizer.decode(choice["token_ids"]) == choice["message"]["content"] + " I help"
    assert len(choice["token_ids"]) == response["usage"]["completion_tokens"]


# Endpoints for tokens


def test_tokenize_text(server: ServerProcess, tokenizer) -> None:
    ids = tokenizer.encode(MIXED)
    for path in ("/tokenize", "/v1/tokenize"):
        for fields in ({"prompt": MIXED}, {"prompt": MIXED, "model": "x", "add_special_tokens": False}):
            response = answer(server, path, **fields)
            assert response == {"count": len(ids), "max_model_len": 8192, "tokens": ids, "token_strs": None}
    texts = answer(server, "/tokenize", prompt=MIXED, return_token_strs=True)["token_strs"]
    assert texts[:3] == ["Hi", " ", "<|im_end|>"]
    assert "bytes:\\xf0" in texts
    assert answer(server, "/tokenize", prompt="")["tokens"] == []


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": HI},
        {"messages": HI, "tools": [TOOL]},
        {"messages": HI, "tools": [TOOL], "tool_choice": "none"},
        {"messages": [{"role": "system", "content": "Be brief."}, *HI]},
        {"messages": [*HI, {"role": "assistant", "content": "Hello"}]},
        {"messages": [*HI, {"role": "assistant", "content": "Hello"}], "continue_final_message": True},
        {"messages": HI, "add_generation_prompt": False},
        {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_tokenize_chat(server: ServerProcess, fields: dict) -> None:
    response = answer(server, "/tokenize", **fields)
    assert response["count"] == len(response["tokens"]) == chat(server, **fields)["usage"]["prompt_tokens"]
    assert response["tokens"] == chat(server, **fields, return_token_ids=True)["prompt_token_ids"]


def test_tokenize_in_llama_style(server: ServerProcess, tokenizer) -> None:
    ids = tokenizer.encode(MIXED)
    assert answer(server, "/tokenize", content=MIXED)["tokens"] == ids
    tokens = answer(server, "/tokenize", content=MIXED, with_pieces=True, add_special=True)["tokens"]
    assert [token["id"] for token in tokens] == ids
    pieces = [token["piece"] for token in tokens]
    assert [240] in pieces  # a byte that is no character
    joined = b"".join(piece.encode() if isinstance(piece, str) else bytes(piece) for piece in pieces)
    assert joined.decode() == MIXED
    plain = answer(server, "/tokenize", content=MIXED, parse_special=False)["tokens"]
    assert plain == tokenizer.encode(MIXED, allowed_special=set())
    assert len(plain) > len(ids)


def test_detokenize(server: ServerProcess, tokenizer) -> None:
    ids = tokenizer.encode(MIXED)
    for path in ("/detokenize", "/v1/detokenize"):
        assert answer(server, path, tokens=ids) == dict.fromkeys(("prompt", "content", "text"), MIXED)
    assert answer(server, "/detokenize", tokens=[])["prompt"] == ""


def test_rendered_prompt(server: ServerProcess, tokenizer) -> None:
    prompt = chat(server, return_token_ids=True)["prompt_token_ids"]
    rendered = {"prompt": tokenizer.decode(prompt), "token_ids": prompt}
    for path in ("/apply-template", "/v1/apply-template", "/v1/chat/completions/render"):
        assert answer(server, path, messages=HI) == rendered
    assert rendered["prompt"].startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert "get_weather" in answer(server, "/apply-template", messages=HI, tools=[TOOL])["prompt"]
    assert answer(server, "/v1/completions/render", prompt=["The", "你好"], n=2) == [
        {"prompt": prompt, "token_ids": tokenizer.encode(prompt)} for prompt in ("The", "你好")
    ]
    assert answer(server, "/v1/completions/render", prompt=[72, 73]) == [{"prompt": "HI", "token_ids": [72, 73]}]


def test_rendered_prompt_is_what_the_chat_encodes(server: ServerProcess) -> None:
    """Sent as a text, the rendered prompt has the tokens of the chat."""
    rendered = answer(server, "/apply-template", messages=HI, tools=[TOOL])
    assert answer(server, "/tokenize", prompt=rendered["prompt"])["tokens"] == rendered["token_ids"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"prompt": "aB" * 100_000, "return_token_strs": True}, "return_token_strs"),
        ("/tokenize", {"content": ["a"]}, "content"),
        ("/tokenize", {"content": "a", "parse_special": 0}, "parse_special"),
        ("/tokenize", {"content": "aB" * 100_000, "with_pieces": True}, "with_pieces"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": "hi"}, "messages"),
        ("/tokenize", {"messages": [{"role": "robot"}]}, "messages.0.role"),
        ("/tokenize", {"messages": HI * 2000}, "messages"),
        ("/tokenize", {"messages": HI, "chat_template": "{{ messages }}"}, "chat_template"),
        ("/tokenize", {"messages": HI, "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"messages": HI, "tools": [{"type": "function"}]}, "tools.0.function"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
        ("/detokenize", {"tokens": [1, "2"]}, "tokens.1"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens.1"),
        ("/detokenize", {"tokens": [1, 2, 3584]}, "tokens.2"),
        ("/detokenize", {"tokens": [10**30]}, "tokens.0"),
        ("/detokenize", {"tokens": [1] * 131_073}, "tokens"),
        ("/apply-template", {}, "messages"),
        ("/apply-template", {"messages": HI * 2000}, "messages"),
        ("/v1/chat/completions/render", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ("/v1/completions/render", {"prompt": [10**6]}, "prompt"),
        ("/v1/chat/completions", {"messages": HI, "return_token_ids": 1}, "return_token_ids"),
        ("/v1/completions", {"prompt": "a", "return_token_ids": "yes"}, "return_token_ids"),
        ("/v1/completions", {"prompt": "a", "return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids"),
    ],
)
def test_wrong_fields_are_named(server: ServerProcess, path: str, fields: dict, param: str) -> None:
    response = post(server, path, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
