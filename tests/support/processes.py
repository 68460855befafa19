"""Processes that are forked from one which has imported torch and its companions: to do so takes seconds each time."""

import functools
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

FORKING = multiprocessing.get_context("forkserver")
# What a script imports. Not gptqmodel, but what that imports: it starts threads, which a fork would lose.
PRELOADED = [
    "qwen_cli.finetune",
    "qwen.finetuning.run",
    "transformers.trainer",
    "peft.tuners.lora",
    "datasets",
    "deepspeed",
]
PRELOADED += ["deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.fsdp"]
PRELOADED += ["torch.utils.cpp_extension", "transformers.models.auto.processing_auto", "matplotlib.figure"]
PRELOADED += ["torch.utils.tensorboard", "requests"]
PRELOADED += [
    "qwen.serving.api.app",
    "qwen.serving.engine.engine",
    "qwen.serving.api.server",
    "gradio",
    "pytest",
    "tests.support.processes",
]


@functools.cache
def start_forking() -> None:
    """Start the process that the others are forked from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # what is compared here is computed in float32, on the CPU
        patch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        FORKING.set_forkserver_preload(PRELOADED)
        FORKING.Process(target=int).start()


class Child:
    """A function of a test file, or of this one, in a process of its own.

    Args:
        folder: the process works in it.
        log: what it says is appended to this file; without one it goes into a new `said.txt` in the folder.
        environment: variables that are set in it.
    """

    def __init__(self, folder: Path, function: Callable, *arguments: Any, log: Path | None = None, **environment: str):
        start_forking()
        self.log = log or folder / "said.txt"
        if log is None:
            self.log.write_text("")
        self.connection, theirs = FORKING.Pipe(duplex=False)
        self.process = FORKING.Process(
            target=_in_child, args=(folder, self.log, theirs, environment, function, arguments)
        )
        self.process.start()
        theirs.close()

    def result(self, seconds: float = 180) -> Any:
        """What the function returned.

        Raises:
            AssertionError: it raised, or took longer.
        """
        try:
            assert self.connection.poll(seconds), f"Not done after {seconds} seconds:\n{self.said()}"
            return self.connection.recv()
        except EOFError:
            raise AssertionError(f"The process ended without a result:\n{self.said()}") from None
        finally:
            self.end()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < until, f"No {text!r}:\n{self.said()}"
            assert self.process.is_alive(), f"No {text!r}:\n{self.said()}"
            time.sleep(0.02)

    def end(self) -> None:
        self.process.join(10)
        self.process.kill()
        self.process.join()


def _settle(folder: Path, environment: dict[str, str]) -> None:
    """Make this forked process one like any other."""
    multiprocessing.set_start_method(None, force=True)  # for its own children
    gc.freeze()  # what is imported stays: no need to look through it at every collection
    os.chdir(folder)
    os.environ.update(environment)


def _in_child(
    folder: Path, log: Path, connection: Any, environment: dict[str, str], function: Callable, arguments: tuple
) -> None:
    _settle(folder, environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    result = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(result)


def main(*arguments: str | Path) -> int:
    """finetune.py in this process; returns its exit code."""
    from qwen_cli.finetune import main

    return main([*map(str, arguments)])


class Script:
    """What `python SCRIPT ARGUMENTS` starts, with the methods of subprocess.Popen.

    It differs from that in its beginning, for what it imports is there, and in its very end, for no interpreter is
    taken down: a test that is about one of these should start a Python of its own.

    Args:
        files: what standard input, output and error are: paths, such as that of a terminal, which it then gets for
            itself.
        folder: the process works in it.
        environment: variables that are set in it.
    """

    def __init__(
        self,
        *words: object,
        files: tuple[str | Path, str | Path, str | Path],
        folder: Path = ROOT,
        **environment: str,
    ):
        start_forking()
        self.words = [str(word) for word in words]
        self._process = FORKING.Process(
            target=_run_script, args=(folder, environment, [str(file) for file in files], self.words)
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.words, timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


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


def _run_script(folder: Path, environment: dict[str, str], files: list[str], words: list[str]) -> None:
    _settle(folder, environment)
    for number, file in enumerate(files):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        if os.isatty(opened):
            os.login_tty(opened)
            break
        os.dup2(opened, number)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))  # noqa: SIM115
    sys.stderr.reconfigure(line_buffering=True)
    sys.argv = words
    sys.path.insert(0, str((folder / words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
