"""Runs Python code that a model wrote, in a confined process with limits. Variables are kept between cells.

    with Sandbox() as sandbox:
        sandbox.run("x = 6")
        print(sandbox.run("x * 7").output)      # 42

`Sandbox` is one session. `process.py` starts and watches the process, in namespaces of `bubblewrap.py`; `worker.py`
runs the cells inside it, after `confinement.py` has removed its rights; `folders.py` copies files in and out.

The code sees Python, the installed libraries and its own folder; no other files, programs or network. Time, memory,
threads, files and output are limited. docs/security.md lists the promises. This needs Linux 5.14 or newer with
bubblewrap and libseccomp, but no privileges. Elsewhere the sandbox does not start unless you allow a weaker one.

The code shares your kernel: it may escape through a bug there. If strangers choose the code, run the whole program in a
virtual machine that holds no secrets.
"""

import os
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from .folders import Snapshot, copy_changes
from .process import Limits, Process, ProcessDied, SandboxUnavailable

__all__ = ["Limits", "Result", "Sandbox", "SandboxUnavailable"]

ADVICE = (
    "Install bubblewrap and libseccomp (apt install bubblewrap libseccomp2), on a system that allows user namespaces; "
    "or, if you trust the code or run all of this in a container without secrets, allow a weaker sandbox."
)


class Result(NamedTuple):
    """Result of a cell.

    Attributes:
        output: printed text, the value of the last expression, the traceback, and notes in square brackets.
        status: "ok", "error" (an exception), "interrupted" (out of time, variables kept) or "died" (variables lost).
    """

    output: str
    status: str


class Sandbox:
    """A session: one process that runs cells in one namespace. Not thread-safe; ends with the thread that starts it.

    Args:
        folder: working folder; created if missing, kept afterwards. The code works on a copy in memory, which is made
            the same before and after each cell. None: a temporary folder, removed by `close`.
        limits: resource limits; the defaults suit calculations and plots.
        allow_weaker: start even if access to files cannot be blocked; `missing_protections` then says what is open.

    Raises:
        SandboxUnavailable: unsupported operating system.
    """

    def __init__(self, folder: Path | None = None, *, limits: Limits | None = None, allow_weaker: bool = False):
        if os.name != "posix":
            raise SandboxUnavailable("The sandbox needs Linux (or macOS, weaker). On Windows, use WSL or a container.")
        self.limits = limits or Limits()
        self.allow_weaker = allow_weaker
        self.missing_protections: list[str] = []
        self.is_temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="sandbox-") if folder is None else folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process: Process | None = None
        self.outside: Snapshot = {}  # files of the folder, and of the process, when they were last the same
        self.inside: Snapshot = {}

    @property
    def missing(self) -> list[str]:
        """Old name of `missing_protections`; the next release removes it."""
        warnings.warn("Sandbox.missing is now Sandbox.missing_protections.", DeprecationWarning, stacklevel=2)
        return self.missing_protections

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process now instead of with the first cell.

        Raises:
            SandboxUnavailable: the process cannot be started or confined; the message says what is missing.
        """
        self._ensure_started()

    def _ensure_started(self) -> Process:
        if self.process is not None:
            return self.process
        try:
            process = Process(self.folder, self.limits, isolated=True)
        except SandboxUnavailable as error:
            if not self.allow_weaker:
                raise SandboxUnavailable(f"This machine cannot confine the code: {error} {ADVICE}") from error
            process = Process(self.folder, self.limits, isolated=False)
            process.missing_protections.append(str(error))
        self.process, self.missing_protections = process, process.missing_protections
        self.outside, self.inside = {}, {}
        if errors := self._copy_in(process):
            self._end()
            raise SandboxUnavailable(
                f"The folder {self.folder} does not fit into the sandbox ({errors[0]}): "
                f"leave at most {self.limits.folder_bytes >> 20} MiB and {self.limits.folder_files} files in it."
            )
        return process

    def run(self, code: str) -> Result:
        """Run a cell. Restarts the process if it has ended.

        Raises:
            SandboxUnavailable: see `start`; or the folder does not fit into the limits.
        """
        notes = []
        if self.process is not None and self._copy_in(self.process):  # code has left no room, or is in the way
            self._end()
            notes.append("[The new files of the folder did not fit beside those of the code: all variables are gone.]")
        process = self._ensure_started()
        try:
            status = process.run(code)
            if status == "interrupted":
                notes.append(f"[Stopped after {self.limits.wall_seconds:g} seconds. The variables are still there.]")
        except ProcessDied as error:
            status = "died"
            notes.append(f"[The interpreter is gone: {error}. So are all variables; the next cell starts a new one.]")
            process.kill()
        except BaseException:  # includes Ctrl-C in this process
            self._end()
            raise
        notes += self._copy_out(process)
        output = process.last_output()
        if status == "died":
            self._end()
        return Result("\n".join(part for part in (output.rstrip("\n"), *notes) if part), status)

    def close(self) -> None:
        """End the process and remove the temporary folder. Can be called repeatedly."""
        self._end()
        if self.is_temporary:  # not shutil.rmtree: folders may be nested too deep for it
            subprocess.run(["rm", "-rf", "--", self.folder], check=False, stderr=subprocess.DEVNULL)

    def _end(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None

    def _copy_in(self, process: Process) -> list[str]:
        """Copy what has changed in the folder into the process's file system; return the errors."""
        if process.files is None:  # it works in the folder itself
            return []
        return copy_changes(self.folder, process.files, self.outside, self.inside, self.limits.folder_bytes)

    def _copy_out(self, process: Process) -> list[str]:
        """Copy what the cell has changed to the folder; return a note on the files that are not copied."""
        if process.files is None:
            return []
        errors = copy_changes(process.files, self.folder, self.inside, self.outside, self.limits.folder_bytes)
        return [f"[{len(errors)} of the files could not be kept: {errors[0]}.]"] if errors else []
