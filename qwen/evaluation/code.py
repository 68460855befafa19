"""Runs model-written Python against tests, always in the sandbox.

`run_programs` runs each program in a process of its own, several in parallel. `ProgramTask` is the base class of
benchmarks that are scored this way.

A program cannot pass by exiting, printing or replacing built-in functions. It can pass by returning objects that
compare equal to everything: the tests run in its process, as in the benchmarks' own harnesses.
"""

import argparse
import itertools
import os
import re
import secrets
import sys
import textwrap
import time
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ..sandbox import Limits, Sandbox, SandboxUnavailable
from ..sandbox.arguments import add_sandbox_arguments
from ..tools.code_interpreter import FENCED
from .task import Case, JSONObject, Task, add_file_argument

HUMANEVAL_FIELDS = dict.fromkeys(("task_id", "prompt", "entry_point", "test"), str)
STOP = ("\n\n", "\ndef ")  # ends the completion of a function
DEFAULT_TIMEOUT = 10.0  # in seconds, for defining a program, and again for its tests
_MAX_SANDBOXES = 4  # in parallel, at most one per processor
_MEMORY_BYTES = 1 << 30  # address space of each sandbox
_MESSAGE_CHARS = 200  # maximum length of an error that is recorded
_CODE_START = re.compile(r"(async )?def |class |import |from \S+ import |@")  # starts a top-level line of code
_CODE_LINE = re.compile(rf"\s|#|[)\]}}]|[A-Z_]+ = |{_CODE_START.pattern}")
# Programs run as an imported module, so that code under `if __name__ == "__main__":` is skipped.
_AS_MODULE = "import sys\nsys.modules['program'] = sys.modules[__name__]\n__name__ = 'program'\ndel sys"


class Program(NamedTuple):
    """Code, and test statements that raise an exception if it is wrong."""

    code: str
    tests: str


class Verdict(NamedTuple):
    """Outcome of a program: "passed", "failed" (an assertion), "error" or "timed out", and the error message."""

    status: str
    message: str


def truncate_completion(text: str) -> str:
    """Cut a completion to the body of one function: up to a blank line or the next function."""
    return re.split(r"\n\n|^def ", text, maxsplit=1, flags=re.MULTILINE)[0]


def extract_program(reply: str, function: str) -> str:
    """Return the Python code in a chat model's reply, or "" if there is none.

    This is the fenced block that defines the function, else the first block, else the unfenced code without the
    sentences around it.
    """
    blocks = [textwrap.dedent(block) for block in FENCED.findall(reply)]
    if blocks:
        return next((block for block in blocks if defines_function(block, function)), blocks[0])
    lines = reply.splitlines(keepends=True)
    code = itertools.dropwhile(lambda line: not _CODE_START.match(line), lines)
    return "".join(itertools.takewhile(_CODE_LINE.match, code))


def defines_function(code: str, function: str) -> bool:
    """Whether the code has a top-level function of this name."""
    return re.search(rf"^(async )?def {re.escape(function)}\s*\(", code, re.MULTILINE) is not None


def run_programs(programs: Sequence[Program], *, timeout: float, allow_weaker: bool = False) -> list[Verdict]:
    """Run programs, several in parallel, each in a process of its own.

    Args:
        timeout: time limit in seconds for defining a program, and again for its tests.
        allow_weaker: also run them where the sandbox lacks some of its protections.

    Raises:
        SandboxUnavailable: the sandbox cannot start on this machine.
    """
    limits = Limits(wall_seconds=timeout, cpu_seconds=2 * int(timeout) + 1, memory_bytes=_MEMORY_BYTES)

    def run_in_sandbox(program: Program) -> Verdict:
        with Sandbox(limits=limits, allow_weaker=allow_weaker) as sandbox:
            return _run_program(program, sandbox)

    with ThreadPoolExecutor(min(_MAX_SANDBOXES, os.cpu_count() or 1)) as pool:
        return list(pool.map(run_in_sandbox, programs))


def _run_program(program: Program, sandbox: Sandbox) -> Verdict:
    # The tests end in a random token, which neither a print nor a replaced `exec` can produce.
    passed = secrets.token_hex()
    sandbox.start()  # outside the time limit
    for cell in (_AS_MODULE, program.code, f"{program.tests}\npassed = {passed!r}\npassed"):
        started = time.monotonic()
        output, status = sandbox.run(cell)
        if status == "interrupted" or time.monotonic() - started > sandbox.limits.wall_seconds:
            return Verdict("timed out", f"after {sandbox.limits.wall_seconds:g} seconds")
        if status != "ok":
            message = (output.strip().splitlines() or [""])[-1]
            return Verdict("failed" if message.startswith("AssertionError") else "error", message[:_MESSAGE_CHARS])
    if passed not in output:
        return Verdict("error", "The tests did not run to completion.")
    return Verdict("passed", "")


class ProgramTask(Task):
    """A benchmark whose answers are programs, scored by pass@1 with greedy decoding."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        add_file_argument(parser, "problems as JSON lines; eval/EVALUATION.md says where to get them")
        add_sandbox_arguments(parser, seconds=DEFAULT_TIMEOUT)

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        check_sandbox(arguments.allow_weaker_sandbox)

    @abstractmethod
    def program(self, case: Case, answer: JSONObject) -> Program:
        """Return the program that is run to score an answer."""

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        return self.scores([case], [answer])[0]

    def scores(self, cases: Sequence[Case], answers: Sequence[JSONObject]) -> list[JSONObject]:
        programs = [self.program(case, answer) for case, answer in zip(cases, answers, strict=True)]
        allow_weaker = self.arguments.allow_weaker_sandbox
        return [
            {"correct": verdict.status == "passed", "verdict": verdict.status, "message": verdict.message}
            for verdict in run_programs(programs, timeout=self.arguments.seconds, allow_weaker=allow_weaker)
        ]


def check_sandbox(allow_weaker: bool) -> None:
    """Start a sandbox, to fail before a model is loaded, and report what a weaker one lacks.

    Raises:
        SandboxUnavailable: the sandbox cannot start on this machine.
    """
    with Sandbox(allow_weaker=allow_weaker) as sandbox:
        try:
            sandbox.start()
        except SandboxUnavailable as error:
            raise SandboxUnavailable(f"{error} (--allow-weaker-sandbox)") from error
        for sentence in sandbox.missing_protections:
            print(f"The sandbox is weaker than it should be. {sentence}", file=sys.stderr)
