"""Text completions: what the tests of vLLM, llama.cpp and SGLang ask of them."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from qwen.checkpoint.loading import load_tokenizer
from tests.support.server_process import ServerProcess


@pytest.fixture(scope="module")
def tokenizer(bundled_chat):
    return load_tokenizer(bundled_chat)


def send(server: ServerProcess, **fields) -> httpx.Response:
    fields = {"prompt": "The", "temperature": 0, "max_tokens": 6} | fields
    return httpx.post(f"{server.url}/v1/completions", json=fields, timeout=60)


def complete(server: ServerProcess, **fields) -> dict:
    """Return the response to a greedy completion."""
    response = send(server, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def texts(server: ServerProcess, **fields) -> list[str]:
    return [choice["text"] for choice in complete(server, **fields)["choices"]]


def chunks(server: ServerProcess, **fields) -> list[dict]:
    """Return the chunks of a streamed completion."""
    *events, done, rest = send(server, stream=True, **fields).text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def merged(parts: list[dict], index: int = 0) -> tuple[str, dict[str, list]]:
    """Return the text and the log-probabilities of a choice from its chunks."""
    choices = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
    shapes = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return "".join(choice["text"] for choice in choices), {
        name: [entry for shape in shapes for entry in shape[name]] for name in names
    }


def error_param(response: httpx.Response) -> str:
    assert response.status_code == 400
    return response.json()["error"]["param"]


def test_completion_shape(server: ServerProcess) -> None:
    answer = complete(server)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "text": "The" * 6,
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (1, 6, 7)


def test_prompt_of_ids(server: ServerProcess, tokenizer) -> None:
    assert texts(server, prompt=tokenizer.encode("The")) == texts(server)


def test_prompts_in_a_list(server: ServerProcess, tokenizer) -> None:
    alone = [*texts(server), *texts(server, prompt="Once upon")]
    assert texts(server, prompt=["The", "Once upon"]) == alone
    assert texts(server, prompt=[tokenizer.encode("The"), tokenizer.encode("Once upon")]) == alone


def test_prompts_and_n(server: ServerProcess) -> None:
    answer = complete(server, prompt=["The", "Once upon"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    first, again, other, other_again = [choice["text"] for choice in answer["choices"]]
    assert first == again != other == other_again


def test_prompts_streamed(server: ServerProcess) -> None:
    prompts = ["The", "Once upon"]
    parts = chunks(server, prompt=prompts)
    assert [merged(parts, index)[0] for index in range(2)] == texts(server, prompt=prompts)


def test_completion_streamed(server: ServerProcess) -> None:
    parts = chunks(server)
    assert merged(parts)[0] == texts(server)[0]
    assert len(parts) > 2
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]


def test_echo(server: ServerProcess) -> None:
    for prompt in ("The", ["The", "你好"]):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        echoed = [first + text for first, text in zip(prompts, texts(server, prompt=prompt), strict=True)]
        assert texts(server, prompt=prompt, echo=True) == echoed
        parts = chunks(server, prompt=prompt, echo=True)
        assert [merged(parts, index)[0] for index in range(len(prompts))] == echoed


def test_completion_logprobs(server: ServerProcess) -> None:
    shape = complete(server, logprobs=2)["choices"][0]["logprobs"]
    assert shape["tokens"] == ["The"] * 6
    assert [len(top) for top in shape["top_logprobs"]] == [2] * 6
    for token, logprob, top in zip(shape["tokens"], shape["token_logprobs"], shape["top_logprobs"], strict=True):
        assert top[token] == logprob == max(top.values())


def test_completion_text_offsets(server: ServerProcess) -> None:
    assert complete(server, logprobs=0)["choices"][0]["logprobs"]["text_offset"] == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize("number", [-1, 6, "1", True])
def test_completion_logprobs_limit(server: ServerProcess, number: object) -> None:
    assert error_param(send(server, logprobs=number)) == "logprobs"


def test_completion_stop(server: ServerProcess) -> None:
    choice = complete(server, stop="eT")["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Th", "stop", "eT")


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 5], [[5], "a"], 5, {"text": "a"}, [-1], [99999]])
def test_bad_prompts(server: ServerProcess, prompt: object) -> None:
    assert error_param(send(server, prompt=prompt)).startswith("prompt")


def test_suffix_or_no(server: ServerProcess) -> None:
    assert error_param(send(server, suffix="end")) == "suffix"


def test_completions_at_once(server: ServerProcess) -> None:
    prompts = ["The", "Once upon", "What is", "你好", "a", "1 + 1", "x", "y"]
    alone = [texts(server, prompt=prompt)[0] for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(lambda prompt: texts(server, prompt=prompt)[0], prompts)) == alone


# Scores of prompts; their numbers are compared with the model's in test_prompt_scores.py


def test_echo_with_logprobs(server: ServerProcess) -> None:
    (choice,) = complete(server, prompt="Once upon a", echo=True, logprobs=2)["choices"]
    shape = choice["logprobs"]
    assert choice["text"].startswith("Once upon a")
    assert "".join(shape["tokens"]) == choice["text"]
    assert shape["token_logprobs"][0] is shape["top_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in shape["token_logprobs"][1:])
    assert {len(top) for top in shape["top_logprobs"][1:]} == {2, 3}  # with the token itself, if it is not among two
    own = [top[token] for token, top in zip(shape["tokens"][1:], shape["top_logprobs"][1:], strict=True)]
    assert own == shape["token_logprobs"][1:]
    for token, offset in zip(shape["tokens"], shape["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert shape["text_offset"][0] == 0


def test_echo_with_logprobs_streamed(server: ServerProcess) -> None:
    fields = {"prompt": ["Once upon a", "The"], "echo": True, "logprobs": 1, "n": 2}
    parts = chunks(server, **fields)
    for choice in complete(server, **fields)["choices"]:
        assert merged(parts, choice["index"]) == (choice["text"], choice["logprobs"])


def test_echo_with_logprobs_counts_the_end_token(server: ServerProcess) -> None:
    """lm-eval takes the last token for a new one, also where the reply is empty."""
    (choice,) = complete(server, prompt="What is 47 + 38?", echo=True, logprobs=1, max_tokens=1)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("What is 47 + 38?", "stop")
    assert choice["logprobs"]["tokens"][-2:] == ["?", "<|im_end|>"]


def test_no_new_tokens(server: ServerProcess) -> None:
    fields = {"prompt": "Once upon a", "max_tokens": 0, "echo": True}
    answer = complete(server, **fields, logprobs=1)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Once upon a", "length")
    scored = complete(server, **fields | {"max_tokens": 2}, logprobs=1)["choices"][0]["logprobs"]
    assert choice["logprobs"] == {name: values[:-2] for name, values in scored.items()}
    assert answer["usage"]["completion_tokens"] == 0
    assert merged(chunks(server, **fields, logprobs=1)) == (choice["text"], choice["logprobs"])
    assert texts(server, **fields) == ["Once upon a"]
    assert texts(server, **fields | {"echo": False}) == [""]
    assert texts(server, **fields | {"prompt": ["a", ""]}) == ["a", "<|endoftext|>"]
