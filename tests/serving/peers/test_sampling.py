"""Sampling: what the tests of vLLM, llama.cpp and SGLang ask of it."""

import httpx
import pytest

from qwen.checkpoint.loading import load_tokenizer
from tests.support.server_process import ServerProcess

SUM = [{"role": "user", "content": "What is 47 + 38?"}]
ANSWER = "47 + 38 = 85."
BOTH = ["/v1/chat/completions", "/v1/completions"]
PROMPT = "Once upon a time"  # the toy goes on with noise at a high temperature
NOISE = {"temperature": 2, "seed": 1, "max_tokens": 12}


@pytest.fixture(scope="module")
def tokenizer(bundled_chat):
    return load_tokenizer(bundled_chat)


def send(server: ServerProcess, path: str = "/v1/chat/completions", **fields) -> httpx.Response:
    prompt = {"messages": SUM} if "chat" in path else {"prompt": PROMPT}
    return httpx.post(f"{server.url}{path}", json=prompt | fields, timeout=60)


def texts(server: ServerProcess, path: str = "/v1/chat/completions", **fields) -> list[str]:
    """Return the texts of all choices."""
    response = send(server, path, **fields)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]


def error_param(response: httpx.Response) -> str:
    assert response.status_code == 400
    return response.json()["error"]["param"]


def greedy(server: ServerProcess, **fields) -> list[str]:
    return texts(server, "/v1/completions", temperature=0, max_tokens=12, **fields)


def noise(server: ServerProcess, **fields) -> list[str]:
    return texts(server, "/v1/completions", **NOISE | fields)


def test_greedy_repeats(server: ServerProcess) -> None:
    assert texts(server, temperature=0) == texts(server, temperature=0) == [ANSWER]


def check_range(server: ServerProcess, field: str, *values: float) -> None:
    for path in BOTH:
        for value in values:
            assert error_param(send(server, path, **{field: value})) == field


def test_temperature_range(server: ServerProcess) -> None:
    check_range(server, "temperature", -0.1, 2.1)


def test_top_p_range(server: ServerProcess) -> None:
    check_range(server, "top_p", -0.1, 1.1)


def test_min_p_range(server: ServerProcess) -> None:
    check_range(server, "min_p", -0.1, 2)


def test_penalties_range(server: ServerProcess) -> None:
    check_range(server, "presence_penalty", -2.1, 2.1)
    check_range(server, "frequency_penalty", -2.1, 2.1)
    check_range(server, "repetition_penalty", 0, 10.1)


def test_n_zero(server: ServerProcess) -> None:
    check_range(server, "n", 0, -1, 17)


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "top_k", "presence_penalty", "n", "seed"])
def test_numbers_are_numbers(server: ServerProcess, field: str) -> None:
    for value in ("1", True, [1]):
        assert error_param(send(server, **{field: value})) == field


def test_not_a_number_is_400(server: ServerProcess) -> None:
    headers = {"Content-Type": "application/json"}
    for value in (b"NaN", b"Infinity", b"1e999"):
        body = b'{"messages": [{"role": "user", "content": "hi"}], "temperature": %s}' % value
        response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
        assert response.status_code == 400


def test_top_k_is_kept(server: ServerProcess) -> None:
    assert noise(server, top_k=1) == greedy(server) != noise(server)


def test_min_p_is_kept(server: ServerProcess) -> None:
    assert noise(server, min_p=1) == greedy(server) != noise(server, min_p=0)
    assert texts(server, temperature=2, min_p=1) == [ANSWER]


def test_repetition_penalty_is_kept(server: ServerProcess) -> None:
    assert greedy(server, repetition_penalty=1.8) != greedy(server)


def test_frequency_penalty_is_kept(server: ServerProcess) -> None:
    assert greedy(server, prompt="The") == ["The" * 12]
    assert greedy(server, prompt="The", frequency_penalty=2) != ["The" * 12]


def test_seed_repeats(server: ServerProcess) -> None:
    assert noise(server) == noise(server) != noise(server, seed=2)


def test_seed_of_any_size(server: ServerProcess) -> None:
    for seed in (0, -1, 2**63, 2**200):
        assert noise(server, seed=seed) == noise(server, seed=seed)


def test_n_choices(server: ServerProcess) -> None:
    several = noise(server, n=3)
    assert several == [*noise(server), *noise(server, seed=2), *noise(server, seed=3)]
    assert len(set(several)) == 3


# n_streamed: tests/serving/test_openai_completions.py::test_stream


def test_logit_bias_forces(server: ServerProcess, tokenizer) -> None:
    (token,) = tokenizer.encode("a")
    assert texts(server, temperature=0, logit_bias={str(token): 100}, max_tokens=4) == ["aaaa"]


def test_logit_bias_range(server: ServerProcess) -> None:
    assert error_param(send(server, logit_bias={"64": 101})) == "logit_bias.64"
    assert error_param(send(server, logit_bias={"999999": 1})) == "logit_bias"


def test_best_of_or_no(server: ServerProcess) -> None:
    assert len(noise(server, best_of=2, n=2)) == 2
    assert error_param(send(server, "/v1/completions", best_of=3, n=2)) == "best_of"


def test_bad_words(server: ServerProcess) -> None:
    plain = texts(server, temperature=0)[0]
    assert "85" in plain
    assert "85" not in texts(server, temperature=0, bad_words=["85"])[0]  # two tokens
    banned = texts(server, "/v1/completions", prompt="The", temperature=0, max_tokens=6, bad_words=["The"])[0]
    assert "The" not in banned
    assert " =" not in texts(server, temperature=0, bad_words=["="])[0]  # also after a space
    several = texts(server, temperature=2, n=8, seed=1, bad_words=["85", "4"])
    assert not any("85" in text or "4" in text for text in several)


def test_bad_words_range(server: ServerProcess) -> None:
    assert error_param(send(server, bad_words=["a", ""])) == "bad_words.1"
    assert error_param(send(server, bad_words=["a" * 201])) == "bad_words.0"
    assert error_param(send(server, bad_words=["a"] * 129)) == "bad_words"
    assert error_param(send(server, bad_words="a")) == "bad_words"


def test_bad_words_in_structured_output(server: ServerProcess) -> None:
    schema = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}}, "required": ["mood"]}
    fields = {"temperature": 0, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    (free,) = texts(server, **fields)
    word = "good" if "good" in free else "bad"
    assert texts(server, **fields, bad_words=[word[0]]) == [free.replace(word, "bad" if word == "good" else "good")]


def test_allowed_token_ids(server: ServerProcess, tokenizer) -> None:
    ids = tokenizer.encode("ab")
    assert texts(server, temperature=0, allowed_token_ids=[64], max_tokens=5) == [tokenizer.decode([64]) * 5]
    (text,) = texts(server, temperature=2, allowed_token_ids=ids, max_tokens=30)
    assert set(text) == {"a", "b"}


def test_allowed_token_ids_range(server: ServerProcess) -> None:
    assert error_param(send(server, allowed_token_ids=[])) == "allowed_token_ids"
    assert error_param(send(server, allowed_token_ids=[1, 99999])) == "allowed_token_ids.1"
    assert error_param(send(server, allowed_token_ids=[1] * 40_000)) == "allowed_token_ids"


@pytest.mark.parametrize("path", BOTH)
def test_nothing_left_to_choose_is_the_error_of_one_request(server: ServerProcess, tokenizer, path: str) -> None:
    (token,) = tokenizer.encode("a")
    response = send(server, path, allowed_token_ids=[token], bad_words=["a"], n=2, max_tokens=5)
    assert response.status_code == 400
    assert "No token can come next" in response.json()["error"]["message"]
    assert texts(server, temperature=0) == [ANSWER]


def test_beam_search_or_no(server: ServerProcess) -> None:
    response = send(server, use_beam_search=True, n=2)
    assert error_param(response) == "use_beam_search"
    assert texts(server, temperature=0, use_beam_search=False, length_penalty=1.0, early_stopping=False) == [ANSWER]


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("typical_p", 0.5, 1.0),
        ("mirostat", 2, 0),
        ("dry_multiplier", 0.8, 0.0),
        ("xtc_probability", 0.5, 0),
        ("dynatemp_range", 0.5, 0),
        ("top_a", 0.1, 0),
        ("repeat_penalty", 1.1, 1),
        ("logits_processors", ["x.y"], []),
        ("stop_regex", "a+", ""),
        ("chat_template", "{{ messages }}", None),
    ],
)
def test_what_peers_act_on_is_refused_unless_it_is_off(
    server: ServerProcess, field: str, value: object, neutral: object
) -> None:
    assert error_param(send(server, **{field: value})) == field
    assert texts(server, temperature=0, **{field: neutral}) == [ANSWER]
