"""Many concurrent clients of the real server: replies are those of single requests, and nothing leaks."""

import http.client
import json
import random
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from urllib.parse import urlsplit

import psutil
import pytest

pytestmark = pytest.mark.process

QUESTIONS = (
    "Hello!",
    "What is 47 + 38?",
    "你好，你是谁？",
    "My name is Alice. Please remember it.",
    "Tell me about this repository.",
    "请问 91 减 27 等于几？",
    "Which checkpoints are there?",
    "谢谢，再见！",
)


def request(text: str, **fields) -> dict:
    return {"model": "qwen", "messages": [{"role": "user", "content": text}], "temperature": 0} | fields


def connect(url: str, body: dict) -> http.client.HTTPConnection:
    """Send a request; the caller may read the response or close the connection."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def ask(url: str, body: dict) -> str:
    """Return the text of a response, streamed or not."""
    connection = connect(url, body)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    if not body.get("stream"):
        text = json.load(response)["choices"][0]["message"]["content"]
    else:
        events = [line[6:] for line in response if line.startswith(b"data: ")]
        assert events.pop().strip() == b"[DONE]"
        text = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)
    connection.close()
    return text


def test_sixteen_clients_get_the_replies_of_single_requests(server):
    rng = random.Random(0)
    bodies = [
        request(QUESTIONS[number % len(QUESTIONS)], stream=rng.random() < 0.5, seed=number)
        | rng.choice([{}, {"repetition_penalty": 1.1}, {"temperature": 0.8, "top_p": 0.9}, {"stop": ["a", "。"]}])
        for number in range(64)
    ]
    alone = [ask(server.url, body) for body in bodies]
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(lambda body: ask(server.url, body), bodies))
    assert together == alone
    assert len(set(alone)) > len(QUESTIONS)


def test_slow_grammars_do_not_keep_other_requests_waiting(server):
    """More of them than there are worker threads."""
    slow = request("hi", max_tokens=1, grammar="start: " + '"a"? ' * 1500)
    with ThreadPoolExecutor(60) as clients:
        replies = [clients.submit(ask, server.url, slow) for _ in range(60)]
        wait(replies, return_when=FIRST_COMPLETED)
        ask(server.url, request("hi", max_tokens=1))
        assert sum(reply.done() for reply in replies) < 15
        assert all(reply.result() in ("", "a") for reply in replies)


def test_disconnected_clients_leak_nothing(start_server, tiny_chat_checkpoint):
    """300 requests to a model that never ends a reply, most of them disconnected at a random moment."""
    # Return large freed blocks to the system instead of keeping them: what stays is a leak.
    server = start_server("-c", str(tiny_chat_checkpoint), python=True, MALLOC_MMAP_THRESHOLD_="1000000")
    process = psutil.Process(server.process.pid)

    def visit(seed: int) -> None:
        rng = random.Random(seed)
        stream = rng.random() < 0.5
        connection = connect(
            server.url, request("x" * rng.randrange(1, 300), stream=stream, max_tokens=rng.choice([1, 7000]))
        )
        time.sleep(rng.random() * 0.2)
        if stream and rng.random() < 0.5:
            connection.getresponse().read(rng.randrange(1, 500))
        connection.close()

    def wave(seeds: range) -> tuple[int, int, int]:
        with ThreadPoolExecutor(16) as clients:
            list(clients.map(visit, seeds))
        server.until_load(running=0)
        return process.num_threads(), process.num_fds(), process.memory_info().rss

    wave(range(100))  # create pools and buffers before measuring
    threads, files, memory = wave(range(100, 150))
    threads_after, files_after, memory_after = wave(range(150, 300))
    # The event loop's pool may grow to 40 threads; a leaked thread per request would make 150.
    assert threads_after <= max(threads, 50)
    assert files_after <= files + 16  # the last connections may not be closed yet
    # The cache keeps what later requests may find, 1 KiB a token. 150 leaked contexts of 8,192 tokens would be 1.2 GiB.
    assert memory_after - memory < 128 * 2**20
    assert ask(server.url, request("still there?", max_tokens=5))
