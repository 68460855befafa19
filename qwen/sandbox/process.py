"""Parent side of the sandbox process: starts the worker, sends cells, enforces time limits, interrupts and kills.

Everything read from the pipes is untrusted: the code in the sandbox may have written it.
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
from typing import cast

WORKER = Path(__file__).with_name("worker.py")
INTERRUPT_TIMEOUT = 5.0  # seconds an interrupted cell has to clean up before the process is killed
START_TIMEOUT = 60.0  # seconds for starting the interpreter, also on a busy machine
FOLDER_CHECK_INTERVAL = 0.25  # seconds between two checks of the folder
MAX_MESSAGE_BYTES = 65536
CONTROL_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # terminal control sequences


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of a cell or, where noted, of the session."""

    wall_seconds: float = 30.0
    cpu_seconds: int = 30
    memory_bytes: int = 2 << 30  # address space of the session
    file_bytes: int = 64 << 20  # of one file
    folder_bytes: int = 256 << 20  # of all files of the session
    folder_files: int = 1000
    open_files: int = 128
    output_bytes: int = 8000  # of printed output; longer output is cut in the middle


class SandboxUnavailable(RuntimeError):
    """This machine cannot confine a process, or the process did not start. The message says what is missing."""


class ProcessDied(Exception):
    """The process ended or must be killed. The message is the reason, a clause for "The interpreter is gone: …"."""


class Process:
    """A worker process and its pipes.

    Attributes:
        missing_protections: protections that are not in force, one sentence each.

    Raises:
        SandboxUnavailable: the process did not start.
    """

    def __init__(self, folder: Path, limits: Limits):
        self.limits = limits
        self.cells = 0
        self.output = _Output(limits.output_bytes)
        (child_commands, self.commands), (self.results, child_results) = os.pipe(), os.pipe()
        settings = {
            "folder": str(folder),
            "commands": child_commands,
            "results": child_results,
            "cpu_seconds": limits.cpu_seconds,
            "limits": {name: getattr(limits, name) for name in ("memory_bytes", "file_bytes", "open_files")},
        }
        cache = str(folder / ".cache")
        environment = {  # not inherited: ours may contain keys
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "MPLBACKEND": "agg",
            "MPLCONFIGDIR": cache,
            "XDG_CACHE_HOME": cache,
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
                pass_fds=(child_commands, child_results),
                start_new_session=True,  # own process group: can be killed as a whole, does not receive our Ctrl-C
            )
        except OSError as error:
            os.close(self.commands)
            os.close(self.results)
            raise SandboxUnavailable(f"The sandbox process did not start: {error}.") from error
        finally:
            os.close(child_commands)
            os.close(child_results)
        assert self.popen.stdout is not None  # stdout=PIPE
        self.pipe = self.popen.stdout
        self.stdout = self.pipe.fileno()
        for pipe in (self.commands, self.results, self.stdout):
            os.set_blocking(pipe, False)
        try:
            answer, _ = self._request(b"", START_TIMEOUT, lambda: "")
            self.missing_protections = cast("dict[str, list[str]]", answer)["missing"]
        except (ProcessDied, KeyError, TypeError) as error:
            self.kill()
            reason = self.last_output().strip() or str(error)
            raise SandboxUnavailable(f"The sandbox process did not start: {reason}") from error
        except BaseException:
            self.kill()
            raise

    def run(self, code: str, check_limits: Callable[[], str]) -> str:
        """Run a cell and return "ok", "error" or "interrupted". `last_output` returns its output.

        Args:
            check_limits: called periodically; returns a reason to kill the process, or "".

        Raises:
            ProcessDied: the process died or must be killed.
        """
        self.cells += 1
        self.output = _Output(self.limits.output_bytes)
        cell = json.dumps({"cell": self.cells, "code": code}).encode() + b"\n"
        message, interrupted = self._request(cell, self.limits.wall_seconds, check_limits)
        status = message.get("status") if isinstance(message, dict) and message.get("cell") == self.cells else None
        if status not in ("ok", "error"):
            raise ProcessDied("its answer made no sense")
        return "interrupted" if interrupted and status == "error" else status

    def last_output(self) -> str:
        """Return the output of the last cell."""
        return self.output.text()

    def kill(self) -> None:
        """Kill the process and everything it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.pipe.close()
        os.close(self.commands)
        os.close(self.results)

    def _request(self, cell: bytes, seconds: float, check_limits: Callable[[], str]) -> tuple[object, bool]:
        """Send the cell, collect its output and wait; return the worker's answer and whether it was interrupted."""
        deadline, next_check = time.monotonic() + seconds, time.monotonic() + FOLDER_CHECK_INTERVAL
        interrupted, reply = False, b""
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
                        chunk = os.read(self.results, MAX_MESSAGE_BYTES)
                        reply += chunk
                        if not chunk or len(reply) > MAX_MESSAGE_BYTES:
                            raise self._exit_reason()
                    elif not self.output.read(self.stdout):
                        pipes.unregister(self.stdout)
                now = time.monotonic()
                if now > next_check:
                    next_check = now + FOLDER_CHECK_INTERVAL
                    if reason := check_limits():
                        raise ProcessDied(reason)
                if now > deadline and not reply:
                    if interrupted:
                        raise ProcessDied(f"it ran for more than {seconds:g} seconds")
                    interrupted, deadline = True, now + INTERRUPT_TIMEOUT
                    os.kill(self.popen.pid, signal.SIGINT)
        self.output.drain(self.stdout)
        with suppress(ValueError, RecursionError):
            return json.loads(reply), interrupted
        return None, interrupted

    def _write(self, cell: bytes) -> int:
        try:
            return os.write(self.commands, cell)
        except BrokenPipeError:
            raise self._exit_reason() from None

    def _exit_reason(self) -> ProcessDied:
        """Return the error for a process that closed its pipes, from its exit status if it exits."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout=INTERRUPT_TIMEOUT)
        self.output.drain(self.stdout)
        code = self.popen.returncode
        if code is None:
            return ProcessDied("it closed its connection")
        if code == -signal.SIGXCPU:
            return ProcessDied(f"it used more than {self.limits.cpu_seconds} seconds of processor time")
        return ProcessDied(
            f"it left with exit status {code}" if code >= 0 else f"signal {-code}: {signal.strsignal(-code)}"
        )


class _Output:
    """Output of a process, truncated to its beginning and its end."""

    def __init__(self, limit: int):
        self.head, self.tail, self.half, self.length = b"", b"", limit // 2, 0

    def read(self, pipe: int) -> bool:
        """Read what is in the pipe now, at most one buffer; return False at end of file."""
        try:
            chunk = os.read(pipe, 65536)
        except BlockingIOError:
            return True
        self.length += len(chunk)
        room = self.half - len(self.head)
        self.head += chunk[:room]
        self.tail = (self.tail + chunk[room:])[-self.half :]
        return bool(chunk)

    def drain(self, pipe: int) -> None:
        """Read what was printed so far, at most the capacity of a pipe, since a thread may keep printing."""
        for _ in range(16):
            before = self.length
            self.read(pipe)
            if self.length == before:
                return

    def text(self) -> str:
        """Decode as UTF-8, with invalid bytes escaped and terminal control sequences removed."""
        left_out = self.length - len(self.head) - len(self.tail)
        if left_out:
            parts = (self.head, f"\n[... {left_out} bytes left out ...]\n".encode(), self.tail)
            return CONTROL_SEQUENCES.sub("", b"".join(parts).decode(errors="ignore"))
        return CONTROL_SEQUENCES.sub("", (self.head + self.tail).decode(errors="backslashreplace"))
