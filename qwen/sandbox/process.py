"""The process that runs cells, seen from outside: started, handed a cell, watched, interrupted, killed.

Revolves around `Process`. It knows pipes, clocks and signals; how a cell is run and what the process may not do, it
leaves to worker.py. Whatever comes out of the pipes was written by code that nobody has read, and is treated so.
"""

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
GRACE = 5.0  # seconds in which an interrupted cell may clean up before the process is killed
START = 60.0  # seconds in which an interpreter starts, also on a busy machine
LOOK = 0.25  # seconds between two looks at the folder
LONGEST_MESSAGE = 65536
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could drive a terminal


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a cell, or where it says so the session, may take."""

    wall_seconds: float = 30.0
    cpu_seconds: int = 30
    memory_bytes: int = 2 << 30  # address space of the session
    file_bytes: int = 64 << 20  # one file
    folder_bytes: int = 256 << 20  # all files of the session
    folder_files: int = 1000
    open_files: int = 128
    output_bytes: int = 8000  # of what a cell prints; the middle of more is left out


class SandboxUnavailable(RuntimeError):
    """This machine cannot confine a process, or the process did not start; the text says what is missing."""


class Ended(Exception):
    """The process is gone, or has to go; the text says why, as the end of "The interpreter is gone: …"."""


class Process:
    """A worker with its pipes.

    `missing` holds what could not be forbidden to it, a sentence each.

    Raises:
        SandboxUnavailable: it did not start.
    """

    def __init__(self, folder: Path, limits: Limits):
        self.limits = limits
        self.cells = 0
        self.output = _Output(limits.output_bytes)
        (theirs, self.commands), (self.results, to_us) = os.pipe(), os.pipe()
        settings = {
            "folder": str(folder),
            "commands": theirs,
            "results": to_us,
            "cpu_seconds": limits.cpu_seconds,
            "limits": {name: getattr(limits, name) for name in ("memory_bytes", "file_bytes", "open_files")},
        }
        hidden = str(folder / ".cache")
        environment = {  # nothing of ours: it may hold keys
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "MPLBACKEND": "agg",
            "MPLCONFIGDIR": hidden,
            "XDG_CACHE_HOME": hidden,
            **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")},
        }
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "utf8", str(WORKER), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                pass_fds=(theirs, to_us),
                start_new_session=True,  # a group of its own to kill, and no share in our Ctrl-C
            )
        except OSError as error:
            os.close(self.commands)
            os.close(self.results)
            raise SandboxUnavailable(f"The process in the sandbox did not start: {error}.") from error
        finally:
            os.close(theirs)
            os.close(to_us)
        assert self.popen.stdout is not None  # it is a pipe
        self.pipe = self.popen.stdout
        self.stdout = self.pipe.fileno()
        for pipe in (self.commands, self.results, self.stdout):
            os.set_blocking(pipe, False)
        try:
            self.missing: list[str] = self._message(b"", START, lambda: "")[0]["missing"]
        except (Ended, KeyError, TypeError) as error:
            self.kill()
            said = self.printed().strip() or str(error)
            raise SandboxUnavailable(f"The process in the sandbox did not start: {said}") from error
        except BaseException:
            self.kill()
            raise

    def run(self, code: str, excess: Callable[[], str]) -> str:
        """Run a cell → "ok", "error" or "interrupted". What it prints, `printed` has.

        Args:
            excess: asked now and then; why the process has to go at once, or "".

        Raises:
            Ended: it died or has to be killed.
        """
        self.cells += 1
        self.output = _Output(self.limits.output_bytes)
        cell = json.dumps({"cell": self.cells, "code": code}).encode() + b"\n"
        message, late = self._message(cell, self.limits.wall_seconds, excess)
        status = message.get("status") if isinstance(message, dict) and message.get("cell") == self.cells else None
        if status not in ("ok", "error"):
            raise Ended("its answer made no sense")
        return "interrupted" if late and status == "error" else status

    def printed(self) -> str:
        """What the last cell has printed."""
        return self.output.text()

    def kill(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.pipe.close()
        os.close(self.commands)
        os.close(self.results)

    def _message(self, cell: bytes, seconds: float, excess: Callable[[], str]) -> tuple[Any, bool]:
        """Hand the cell over, collect what it prints and wait → (its answer, whether it had to be interrupted)."""
        deadline, look, late, reply = time.monotonic() + seconds, time.monotonic() + LOOK, False, b""
        with selectors.DefaultSelector() as pipes:
            pipes.register(self.stdout, selectors.EVENT_READ)
            pipes.register(self.results, selectors.EVENT_READ)
            if cell:
                pipes.register(self.commands, selectors.EVENT_WRITE)
            while not reply.endswith(b"\n"):
                for key, _ in pipes.select(timeout=0.1):
                    if key.fd == self.commands:
                        cell = cell[self._write(cell) :]
                        if not cell:
                            pipes.unregister(self.commands)
                    elif key.fd == self.results:
                        piece = os.read(self.results, LONGEST_MESSAGE)
                        reply += piece
                        if not piece or len(reply) > LONGEST_MESSAGE:
                            raise self._ended()
                    elif not self.output.read(self.stdout):
                        pipes.unregister(self.stdout)
                now = time.monotonic()
                if now > look:
                    look = now + LOOK
                    if reason := excess():
                        raise Ended(reason)
                if now > deadline and not reply:
                    if late:
                        raise Ended(f"it ran for more than {seconds:g} seconds")
                    late, deadline = True, now + GRACE
                    os.kill(self.popen.pid, signal.SIGINT)
        self.output.drain(self.stdout)
        with suppress(ValueError, RecursionError):
            return json.loads(reply), late
        return None, late

    def _write(self, cell: bytes) -> int:
        try:
            return os.write(self.commands, cell)
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> Ended:
        """It has closed its pipes; the reason is in how it ends, if it does."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout=GRACE)
        self.output.drain(self.stdout)
        code = self.popen.returncode
        if code is None:
            return Ended("it closed its connection")
        if code == -signal.SIGXCPU:
            return Ended(f"it used more than {self.limits.cpu_seconds} seconds of processor time")
        return Ended(f"it left with exit status {code}" if code >= 0 else f"signal {-code}: {signal.strsignal(-code)}")


class _Output:
    """Text that a process prints: its beginning and its end, however long it is."""

    def __init__(self, limit: int):
        self.head, self.tail, self.half, self.length = b"", b"", limit // 2, 0

    def read(self, pipe: int) -> bool:
        """Take what the pipe holds now, at most one buffer of it; False at its end."""
        try:
            piece = os.read(pipe, 65536)
        except BlockingIOError:
            return True
        self.length += len(piece)
        room = self.half - len(self.head)
        self.head += piece[:room]
        self.tail = (self.tail + piece[room:])[-self.half :]
        return bool(piece)

    def drain(self, pipe: int) -> None:
        """Take what was printed before now: at most a pipe full, as a thread may go on printing."""
        for _ in range(16):
            before = self.length
            self.read(pipe)
            if self.length == before:
                return

    def text(self) -> str:
        """UTF-8 as text, what is none as escapes; without what could drive a terminal."""
        left_out = self.length - len(self.head) - len(self.tail)
        if left_out:
            parts = (self.head, f"\n[... {left_out} bytes left out ...]\n".encode(), self.tail)
            return CONTROL.sub("", b"".join(parts).decode(errors="ignore"))
        return CONTROL.sub("", (self.head + self.tail).decode(errors="backslashreplace"))
