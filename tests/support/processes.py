"""Starts processes, most of them by forking one that has already imported torch, because the import takes seconds.

- `Child`: runs a function of a test file in its own process.
- `Script`: does what `python SCRIPT ARGUMENTS` does; `run_script` runs one to its end.
- `forking_python`: a `python` command that forks in the same way, for shell scripts and programs that start a Python.
- `IsolatedPython`: a Python that has transformers but not this repository.

Tests of how a process starts (imports, Ctrl-C meanwhile) or exits start a new interpreter with `subprocess` instead.
"""

import atexit
import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.support.fork_python import serve_at, write_command

may_start = True
"""Whether the current test may start processes; set by conftest.py."""
ADDRESS = "FORK_SERVER_OF_TESTS"
"""Environment variable: the socket of the process that others are forked from."""
SERVER_LOG = "log.txt"  # beside the socket


def start_forking(preload: bool = True) -> None:
    """Start the process that others are forked from, unless this process or its parent has done so.

    Args:
        preload: let it import the libraries now, instead of when it is needed.
    """
    if ADDRESS not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="qwen-forks-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        address = folder / "socket"
        with (
            socket.create_server(str(address), family=socket.AF_UNIX) as listener,
            address.with_name(SERVER_LOG).open("w") as log,
        ):
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server", str(listener.fileno())],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,  # the server ends when this is closed, at the latest with this process
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
            )
        atexit.register(process.communicate)
        os.environ[ADDRESS] = str(address)
    if preload:
        _connect().close()


def _connect() -> Connection:
    start_forking(preload=False)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[ADDRESS])
    return Connection(connection.detach())


class ForkedProcess:
    """Calls a function in a forked process; has the methods of subprocess.Popen.

    Args:
        function: called in the process with `arguments`.
        folder: working directory of the process.
        environment: variables to set in the process.
    """

    def __init__(self, function: Callable, *arguments: Any, folder: Path, environment: dict[str, str]):
        assert may_start, "tests that start a process need @pytest.mark.process"
        self._received: dict[str, Any] = {}
        self._connection = _connect()
        # Tensors are sent through shared memory, whose other end asks for the key.
        self._connection.send((sys.path, bytes(multiprocessing.current_process().authkey)))
        self._connection.send((_in_fork, (folder, environment, function, arguments)))
        while "pid" not in self._received:
            self._receive(None)
        self.pid = self._received["pid"]

    def _receive(self, timeout: float | None) -> bool:
        """Receive the next message of the process: its id, result or exit status. Returns whether there was one."""
        if not self._connection.poll(timeout):
            return False
        try:
            name, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            log = Path(os.environ[ADDRESS]).with_name(SERVER_LOG)
            raise AssertionError(f"The fork server has ended:\n{log.read_text(encoding='utf-8')}") from None
        self._received[name] = value
        return True

    def poll(self) -> int | None:
        while "status" not in self._received and self._receive(0):
            pass
        return self._received.get("status")

    def wait(self, timeout: float | None = None) -> int:
        self._wait_for({"status"}, timeout)
        return self._received["status"]

    def _wait_for(self, names: set[str], timeout: float | None) -> None:
        """Wait for one of these messages."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while names.isdisjoint(self._received):
            if not self._receive(None if deadline is None else max(0, deadline - time.monotonic())):
                raise subprocess.TimeoutExpired(str(self), timeout)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()


class Child(ForkedProcess):
    """Runs a function of a test file, or of this one, in its own process.

    Args:
        log: file to append the output to (default: a new `output.txt` in the folder).
    """

    def __init__(self, folder: Path, function: Callable, *arguments: Any, log: Path | None = None, **environment: str):
        self.log = log or folder / "output.txt"
        if log is None:
            self.log.write_text("")
        super().__init__(_call, self.log, function, arguments, folder=folder, environment=environment)

    def result(self, seconds: float = 180) -> Any:
        """Return the result of the function.

        Raises:
            AssertionError: it raised an exception or took longer than `seconds`.
        """
        try:
            self._wait_for({"result", "status"}, seconds)
            assert "result" in self._received, f"The process ended without a result:\n{self.output()}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(10)
            return self._received["result"]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"Not done after {seconds} seconds:\n{self.output()}") from None
        finally:
            self.kill()

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def interrupt(self) -> None:
        self.send_signal(signal.SIGINT)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < deadline, f"No {text!r}:\n{self.output()}"
            assert self.poll() is None, f"It ended without {text!r}:\n{self.output()}"
            time.sleep(0.02)


class Script(ForkedProcess):
    """Does what `python SCRIPT ARGUMENTS` does, except that imports are already done and the interpreter does not exit.

    Args:
        files: paths of standard input, output and error. A terminal becomes the controlling terminal of the process.
    """

    def __init__(
        self,
        *words: object,
        files: tuple[str | Path, str | Path, str | Path],
        folder: Path = ROOT,
        **environment: str,
    ):
        self.words = [str(word) for word in words]
        super().__init__(_run, [str(file) for file in files], self.words, folder=folder, environment=environment)

    def __str__(self) -> str:
        return " ".join(self.words)


def run_script(
    *words: object, folder: Path = ROOT, text: str = "", timeout: float = 180, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run a script to its end, like subprocess.run.

    Args:
        words: the script and its arguments.
        text: its standard input.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as directory:
        files = tuple(Path(directory, name) for name in ("input", "output", "errors"))
        files[0].write_text(text, encoding="utf-8")
        process = Script(*words, files=files, folder=folder, **environment)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        outputs = [file.read_text(encoding="utf-8") for file in files[1:]]
    return subprocess.CompletedProcess(process.words, status, *outputs)


@contextlib.contextmanager
def forking_python(folder: Path, nested: bool = False) -> Iterator[Path]:
    """Write a `python` command into a folder that forks its processes from one started here.

    Args:
        folder: where to write it.
        nested: also fork what these processes start with `sys.executable`.

    Yields:
        The path of the command.
    """
    address, command = folder / "forks", folder / "python"
    process = ForkedProcess(serve_at, address, folder=folder, environment={})
    write_command(command, address, nested)
    try:
        while not address.exists():
            assert process.poll() is None, "the process to fork from has ended"
            time.sleep(0.02)
        yield command
    finally:
        process.kill()


def run_finetune(*arguments: str | Path) -> int:
    """Run finetune.py in this process and return its exit status."""
    from qwen_cli.finetune import main

    return main([*map(str, arguments)])


def _in_fork(folder: Path, environment: dict[str, str], function: Callable, arguments: tuple) -> Any:
    set_up_fork(folder, environment)
    return function(*arguments)


def set_up_fork(folder: Path, environment: dict[str, str]) -> None:
    """Set the folder and environment of a forked process, and undo settings inherited from the fork server."""
    multiprocessing.set_start_method(None, force=True)  # for children of this process
    gc.freeze()  # exclude imported modules from garbage collection
    os.chdir(folder)
    os.environ.update(environment)


def open_standard_files() -> None:
    """Reopen sys.stdin, sys.stdout and sys.stderr after their file descriptors were replaced."""
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww"))
    sys.stderr.reconfigure(line_buffering=True)


def _call(log: Path, function: Callable, arguments: tuple) -> Any:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return function(*arguments)


def _run(files: list[str], words: list[str]) -> None:
    for number, file in enumerate(files):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        if os.isatty(opened):
            os.login_tty(opened)
            break
        os.dup2(opened, number)
    open_standard_files()
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent.absolute()))
    runpy.run_path(words[0], run_name="__main__")


class IsolatedPython:
    """A Python that has transformers but not this repository, like that of a user who loads a saved checkpoint.

    Calling it with code and the values of sys.argv[1:] runs the code in its own process and returns the printed lines.

    Args:
        home: an empty folder, used as the working directory and for code copied from checkpoints.
    """

    def __init__(self, home: Path):
        self._home = home
        self._count = 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("isolated_python.py"))],
            cwd=home,
            env=environment | {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, code: str, *arguments: object) -> list[str]:
        self._count += 1
        files = {name: self._home / f"{name}{self._count}" for name in ("script", "output", "errors")}
        files["script"].write_text(textwrap.dedent(code), encoding="utf-8")
        request = {"arguments": [*map(str, arguments)]} | {name: str(file) for name, file in files.items()}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        status = self._process.stdout.readline()
        assert status == "0\n", files["errors"].read_text(encoding="utf-8")
        return files["output"].read_text(encoding="utf-8").splitlines()

    def end(self) -> None:
        self._process.communicate()
