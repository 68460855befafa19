"""Hostile HTTP and surroundings of a server: broken outputs, keys, Host headers, proxies, long and late input."""

import base64
import contextlib
import fcntl
import json
import logging
import logging.config
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from qwen.checkpoint.checkpoint import Checkpoint
from qwen.checkpoint.files import CheckpointError
from qwen.checkpoint.generation_settings import check_generation_settings
from qwen.serving.api.errors import MAX_MESSAGE, ApiError
from qwen.serving.api.middleware import AuthenticationMiddleware
from qwen.serving.api.server import log_config
from qwen.serving.hosts import HostMiddleware, hosts_to_allow
from tests.serving.engine.replies import wait_until
from tests.support import ROOT
from tests.support.processes import Child, Script, open_standard_files, run_script
from tests.support.server_process import ServerProcess

HI = [{"role": "user", "content": "hi"}]
TIMEOUT = 120  # seconds


def get(url: str, host: str | None = None, **options: Any) -> httpx.Response:
    headers = {} if host is None else {"Host": host}
    return httpx.get(url, headers=headers | options.pop("headers", {}), timeout=TIMEOUT, **options)


def talk(url: str, *parts: bytes, half_close: bool = False) -> bytes:
    """Send bytes to the address of a URL and return everything that comes back until the connection is closed."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
        for part in parts:
            connection.sendall(part)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(2**16):
                answer += data
    return answer


# Outputs that cannot be written


def run_with_output(output: str, script: str, port: int) -> None:
    """Run a server whose standard output and error are `output`; called in a process of its own."""
    if output == "closed":
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None  # as Python starts
    else:
        reader, writer = os.pipe() if output != "full" else (None, os.open("/dev/full", os.O_WRONLY))
        if output == "reader gone":
            os.close(reader)
        elif output == "reader stopped":
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        open_standard_files()
    sys.argv = [script, "--cpu-only", "--server-port", str(port)]
    runpy.run_path(script, run_name="__main__")


@pytest.mark.process
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("script", "output", "number"),
    [
        ("openai_api.py", "reader gone", signal.SIGTERM),
        ("openai_api.py", "full", signal.SIGINT),
        ("openai_api.py", "closed", signal.SIGTERM),
        ("openai_api.py", "reader stopped", signal.SIGTERM),
        ("web_demo.py", "reader gone", signal.SIGTERM),
    ],
)
def test_a_server_whose_output_cannot_be_written_answers_and_ends(
    tmp_path: Path, script: str, output: str, number: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / script).symlink_to(ROOT / script)
    process = Child(tmp_path, run_with_output, output, str(ROOT / script), port)
    try:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.poll() is None
            with contextlib.suppress(httpx.TransportError):
                return get(f"{url}/health" if script == "openai_api.py" else url).status_code == 200
            return False

        wait_until(answers)
        if script == "openai_api.py":
            with httpx.Client(timeout=TIMEOUT) as client:
                for _ in range(40 if output == "reader stopped" else 1):  # lines of the log, more than the pipe takes
                    assert client.get(f"{url}/version?{'x' * 200}").status_code == 200
                reply = client.post(f"{url}/v1/chat/completions", json={"messages": HI, "max_tokens": 2})
            assert reply.status_code == 200
        process.send_signal(number)
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()


def test_closed_descriptors_are_not_reused() -> None:
    """Without it, the first connection of a server gets descriptor 2, and with it what libraries print."""
    code = (
        "import os, sys; from qwen_cli.console import open_closed_streams, print_message\n"
        "print_message('lost'); open_closed_streams(); print_message('lost, too')\n"
        "print(os.open('/dev/null', os.O_RDONLY) > 2 and os.fstat(2).st_rdev == os.stat('/dev/null').st_rdev)"
    )
    command = f'exec {sys.executable} -c "$0" 2>&- <&-'
    done = subprocess.run(["bash", "-c", command, code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.process
def test_the_terminal_chat_answers_without_standard_error(tmp_path: Path) -> None:
    questions = tmp_path / "questions"
    questions.write_text("What is 47 + 38?\n")
    process = Child(tmp_path, chat_without_error, str(questions), str(tmp_path / "answers"))
    assert process.wait(TIMEOUT) == 0
    assert (tmp_path / "answers").read_text() == "47 + 38 = 85.\n"


def chat_without_error(questions: str, answers: str) -> None:
    """Run cli_demo.py with standard error on a full disk; called in a process of its own."""
    for number, opened in enumerate(
        (os.open(questions, os.O_RDONLY), os.open(answers, os.O_WRONLY | os.O_CREAT), os.open("/dev/full", os.O_WRONLY))
    ):
        os.dup2(opened, number)
    open_standard_files()
    sys.argv = ["cli_demo.py", "--cpu-only"]
    try:
        runpy.run_path(str(ROOT / "cli_demo.py"), run_name="__main__")
    finally:  # a Python that exits ignores that standard error cannot be written, unlike the fork server
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.mark.process
def test_the_terminal_chat_ends_without_standard_output(tmp_path: Path) -> None:
    questions, errors = tmp_path / "questions", tmp_path / "errors"
    questions.write_text("What is 47 + 38?\n")
    process = Script("cli_demo.py", "--cpu-only", files=(questions, "/dev/full", errors))
    assert process.wait(TIMEOUT) == 1
    assert errors.read_text().endswith("Cannot write the reply to standard output: No space left on device.\n")
    assert "Traceback" not in errors.read_text()


# Keys


@pytest.mark.parametrize(
    "key", ["voilà", "国内", "ключР", "schlüssel", "パスワード", "한국어", "Zoë à", "plain", "à", "x…"]
)
def test_any_key_is_accepted(key: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def status(name: str, value: bytes) -> int:
        guarded = AuthenticationMiddleware(app, basic=f"{key}:{key}", key=key)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://test") as client:
            return (await client.get("/", headers=[(name.encode(), value)])).status_code

    encodings = [key.encode()]
    with contextlib.suppress(UnicodeEncodeError):  # Python's requests and fetch of browsers send latin-1
        encodings.append(key.encode("latin-1"))
    for encoded in encodings:
        basic = base64.b64encode(encoded + b":" + encoded)
        for name, value in (
            ("Authorization", b"Bearer " + encoded),
            ("Authorization", b" bearer   " + encoded + b"\t "),
            ("X-Api-Key", b" " + encoded + b" "),
            ("Authorization", b"Basic " + basic),
        ):
            assert anyio.run(status, name, value) == 200, (name, value)
            # Neither fewer bytes nor more: those that str.strip removes are part of a key.
            for wrong in (value.rstrip()[:-1], value.rstrip() + b"\xa0", value.rstrip() + b"\x85"):
                assert anyio.run(status, name, wrong) == 401, (name, wrong)


@pytest.fixture(scope="module")
def guarded(bundled_chat: Path) -> Iterator[ServerProcess]:
    """A server with credentials, an allowed host and a trusted proxy."""
    process = ServerProcess(
        *(
            "-c",
            str(bundled_chat),
            "--api-key",
            "国内",
            "--allowed-host",
            "*.api.example",
            "--trusted-proxy",
            "127.0.0.1",
        )
    )
    yield process
    process.stop()


@pytest.mark.process
def test_a_key_that_ends_in_a_byte_that_looks_blank(guarded: ServerProcess) -> None:
    def status(key: bytes) -> int:
        return get(f"{guarded.url}/v1/models", headers={"Authorization": b"Bearer " + key}).status_code

    assert status("国内".encode()) == 200
    assert status("国内".encode()[:-1]) == 401


# Hosts and proxies


def test_the_host_of_a_server_on_this_machine(server: ServerProcess) -> None:
    port = server.url.rpartition(":")[2]
    for host in ("localhost", f"LOCALHOST:{port}", "localhost.", "a.localhost:1", "127.0.0.1", "127.9.9.9", "[::1]:80"):
        assert get(f"{server.url}/v1/models", host).status_code == 200, host
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "evillocalhost", "127.0.0.1.nip.io"):
        for path in ("/v1/models", "/health", "/nowhere"):
            assert get(f"{server.url}{path}", host).status_code == 403, (host, path)
    for host in (
        "",
        "10.0.0.1",
        "[::ffff:7f00:1]",
        "127.1",
        "2130706433",
        "local host",
        "[::1",
        "@localhost",
        "x" * 9000,
    ):
        answer = get(f"{server.url}/v1/models", host)
        assert answer.status_code == 403, host
        assert len(answer.json()["error"]["message"]) < 350
    error = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HI}, headers={"Host": "a.example:1"})
    assert error.json()["error"]["code"] == "host_not_allowed"
    assert error.json()["error"]["message"].endswith("start the server with --allowed-host a.example.")
    assert talk(server.url, b"GET /version HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    two = b"GET /version HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert not talk(server.url, two).startswith(b"HTTP/1.1 200")
    upgrade = (
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YQ==\r\n\r\n"
    )
    assert not talk(server.url, b"GET / HTTP/1.1\r\nHost: evil.example\r\n" + upgrade).startswith(b"HTTP/1.1 101")


@pytest.mark.process
def test_allowed_hosts_are_enforced(guarded: ServerProcess) -> None:
    headers = {"Authorization": "Bearer 国内".encode()}
    for host, status in {"a.api.example": 200, "localhost": 200, "api.example": 403, "other.example": 403}.items():
        assert get(f"{guarded.url}/v1/models", host, headers=headers).status_code == status


def test_hosts_by_address_and_credentials() -> None:
    local = {"server_name": "box", "address": "127.0.1.1"}
    everywhere = {"server_name": "0.0.0.0", "address": "0.0.0.0"}
    assert hosts_to_allow([], **local, has_credentials=False) == ("box",)
    assert hosts_to_allow([], **local, has_credentials=True) == ("*",)
    assert hosts_to_allow([], **everywhere, has_credentials=False) == ("*",)
    assert hosts_to_allow(["a.example"], **everywhere, has_credentials=True) == ("a.example", "0.0.0.0")
    assert HostMiddleware(None, ["BOX", "[fe80::1]"]).is_allowed("box.:80")
    assert HostMiddleware(None, ["BOX", "[fe80::1]"]).is_allowed("[fe80::1]")
    assert not HostMiddleware(None, ["BOX"]).is_allowed("box.example")


@pytest.mark.process
@pytest.mark.parametrize("words", [("--allowed-host", "http://a.example"), ("--trusted-proxy", "my proxy")])
def test_malformed_hosts_and_proxies_are_refused(words: tuple[str, str]) -> None:
    done = run_script("openai_api.py", *words)
    assert done.returncode == 2
    assert f"{words[1]!r}" in done.stderr.splitlines()[-1]


@pytest.mark.process
def test_forwarded_addresses(server: ServerProcess, guarded: ServerProcess) -> None:
    headers = {"X-Forwarded-For": "9.8.7.6", "X-Forwarded-Proto": "https"}

    def line_of(process: ServerProcess, marker: str) -> str:
        get(f"{process.url}/{marker}", headers=headers | {"Authorization": "Bearer 国内".encode()})
        wait_until(lambda: marker in process.output())
        return next(line for line in process.output().splitlines() if marker in line)

    assert re.search(r" 127\.0\.0\.1:\d+ - ", line_of(server, "not-believed"))
    assert " 9.8.7.6:0 - " in line_of(guarded, "believed")


# Input that is long, late or half


def test_pages_of_other_origins_cannot_post(server: ServerProcess) -> None:
    """A form or a `fetch` without a preflight can send these types, or none."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        headers = {"Origin": "http://evil.example", "Content-Type": content_type}
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", content=json.dumps({"messages": HI}), headers=headers, timeout=TIMEOUT
        )
        assert answer.status_code == 415
        assert "access-control-allow-origin" not in answer.headers


LONG = "x" * 1_000_000
LONG_FIELDS: list[dict[str, Any]] = [
    {"response_format": {"type": LONG}},
    {"tools": [{"type": "function", "function": {"name": "a"}}], "tool_choice": {"function": {"name": LONG}}},
    {"logit_bias": {LONG: 1}},
    {"stop_token_ids": [int("9" * 4000)]},
    {"messages": [{"role": "user", "content": [{"type": LONG}]}]},
    {"grammar": "a b " * 10_000},
    {"regex": "(" + "a b " * 10_000},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "a " * 10_000}}}},
    {"tools": [{"type": LONG}]},
]


def test_errors_do_not_echo_long_input(server: ServerProcess) -> None:
    for fields in LONG_FIELDS:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", json={"messages": HI, "max_tokens": 1, **fields}, timeout=TIMEOUT
        )
        assert answer.status_code == 400, fields.keys()
        assert len(answer.json()["error"]["message"]) <= MAX_MESSAGE, fields.keys()
        assert len(answer.content) < 1000, fields.keys()
    long = "y" * 30_000
    for path in (f"/v1/models/{long}", f"/{long}", f"/v1/responses/{long}", f"/{'%20y' * 10_000}"):
        assert len(get(f"{server.url}{path}").content) < 1000
    posts = {"Content-Type": long, "Content-Encoding": long}
    for name, value in posts.items():
        headers = {"Content-Type": "application/json", name: value}
        answer = httpx.post(f"{server.url}/v1/completions", content="{}", headers=headers, timeout=TIMEOUT)
        assert answer.status_code == 415
        assert len(answer.content) < 1000
    wait_until(lambda: f"/{'y' * 50}" in server.output())
    assert "y" * 300 not in server.output()


def test_a_cut_message_keeps_its_start_and_end() -> None:
    message = ApiError(400, f"field: {'a b ' * 300} is wrong. Send another.").body["error"]["message"]
    assert message.startswith("field: a b ")
    assert message.endswith("is wrong. Send another.")
    assert ApiError(400, "a\n  b\x1b\u202e", param="x\ny").body["error"] == {
        "message": "a b\\x1b\\u202e",
        "type": "invalid_request_error",
        "param": "x\\ny",
        "code": None,
    }
    quoted = ApiError(404, f"Unknown {LONG!r}. Use 'it'.", param=LONG).body["error"]
    assert re.fullmatch(r"Unknown 'x+ … \(1000002 characters\) … x+'\. Use 'it'\.", quoted["message"])
    assert len(quoted["message"]) < 250
    assert len(quoted["param"]) <= 200
    escaped = ApiError(400, "\U000e0001 " * 300, param="\U000e0001" * 150).body["error"]  # ten characters each
    assert len(escaped["message"]) <= MAX_MESSAGE
    assert len(escaped["param"]) <= 200


def test_a_body_that_never_comes(server: ServerProcess) -> None:
    """A client that asks before it sends is answered at once, and one that sends nothing within seconds."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    length = b"Content-Length: 5000000\r\n"
    for expect in (b"Expect: 100-continue\r\n", b""):
        started = time.monotonic()
        answer = talk(server.url, head + length + expect + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert time.monotonic() - started < 25  # body_seconds is 30


def test_a_client_that_half_closes_has_left(server: ServerProcess) -> None:
    """Its request ends without an answer, as that of a client that is gone, and the server goes on."""
    body = json.dumps({"messages": HI, "max_tokens": 8000, "ignore_eos": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a.localhost\r\nContent-Length: {len(body)}\r\n"
    request = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
    for _ in range(5):
        assert talk(server.url, request, half_close=True) == b""
    server.until_load(0)
    assert get(f"{server.url}/version").status_code == 200


@pytest.mark.parametrize("path", ["%1b%5b31m%0aINFO:%20forged", "%c2%9b31m", "%e2%80%ae", "%7f%08%07"])
def test_requests_cannot_write_control_characters_to_the_log(server: ServerProcess, path: str) -> None:
    marker = f"marker-{path.replace('%', '-')[:6]}"
    request = f"GET /{marker}/{path}?{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n".encode()
    talk(server.url, request + b"User-Agent: \x9b31m\r\nX-Request-Id: \xc2\x9b\r\nReferer: \xe2\x80\xae\r\n\r\n")
    wait_until(lambda: marker in server.output())
    (line,) = [line for line in server.output().split("\n") if marker in line]
    assert line.isprintable()
    assert "\nINFO: forged" not in server.output()


def test_what_is_logged_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    """Also in exceptions, and in the address that a trusted proxy hands on."""
    loggers = [logging.getLogger(name) for name in ("", "qwen", "uvicorn", "uvicorn.access", "uvicorn.error")]
    before = [(each, each.handlers[:], each.level, each.propagate) for each in loggers]
    try:
        logging.config.dictConfig(log_config())
        logging.getLogger("uvicorn.access").info(
            '%s - "%s %s HTTP/%s" %d', "\x1b[2J\x9b1m a:0", "GET", "/" + "z" * 5000, "1.1", 200
        )
        logging.getLogger("qwen.serving").warning("failed: %s", "\x1b[31m\r\nforged\u202e")
        try:
            raise ValueError("\x1b[31mevil" + "w" * 5000)
        except ValueError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    finally:
        for each, handlers, level, propagate in before:
            each.handlers, each.level, each.propagate = handlers, level, propagate
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert text.replace("\n", "").isprintable()
    assert "\\x1b[31m\\r\\nforged\\u202e" in text
    assert "Traceback" in text
    assert "z" * 300 not in text
    assert "w" * 1100 not in text


# generation_config.json

WRONG_SETTINGS: list[tuple[str, object]] = [
    *(("top_p", value) for value in (5, 0, -1, "x", True, [0.5], 10**400)),
    *(("top_k", value) for value in (-5, "x", 1.5, 2**31)),
    *(("temperature", value) for value in ("hot", -1, 10**400, {}, False)),
    *(("repetition_penalty", value) for value in (0, 1e-40, -1, "x")),
    *(("max_new_tokens", value) for value in (0, "many", -1, 1.5)),
    *(("eos_token_id", value) for value in ([[1]], "x", -1, [], [None], {"a": 1})),
    *(("pad_token_id", value) for value in ("x", -1, [0])),
    *(("do_sample", value) for value in ("yes", 1)),
    *(("min_p", value) for value in (2, "x")),
    *(("stop_words_ids", value) for value in ([1], "x", [[]], [["x"]])),
    *(("watermarking_config", value) for value in ("x", 5, [1])),
    ("max_window_size", 0),
    ("chat_format", ["chatml"]),
    ("bos_token_id", "x"),
    ("num_beams", "x"),
]


@pytest.mark.parametrize(("field", "value"), WRONG_SETTINGS, ids=lambda value: str(value)[:20])
def test_wrong_generation_settings_are_named(field: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_generation_settings({"chat_format": "chatml", field: value}, "my-model")
    message = str(caught.value)
    assert message.startswith(f"{field} in generation_config.json of my-model ")
    assert repr(value)[:50] in message
    assert "\n" not in message
    assert len(message) < 400


def test_sensible_generation_settings_stay_allowed(bundled_chat: Path) -> None:
    settings = Checkpoint(bundled_chat).check_generation_settings().generation_settings
    for fields in (
        {},
        {"top_p": 1.0, "top_k": 0, "temperature": 0.0, "do_sample": False},
        dict.fromkeys(("top_p", "top_k", "temperature", "eos_token_id", "max_new_tokens", "do_sample")),
        {"top_p": 1, "temperature": 1, "repetition_penalty": 1.1, "eos_token_id": [1, 2], "num_beams": 4},
        {"no_such_field": [1], "transformers_version": "4.31.0", "chat_format": "raw", "stop_words_ids": [[1], [2, 3]]},
    ):
        check_generation_settings(settings | fields, "my-model")


@pytest.mark.process
@pytest.mark.parametrize("script", ["openai_api.py", "web_demo.py", "cli_demo.py"])
def test_wrong_generation_settings_are_refused_at_start(tmp_path: Path, bundled_chat: Path, script: str) -> None:
    folder = Path(shutil.copytree(bundled_chat, tmp_path / "model"))
    content = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(content | {"top_p": 5}))
    done = run_script(script, "-c", folder, "--cpu-only")
    assert done.returncode == 1
    *_, message = done.stderr.splitlines()
    name = f"top_p in generation_config.json of {folder}"
    assert message == f"{name} must be a number above 0 and up to 1, not 5. Correct or remove it."
    assert "Traceback" not in done.stderr


# The page about all of this


def test_the_page_on_security_names_existing_tests() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    names = re.findall(r"`(test_\w+)`", page)
    assert names
    assert [name for name in names if f"def {name}(" not in source] == []
