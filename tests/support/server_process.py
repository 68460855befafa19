"""Runs openai_api.py in its own process, for tests that send requests to it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import ROOT
from tests.support.processes import Script

READY = re.compile(r"answers at (http://\S+)/v1")
START_SECONDS = 180


class ServerProcess:
    """A server on its own port, at `url`.

    Subclasses may run another script, which prints its address.

    Args:
        arguments: arguments of openai_api.py.
        python: start a new interpreter, to test its exit as well; otherwise fork, which saves seconds.
        variables: environment variables.

    Raises:
        AssertionError: the server ended before it was ready; the message has its output.
    """

    script = "openai_api.py"
    ready = READY

    def __init__(self, *arguments: str, python: bool = False, **variables: str):
        self.log = tempfile.NamedTemporaryFile()  # noqa: SIM115  lives as long as the process
        port = () if "--server-port" in arguments else ("--server-port", "0")
        words = [self.script, "--cpu-only", *port, *arguments]
        if python:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
            )
        else:
            self.process = Script(*words, files=(os.devnull, self.log.name, self.log.name), **variables)
        deadline = time.monotonic() + START_SECONDS
        while not (found := self.ready.search(self.output())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"The server did not start:\n{self.output()}")
            time.sleep(0.05)
        self.url = found[1]

    def output(self) -> str:
        """Return everything printed so far."""
        return os.pread(self.log.fileno(), 10**7, 0).decode()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 120) -> int:
        """Wait for the end of the process and return its exit status."""
        return self.process.wait(seconds)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def metric(self, name: str, **options) -> float:
        """Return the value of a metric without labels, from /metrics."""
        text = httpx.get(f"{self.url}/metrics", **options).text
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])

    def until_load(self, running: int, queued: int = 0, **options) -> None:
        """Wait until `running` replies are being generated and `queued` ones wait."""
        deadline = time.monotonic() + 120
        while True:
            load = tuple(self.metric(f"qwen_{kind}_sequences", **options) for kind in ("running", "queued"))
            if load == (running, queued):
                return
            assert time.monotonic() < deadline, f"the load stays at {load}"
            time.sleep(0.02)


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Start servers that end with the test."""
    servers: list[ServerProcess] = []

    def start(*arguments: str, **settings: bool | str) -> ServerProcess:
        servers.append(ServerProcess(*arguments, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(bundled_chat: Path) -> Iterator[ServerProcess]:
    """The server of the bundled chat model with default arguments."""
    process = ServerProcess("-c", str(bundled_chat))
    yield process
    process.stop()
