"""Hostile requests to the real server: they harm no neighbours, keep no memory, and are no failure of the server."""

import asyncio
import contextlib
import itertools
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import httpx
import psutil
import pytest

from qwen.checkpoint.loading import load_model, load_tokenizer
from qwen.model.qwen_generation_utils import encode_turns
from qwen.serving.api import chat, routing, sampling
from qwen.serving.api.app import create_app
from qwen.serving.api.errors import ApiError
from qwen.serving.engine import Engine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}
BODIES = {
    CHAT: HI | {"max_length": 60},  # so that no number makes the reply long
    TEXT: {"prompt": "hi", "max_tokens": 2, "max_length": 20, "temperature": 0},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2, "temperature": 0},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0},
}
JSON_TYPE = {"Content-Type": "application/json"}
MEGABYTE = 2**20
CLIENT = httpx.Client(timeout=300)  # of all threads: a new one takes longer than the answer


def send(url: str, path: str, body: object) -> httpx.Response:
    """Send a body: bytes and strings as they are, everything else as JSON."""
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    return CLIENT.post(f"{url}{path}", content=content, headers=JSON_TYPE)


def content(response: httpx.Response) -> str:
    """Return the text of a chat completion."""
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


# Neighbours


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param({"n": 2, "seed": "SEED"}, id="seed"),
        pytest.param({"repetition_penalty": 1e-40, "response_format": {"type": "json_object"}}, id="penalty"),
        pytest.param({"logit_bias": {str(token): -100 for token in range(1024)}, "bad_words": ["a", "b c"]}, id="bias"),
        pytest.param({"allowed_token_ids": [5], "bad_words": ["&"], "min_tokens": 2, "n": 4}, id="nothing allowed"),
    ],
)
def test_thirty_neighbours_are_answered_as_alone(server, hostile):
    """Log A1 to A5: a seed of 4300 digits gave 28 of 30 neighbours a 500."""
    plain = HI | {"max_tokens": 12}
    body = json.dumps(HI | hostile).replace('"SEED"', "9" * 4300)
    alone = content(send(server.url, CHAT, plain))
    with ThreadPoolExecutor(36) as clients:
        attacks = [clients.submit(send, server.url, CHAT, body) for _ in range(6)]
        neighbours = [clients.submit(send, server.url, CHAT, plain) for _ in range(30)]
        assert [content(each.result()) for each in neighbours] == [alone] * 30
        assert {each.result().status_code for each in attacks} <= {200, 400}


def test_a_seed_may_have_4300_digits(server):
    body = json.dumps(HI | {"n": 2, "temperature": 1, "seed": "SEED"}).replace('"SEED"', "9" * 4300)
    first, second = (send(server.url, CHAT, body) for _ in range(2))
    assert first.status_code == 200
    assert first.json()["choices"] == second.json()["choices"]


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e-320, 5e-324, 1e-30])
def test_a_tiny_repetition_penalty_is_refused(server, penalty):
    """Log A5: 500 with a grammar, NUL characters as the answer without one."""
    for temperature, grammar in itertools.product((0.01, 1, 2), ({}, {"response_format": {"type": "json_object"}})):
        body = HI | grammar | {"repetition_penalty": penalty, "temperature": temperature}
        response = send(server.url, CHAT, body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "repetition_penalty"


# The client's own mistakes

INTEGERS = ("0", "-0.0", "-1", "1e308", str(2**31), str(2**63), str(2**64), "9" * 4300, "-" + "9" * 4300, "1e400")
REALS = ("0", "-0.0", "5e-324", "-5e-324", "1e-40", "1e308", "-1e308", "9" * 4300)
FIELDS = {
    **dict.fromkeys(
        ("n", "max_tokens", "max_completion_tokens", "max_length", "min_tokens", "seed", "top_k"), INTEGERS
    ),
    **dict.fromkeys(("top_logprobs", "logprobs", "prompt_logprobs", "best_of", "truncate_prompt_tokens"), INTEGERS),
    **dict.fromkeys(("max_output_tokens",), INTEGERS),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), REALS),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), REALS),
}


@pytest.mark.parametrize("path", BODIES)
def test_extreme_numbers_are_no_failure(server, path):
    for field, values in FIELDS.items():
        for value in values:
            body = json.dumps(BODIES[path] | {field: "VALUE"}).replace('"VALUE"', value)
            response = send(server.url, path, body)
            assert response.status_code in (200, 400), (field, value[:20], response.text)


DIGITS = "9" * 4300
NESTED = [
    f'"logit_bias": {{"{DIGITS}": 1}}',
    f'"logit_bias": {{"1": {DIGITS}}}',
    '"logit_bias": {"1": 5e-324, "2": -0.0}',
    '"logit_bias": {"999999999": 1}',
    '"logit_bias": {}',
    f'"stop_token_ids": [{DIGITS}]',
    '"stop_token_ids": [1e308]',
    '"stop_token_ids": [-0.0]',
    '"stop_token_ids": []',
    f'"allowed_token_ids": [{DIGITS}]',
    '"allowed_token_ids": []',
    '"allowed_token_ids": [3583, -0.0]',
    '"bad_words": ["\\ud800"]',
    '"bad_words": ["\\udfff\\ud800", "\\u0000"]',
    '"bad_words": []',
    '"bad_words": [""]',
    '"stop": ["\\ud800"]',
    '"stop": []',
    '"stop": [null, ""]',
    '"stop": [{}]'.format(", ".join(json.dumps("a" * 999 + chr(65 + index)) for index in range(16))),
    '"stop": [{}]'.format(", ".join(json.dumps("a" * 1000) for _ in range(1024))),
    '"cache_salt": "\\ud800"',
    '"n": 128',
    '"n": 16, "max_tokens": 1',
    f'"stream": true, "stream_options": {{"include_usage": true}}, "seed": {DIGITS}, "n": 2',
    '"tools": []',
    f'"prompt": [{DIGITS}]',
    '"prompt": [[-0.0]]',
    '"prompt": []',
    '"prompt": [[]]',
    '"prompt": ["", ""]',
    '"prompt": "\\ud800"',
    '"messages": []',
    '"input": []',
    '"stop_sequences": ["\\ud800", ""]',
    '"logprobs": true, "top_logprobs": 20, "min_tokens": 2, "ignore_eos": true',
    '"response_format": {"type": "json_object"}, "allowed_token_ids": [5]',
]


@pytest.mark.parametrize("path", BODIES)
def test_extreme_values_in_lists_are_no_failure(server, path):
    for members in NESTED:
        body = json.dumps(BODIES[path])[:-1] + f", {members}}}"
        response = send(server.url, path, body)
        assert response.status_code in (200, 400), (members[:60], response.text)


def test_extreme_values_of_the_other_endpoints_are_no_failure(server):
    bodies = {
        "/v1/tokenize": ['{"prompt": "\\ud800"}', '{"content": ""}', '{"prompt": ""}', '{"messages": []}'],
        "/v1/detokenize": [f'{{"tokens": [{value}]}}' for value in INTEGERS] + ['{"tokens": []}'],
        "/v1/apply-template": [f'{{"messages": [{{"role": "user", "content": "\\ud800"}}], "seed": {DIGITS}}}'],
        "/v1/completions/render": [f'{{"prompt": [{value}]}}' for value in INTEGERS],
        "/v1/responses/input_tokens": [f'{{"input": "\\ud800", "max_output_tokens": {DIGITS}}}'],
        "/v1/messages/count_tokens": [f'{{"messages": [{{"role": "user", "content": ""}}], "top_k": {DIGITS}}}'],
    }
    for path, texts in bodies.items():
        for text in texts:
            response = send(server.url, path, text)
            assert response.status_code in (200, 400), (path, text[:60], response.text)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, HI | {"temperature": "hot"}, "temperature"),
        (CHAT, HI | {"messages": [{"role": "x", "content": "hi"}]}, "messages.0.role"),
        (TEXT, {"prompt": [["x"]]}, "prompt.0"),
        ("/v1/responses", {"input": [{"type": "x"}]}, "input.0.type"),
    ],
)
def test_errors_of_large_requests_name_the_field(server, path, body, param):
    """The content of a large request is released early, but not before its error names the field."""
    error = send(server.url, path, body | {"user": "x" * 2 * routing.LARGE_BYTES}).json()["error"]
    assert error["param"] == send(server.url, path, body).json()["error"]["param"]
    assert error["param"].startswith(param)
    assert error["message"].startswith(param)


def test_errors_of_a_reply_are_logged_with_the_request(server):
    """Log F12: the client was told to look into the log, which had no word of it."""
    body = HI | {"allowed_token_ids": [5], "bad_words": ["&"]}
    token = send(server.url, "/v1/tokenize", {"prompt": "&"}).json()["tokens"]
    response = httpx.post(
        f"{server.url}{CHAT}", json=body | {"allowed_token_ids": token}, headers={"X-Request-Id": "no-token-left"}
    )
    assert response.status_code == 400
    assert "Request no-token-left failed: ConstraintError: 'No token can come next" in server.output()


def test_brackets_in_strings_are_not_counted():
    many = "[{" * routing.MAX_CONTAINERS
    routing._check_size(json.dumps({"a": many, 'b"\\': '\\\\"' + many}).encode())
    with pytest.raises(ApiError, match="lists and objects"):
        routing._check_size(json.dumps({"a": "\\", "b": [[]] * routing.MAX_CONTAINERS}).encode())
    with pytest.raises(ApiError):  # not valid JSON
        routing._check_size(b'{"a' + b"[" * (routing.MAX_CONTAINERS + 1) + b'"' + b"[" * (routing.MAX_CONTAINERS + 1))


# Memory


@pytest.fixture(scope="module")
def tokenizer(bundled_chat):
    return load_tokenizer(bundled_chat)


TEXTS = {
    "letters": lambda draw, length: "".join(draw.choices("abcdefghij", k=length)),
    "words": lambda draw, length: " ".join("".join(draw.choices("abcde", k=4)) for _ in range(length // 5)),
    "blanks": lambda draw, length: " " * length,
    "marks": lambda draw, length: "\u0301\u0323a" * (length // 3),
    "hangul": lambda draw, length: "\u1112\u1161\u11ab" * (length // 3),
    "control tokens": lambda draw, length: "<|im_end|>" * (length // 10),
    "lines": lambda draw, length: "\n" * length,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_has_no_fewer_tokens_than_were_counted(tokenizer, kind):
    text = TEXTS[kind](random.Random(0), 3 * sampling.SLICE + 7)
    tokens = len(tokenizer.encode(text))
    assert 0 <= sampling.fewest_tokens(tokenizer, [text], 10**9) <= tokens
    if kind in ("letters", "words", "marks"):
        counted = sampling.fewest_tokens(tokenizer, [text[: len(text) // 2], text[len(text) // 2 :]], 10**9)
        assert counted > 0.9 * tokens


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4])
def test_history_that_is_too_long_is_dropped_unread(tokenizer, place):
    roles = ("user", "assistant", "user", "system", "assistant", "user")
    turns = [(role, f"turn {index}") for index, role in enumerate(roles)]
    turns[place] = (turns[place][0], TEXTS["letters"](random.Random(0), sampling.SLICE + 7))
    shorter = chat._without_long_history(turns, 700, tokenizer)
    assert encode_turns(tokenizer, shorter, 700) == encode_turns(tokenizer, turns, 700)
    assert (len(shorter) < len(turns)) == (roles[place] != "system")


def large_body(kind: str) -> tuple[str, bytes]:
    """Return a path and a body of 4 MB whose prompt is too long."""
    room = 4 * MEGABYTE - 200
    if kind == "ids":
        return TEXT, b'{"prompt": [[' + b",".join([b"1000"] * (room // 5)) + b"]]}"
    if kind == "lists":
        return TEXT, b'{"prompt": [' + b",".join([b"[]"] * (room // 3)) + b"]}"
    return CHAT, json.dumps(
        {"messages": [{"role": "user", "content": TEXTS["letters"](random.Random(0), room)}]}
    ).encode()


def test_refused_prompts_keep_no_memory(server):
    """Log D6, F27: ten prompts of 4 MB took 1.5 GB, and 1.4 GB stayed."""
    bodies = [large_body(kind) for kind in ("letters", "ids", "lists")]
    process = psutil.Process(server.process.pid)
    most = [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], process.memory_info().rss)

    def wave() -> None:
        for path, body in bodies:
            with ThreadPoolExecutor(10) as clients:
                replies = [clients.submit(send, server.url, path, body) for _ in range(10)]
                assert {reply.result().status_code for reply in replies} == {400}

    wave()  # creates threads and buffers
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    wave()
    over.set()
    watcher.join()
    assert most[0] - before < 200 * MEGABYTE
    deadline = time.monotonic() + 60
    while process.memory_info().rss - before >= 50 * MEGABYTE:
        assert time.monotonic() < deadline, f"{(process.memory_info().rss - before) / MEGABYTE:.0f} MB are kept"
        time.sleep(0.1)


def test_a_neighbour_is_answered_while_large_prompts_are_refused(server):
    alone = content(send(server.url, CHAT, HI))
    with ThreadPoolExecutor(10) as clients:
        replies = [clients.submit(send, server.url, *large_body("letters")) for _ in range(10)]
        assert content(send(server.url, CHAT, HI)) == alone
        wait(replies)


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 2 * routing.LARGE_BYTES])
def test_abandoned_requests_cost_nothing(bundled_chat, monkeypatch, size):
    """The client leaves once its request has arrived: a large one is not even parsed when it is its turn."""
    body = json.dumps({"prompt": "a " * size, "max_tokens": 1, "truncate_prompt_tokens": 5}).encode()
    messages = iter([{"type": "http.request", "body": body}])
    statuses, calls = [], []

    async def receive() -> dict:
        return next(messages, {"type": "http.disconnect"})

    async def note(message: dict) -> None:
        statuses.append(message.get("status"))

    def count(owner: object, name: str) -> None:
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(name))

    with contextlib.closing(Engine(*load_model(bundled_chat, cpu_only=True))) as engine:
        app = create_app(engine)
        count(engine, "start")
        if size > routing.LARGE_BYTES:
            count(routing, "from_json")
        headers = [(b"content-type", b"application/json"), (b"host", b"test")]
        scope = {"type": "http", "method": "POST", "path": TEXT, "query_string": b"", "headers": headers}
        asyncio.run(app(scope, receive, note))
        assert app.state.service.large_requests.borrowed_tokens == 0
    assert statuses[0] == 499
    assert calls == []
