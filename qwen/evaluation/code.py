"""Python that a model wrote → a program → whether it passes its tests, which run in the sandbox and nowhere else.

Revolves around `verdicts`: each program gets a process of its own, some run side by side. `ProgramTask` is what the
benchmarks have in common that are scored this way; what they ask and which tests they have, it refuses to know.

A program that ends the process, prints what it likes, or puts something in place of the built-in functions does not
pass by that. One that hands back objects which equal everything does: the tests live in its process, as in the
benchmarks' own harnesses.
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
from typing import Any, NamedTuple

from ..sandbox import Limits, Sandbox, SandboxUnavailable
from ..sandbox.arguments import add_sandbox_arguments
from ..tools.code_interpreter import FENCED
from .task import Case, Task, add_file_argument

HUMANEVAL_FIELDS = dict.fromkeys(("task_id", "prompt", "entry_point", "test"), str)
STOP = ("\n\n", "\ndef ")  # ends the completion of a function
SECONDS = 10.0  # for a program to be defined, and again for its tests
_SIDE_BY_SIDE = 4  # sandboxes, at most one for each processor
_MEMORY = 1 << 30  # bytes of address space for each
_MESSAGE = 200  # characters of an error that are kept
_CODE = re.compile(r"(async )?def |class |import |from \S+ import |@")  # begins a line at the outermost level
_INSIDE = re.compile(rf"\s|#|[)\]}}]|[A-Z_]+ = |{_CODE.pattern}")
# A program is imported, not started: what stands under `if __name__ == "__main__":` is none of the tests' business.
_AS_MODULE = "import sys\nsys.modules['program'] = sys.modules[__name__]\n__name__ = 'program'\ndel sys"


class Program(NamedTuple):
    """Code, and statements that raise an exception unless it does what it should."""

    code: str
    tests: str


class Verdict(NamedTuple):
    """What came of a program: "passed", "failed" (an assertion), "error" or "timed out", and the exception."""

    status: str
    message: str


def cut_completion(text: str) -> str:
    """A function's body out of what a model writes on and on: up to a blank line or the next function."""
    return re.split(r"\n\n|^def ", text, maxsplit=1, flags=re.MULTILINE)[0]


def code_of_reply(reply: str, function: str) -> str:
    """The Python in a chat model's reply: the fenced block that defines the function, else the first one, else from the
    first line of Python on, without the sentences around it; "" where there is none.
    """
    blocks = [textwrap.dedent(block) for block in FENCED.findall(reply)]
    if blocks:
        return next((block for block in blocks if defines(block, function)), blocks[0])
    lines = reply.splitlines(keepends=True)
    code = itertools.dropwhile(lambda line: not _CODE.match(line), lines)
    return "".join(itertools.takewhile(_INSIDE.match, code))


def defines(code: str, function: str) -> bool:
    """Whether the code has a function of this name at the outermost level."""
    return re.search(rf"^(async )?def {re.escape(function)}\s*\(", code, re.MULTILINE) is not None


def verdicts(programs: Sequence[Program], *, seconds: float, allow_weaker: bool = False) -> list[Verdict]:
    """Run programs, some at a time, each in a process of its own.

    Args:
        seconds: what defining it and testing it may take, each.
        allow_weaker: run them also where the sandbox cannot be a whole one.

    Raises:
        SandboxUnavailable: the sandbox does not start here.
    """
    limits = Limits(wall_seconds=seconds, cpu_seconds=2 * int(seconds) + 1, memory_bytes=_MEMORY)

    def run(program: Program) -> Verdict:
        with Sandbox(limits=limits, allow_weaker=allow_weaker) as sandbox:
            return _verdict(program, sandbox)

    with ThreadPoolExecutor(min(_SIDE_BY_SIDE, os.cpu_count() or 1)) as pool:
        return list(pool.map(run, programs))


def _verdict(program: Program, sandbox: Sandbox) -> Verdict:
    # What the tests end in is not known before they begin: neither a print nor a replaced `exec` leads to it.
    passed = secrets.token_hex()
    sandbox.start()  # which takes time that is not the program's
    for cell in (_AS_MODULE, program.code, f"{program.tests}\npassed = {passed!r}\npassed"):
        begun = time.monotonic()
        output, status = sandbox.run(cell)
        if status == "interrupted" or time.monotonic() - begun > sandbox.limits.wall_seconds:
            return Verdict("timed out", f"after {sandbox.limits.wall_seconds:g} seconds")
        if status != "ok":
            message = (output.strip().splitlines() or [""])[-1]
            return Verdict("failed" if message.startswith("AssertionError") else "error", message[:_MESSAGE])
    if passed not in output:
        return Verdict("error", "The tests did not run to their end.")
    return Verdict("passed", "")


class ProgramTask(Task):
    """A benchmark whose answers are programs: pass@1 of greedy decoding."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        add_file_argument(parser, "the problems, as JSON lines; eval/EVALUATION.md tells where they come from")
        add_sandbox_arguments(parser, seconds=SECONDS)

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        check_sandbox(arguments.allow_weaker_sandbox)

    @abstractmethod
    def program(self, case: Case, answer: dict[str, Any]) -> Program:
        """What is run to score an answer."""

    def score(self, case: Case, answer: dict[str, Any]) -> dict[str, Any]:
        return self.scores([case], [answer])[0]

    def scores(self, cases: Sequence[Case], answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        programs = [self.program(case, answer) for case, answer in zip(cases, answers, strict=True)]
        allow_weaker = self.arguments.allow_weaker_sandbox
        return [
            {"correct": verdict.status == "passed", "verdict": verdict.status, "message": verdict.message}
            for verdict in verdicts(programs, seconds=self.arguments.seconds, allow_weaker=allow_weaker)
        ]


def check_sandbox(allow_weaker: bool) -> None:
    """Start a sandbox, for it is no use to load a model if that fails; tell what a weaker one lacks.

    Raises:
        SandboxUnavailable: it does not start.
    """
    with Sandbox(allow_weaker=allow_weaker) as sandbox:
        try:
            sandbox.start()
        except SandboxUnavailable as error:
            raise SandboxUnavailable(f"{error} (--allow-weaker-sandbox)") from error
        for sentence in sandbox.missing:
            print(f"The sandbox is weaker than it should be. {sentence}", file=sys.stderr)
