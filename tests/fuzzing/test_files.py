"""Every file that the library reads is read or refused in one line that names it, whatever was done to it.

The inputs are always the same ones. `python -m tests.fuzzing files` searches with other ones.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzzing.test_server import FOUND, run
from tests.support.processes import Child

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:Generating overly large repr")]

EXAMPLES = {"run": 4}  # which trains
OTHER_EXAMPLES = 8


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    # Here, because the imports take seconds that the workers without this file save.
    from tests.fuzzing.file_checks import CheckedFiles

    checked = CheckedFiles(tmp_path_factory.mktemp("files"))
    yield checked
    checked.close()


def test_damaged_files_are_read_or_refused(checked) -> None:
    """About 30 seconds: configs, tokenizers, weights, adapters, data, checkpoints of training, benchmarks, records."""
    checked.results.clear()
    for name, cases in checked.kinds().items():
        run(checked, cases, EXAMPLES.get(name, OTHER_EXAMPLES))
    for result in ("read", "refused"):  # the inputs get deep, and some are wrong
        assert sum(count for (_, found), count in checked.results.items() if found == result) > 20
    assert {name for name, _ in checked.results} == {*checked.kinds()}


def test_undamaged_files_are_read(checked) -> None:
    from tests.fuzzing.file_cases import FileCase

    checked.results.clear()
    for name in checked.kinds():
        checked.check(FileCase(name, ()))
        assert checked.results[name, "read"] == 1, checked.answer()


def test_inputs_that_once_failed(checked) -> None:
    tried = 0
    for path in FOUND:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not checked.accepts(fields):
            continue
        tried += 1
        try:
            checked.check(checked.read(fields))
        except AssertionError as error:
            raise AssertionError(f"{path.name}: {error}") from error
    assert tried


# ---- the checks ----


def recurse(folder: Path) -> None:
    recurse(folder)


def fill_memory(folder: Path) -> None:
    raise ValueError(f"{folder}: {len(bytearray(300 << 20))}")


def hide_a_memory_error(folder: Path) -> None:
    try:
        bytearray(1 << 60)
    except MemoryError as error:
        raise OSError(f"{folder} is too large.") from error


def kill_itself(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def wait_for_a_pipe(folder: Path) -> None:
    os.read(os.pipe()[0], 1)


def refuse(folder: Path) -> None:
    print("here")
    raise OSError(f"{folder} is\nodd.")


def outcomes(folder: Path, *readers: Callable[[Path], None]) -> list:
    """Read a folder by readers, in forks of this process."""
    from tests.fuzzing import file_process
    from tests.fuzzing.file_readers import READERS, Reader

    found = []
    for reader in readers:
        READERS[reader.__name__] = Reader("", (), reader)
        file_process.TIME_LIMIT = 1 if reader is wait_for_a_pipe else 600
        found.append(file_process.read_in_fork(reader.__name__, folder / "input"))
    return found


def test_the_checks_notice_what_they_should(tmp_path: Path) -> None:
    from tests.fuzzing.file_checks import check_error

    bad = (recurse, fill_memory, hide_a_memory_error, kill_itself, wait_for_a_pipe, refuse)
    recursed, large, hidden, killed, waited, refused = Child(tmp_path, outcomes, tmp_path, *bad).result()
    assert "RecursionError" in recursed.failure
    assert large.failure is None
    assert 290 << 20 < large.memory < 400 << 20
    assert large.seconds > 0
    assert "MemoryError" in hidden.failure
    assert "SIGSEGV" in killed.failure
    assert "SIGKILL" in waited.failure
    assert (refused.failure, refused.used, refused.output) == (None, False, "here\n")
    assert refused.memory < 50 << 20
    for outcome, names, problem in ((refused, ["input"], "2 lines"), (large, ["config.json"], "names no file")):
        with pytest.raises(AssertionError, match=problem):
            check_error(outcome, names)
    check_error(large, ["input"])
