"""openai_api.py as a process of its own, for the tests that talk to it."""

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
    """A server on a port of its own; `url` is where it answers.

    Args:
        arguments: of openai_api.py.
        python: start a Python for it, whose end is looked at, too. Else it is forked, which takes seconds less.
        variables: of its environment.

    Raises:
        AssertionError: it ended before it was ready; the text holds what it said.
    """

    def __init__(self, *arguments: str, python: bool = False, **variables: str):
        self.log = tempfile.NamedTemporaryFile()  # noqa: SIM115  it lives as long as the process
        words = ["openai_api.py", "--cpu-only", "--server-port", "0", *arguments]
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
        until = time.monotonic() + START_SECONDS
        while not (found := READY.search(self.said())):
            if self.process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise AssertionError(f"The server did not start:\n{self.said()}")
            time.sleep(0.05)
        self.url = found[1]

    def said(self) -> str:
        """Everything that it has printed so far."""
        return os.pread(self.log.fileno(), 10**7, 0).decode()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 120) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(seconds)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def metric(self, name: str, **options) -> float:
        """The value of a metric without labels, from /metrics."""
        text = httpx.get(f"{self.url}/metrics", **options).text
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])

    def until_load(self, running: int, queued: int = 0, **options) -> None:
        """Wait until so many replies are being written and so many wait."""
        until = time.monotonic() + 120
        while True:
            load = tuple(self.metric(f"qwen_{kind}_sequences", **options) for kind in ("running", "queued"))
            if load == (running, queued):
                return
            assert time.monotonic() < until, f"the load stays at {load}"
            time.sleep(0.02)


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers that end with the test."""
    servers: list[ServerProcess] = []

    def start(*arguments: str, **settings: bool | str) -> ServerProcess:
        servers.append(ServerProcess(*arguments, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(bundled_chat: Path) -> Iterator[ServerProcess]:
    """The server of the bundled chat model, as it starts without arguments."""
    process = ServerProcess("-c", str(bundled_chat))
    yield process
    process.stop()
