"""Starts processes, most of them by forking one that has already imported torch, because the import takes seconds.

- `Child`: runs a function of a test file in its own process.
- `Script`: does what `python SCRIPT ARGUMENTS` does; `run_script` runs one to its end.
- `forking_python`: a `python` command that forks in the same way, for shell scripts and programs that start a Python.
- `IsolatedPython`: a Python that has transformers but not this repository.

Tests of how a process starts (imports, Ctrl-C meanwhile) or exits start a new interpreter with `subprocess` instead.
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

may_start = True
"""Whether the current test may start processes; set by conftest.py."""
FORKING = multiprocessing.get_context("forkserver")
# Modules that scripts import. Without gptqmodel, which starts threads that a fork would lose, but with its imports.
PRELOADED = [
    *("qwen_cli.finetune", "qwen.finetuning.run", "qwen.serving.api.app", "qwen.serving.api.server"),
    *("transformers.trainer", "transformers.models.auto.processing_auto", "peft.tuners.lora", "datasets", "requests"),
    *("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.fsdp", "torch.distributed.run"),
    *("torch.utils.cpp_extension", "torch.utils.tensorboard", "matplotlib.figure", "gradio"),
    *("pytest", "tests.support.processes"),
]


def preload() -> None:
    """Import what scripts import, in the process that others are forked from."""
    for name in PRELOADED:
        importlib.import_module(name)


@functools.cache
def start_forking() -> None:
    """Start the process that others are forked from, and let it import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # results are compared in float32, on the CPU
        patch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        FORKING.set_forkserver_preload(PRELOADED)
        FORKING.Process(target=int).start()


class ForkedProcess:
    """Runs a function in a forked process; has the methods of subprocess.Popen.

    Args:
        function: called in the process with `arguments`; its return value is ignored.
        folder: working directory of the process.
        environment: variables to set in the process.
    """

    def __init__(self, function: Callable, *arguments: Any, folder: Path, environment: dict[str, str]):
        assert may_start, "tests that start a process need @pytest.mark.process"
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


class Child(ForkedProcess):
    """Runs a function of a test file, or of this one, in its own process.

    Args:
        log: file to append the output to (default: a new `output.txt` in the folder).
    """

    def __init__(self, folder: Path, function: Callable, *arguments: Any, log: Path | None = None, **environment: str):
        start_forking()
        self.log = log or folder / "output.txt"
        if log is None:
            self.log.write_text("")
        self._connection, sender = FORKING.Pipe(duplex=False)
        super().__init__(_call, self.log, sender, function, arguments, folder=folder, environment=environment)
        sender.close()

    def result(self, seconds: float = 180) -> Any:
        """Return the result of the function.

        Raises:
            AssertionError: it raised an exception or took longer than `seconds`.
        """
        try:
            assert self._connection.poll(seconds), f"Not done after {seconds} seconds:\n{self.output()}"
            return self._connection.recv()
        except EOFError:
            raise AssertionError(f"The process ended without a result:\n{self.output()}") from None
        finally:
            self._process.join(10)
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
def forking_python(folder: Path) -> Iterator[Path]:
    """Write a `python` command into a folder that forks its processes from one started here.

    Yields:
        The path of the command.
    """
    address, command = folder / "forks", folder / "python"
    process = ForkedProcess(serve_at, address, folder=folder, environment={})
    write_command(command, address)
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


def _in_fork(folder: Path, environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    set_up_fork(folder, environment)
    function(*arguments)


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
