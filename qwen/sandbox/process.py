"""Parent side of the sandbox process: starts the worker, sends cells, enforces time limits, interrupts and kills.

Everything read from the pipes is untrusted: the code in the sandbox may have written it. The process is stopped between
cells, so that threads and code behind a forged answer do not go on.
"""

import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from .bubblewrap import bubblewrap_command, choose_user

WORKER = Path(__file__).with_name("worker.py")
INTERRUPT_TIMEOUT = 5.0  # seconds an interrupted cell has to clean up before the process is killed
START_TIMEOUT = 60.0  # seconds for starting the interpreter, also on a busy machine
POLL_INTERVAL = 0.1  # seconds between two checks of the time
MAX_MESSAGE_BYTES = 65536
CONTROL_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # terminal control sequences


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of a cell or, where noted, of the session."""

    wall_seconds: float = 30.0
    cpu_seconds: int = 30
    threads: int = 64
    memory_bytes: int = 2 << 30  # address space of the session
    file_bytes: int = 64 << 20  # of one file
    folder_bytes: int = 256 << 20  # of all files of the session, which are in memory, too
    folder_files: int = 1000  # and folders
    open_files: int = 128
    output_bytes: int = 8000  # of printed output; longer output is cut in the middle


class SandboxUnavailable(RuntimeError):
    """This machine cannot confine a process, or the process did not start. The message says what is missing."""


class ProcessDied(Exception):
    """The process ended or must be killed. The message is the reason, a clause for "The interpreter is gone: …"."""


class Process:
    """A worker process and its pipes.

    Args:
        folder: the working folder.
        limits: resource limits.
        isolated: start it with bubblewrap, on an empty file system in memory at the place of the folder.

    Attributes:
        missing_protections: protections that are not in force, one sentence each.
        files: the file system in memory; None if not `isolated`. It stays until `close`.

    Raises:
        SandboxUnavailable: the process did not start.
    """

    def __init__(self, folder: Path, limits: Limits, *, isolated: bool):
        self.limits = limits
        self.cells = 0
        self.output = _Output(limits.output_bytes)
        self.files: Path | None = None
        self.pidfd: int | None = None  # of the worker, which is a child of bubblewrap: its number may be given away
        command: list[str] = []
        user = choose_user() if isolated else None
        if isolated:
            if not (program := shutil.which("bwrap")):
                raise SandboxUnavailable("bubblewrap is not installed.")
            command = bubblewrap_command(program, folder, (WORKER, WORKER.with_name("confinement.py")), user)
        self.results, child_results = os.pipe()
        self.opened = ExitStack()
        self.opened.callback(os.close, self.results)
        settings = {"results": child_results, "limits": asdict(limits), "isolated": isolated, "user": user}
        environment = {  # not inherited: ours may contain keys
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "MPLBACKEND": "agg",
            **dict.fromkeys(("HOME", "TMPDIR"), str(folder)),
            **dict.fromkeys(("MPLCONFIGDIR", "XDG_CACHE_HOME"), str(folder / ".cache")),
            **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")},
        }
        try:
            self.popen = subprocess.Popen(
                [*command, sys.executable, "-I", "-B", "-X", "utf8", str(WORKER), json.dumps(settings)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                pass_fds=(child_results,),
                start_new_session=True,  # own process group: can be killed as a whole, does not receive our Ctrl-C
            )
        except OSError as error:
            self.opened.close()
            raise SandboxUnavailable(f"The sandbox process did not start: {error}.") from error
        finally:
            os.close(child_results)
        self.opened.enter_context(self.popen)  # its pipes
        self.pid = self.popen.pid
        assert self.popen.stdin is not None  # PIPE
        assert self.popen.stdout is not None
        self.commands, self.stdout = self.popen.stdin.fileno(), self.popen.stdout.fileno()
        for pipe in (self.commands, self.results, self.stdout):
            os.set_blocking(pipe, False)
        try:
            answer, _ = self._request(b"", START_TIMEOUT)
            self.missing_protections = cast("dict[str, list[str]]", answer)["missing"]
            if isolated:
                self._open_worker(folder)
        except (ProcessDied, KeyError, TypeError, ValueError, OSError) as error:
            self.close()
            reason = self.last_output().strip() or str(error)
            raise SandboxUnavailable(f"The sandbox process did not start: {reason}") from error
        except BaseException:
            self.close()
            raise

    def run(self, code: str) -> str:
        """Run a cell and return "ok", "error" or "interrupted". `last_output` returns its output.

        Raises:
            ProcessDied: the process died or must be killed.
        """
        self.cells += 1
        self.output = _Output(self.limits.output_bytes)
        cell = json.dumps({"cell": self.cells, "code": code}).encode() + b"\n"
        self._signal(signal.SIGCONT)
        message, interrupted = self._request(cell, self.limits.wall_seconds)
        self._signal(signal.SIGSTOP)
        status = message.get("status") if isinstance(message, dict) and message.get("cell") == self.cells else None
        if status not in ("ok", "error"):
            raise ProcessDied("its answer made no sense")
        return "interrupted" if interrupted and status == "error" else status

    def last_output(self) -> str:
        """Return the output of the last cell."""
        return self.output.text()

    def kill(self) -> None:
        """Kill the process and everything it started. Its files can still be read."""
        self._signal(signal.SIGKILL)
        if self.popen.poll() is None:  # until then the number stays its own
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        if self.pidfd is not None:
            with selectors.DefaultSelector() as end:  # may come after that of bubblewrap
                end.register(self.pidfd, selectors.EVENT_READ)
                end.select(INTERRUPT_TIMEOUT)

    def close(self) -> None:
        """Kill the process and remove its files."""
        self.kill()
        self.opened.close()

    def _open_worker(self, folder: Path) -> None:
        """Open the worker and its file system."""
        self.pid = _last_child(self.popen.pid)
        if sys.platform == "linux":
            self.pidfd = os.pidfd_open(self.pid)
            self.opened.callback(os.close, self.pidfd)
        descriptor = os.open(f"/proc/{self.pid}/root{folder}", os.O_RDONLY | os.O_DIRECTORY)
        self.opened.callback(os.close, descriptor)
        self.files = Path(f"/proc/self/fd/{descriptor}")
        if _last_child(self.popen.pid) != self.pid:
            raise ValueError("the worker has ended")

    def _signal(self, number: int) -> None:
        if self.pidfd is None:
            self.popen.send_signal(number)  # a child: does nothing once it has ended
        elif sys.platform == "linux":
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def _processor_seconds(self) -> float:
        """Return the processor time of the process, 0 if it has ended or this is not Linux."""
        with suppress(OSError):
            if sys.platform == "linux":
                return time.clock_gettime((~self.pid << 3) | 2)  # as clock_getcpuclockid
        return 0.0

    def _request(self, cell: bytes, seconds: float) -> tuple[object, bool]:
        """Send the cell, collect its output and wait; return the worker's answer and whether it was interrupted."""
        deadline, cpu_deadline = time.monotonic() + seconds, self._processor_seconds() + self.limits.cpu_seconds
        interrupted, reply = False, b""
        with selectors.DefaultSelector() as pipes:
            pipes.register(self.stdout, selectors.EVENT_READ)
            pipes.register(self.results, selectors.EVENT_READ)
            if cell:
                pipes.register(self.commands, selectors.EVENT_WRITE)
            while not reply.endswith(b"\n"):
                for key, _ in pipes.select(timeout=POLL_INTERVAL):
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
                if self._processor_seconds() > cpu_deadline:
                    raise ProcessDied(f"it used more than {self.limits.cpu_seconds} seconds of processor time")
                now = time.monotonic()
                if now > deadline:  # also behind half an answer
                    if interrupted:
                        raise ProcessDied(f"it ran for more than {seconds:g} seconds")
                    interrupted, deadline = True, now + INTERRUPT_TIMEOUT
                    self._signal(signal.SIGINT)
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
        number = code - 128 if code > 128 else -code  # bubblewrap leaves as a shell does
        if 0 < number < signal.NSIG:
            return ProcessDied(f"signal {number}: {signal.strsignal(number)}")
        return ProcessDied(f"it left with exit status {code}")


def _last_child(pid: int) -> int:
    """Return the process at the end of the chain of children: bubblewrap, as root its process 1, the worker."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


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
            self.read(pipe)

    def text(self) -> str:
        """Decode as UTF-8, with invalid bytes escaped and terminal control sequences removed."""
        left_out = self.length - len(self.head) - len(self.tail)
        if left_out:
            parts = (self.head, f"\n[... {left_out} bytes left out ...]\n".encode(), self.tail)
            return CONTROL_SEQUENCES.sub("", b"".join(parts).decode(errors="ignore"))
        return CONTROL_SEQUENCES.sub("", (self.head + self.tail).decode(errors="backslashreplace"))
