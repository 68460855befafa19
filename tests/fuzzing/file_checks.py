"""Checks what must hold for every file that the library reads, however damaged.

It is read, or refused with one of the library's errors: one line that names the file. No other exception, little
memory, few seconds.
"""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzzing.file_cases import FileCase, cases_of, read_case, write_input
from tests.fuzzing.file_process import FileProcess, Outcome
from tests.fuzzing.file_readers import READERS
from tests.fuzzing.strategies import Strategy

MORE_MEMORY = 200 << 20  # bytes, beside twice the size of the folder
MAX_SECONDS = 10.0  # of processor time; the longest valid input takes one
MAX_ERROR = 2000  # characters


class CheckedFiles:
    """Readers of files, whose results are checked.

    Args:
        folder: an empty folder for the inputs.

    Attributes:
        inputs: number of inputs that were read.
        results: how many of each reader were "read" and "refused".
        memory: the most that a process grew by, less twice the size of its folder, in bytes.
        seconds: the most processor time that an input took.
    """

    def __init__(self, folder: Path):
        self.process = FileProcess(folder)
        self.inputs, self.memory, self.seconds = 0, 0, 0.0
        self.results: Counter[tuple[str, str]] = Counter()
        self._folder = folder / "work"
        self._last: Outcome | None = None

    @property
    def pid(self) -> int:
        return self.process.child.pid

    def is_running(self) -> bool:
        return self.process.child.poll() is None

    def kinds(self) -> dict[str, Strategy]:
        """Return strategies of inputs, by their readers."""
        return {name: cases_of(name, self.process.originals) for name in READERS}

    def accepts(self, fields: dict[str, Any]) -> bool:
        """Return whether a file describes an input of this class."""
        return "reader" in fields

    def read(self, fields: dict[str, Any]) -> FileCase:
        return read_case(fields)

    def fields(self, case: FileCase) -> dict[str, Any]:
        """Return an input as JSON."""
        return case.fields

    def place(self, case: FileCase) -> str:
        """Return what the input is for, to tell failures apart."""
        return f"{case.reader} {' '.join(case.files)}"

    def answer(self) -> dict[str, Any]:
        """Return the last result as JSON."""
        return {} if self._last is None else {"error": self._last.error, "output": self._last.output[-2000:]}

    def status(self) -> str:
        """Return the most that inputs took."""
        return f"at most {self.memory >> 20} MiB and {self.seconds:.1f} s an input, "

    def check(self, case: FileCase) -> None:
        """Read an input and check the result.

        Raises:
            AssertionError: something does not hold.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        folder = self._folder / "input"
        self._last = None
        write_input(case, self.process.originals / READERS[case.reader].original, folder)
        size = sum(size_of(path) for path in folder.rglob("*"))
        self._last = outcome = self.process.read(case.reader, folder)
        self.inputs += 1
        self.memory = max(self.memory, outcome.memory - 2 * size)
        self.seconds = max(self.seconds, outcome.seconds)
        self.results[case.reader, "read" if outcome.error is None else "refused"] += 1
        assert outcome.failure is None, outcome.failure
        assert "Traceback (most recent" not in outcome.output, f"a traceback was printed:\n{outcome.output[-5000:]}"
        if outcome.error is not None:
            check_error(outcome, [str(folder), *(Path(file).name for file in case.files)])
        mebibytes = outcome.memory >> 20
        assert outcome.memory <= MORE_MEMORY + 2 * size, f"it took {mebibytes} MiB of memory for {size >> 20} MiB"
        assert outcome.seconds <= MAX_SECONDS, f"it took {outcome.seconds:.1f} seconds of processor time"

    def close(self) -> None:
        """End the process."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.process.close()


def check_error(outcome: Outcome, names: list[str]) -> None:
    """Check that an error is one line that names a file or its folder."""
    text = outcome.error or ""
    assert text.strip(), "an error without a text"
    assert len(text.splitlines()) == 1, f"an error of {len(text.splitlines())} lines:\n{text}"
    assert text.isprintable(), f"an error with control characters:\n{text!r}"
    assert len(text) <= MAX_ERROR, f"an error of {len(text)} characters:\n{text[:500]}"
    assert "weights_only" not in text, f"an error that advises to execute a file:\n{text}"
    if not outcome.used:
        assert any(name in text for name in names), f"an error that names no file:\n{text}"


def size_of(path: Path) -> int:
    """Return the size of a file, without holes."""
    status = path.lstat()
    return min(status.st_size, 512 * status.st_blocks)
