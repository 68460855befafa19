"""The demos, the server and its clients where the environment sets a proxy that cannot reach this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from qwen.checkpoint.files import CheckpointError
from qwen.checkpoint.hub import explain_unusable_proxy
from qwen.serving.web.proxies import bypass_proxies
from qwen_cli import web
from tests.support import ROOT
from tests.support.processes import run_script
from tests.support.recording_server import RecordingServer, recording_server
from tests.support.server_process import ServerProcess

TIMEOUT = 180  # seconds
DEAD, SOCKS, UNKNOWN = "http://127.0.0.1:9", "socks5://127.0.0.1:9", "socks://127.0.0.1:9"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def proxy(request: pytest.FixtureRequest) -> Iterator[RecordingServer]:
    """A proxy that answers every request with an error."""
    with recording_server(getattr(request, "param", 502)) as proxy:
        yield proxy


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process: that of the tests, with no other proxy than the given one."""
    kept = {name: value for name, value in os.environ.items() if name.lower() not in VARIABLES}
    return {**kept, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", **variables}


def run(*command: str, text: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a script in a new Python, because libraries also create HTTP clients when they are imported."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(**variables),
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


@contextlib.contextmanager
def web_demo(log: Path, host: str, **variables: str) -> Iterator[int]:
    """Start web_demo.py in a new Python; yields its port when it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "web_demo.py", "--cpu-only", "--server-name", host, "--server-port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(**variables), stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + TIMEOUT
        while "Open http" not in (text := log.read_text()):
            assert process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        yield port
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


@pytest.mark.process
@pytest.mark.parametrize(
    ("variables", "host"),
    [
        ({"HTTP_PROXY": None, "all_proxy": UNKNOWN}, "0.0.0.0"),
        pytest.param({"all_proxy": UNKNOWN}, "localhost", marks=pytest.mark.nightly),
        pytest.param({"http_proxy": DEAD}, "127.0.0.1", marks=pytest.mark.nightly),
        pytest.param({"ALL_PROXY": SOCKS}, "127.0.0.2", marks=pytest.mark.nightly),
    ],
)
def test_web_demo(tmp_path: Path, proxy: RecordingServer, variables: dict[str, str | None], host: str) -> None:
    """Address None is a proxy that answers 502."""
    addresses = {name: address or proxy.url for name, address in variables.items()}
    with web_demo(tmp_path / "log", host, **addresses) as port:
        connection = HTTPConnection("127.0.0.1" if host == "0.0.0.0" else host, port, timeout=TIMEOUT)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
    assert not proxy.requests


@pytest.mark.process
@pytest.mark.parametrize("proxy", [404], indirect=True)  # after 502, the client would try again for half a minute
def test_downloads_of_the_web_demo_use_the_proxy(tmp_path: Path, proxy: RecordingServer) -> None:
    variables = {"http_proxy": proxy.url, "HF_ENDPOINT": "http://hub.invalid", "HF_HOME": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    done = run("web_demo.py", "--server-port", port, "-c", "Qwen/Qwen-7B-Chat", **variables)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    assert any("http://hub.invalid/Qwen/Qwen-7B-Chat" in line for line in proxy.requests)


@pytest.mark.process
@pytest.mark.parametrize(("hub", "address"), [("huggingface", UNKNOWN), ("modelscope", SOCKS)])
def test_download_through_an_unusable_proxy_is_a_one_line_error(tmp_path: Path, hub: str, address: str) -> None:
    words = ("-c", "Qwen/Qwen-7B-Chat", "--hub", hub)
    done = run("cli_demo.py", *words, all_proxy=address, HF_HOME=str(tmp_path), MODELSCOPE_CACHE=str(tmp_path))
    assert done.returncode == 1
    _, message = done.stderr.splitlines()
    assert message.startswith("Cannot download Qwen/Qwen-7B-Chat. The proxy of the environment")
    assert 'pip install "httpx[socks]"' in message


@pytest.mark.process
@pytest.mark.parametrize(
    "variables",
    [
        {"http_proxy": DEAD, "https_proxy": DEAD, "all_proxy": SOCKS},
        pytest.param({"all_proxy": SOCKS}, marks=pytest.mark.nightly),
    ],
)
def test_server_and_client(variables: dict[str, str], start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(python=True, **variables)
    done = run(
        "examples/function_call_examples.py", "--base-url", f"{server.url}/v1", "plain", "langchain", **variables
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in server.output()


@pytest.mark.process
def test_local_models_need_no_proxy(tmp_path: Path) -> None:
    done = run("cli_demo.py", "--cpu-only", text="What is 47 + 38?\n", all_proxy=SOCKS)
    assert (done.returncode, done.stdout) == (0, "47 + 38 = 85.\n")
    sizes = ("--lengths", "64", "--tokens", "128")
    evaluated = run_script("eval/long_context.py", *sizes, "-o", tmp_path / "results", all_proxy=SOCKS)
    assert evaluated.returncode == 0, evaluated.stderr
    steps = ("--data_path", "examples/identity.json", "--max_steps", "1", "--use_lora", "--use_cpu")
    trained = run_script("finetune.py", *steps, "--output_dir", tmp_path / "lora", all_proxy=SOCKS)
    assert trained.returncode == 0, trained.stderr


def test_bypassing_restores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("all_proxy", SOCKS)
    with bypass_proxies():
        httpx.Client().close()
    assert "no_proxy" not in os.environ
    with pytest.raises(ImportError, match="SOCKS"):
        httpx.Client()
    monkeypatch.setenv("NO_PROXY", "example.com")
    with bypass_proxies(["localhost"]):
        assert set(os.environ["no_proxy"].split(",")) == {"localhost", "example.com"}
    assert "no_proxy" not in os.environ
    monkeypatch.setenv("no_proxy", "example.org")
    with bypass_proxies():
        httpx.Client().close()
    assert os.environ["no_proxy"] == "example.org"


@pytest.mark.parametrize("address", [SOCKS, UNKNOWN])
def test_sharing_through_an_unusable_proxy_is_an_error(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("all_proxy", address)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ValueError, match="Cannot open the tunnel of --share") as caught:
        web.check_proxy()
    assert "socks5://HOST:PORT" in str(caught.value)
    with pytest.raises(CheckpointError, match="Cannot download x"), explain_unusable_proxy("x"):
        httpx.Client()
    monkeypatch.setenv("all_proxy", DEAD)
    web.check_proxy()


def test_other_errors_are_not_about_the_proxy() -> None:
    with pytest.raises(ImportError, match="nothing"), explain_unusable_proxy("x"):
        raise ImportError("nothing of that name")
