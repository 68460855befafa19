"""Processes that are forked from one which has imported torch and its companions: to do so takes seconds each time."""

import functools
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORKING = multiprocessing.get_context("forkserver")
# What a run imports. Not gptqmodel, but what that imports: it starts threads, which a fork would lose.
PRELOADED = ["finetune", "qwen.finetuning.run", "transformers.trainer", "peft.tuners.lora", "datasets", "deepspeed"]
PRELOADED += ["deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.fsdp", "torch.utils.cpp_extension"]
PRELOADED += ["transformers.models.auto.processing_auto", "matplotlib.figure", "torch.utils.tensorboard", "requests"]
PRELOADED += ["pytest", "forked"]


@functools.cache
def start_forking() -> None:
    """Start the process that the others are forked from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
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
            assert time.monotonic() < until and self.process.is_alive(), f"No {text!r}:\n{self.said()}"
            time.sleep(0.02)

    def end(self) -> None:
        self.process.join(10)
        self.process.kill()
        self.process.join()


def _in_child(
    folder: Path, log: Path, connection: Any, environment: dict[str, str], function: Callable, arguments: tuple
) -> None:
    multiprocessing.set_start_method(None, force=True)  # for its own children, as in any other process
    gc.freeze()  # what is imported stays: no need to look through it at every collection
    os.chdir(folder)
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    result = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(result)


def main(*arguments: str | Path) -> int:
    """finetune.py in this process; returns its exit code."""
    import finetune

    sys.argv = ["finetune.py", *map(str, arguments)]
    return finetune.main()
