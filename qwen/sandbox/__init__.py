"""Runs Python code that a model wrote, in a confined process with limits. Variables are kept between cells.

    with Sandbox() as sandbox:
        sandbox.run("x = 6")
        print(sandbox.run("x * 7").output)      # 42

`Sandbox` is one session: its folder, its limits and the results of its cells. `process.py` starts and watches the
process, `worker.py` runs the cells inside it, and `confinement.py` removes the process's rights.

The sandbox protects against mistakes and casual mischief of a model. The code cannot read or change your files or see
your environment. It cannot use the network, start programs or signal other processes. Time, memory, output and disk are
limited. This needs Linux 6.2 or newer with libseccomp, but no privileges. Elsewhere some protections are missing, and
the sandbox does not start unless you allow that.

It does not protect against a determined attacker. The code shares your kernel, can read the installed Python packages
and test whether a path exists, and can escape through a bug in the kernel or in the rules here. The rules are a
denylist of known dangers, not an allowlist. To run untrusted code, run the whole program in a separate container or
virtual machine that holds no secrets.
"""

import contextlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from .process import Limits, Process, ProcessDied, SandboxUnavailable

__all__ = ["Limits", "Result", "Sandbox", "SandboxUnavailable"]


class Result(NamedTuple):
    """Result of a cell.

    Attributes:
        output: printed text, the value of the last expression, the traceback, and notes in square brackets.
        status: "ok", "error" (an exception), "interrupted" (out of time, variables kept) or "died" (variables lost).
    """

    output: str
    status: str


class Sandbox:
    """A session: one process that runs cells in one namespace. Not thread-safe.

    Args:
        folder: working folder and the only place where the code may write; created if missing, kept afterwards. None: a
            temporary folder, removed by `close`.
        limits: resource limits; the defaults suit calculations and plots.
        allow_weaker: start even if access to files or the network cannot be blocked; `missing_protections` then says
            what is open.

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
        self.files_before = self._files()
        self.process: Process | None = None

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
        process = Process(self.folder, self.limits)
        if process.missing_protections and not self.allow_weaker:
            process.kill()
            raise SandboxUnavailable(
                f"This machine cannot confine the code: {' '.join(process.missing_protections)} "
                "Run the program in a container, or allow a weaker sandbox if you trust the code."
            )
        self.process, self.missing_protections = process, process.missing_protections
        return process

    def run(self, code: str) -> Result:
        """Run a cell. Restarts the process if it has ended.

        Raises:
            SandboxUnavailable: see `start`.
        """
        process = self._ensure_started()
        files, notes = self._files(), []
        try:
            status = process.run(code, self._exceeded_folder_limit)
            if status == "interrupted":
                notes.append(f"[Stopped after {self.limits.wall_seconds:g} seconds. The variables are still there.]")
        except ProcessDied as error:
            status = "died"
            notes.append(f"[The interpreter is gone: {error}. So are all variables; the next cell starts a new one.]")
        except BaseException:  # includes Ctrl-C in this process
            self._end()
            raise
        output = process.last_output()
        if status == "died":
            self._end()
            if self._exceeded_folder_limit():
                for path in self._files() - files:
                    with contextlib.suppress(OSError):
                        path.unlink()
                notes.append("[The files that it made are removed.]")
        return Result("\n".join(part for part in (output.rstrip("\n"), *notes) if part), status)

    def close(self) -> None:
        """End the process and remove the temporary folder. Can be called repeatedly."""
        self._end()
        if self.is_temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process = None

    def _files(self) -> set[Path]:
        return {Path(root, name) for root, _, names in os.walk(self.folder) for name in names}

    def _exceeded_folder_limit(self) -> str:
        """Return which folder limit is exceeded, or "". Files that existed before the session do not count."""
        files, size = self._files() - self.files_before, 0
        for path in files:
            with contextlib.suppress(OSError):
                size += path.lstat().st_blocks * 512
        if len(files) > self.limits.folder_files:
            return f"it made more than {self.limits.folder_files} files"
        if size > self.limits.folder_bytes:
            return f"its files took more than {self.limits.folder_bytes >> 20} MiB"
        return ""
