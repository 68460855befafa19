"""Tests of running openai_api.py: start, credentials, limits, disconnecting clients, signals, metrics."""

import argparse
import base64
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import anyio
import httpx
import openai
import pytest

from qwen_cli import serve as openai_api
from tests.support import ROOT
from tests.support.server_process import ServerProcess

HI = [{"role": "user", "content": "hi"}]
LONG = {"prompt": "The", "temperature": 0, "max_tokens": 6000, "stream": True}  # the model repeats it up to max_tokens
KEY = {"Authorization": "Bearer secret ключ".encode()}
API_KEY = {"X-Api-Key": "secret ключ".encode()}  # as Anthropic's clients send it
BASIC = {"Authorization": "Basic " + base64.b64encode("anna:pass:wörd".encode()).decode()}


@pytest.fixture(scope="module")
def guarded(bundled_chat) -> Iterator[ServerProcess]:
    """A server with credentials and one CORS origin, which runs one request and queues another."""
    arguments = ["--max-batch-size", "1", "--max-queue", "1", "--cors-origin", "http://localhost:3000"]
    arguments += ["--served-model-name", "toy", "--max-request-bytes", "2000", "--max-messages", "3", "--disable-gc"]
    variables = {"QWEN_API_AUTH": "anna:pass:wörd", "QWEN_API_KEY": "secret ключ"}
    process = ServerProcess("-c", str(bundled_chat), *arguments, **variables)
    yield process
    process.stop()


def begin(server: ServerProcess, client: httpx.Client, **fields) -> Iterator[str]:
    """Yield the lines of a stream; closing the generator disconnects."""
    with client.stream("POST", f"{server.url}/v1/completions", json=LONG | fields) as response:
        assert response.status_code == 200
        yield from response.iter_lines()


# Endpoints other than generation


def test_models(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        (model,) = client.models.list().data
        assert model.id == "qwen-tiny-chat"
        assert client.models.retrieve(model.id) == model
        with pytest.raises(openai.NotFoundError, match="qwen-tiny-chat"):
            client.models.retrieve("gpt-4o")


def test_health_and_documentation(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ready"}
    assert "swagger" in httpx.get(f"{server.url}/docs").text
    document = httpx.get(f"{server.url}/openapi.json").json()
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "tools", "response_format", "top_k", "max_length", "repetition_penalty"} <= set(fields)
    assert "422" not in document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert "security" not in document


def test_metrics(server: ServerProcess) -> None:
    names = ["qwen_prompt_tokens_total", "qwen_cached_prompt_tokens_total", "qwen_completion_tokens_total"]
    names += [f"qwen_{name}_seconds_count" for name in ("time_to_first_token", "time_per_output_token", "queue_time")]
    before = [server.metric(name) for name in names]
    body = {"messages": HI, "temperature": 0, "n": 2}
    usage = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["usage"]
    after = [server.metric(name) for name in names]
    grown = [new - old for new, old in zip(after, before, strict=True)]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert grown == [usage["prompt_tokens"], cached, usage["completion_tokens"], 2, 2, 2]
    assert 0 <= server.metric("qwen_queue_time_seconds_sum") <= server.metric("qwen_time_to_first_token_seconds_sum")
    for path in ("/no/such/1", "/no/such/2"):
        httpx.get(server.url + path)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'qwen_requests_total{endpoint="/v1/chat/completions",status="200"}' in text
    assert 'qwen_requests_total{endpoint="other",status="404"}' in text
    assert "/no/such" not in text
    assert 'qwen_request_duration_seconds_count{endpoint="/v1/chat/completions"}' in text


def test_metrics_of_the_load(server: ServerProcess) -> None:
    def finished(reason: str) -> float:
        text = httpx.get(f"{server.url}/metrics").text
        found = re.search(rf'^qwen_finished_sequences_total{{reason="{reason}"}} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    server.until_load(0)
    reasons = ("stop", "length", "cancelled")
    before = [finished(reason) for reason in reasons]
    assert server.metric("qwen_cache_usage_ratio") == server.metric("qwen_preemptions_total") == 0
    with httpx.Client(timeout=60) as client:
        for max_tokens in (1, 100):
            client.post(f"{server.url}/v1/chat/completions", json={"messages": HI, "max_tokens": max_tokens})
        lines = begin(server, client)
        next(lines)
        assert 0 < server.metric("qwen_cache_usage_ratio") <= 1
        lines.close()
    server.until_load(0)
    deadline = time.monotonic() + 60
    while finished("cancelled") == before[2]:  # recorded when the server sees that the client has left
        assert time.monotonic() < deadline
    assert [finished(reason) - old for reason, old in zip(reasons, before, strict=True)] == [1, 1, 1]
    assert server.metric("qwen_cache_usage_ratio") == 0


def test_every_response_has_a_request_id(server: ServerProcess, guarded: ServerProcess) -> None:
    chat = {"messages": HI, "max_tokens": 1}
    with httpx.Client(headers={"X-Request-Id": "my id/1"}, timeout=60) as client:
        responses = [
            client.get(f"{server.url}/health"),
            client.get(f"{server.url}/nothing"),
            client.get(f"{server.url}/v1/completions"),
            client.post(f"{server.url}/v1/chat/completions", json=chat | {"stream": True}),
            client.post(f"{server.url}/v1/chat/completions", json=chat | {"temperature": 3}),
            client.post(f"{server.url}/v1/chat/completions", content=b"{", headers={"Content-Type": "text/plain"}),
            client.get(f"{guarded.url}/v1/models"),
            client.post(f"{guarded.url}/v1/completions", json={"prompt": "x" * 3000}, headers=KEY),
            client.options(
                f"{guarded.url}/v1/models", headers={"Origin": "http://x.y", "Access-Control-Request-Method": "GET"}
            ),
        ]
    assert [response.status_code for response in responses] == [200, 404, 405, 200, 400, 415, 401, 413, 403]
    assert all(response.headers.get_list("x-request-id") == ["my id/1"] for response in responses)
    lines = [line for line in server.output().splitlines() if line.endswith(" my id/1")]
    assert any('"POST /v1/chat/completions HTTP/1.1" 200' in line for line in lines)


@pytest.mark.parametrize("given", [b"", b"a" * 129, "é".encode(), b"a\x01", b"a\tb"])
def test_request_ids_that_are_replaced(server: ServerProcess, given: bytes) -> None:
    response = httpx.get(f"{server.url}/version", headers=[(b"X-Request-Id", given)])
    assert re.fullmatch("req_[0-9a-f]{32}", response.headers["x-request-id"])
    assert httpx.get(f"{server.url}/version", headers={"X-Request-Id": "a" * 128}).headers["x-request-id"] == "a" * 128


def test_curl(server: ServerProcess) -> None:
    def curl(body: dict) -> str:
        command = ["curl", "--silent", "--show-error", "--no-buffer", f"{server.url}/v1/chat/completions"]
        command += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    body = {"messages": [{"role": "user", "content": "What is 47 + 38?"}], "temperature": 0}
    assert json.loads(curl(body))["choices"][0]["message"]["content"] == "47 + 38 = 85."
    *events, end, rest = curl(body | {"stream": True}).split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == "47 + 38 = 85."


# Credentials and limits


@pytest.mark.process
@pytest.mark.parametrize(
    "headers",
    [
        KEY,
        BASIC,
        {"Authorization": BASIC["Authorization"].replace("Basic", "basic")},
        API_KEY,
        {"Authorization": "Bearer wrong"} | API_KEY,
        KEY | {"X-Api-Key": "wrong"},
    ],
)
def test_either_of_the_credentials_is_accepted(guarded: ServerProcess, headers: dict) -> None:
    for path in ("/v1/models", "/metrics", "/docs", "/openapi.json"):
        assert httpx.get(guarded.url + path, headers=headers).status_code == 200
    assert httpx.get(f"{guarded.url}/v1/models/toy", headers=headers).json()["id"] == "toy"
    document = httpx.get(f"{guarded.url}/openapi.json", headers=headers).json()
    assert set(document["components"]["securitySchemes"]) == {"basic", "bearer", "key"}


@pytest.mark.process
@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer secret",
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(b"anna:wrong").decode(),
        "Basic " + base64.b64encode("secret ключ".encode()).decode(),
        "Bearer anna:pass:wörd".encode(),
        "Digest " + base64.b64encode("anna:pass:wörd".encode()).decode(),
    ],
)
def test_wrong_credentials_are_rejected(guarded: ServerProcess, given: str | bytes | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for method, path in [("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/nowhere")]:
        response = httpx.request(method, guarded.url + path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == 'Basic realm="qwen", Bearer realm="qwen"'
    assert httpx.get(f"{guarded.url}/health", headers=headers).status_code == 200


@pytest.mark.process
@pytest.mark.parametrize("key", ["", "wrong", "secret", "anna:pass:wörd".encode()])
def test_wrong_keys_of_the_messages_api_are_rejected(guarded: ServerProcess, key: str | bytes) -> None:
    response = httpx.post(f"{guarded.url}/v1/messages", json={"messages": HI}, headers={"X-Api-Key": key})
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"
    assert "X-Api-Key: KEY" in response.json()["error"]["message"]


def test_cors_allows_the_given_origin_only(guarded: ServerProcess, server: ServerProcess) -> None:
    def preflight(to: ServerProcess, origin: str) -> httpx.Response:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        return httpx.options(f"{to.url}/v1/chat/completions", headers={"Origin": origin, **asked})

    allowed = preflight(guarded, "http://localhost:3000")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "http://localhost:3000"
    for response in (preflight(guarded, "http://evil.example"), preflight(server, "http://localhost:3000")):
        assert "access-control-allow-origin" not in response.headers
    refused = httpx.get(f"{guarded.url}/v1/models", headers={"Origin": "http://localhost:3000"})
    assert refused.status_code == 401
    assert "access-control-allow-origin" in refused.headers
    assert "X-Request-Id" in refused.headers["access-control-expose-headers"]
    assert "DELETE" in allowed.headers["access-control-allow-methods"]


@pytest.mark.parametrize(
    ("origin", "advice"),
    [
        ("http://localhost:3000", "start the server with --cors-origin http://localhost:3000."),
        ("app://obsidian.md", "start the server with --cors-origin app://obsidian.md."),
        ("null", "allow that with --cors-origin ORIGIN"),
        ("http://x;reboot", "allow that with --cors-origin ORIGIN"),
    ],
)
def test_rejected_web_page_is_told_the_option(server: ServerProcess, origin: str, advice: str) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for _ in range(2):
        response = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
        assert response.status_code == 403
        assert advice in response.json()["error"]["message"]
    (line,) = [line for line in server.output().splitlines() if f"Web pages of origin {origin!r}" in line]
    assert advice in line


@pytest.mark.process
def test_preflight_of_another_origin_needs_no_credentials(guarded: ServerProcess) -> None:
    headers = {"Origin": "http://localhost:4000", "Access-Control-Request-Method": "POST"}
    response = httpx.options(f"{guarded.url}/v1/chat/completions", headers=headers)
    assert response.status_code == 403
    assert "--cors-origin http://localhost:4000" in response.text
    assert "--cors-origin http://localhost:4000" in guarded.output()


@pytest.mark.process
def test_normalized_paths_need_credentials(guarded: ServerProcess) -> None:
    for path in ("//v1/models", "/v1/models/", "//metrics", "/models", "//models/toy"):
        assert httpx.get(guarded.url + path).status_code == 401
    assert httpx.get(f"{guarded.url}//health/").status_code == 200


def test_origins_of_web_pages_and_programs() -> None:
    for text in ("*", "http://localhost:3000", "app://obsidian.md", "chrome-extension://abcdef"):
        assert openai_api.origin(text) == text
    for text in ("localhost:3000", "null", "http://localhost/page", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="origin"):
            openai_api.origin(text)


@pytest.mark.process
def test_limits_are_configurable(guarded: ServerProcess) -> None:
    url = f"{guarded.url}/v1/chat/completions"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}] * 2
    many = httpx.post(url, json={"messages": messages}, headers=KEY)
    assert many.status_code == 400
    assert "at most 3" in many.json()["error"]["message"]
    long = httpx.post(url, json={"messages": [{"role": "user", "content": "a" * 2000}]}, headers=KEY)
    assert long.status_code == 413
    assert httpx.post(url, json={"messages": HI, "max_tokens": 1}, headers=KEY, timeout=60).status_code == 200


@pytest.mark.process
def test_full_queue_is_429(guarded: ServerProcess) -> None:
    with (
        openai.OpenAI(
            base_url=f"{guarded.url}/v1", api_key="unused", default_headers={"Authorization": BASIC["Authorization"]}
        ) as client,
        httpx.Client(headers=KEY, timeout=60) as other,
    ):
        running = begin(guarded, other)
        next(running)
        waiting = threading.Thread(target=lambda: list(begin(guarded, other, max_tokens=1)))
        waiting.start()
        guarded.until_load(1, 1, headers=KEY)
        with pytest.raises(openai.RateLimitError) as error:
            client.with_options(max_retries=0).chat.completions.create(model="toy", messages=HI)
        assert int(error.value.response.headers["retry-after"]) >= 1
        assert error.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.BadRequestError, match="2"):
            client.chat.completions.create(model="toy", messages=HI, n=3)
        running.close()
        waiting.join(60)
    guarded.until_load(0, 0, headers=KEY)


# Clients that disconnect


@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_client_frees_its_place(server: ServerProcess, stream: bool) -> None:
    server.until_load(0)
    before = server.metric("qwen_completion_tokens_total")
    with httpx.Client(timeout=60) as client:
        if stream:
            lines = begin(server, client, n=3)
            for _ in range(20):
                next(lines)
            assert server.metric("qwen_running_sequences") == 3
        else:
            address = server.url.removeprefix("http://").split(":")
            body = json.dumps(LONG | {"stream": False, "n": 3}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            with socket.create_connection((address[0], int(address[1]))) as connection:
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                server.until_load(3)
    server.until_load(0)
    assert server.metric("qwen_completion_tokens_total") - before < 3 * 6000  # they were not finished


def test_many_clients_disconnect(server: ServerProcess) -> None:
    async def visit(client: httpx.AsyncClient, lines: int) -> None:
        async with client.stream("POST", f"{server.url}/v1/completions", json=LONG) as response:
            async for _ in response.aiter_lines():
                lines -= 1
                if lines <= 0:
                    return

    async def visit_all() -> None:
        async with httpx.AsyncClient(timeout=120) as client, anyio.create_task_group() as visitors:
            for number in range(24):
                visitors.start_soon(visit, client, number * 7 % 10)

    anyio.run(visit_all)
    server.until_load(0)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HI, "temperature": 0}, timeout=60)
    assert answer.json()["choices"][0]["message"]["content"].startswith("Hello")


# Signals


def test_sigterm_lets_replies_finish(start_server: Callable[..., ServerProcess], bundled_chat) -> None:
    # Longer than the longest wait of a thread.
    server = start_server("-c", str(bundled_chat), "--drain-seconds", "1e10")
    host, port = server.url.removeprefix("http://").split(":")
    slow = socket.create_connection((host, int(port)), timeout=120)
    with slow, httpx.Client(timeout=120) as client, httpx.Client(timeout=60) as late:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(head + b'Content-Length: 100\r\n\r\n{"prompt"')  # the rest is never sent
        lines = begin(server, client, max_tokens=600)
        next(lines)
        server.signal(signal.SIGTERM)
        while (health := late.get(f"{server.url}/health")).status_code == 200:
            pass
        assert health.json() == {"status": "draining"}
        refused = late.post(f"{server.url}/v1/completions", json={"prompt": "The"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        *_, last, done = [line for line in lines if line]
        answer = slow.makefile("rb").read()
        assert b"shutting_down" in answer or b'"timeout"' in answer  # if the reply took longer than a body may
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.wait() == 0
    assert "Stopping" in server.output()
    assert "Traceback" not in server.output()


@pytest.mark.parametrize(("drain_seconds", "signals"), [("0.2", 1), ("600", 2)])
def test_replies_that_are_cut_off_end_in_an_error(
    start_server: Callable[..., ServerProcess], bundled_chat, drain_seconds: str, signals: int
) -> None:
    server = start_server("-c", str(bundled_chat), "--drain-seconds", drain_seconds, python=signals == 2)
    with httpx.Client(timeout=120) as client:
        lines = begin(server, client)
        next(lines)
        server.signal(signal.SIGINT)
        if signals == 2:
            while "Stopping" not in server.output():
                assert server.process.poll() is None
            server.signal(signal.SIGTERM)
        *_, last = [line for line in lines if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "shutting_down"
    assert "incomplete" in error["message"]
    assert server.wait() == signals - 1
    assert "Traceback" not in server.output()


# Start


def run(*arguments: str, python: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *python, "openai_api.py", *arguments],
        cwd=ROOT,
        env={"HF_HUB_OFFLINE": "1", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_needs_no_libraries() -> None:
    result = run("--help", python=("-S",))
    assert result.returncode == 0
    assert "--api-key" in result.stdout
    assert "QWEN_API_KEY" in result.stdout


def test_missing_libraries_are_named() -> None:
    result = run("--server-port", "0", python=("-S",))
    assert result.returncode == 1
    assert "pip install -e '.[serve]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server-port", "99999"], "65535"),
        (["--server-port", "http"], "whole number"),
        (["--max-batch-size", "0"], "at least 1"),
        (["--drain-seconds", "soon"], "seconds"),
        (["--response-store", "-1"], "at least 0"),
        (["--api-auth", "anna"], "USER:PASS"),
        (["--api-auth", ":pass"], "USER:PASS"),
        (["--api-key", ""], "printable"),
        (["--api-key", " x"], "blanks"),
        (["--no-such-flag"], "unrecognized"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_port_in_use_is_a_one_line_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("--server-port", port)
    assert result.returncode == 1
    assert port in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_missing_checkpoint_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["openai_api.py", "-c", "/no/such/folder", "--server-port", "0"])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # main() sets it: restore it afterwards
    assert openai_api.main() == 1
    loading, complaint = capfd.readouterr().err.splitlines()
    assert loading == "Loading /no/such/folder ..."
    assert "/no/such/folder" in complaint


def test_server_prints_its_address(server: ServerProcess, guarded: ServerProcess) -> None:
    for process, name in ((server, "qwen-tiny-chat"), (guarded, "toy")):
        assert f"{name} answers at {process.url}/v1 (documentation: {process.url}/docs)" in process.output()
        assert re.match(r"http://127\.0\.0\.1:\d+$", process.url)
        assert "Anybody" not in process.output()  # the warning about other machines
