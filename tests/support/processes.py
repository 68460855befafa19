"""Starts processes, most of them forked from one that has imported torch and its companions: that takes seconds.

- `Child`: a function of a test file in a process of its own.
- `Script`: what `python SCRIPT ARGUMENTS` starts; `run_script` runs one to its end.
- `forking_python`: a command for shell scripts, and for programs that start a Python, that forks likewise.
- `Elsewhere`: a Python that has transformers and not this repository.

A test of how a process begins (what it imports, Ctrl-C meanwhile) or ends (the interpreter's exit) starts a Python of
its own with `subprocess` instead.
"""

import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.fork_python import serve_at, write_command

allowed = True
"""Whether the test that runs now is one of those that may take long; conftest.py sets it."""
FORKING = multiprocessing.get_context("forkserver")
# What scripts import. Not gptqmodel, but what that imports: it starts threads, which a fork would lose.
PRELOADED = [
    *("qwen_cli.finetune", "qwen.finetuning.run", "qwen.serving.api.app", "qwen.serving.api.server"),
    *("transformers.trainer", "transformers.models.auto.processing_auto", "peft.tuners.lora", "datasets", "requests"),
    *("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.fsdp", "torch.distributed.run"),
    *("torch.utils.cpp_extension", "torch.utils.tensorboard", "matplotlib.figure", "gradio"),
    *("pytest", "tests.support.processes"),
]


def preload() -> None:
    """Import what scripts import, into the process that others will be forked from."""
    for name in PRELOADED:
        importlib.import_module(name)


@functools.cache
def start_forking() -> None:
    """Start the process that the others are forked from, and let it import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # what is compared here is computed in float32, on the CPU
        patch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        FORKING.set_forkserver_preload(PRELOADED)
        FORKING.Process(target=int).start()


class Forked:
    """A function in a forked process, with the methods of subprocess.Popen.

    Args:
        function: called there with `arguments`; its return value is dropped.
        folder: the process works in it.
        environment: variables that are set in it.
    """

    def __init__(self, function: Callable, *arguments: Any, folder: Path, environment: dict[str, str]):
        assert allowed, "a test that starts a process is not one of the quick ones: @pytest.mark.process"
        start_forking()
        self._process = FORKING.Process(target=_in_fork, args=(folder, environment, function, arguments))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self), timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


class Child(Forked):
    """A function of a test file, or of this one, in a process of its own.

    Args:
        log: what it says is appended to this file; without one it goes into a new `said.txt` in the folder.
    """

    def __init__(self, folder: Path, function: Callable, *arguments: Any, log: Path | None = None, **environment: str):
        start_forking()
        self.log = log or folder / "said.txt"
        if log is None:
            self.log.write_text("")
        self._connection, theirs = FORKING.Pipe(duplex=False)
        super().__init__(_call, self.log, theirs, function, arguments, folder=folder, environment=environment)
        theirs.close()

    def result(self, seconds: float = 180) -> Any:
        """What the function returned.

        Raises:
            AssertionError: it raised, or took longer.
        """
        try:
            assert self._connection.poll(seconds), f"Not done after {seconds} seconds:\n{self.said()}"
            return self._connection.recv()
        except EOFError:
            raise AssertionError(f"The process ended without a result:\n{self.said()}") from None
        finally:
            self._process.join(10)
            self.kill()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def interrupt(self) -> None:
        self.send_signal(signal.SIGINT)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < until, f"No {text!r}:\n{self.said()}"
            assert self.poll() is None, f"It ended without {text!r}:\n{self.said()}"
            time.sleep(0.02)


class Script(Forked):
    """What `python SCRIPT ARGUMENTS` starts.

    It differs from that in its beginning, since what it imports is there, and in its very end, since no interpreter is
    taken down.

    Args:
        files: what standard input, output and error are: paths, such as that of a terminal, which it then gets for
            itself.
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
    """A script to its end, as subprocess.run does it.

    Args:
        words: the script and its arguments.
        text: its standard input.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    with tempfile.TemporaryDirectory() as place:
        files = tuple(Path(place, name) for name in ("input", "output", "errors"))
        files[0].write_text(text, encoding="utf-8")
        process = Script(*words, files=files, folder=folder, **environment)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        said = [file.read_text(encoding="utf-8") for file in files[1:]]
    return subprocess.CompletedProcess(process.words, status, *said)


@contextlib.contextmanager
def forking_python(folder: Path) -> Iterator[Path]:
    """Write a command into a folder that does what `python` does, in processes forked from one made here.

    Yields:
        the path of the command.
    """
    address, command = folder / "forks", folder / "python"
    process = Forked(serve_at, address, folder=folder, environment={})
    write_command(command, address)
    try:
        while not address.exists():
            assert process.poll() is None, "there is no process to fork from"
            time.sleep(0.02)
        yield command
    finally:
        process.kill()


def main(*arguments: str | Path) -> int:
    """finetune.py in this process; returns its exit code."""
    from qwen_cli.finetune import main

    return main([*map(str, arguments)])


def _in_fork(folder: Path, environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    settle(folder, environment)
    function(*arguments)


def settle(folder: Path, environment: dict[str, str]) -> None:
    """Make this forked process one like any other."""
    multiprocessing.set_start_method(None, force=True)  # for its own children
    gc.freeze()  # what is imported stays: no need to look through it at every collection
    os.chdir(folder)
    os.environ.update(environment)


def open_standard_files() -> None:
    """Make sys.stdin and its companions anew, after their file descriptors have been replaced."""
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww"))
    sys.stderr.reconfigure(line_buffering=True)


def _call(log: Path, connection: Any, function: Callable, arguments: tuple) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    result = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(result)


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


class Elsewhere:
    """A Python that has transformers and nothing of this repository, as whoever is given a saved checkpoint has it.

    Called with code, and what sys.argv[1:] shall be, it runs that in a process of its own and returns the lines that
    were printed.

    Args:
        home: an empty folder, where it works and where code from checkpoints is copied to.
    """

    def __init__(self, home: Path):
        self._home = home
        self._count = 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("elsewhere.py"))],
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
