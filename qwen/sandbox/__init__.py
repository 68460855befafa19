"""Runs Python that a model wrote: in a process of its own, with limits, and with its variables kept between cells.

    with Sandbox() as sandbox:
        sandbox.run("x = 6")
        print(sandbox.run("x * 7").output)      # 42

Revolves around `Sandbox`, one session: its folder, its limits, what is said about a cell. `process.py` holds the
process in which the cells run; what it does inside stands in `worker.py`, what it may not do in `confinement.py`. None
of them knows models or prompts.

What it protects against: the mistakes and the casual mischief of a model. The code cannot read your files, change them
or see your environment; cannot use the network, start programs or signal other processes; and cannot take more than its
share of time, memory, output and disk. All of that needs no privileges on Linux 6.2 or newer with libseccomp. Elsewhere
parts are missing, and a sandbox does not start unless you allow that.

What it does not protect against: an attacker who is determined. The code shares the kernel with you, may read the
installed Python packages and ask whether a path exists, and a hole in the kernel or in the rules here lets it out. The
rules forbid what is known to be dangerous rather than allowing what is known to be safe. For code of strangers run the
whole program in a container or a virtual machine of its own, with no secrets inside.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from .process import Ended, Limits, Process, SandboxUnavailable

__all__ = ["Limits", "Result", "Sandbox", "SandboxUnavailable"]


class Result(NamedTuple):
    """What came of a cell.

    `output` is what it printed, the value of its last expression, its traceback, and notes in square brackets. `status`
    is "ok", "error" (an exception), "interrupted" (out of time, variables kept) or "died" (variables gone).
    """

    output: str
    status: str


class Sandbox:
    """A session: one process that runs cells in one namespace. For one thread at a time.

    Args:
        folder: where the code works and the only place where it may write; made if missing, kept afterwards. None: a
            temporary one, removed by `close`.
        limits: the defaults suit calculations and plots.
        allow_weaker: start also where files or the network cannot be closed off; `missing` then tells what is open.

    Raises:
        SandboxUnavailable: not on this operating system.
    """

    def __init__(self, folder: Path | None = None, *, limits: Limits | None = None, allow_weaker: bool = False):
        if os.name != "posix":
            raise SandboxUnavailable("The sandbox needs Linux (or macOS, weaker): on Windows use WSL or a container.")
        self.limits = limits or Limits()
        self.allow_weaker = allow_weaker
        self.missing: list[str] = []
        self.temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="sandbox-") if folder is None else folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files_before = self._files()
        self.process: Process | None = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process now rather than with the first cell.

        Raises:
            SandboxUnavailable: it cannot be started or confined; the text says what is missing.
        """
        self._started()

    def _started(self) -> Process:
        if self.process is not None:
            return self.process
        process = Process(self.folder, self.limits)
        if process.missing and not self.allow_weaker:
            process.kill()
            raise SandboxUnavailable(
                f"This machine cannot confine the code: {' '.join(process.missing)} "
                "Run the program in a container, or allow a weaker sandbox if you trust the code."
            )
        self.process, self.missing = process, process.missing
        return process

    def run(self, code: str) -> Result:
        """Run a cell; a process that is gone is started again.

        Raises:
            SandboxUnavailable: as `start`.
        """
        process = self._started()
        files, notes = self._files(), []
        try:
            status = process.run(code, self._excess)
            if status == "interrupted":
                notes.append(f"[Stopped after {self.limits.wall_seconds:g} seconds. The variables are still there.]")
        except Ended as error:
            status = "died"
            notes.append(f"[The interpreter is gone: {error}. So are all variables; the next cell starts a new one.]")
        except BaseException:  # Ctrl-C in our own process among them
            self._end()
            raise
        output = process.printed()
        if status == "died":
            self._end()
            if self._excess():
                for path in self._files() - files:
                    with contextlib.suppress(OSError):
                        path.unlink()
                notes.append("[The files that it made are removed.]")
        return Result("\n".join(part for part in (output.rstrip("\n"), *notes) if part), status)

    def close(self) -> None:
        """End the process and remove the temporary folder. May be called twice."""
        self._end()
        if self.temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process = None

    def _files(self) -> set[Path]:
        return {Path(place, name) for place, _, names in os.walk(self.folder) for name in names}

    def _excess(self) -> str:
        """Why the folder is too full, or nothing; what lay there before does not count."""
        files, size = self._files() - self.files_before, 0
        for path in files:
            with contextlib.suppress(OSError):
                size += path.lstat().st_blocks * 512
        if len(files) > self.limits.folder_files:
            return f"it made more than {self.limits.folder_files} files"
        if size > self.limits.folder_bytes:
            return f"its files took more than {self.limits.folder_bytes >> 20} MiB"
        return ""
