"""Calls the server with the newest versions of clients from the package index, each in its own environment.

The clients' pins contradict each other, so they cannot share an environment. Environments are kept in .venv-clients/
and updated by the next run. A client that fails to install or to work does not affect the others.

    python -m tests.clients.run                 # all clients, as `make test-clients` does
    python -m tests.clients.run openai litellm
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-clients"
SCRIPTS = Path(__file__).parent
START_SECONDS, INSTALL_SECONDS, CALL_SECONDS = 180, 900, 300
READY = re.compile(r"answers at (http://\S+/v1)")

CLIENTS = {
    "openai": "openai",
    "openai_agents": "openai-agents",
    "anthropic": "anthropic",
    "langchain": "langchain-openai",
    "litellm": "litellm",
    "pydantic_ai": "pydantic-ai-slim[openai]",
    "instructor": "instructor",
    "llama_index": "llama-index-llms-openai-like",
    "haystack": "haystack-ai",
    "semantic_kernel": "semantic-kernel",
    "smolagents": "smolagents[openai]",
    "llm": "llm",
    "guidance": "guidance[openai]",
}
"""Name of a client → its package. The script of a client is call_NAME.py."""


class Result(NamedTuple):
    """Result of one client.

    Args:
        version: installed version; "-" if the installation failed.
        error: what failed; None if all calls succeeded.
    """

    version: str
    error: str | None


def run_command(*words: object, seconds: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; a timeout counts as a failure."""
    command = [str(word) for word in words]
    try:
        return subprocess.run(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        output = error.output.decode(errors="replace") if isinstance(error.output, bytes) else error.output or ""
        return subprocess.CompletedProcess(command, 1, f"{output}\nNot done after {seconds:g} seconds.")


def try_client(name: str, url: str) -> Result:
    """Install the newest version of a client and run its script."""
    folder, package = ENVIRONMENTS / name, CLIENTS[name]
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        created = run_command(sys.executable, "-m", "venv", "--clear", folder, seconds=INSTALL_SECONDS)
        if created.returncode:
            return Result("-", f"The environment {folder} could not be created:\n{created.stdout}")
    pip = (python, "-m", "pip", "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager")
    installed = run_command(*pip, "--disable-pip-version-check", package, seconds=INSTALL_SECONDS)
    if installed.returncode:
        return Result("-", f"pip install {package} failed:\n{installed.stdout}")
    distribution = package.partition("[")[0]
    query = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    version = run_command(python, "-c", query, distribution, seconds=CALL_SECONDS).stdout.strip()
    # The server is on this machine: a proxy of the user would not reach it.
    called = run_command(python, SCRIPTS / f"call_{name}.py", url, seconds=CALL_SECONDS, no_proxy="*")
    return Result(version, called.stdout if called.returncode else None)


def wait_for_server(server: subprocess.Popen, log: Path) -> str:
    """Wait until the server answers and return its base URL.

    Raises:
        SystemExit: it did not start.
    """
    deadline = time.monotonic() + START_SECONDS
    while not (found := READY.search(log.read_text(encoding="utf-8"))):
        if server.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"The server did not start:\n{log.read_text(encoding='utf-8')}")
        time.sleep(0.1)
    return found[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the clients and print a table. Returns the exit status: 1 if any client failed."""
    parser = argparse.ArgumentParser(description="Calls the server with the newest versions of its clients.")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(CLIENTS)} (default: all)")
    names = parser.parse_args(argv).clients or list(CLIENTS)
    if unknown := [name for name in names if name not in CLIENTS]:
        parser.error(f"unknown client {unknown[0]!r}, choose from {', '.join(CLIENTS)}")

    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "server.log")
        command = [sys.executable, "openai_api.py", "--cpu-only", "--server-port", "0"]
        with log.open("w") as file:
            server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            url = wait_for_server(server, log)
            for name in names:
                print(f"{name} ...", flush=True)
                results[name] = try_client(name, url)
                if error := results[name].error:
                    print(error, flush=True)
        finally:
            server.terminate()
            server.wait()
    for name, (version, error) in results.items():
        print(f"{CLIENTS[name]:30} {version:12} {'failed' if error else 'ok'}")
    return int(any(result.error for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
