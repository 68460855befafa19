"""Log-probabilities of prompts: what the tests of vLLM ask of them, and that they are the model's."""

import httpx
import pytest
import torch

from qwen.checkpoint.loading import load_model
from tests.support.server_process import ServerProcess

TOLERANCE = 3e-5  # the engine's kernels add in another order; logits are up to 30
TEXT = "Once upon a time there was a toy, and 你好. " * 8


@pytest.fixture(scope="module")
def loaded(bundled_chat):
    return load_model(bundled_chat, cpu_only=True)


def send(server: ServerProcess, path: str, **fields) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"temperature": 0, "max_tokens": 1} | fields, timeout=60)


def chat(server: ServerProcess, **fields) -> dict:
    messages = [{"role": "user", "content": "What is 47 + 38?"}]
    return send(server, "/v1/chat/completions", **{"messages": messages} | fields).json()


def complete(server: ServerProcess, **fields) -> dict:
    return send(server, "/v1/completions", **{"prompt": TEXT} | fields).json()


@torch.inference_mode()
def local_logprobs(model, ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities of the next tokens, of a forward pass: (tokens, vocabulary)."""
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def check_scores(scores: list, ids: list[int], expected: torch.Tensor, top: int) -> None:
    assert scores[0] is None
    assert len(scores) == len(ids)
    for entry, token, row in zip(scores[1:], ids[1:], expected, strict=False):
        assert entry[str(token)]["logprob"] == pytest.approx(row[token].item(), abs=TOLERANCE)
        surely_above, perhaps_above = ((row > row[token] + shift).sum() for shift in (TOLERANCE, -TOLERANCE))
        assert surely_above < entry[str(token)]["rank"] <= perhaps_above
        assert {value["rank"] for value in entry.values()} >= set(range(1, top + 1))
        assert len(entry) in (top, top + 1)
        for likely, value in entry.items():
            assert value["logprob"] == pytest.approx(row[int(likely)].item(), abs=TOLERANCE)


def test_prompt_logprobs_in_chat(server: ServerProcess, loaded) -> None:
    model, tokenizer = loaded
    answer = chat(server, prompt_logprobs=1, return_token_ids=True, n=2)
    ids = answer["prompt_token_ids"]
    check_scores(answer["prompt_logprobs"], ids, local_logprobs(model, ids), 1)
    assert answer["prompt_logprobs"][1][str(ids[1])]["decoded_token"] == tokenizer.decode([ids[1]])
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert "prompt_logprobs" not in chat(server)


def test_prompt_logprobs_in_completions(server: ServerProcess, loaded) -> None:
    model, tokenizer = loaded
    answer = complete(server, prompt=[TEXT, "The"], prompt_logprobs=3, n=2)
    for choice in answer["choices"]:
        ids = tokenizer.encode(TEXT if choice["index"] < 2 else "The")
        check_scores(choice["prompt_logprobs"], ids, local_logprobs(model, ids), 3)
    assert complete(server, prompt="The", prompt_logprobs=0)["choices"][0]["prompt_logprobs"] == [None]


def test_echo_with_logprobs_are_the_models(server: ServerProcess, loaded) -> None:
    model, tokenizer = loaded
    ids = tokenizer.encode(TEXT)
    expected = local_logprobs(model, ids)
    shape = complete(server, echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"]
    own = expected[range(len(ids) - 1), ids[1:]].tolist()
    assert shape["token_logprobs"][1:] == pytest.approx(own, abs=TOLERANCE)
    both = complete(server, echo=True, logprobs=2, prompt_logprobs=1, max_tokens=0)["choices"][0]
    check_scores(both["prompt_logprobs"], ids, expected, 1)
    scores = zip(ids[1:], both["prompt_logprobs"][1:], strict=True)
    ranks = [entries[str(token_id)]["rank"] for token_id, entries in scores]
    assert [len(top) for top in both["logprobs"]["top_logprobs"][1:]] == [2 if rank <= 2 else 3 for rank in ranks]


def test_cached_prompts_are_scored(server: ServerProcess) -> None:
    """Blocks of the cache have no logits, so that they are not taken over."""
    first = complete(server, prompt_logprobs=1)
    again = complete(server, prompt_logprobs=1)
    assert again["choices"][0]["prompt_logprobs"] == first["choices"][0]["prompt_logprobs"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert complete(server)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0  # others find theirs


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_logprobs": -1},
        {"prompt_logprobs": -2},
        {"prompt_logprobs": 21},
        {"prompt_logprobs": True},
        {"prompt_logprobs": "1"},
        {"prompt_logprobs": 1, "stream": True},
    ],
)
def test_prompt_logprobs_range(server: ServerProcess, path: str, fields: dict) -> None:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    response = send(server, path, **prompt, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt_logprobs"


def test_too_many_scores_are_400(server: ServerProcess) -> None:
    ids = [5] * 1000
    response = send(server, "/v1/completions", prompt=[ids] * 20, prompt_logprobs=20)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt_logprobs"
    response = send(server, "/v1/completions", prompt=[ids] * 100, logprobs=5, echo=True)
    assert response.json()["error"]["param"] == "logprobs"
