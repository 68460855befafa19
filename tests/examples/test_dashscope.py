"""examples/dashscope_chat.py against a local server that imitates the hosted service."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.support import ROOT

PATH = "/api/v1/services/aigc/text-generation/generation"
KEY = "sk-right"

Run = tuple[int, str, str]


class Service:
    """A local service that streams the number of messages it received in two pieces, and records requests.

    Special models: qwen-busy is throttled (status 429), the answer of qwen-broken is cut off.
    """

    def __init__(self) -> None:
        self.requests: list[dict] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append({"path": self.path, **request})
                if self.headers["Authorization"] != f"Bearer {KEY}":
                    self.refuse(401, "InvalidApiKey", "Invalid API-key provided.")
                elif request["model"] == "qwen-busy":
                    self.refuse(429, "Throttling.RateQuota", "Requests rate limit exceeded.")
                else:
                    self.stream(request)

            def refuse(self, status: int, code: str, message: str) -> None:
                body = json.dumps({"code": code, "message": message, "request_id": "r-1"}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def stream(self, request: dict) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream;charset=UTF-8")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for number, text in enumerate(["我收到 ", f"{len(request['input']['messages'])} messages."], 1):
                    message = {"role": "assistant", "content": text}
                    output = {"choices": [{"message": message, "finish_reason": "stop" if number == 2 else "null"}]}
                    data = json.dumps({"output": output, "usage": {}, "request_id": "r-2"}, ensure_ascii=False)
                    self.chunk(f"id:{number}\nevent:result\n:HTTP_STATUS/200\ndata:{data}\n\n".encode())
                    if request["model"] == "qwen-broken":
                        self.close_connection = True
                        return
                self.chunk(b"")

            def chunk(self, content: bytes) -> None:
                self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/api/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


@pytest.fixture
def chat(service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Run]:
    """Run the example in this process and return (status, stdout, stderr)."""
    import dashscope

    from examples import dashscope_chat

    def run(*arguments: str, key: str = KEY, url: str = service.url, lines: str = "") -> Run:
        monkeypatch.setenv("DASHSCOPE_API_KEY", key)
        monkeypatch.setattr(dashscope, "api_key", key)  # the client reads the variable at import
        monkeypatch.setattr(dashscope, "base_http_api_url", url)
        monkeypatch.setattr(sys, "argv", ["dashscope_chat.py", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return dashscope_chat.main(), *capsys.readouterr()

    service.requests.clear()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return run


@pytest.mark.process
def test_turns_form_one_conversation(service: Service) -> None:
    service.requests.clear()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DASHSCOPE_")}
    variables = {"DASHSCOPE_HTTP_BASE_URL": service.url, "DASHSCOPE_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, "examples/dashscope_chat.py", "Who are you?", "And who made you?", "--system", "Be brief."],
        cwd=ROOT,
        env=inherited | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "我收到 2 messages.\n我收到 4 messages.\n", "")
    first, second = service.requests
    assert first["path"] == PATH
    assert first["model"] == "qwen-turbo"
    settings = {"seed": 1234, "result_format": "message", "incremental_output": True}
    assert settings.items() <= first["parameters"].items()
    assert second["input"]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "我收到 2 messages."},
        {"role": "user", "content": "And who made you?"},
    ]


def test_lines_of_standard_input_are_questions(service: Service, chat: Callable[..., Run]) -> None:
    run = chat("--model", "qwen-plus", "--seed", "7", lines="Hi\n\n你好\n")
    assert run == (0, "我收到 2 messages.\n我收到 4 messages.\n", "")
    assert [request["model"] for request in service.requests] == ["qwen-plus"] * 2
    assert service.requests[1]["parameters"]["seed"] == 7
    assert service.requests[1]["input"]["messages"][-1]["content"] == "你好"


def test_missing_key_is_explained(service: Service, chat: Callable[..., Run]) -> None:
    status, out, err = chat("Hi", key="")
    assert (status, out, service.requests) == (2, "", [])
    assert err.startswith("DASHSCOPE_API_KEY is not set. See https://help.aliyun.com/")


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        ([], "sk-wrong", ("status 401", "InvalidApiKey", "r-1", "DASHSCOPE_API_KEY is not a valid key")),
        (["--model", "qwen-busy"], KEY, ("status 429", "Throttling.RateQuota", "Wait a little")),
        (["--model", "qwen-broken"], KEY, ("the connection was lost",)),
    ],
)
def test_errors_are_explained(
    arguments: list[str], key: str, expected: tuple[str, ...], chat: Callable[..., Run]
) -> None:
    status, out, err = chat("Hi", *arguments, key=key)
    assert status == 1
    assert all(text in err for text in expected), err
    assert out == ("我收到 \n" if "qwen-broken" in arguments else "")  # text received before the error is kept


def test_unreachable_address_is_reported(chat: Callable[..., Run]) -> None:
    status, out, err = chat("Hi", url="http://127.0.0.1:9/api/v1")
    assert (status, out) == (1, "")
    assert "Cannot reach the service" in err
    assert "DASHSCOPE_HTTP_BASE_URL" in err
