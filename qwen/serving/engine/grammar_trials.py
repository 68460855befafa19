"""Tries grammars in a child process before they are built here, so that none can take long or end the server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

import psutil

from . import grammar_worker

# Of the processor, for all grammars of a request: many times what small ones need, and several times what the largest
# need. Those that pass cost the server the same again.
SECONDS, SECONDS_PER_CHARACTER = 0.4, 2.0 / 65_536
WALL_SECONDS = 60.0  # for the start of the process or a trial, on a machine that does other things
POLL_SECONDS = 0.02
MAX_PASSED = 1024

# When the client of a request has left, its event is set. Worker threads inherit the variable.
client_left: ContextVar[threading.Event | None] = ContextVar("client_left", default=None)


class GrammarTooExpensive(ValueError):
    """A grammar takes too much time or memory."""


class ClientLeft(Exception):
    """The client of a request left before its grammars were built."""


class GrammarTrials:
    """Tries grammars, one at a time, in a process that starts with the first one and ends with this process.

    Grammars that have passed are not tried again. Thread-safe.

    Args:
        passed: grammars that need no trial.
    """

    def __init__(self, passed: Iterable[str] = ()):
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._passed: OrderedDict[bytes, None] = OrderedDict()
        self._passed_lock = threading.Lock()
        for grammar in passed:
            self._remember(_key(grammar))

    def request(self) -> RequestTrials:
        """Return an object to try the grammars of one request, which share a limit of time."""
        return RequestTrials(self)

    def try_grammar(self, grammar: str, seconds: float) -> tuple[str, float]:
        """Return llguidance's error of a grammar, or "", and the processor time that the trial took.

        Args:
            seconds: processor time that it may take.

        Raises:
            GrammarTooExpensive: it takes more, or too much memory.
            ClientLeft: the client of the request left.
        """
        key = _key(grammar)
        with self._passed_lock:
            if key in self._passed:
                self._passed.move_to_end(key)
                return "", 0.0
        answer = self._run({"grammar": grammar}, seconds)
        if not answer["error"]:
            self._remember(key)
        return answer["error"], answer["seconds"]

    def convert(self, gbnf: str, seconds: float) -> tuple[str, float]:
        """Convert GBNF to Lark. Return that and the processor time that it took.

        Args:
            seconds: processor time that it may take.

        Raises:
            ValueError: it is not valid, or takes too much time or memory.
            ClientLeft: the client of the request left.
        """
        answer = self._run({"gbnf": gbnf}, seconds)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["lark"], answer["seconds"]

    def _run(self, request: dict[str, str], seconds: float) -> dict[str, Any]:
        while not self._lock.acquire(timeout=POLL_SECONDS):
            _check_client()
        try:
            if self._worker is None or self._worker.has_ended():
                self._worker = _Worker()
            try:
                return self._worker.run(request, seconds)
            except BaseException:
                self._worker.kill()
                self._worker = None
                raise
        finally:
            self._lock.release()

    def _remember(self, key: bytes) -> None:
        with self._passed_lock:
            self._passed[key] = None
            if len(self._passed) > MAX_PASSED:
                self._passed.popitem(last=False)


class RequestTrials:
    """The trials of one request. What they may take grows with the texts, slowly."""

    def __init__(self, trials: GrammarTrials):
        self._trials = trials
        self._left = SECONDS

    def check(self, grammar: str) -> None:
        """Raise ValueError with llguidance's reason if a grammar cannot be used.

        Raises:
            GrammarTooExpensive: it takes too much time or memory.
            ClientLeft: the client of the request left.
        """
        self._left += len(grammar) * SECONDS_PER_CHARACTER
        error, seconds = self._trials.try_grammar(grammar, self._left)
        self._left -= seconds
        if error:
            raise ValueError(error)

    def convert(self, gbnf: str) -> str:
        """Convert GBNF to Lark.

        Raises:
            ValueError: it is not valid, or takes too much time or memory.
            ClientLeft: the client of the request left.
        """
        self._left += len(gbnf) * SECONDS_PER_CHARACTER
        lark, seconds = self._trials.convert(gbnf, self._left)
        self._left -= seconds
        return lark


class _Worker:
    """A process that runs grammar_worker.py."""

    def __init__(self) -> None:
        import llguidance

        folder = Path(llguidance.__file__).parents[1]
        # Without the packages of the environment, whose start files may import much.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", grammar_worker.__file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a process that ends for lack of memory says so
            encoding="utf-8",
            start_new_session=True,  # does not receive the Ctrl-C of a terminal
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._stdin: IO[str] = stdin
        self._times = psutil.Process(self._process.pid)
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_read_lines, args=[stdout, self._answers], daemon=True).start()
        try:
            if not self._wait(WALL_SECONDS):
                raise RuntimeError(f"{grammar_worker.__file__} did not start: run it to see why.")
        except BaseException:
            self.kill()
            raise

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def run(self, request: dict[str, str], seconds: float) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            GrammarTooExpensive: it took more than `seconds` of the processor, or ended the process.
            ClientLeft: the client left.
        """
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(request) + "\n")
            self._stdin.flush()
        if not (line := self._wait(seconds)):
            raise GrammarTooExpensive("it takes too much memory, or is nested too deeply. Simplify it.")
        return json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # of what was not written yet
            self._stdin.close()

    def _wait(self, seconds: float) -> str:
        """Return the next line of output; "" if the process has ended."""
        started, deadline = self._processor_time(), time.monotonic() + WALL_SECONDS
        while True:
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=POLL_SECONDS)
            _check_client()
            if self._processor_time() - started > seconds or time.monotonic() > deadline:
                raise GrammarTooExpensive("it takes too long to compile. Simplify it.")

    def _processor_time(self) -> float:
        try:
            times = self._times.cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return times.user + times.system


def _read_lines(stream: IO[str], lines: queue.SimpleQueue[str]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put("")


def _check_client() -> None:
    if (left := client_left.get()) is not None and left.is_set():
        raise ClientLeft


def _key(grammar: str) -> bytes:
    return hashlib.sha256(grammar.encode(errors="surrogatepass")).digest()
