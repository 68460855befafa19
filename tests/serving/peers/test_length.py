"""Length and stop: what the tests of vLLM, llama.cpp and SGLang ask of them."""

import httpx
import pytest

from qwen.checkpoint.loading import load_tokenizer
from tests.support.server_process import ServerProcess

SUM = [{"role": "user", "content": "What is 47 + 38?"}]
ANSWER = "47 + 38 = 85."


@pytest.fixture(scope="module")
def tokenizer(bundled_chat):
    return load_tokenizer(bundled_chat)


def chat(server: ServerProcess, **fields) -> httpx.Response:
    """Return the response to a greedy chat completion."""
    fields = {"messages": SUM, "temperature": 0} | fields
    return httpx.post(f"{server.url}/v1/chat/completions", json=fields, timeout=60)


def complete(server: ServerProcess, **fields) -> httpx.Response:
    """Return the response to a greedy text completion."""
    fields = {"prompt": "The", "temperature": 0, "max_tokens": 6} | fields
    return httpx.post(f"{server.url}/v1/completions", json=fields, timeout=60)


def reply(response: httpx.Response) -> tuple[str, str, object]:
    """Return the text of the first choice, its finish reason and its stop reason."""
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, choice["finish_reason"], choice["stop_reason"]


def streamed(server: ServerProcess, **fields) -> tuple[str, str, object]:
    """Return the same of a streamed chat completion."""
    with httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        json={"messages": SUM, "temperature": 0, "stream": True} | fields,
        timeout=60,
    ) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events.pop() == "[DONE]"
    choices = [httpx.Response(200, text=event).json()["choices"][0] for event in events]
    assert not any("stop_reason" in choice for choice in choices[:-1])
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    return text, choices[-1]["finish_reason"], choices[-1]["stop_reason"]


def error_param(response: httpx.Response) -> str:
    assert response.status_code == 400
    return response.json()["error"]["param"]


def test_max_tokens(server: ServerProcess) -> None:
    response = chat(server, max_tokens=3)
    assert reply(response)[1] == "length"
    assert response.json()["usage"]["completion_tokens"] == 3
    assert reply(complete(server)) == ("The" * 6, "length", None)


def test_max_completion_tokens(server: ServerProcess) -> None:
    assert chat(server, max_completion_tokens=3, max_tokens=9).json()["usage"]["completion_tokens"] == 3


def test_max_tokens_zero_in_chat(server: ServerProcess) -> None:
    assert error_param(chat(server, max_tokens=0)) == "max_tokens"


def test_too_long_is_400(server: ServerProcess) -> None:
    long = [{"role": "user", "content": "a b " * 9000}]
    response = chat(server, messages=long)
    assert error_param(response) == "messages"
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert error_param(complete(server, prompt="a b " * 9000)) == "prompt"


def test_too_long_in_known_words(server: ServerProcess) -> None:
    """LiteLLM and LangChain tell this error from others by its words."""
    response = complete(server, prompt="a b " * 9000)
    assert "maximum context length is 8192 tokens" in response.json()["error"]["message"]
    assert "prompt is too long" in response.json()["error"]["message"]


def test_stop_string(server: ServerProcess) -> None:
    assert reply(chat(server, stop="=")) == ("47 + 38", "stop", "=")


def test_stop_list_streamed(server: ServerProcess) -> None:
    assert streamed(server, stop=["nowhere", " = 8", "85"]) == ("47 + 38", "stop", " = 8")


@pytest.mark.parametrize("stop", ["", [], None, ["nowhere"]])
def test_stop_nothing(server: ServerProcess, stop: object) -> None:
    assert reply(chat(server, stop=stop)) == (ANSWER, "stop", None)


@pytest.mark.parametrize("field", ["include_stop_str_in_output", "no_stop_trim"])
def test_stop_string_included(server: ServerProcess, field: str) -> None:
    for end in (reply(chat(server, stop=["8 =", "."], **{field: True})), streamed(server, stop="8 =", **{field: True})):
        assert end == ("47 + 38 =", "stop", "8 =")
    assert reply(complete(server, stop="eT", **{field: True})) == ("TheT", "stop", "eT")
    assert reply(chat(server, stop=" = ", **{field: True}))[0] == "47 + 38 = "  # with its whitespace


def test_stop_reason_is_told(server: ServerProcess, tokenizer) -> None:
    assert reply(complete(server, stop=["x", "eT"])) == ("Th", "stop", "eT")
    (end,) = tokenizer.encode(".")
    assert reply(chat(server, stop_token_ids=[end]))[2] == streamed(server, stop_token_ids=[end])[2] == end
    assert reply(chat(server, stop_token_ids=[tokenizer.im_end_id]))[2] is None  # it ends every reply
    choices = chat(server, stop="8", n=2, temperature=0.1, seed=1).json()["choices"]
    assert [choice["stop_reason"] for choice in choices] == ["8", "8"]


def test_stop_string_of_the_tool_format_is_not_told(server: ServerProcess) -> None:
    tool = {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location.",
        "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
    }
    fields = {
        "messages": [{"role": "user", "content": "What is the weather like in Boston?"}],
        "tools": [{"type": "function", "function": tool}],
        "include_stop_str_in_output": True,
    }
    choice = chat(server, **fields).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", None)
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].endswith("}")


def test_stop_token_ids(server: ServerProcess, tokenizer) -> None:
    (end,) = tokenizer.encode(" =")
    assert reply(chat(server, stop_token_ids=[0, end])) == ("47 + 38", "stop", end)
    assert streamed(server, stop_token_ids=[end]) == ("47 + 38", "stop", end)
    included = {"stop_token_ids": [end], "include_stop_str_in_output": True}
    assert reply(chat(server, **included)) == streamed(server, **included) == ("47 + 38 =", "stop", end)


def test_stop_token_ids_in_completions(server: ServerProcess, tokenizer) -> None:
    prompt = "<|im_start|>user\nWhat is 47 + 38?<|im_end|>\n<|im_start|>assistant\n"
    (end,) = tokenizer.encode(" =")
    response = complete(server, prompt=prompt, max_tokens=30, stop_token_ids=[end], logprobs=0)
    assert reply(response) == ("47 + 38", "stop", end)
    tokens = response.json()["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == response.json()["usage"]["completion_tokens"]
    assert "".join(tokens) == "47 + 38"


@pytest.mark.parametrize("token", [-1, 3584, 10**20])
def test_stop_token_ids_out_of_range(server: ServerProcess, token: int) -> None:
    for send in (chat, complete):
        assert error_param(send(server, stop_token_ids=[5, token])) == "stop_token_ids.1"


def test_ignore_eos(server: ServerProcess) -> None:
    response = chat(server, ignore_eos=True, max_tokens=35)
    text, finish_reason, _ = reply(response)
    assert finish_reason == "length"
    assert response.json()["usage"]["completion_tokens"] == 35
    assert text.startswith(ANSWER)
    assert "<|im_end|>" not in text
    assert streamed(server, ignore_eos=True, max_tokens=35)[0] == text
    shown = reply(chat(server, ignore_eos=True, max_tokens=35, skip_special_tokens=False))[0]
    assert shown.replace("<|im_end|>", "").replace("<|im_start|>", "").rstrip() == text != shown
    assert complete(server, ignore_eos=True, max_tokens=70).json()["usage"]["completion_tokens"] == 70


def test_ignore_eos_with_a_grammar_is_400(server: ServerProcess) -> None:
    assert error_param(chat(server, ignore_eos=True, response_format={"type": "json_object"})) == "ignore_eos"


def test_min_tokens(server: ServerProcess) -> None:
    response = chat(server, min_tokens=25)
    assert response.json()["usage"]["completion_tokens"] >= 25
    assert reply(response)[1] == "stop"
    late = chat(server, min_tokens=25, stop=["8"], max_tokens=30)
    assert late.json()["usage"]["completion_tokens"] >= 25
    assert reply(late)[0].startswith(ANSWER)


def test_min_tokens_beyond_the_default_length(server: ServerProcess) -> None:
    fields = {"prompt": "The", "temperature": 0, "min_tokens": 300}
    response = httpx.post(f"{server.url}/v1/completions", json=fields, timeout=60)
    assert response.json()["usage"]["completion_tokens"] == 300


def test_min_tokens_holds_stop_tokens_back(server: ServerProcess, tokenizer) -> None:
    (end,) = tokenizer.encode("The")
    response = complete(server, min_tokens=4, stop_token_ids=[end])
    assert response.json()["usage"]["completion_tokens"] >= 4
    assert "The" not in reply(response)[0]


@pytest.mark.parametrize(
    "fields",
    [{"min_tokens": 7, "max_tokens": 6}, {"min_tokens": -1}, {"min_tokens": "5"}, {"min_tokens": 2.5}],
)
def test_min_tokens_range(server: ServerProcess, fields: dict) -> None:
    assert error_param(complete(server, **fields)) == "min_tokens"


def test_truncate_prompt_tokens(server: ServerProcess, tokenizer) -> None:
    text = "What is 47 + 38? The"
    kept = tokenizer.decode(tokenizer.encode(text)[-4:])
    response = complete(server, prompt=text, truncate_prompt_tokens=4, echo=True)
    assert response.json()["usage"]["prompt_tokens"] == 4
    assert reply(response)[0] == kept + reply(complete(server, prompt=kept))[0]
    assert complete(server, prompt="The", truncate_prompt_tokens=4).json()["usage"]["prompt_tokens"] == 1
    assert chat(server, truncate_prompt_tokens=4, max_tokens=1).json()["usage"]["prompt_tokens"] == 4


def test_truncate_prompt_tokens_to_the_context(server: ServerProcess) -> None:
    response = complete(server, prompt="a b " * 9000, truncate_prompt_tokens=-1, max_tokens=3)
    assert response.json()["usage"]["total_tokens"] == 8192


@pytest.mark.parametrize("number", [0, -2, 8193, "4", 1.5])
def test_truncate_prompt_tokens_range(server: ServerProcess, number: object) -> None:
    assert error_param(complete(server, truncate_prompt_tokens=number)) == "truncate_prompt_tokens"
