"""The directory in which a model is written before it takes its place."""

import itertools
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen import Checkpoint, CheckpointError
from qwen.checkpoint.staging import check_target, staged_directory
from tests.support.processes import Child


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_nobody_else_reads_an_unfinished_model(tmp_path):
    previous = os.umask(0)
    try:
        with staged_directory(tmp_path / "out") as staging:
            (staging / "model.safetensors").write_bytes(b"secret")
            modes = [stat.S_IMODE(folder.stat().st_mode) for folder in (staging.parent, tmp_path / "out")]
    finally:
        os.umask(previous)
    assert modes == [0o700, 0o777]  # of the staging folder only: the finished model is as public as the umask says
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"secret"


# ---- SIGKILL during the moves (attack log: I2 to I5) ----

OLD = {"config.json": b'{"model_type": "qwen"}', "model.safetensors": b"old", "only_old.txt": b"kept"}
NEW = {"config.json": b'{"model_type": "qwen", "new": 1}', "model.safetensors": b"new", "only_new.json": b"{}"}
# Events that Python reports.
STEPS = {"os.link", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "open", "shutil.rmtree"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write(out: Path) -> None:
    with staged_directory(out) as staging:
        for name, data in NEW.items():
            (staging / name).write_bytes(data)


def write_again(out: Path) -> None:
    """Do what the next run does first with a folder in which another was killed."""
    check_target(out, out.parent / "source", overwrite=True)


def dies_before(step: int, function: Callable[[Path], object], out: Path, *, only_in: Path | None = None) -> bool:
    """Call the function in a process that is killed before this change of the file system. Whether that came.

    Args:
        only_in: count only changes of files in this folder, and of opened files only those that are written.
    """
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0
    count = itertools.count()

    def kill(event: str, arguments: tuple) -> None:
        if only_in is not None:
            reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if reads or not str(arguments[0]).startswith(f"{only_in}/"):
                return
        if event in STEPS and next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(kill)  # holds until the process ends
        function(out)
        os._exit(0)
    finally:
        os._exit(1)


def kill_at_every_step(folder: Path, next_as_well: bool) -> list[tuple[int, str]]:
    """Kill the run that replaces the old model before each step, if asked also each next run before each of its steps.

    Returns the steps after which the last run did not leave one of the models, and why; the last item counts the steps.
    """
    failures, source = [], folder / "old"
    source.mkdir()
    for name, data in OLD.items():
        (source / name).write_bytes(data)
    for step in itertools.count():
        out = Path(shutil.copytree(source, folder / "out"))
        came = dies_before(step, write, out)
        try:
            if (out / "config.json").exists():  # else it is no model, and the message says where both are
                assert content(out) in (OLD, OLD | NEW), "the two are mixed"
            elif step:
                with pytest.raises(CheckpointError, match="was killed while it moved the finished model from"):
                    Checkpoint.open(out)
            next_step = 0 if next_as_well else sys.maxsize
            while dies_before(next_step, write_again, out):
                next_step += 1
            assert content(out) in (OLD, OLD | NEW), "neither is whole"
            assert not list(out.glob(".unfinished-*")), "something is left"
        except (AssertionError, OSError) as error:
            failures.append((step, str(error)))
        shutil.rmtree(out)
        if not came:
            return [*failures, (step, "steps in all")]
    raise AssertionError


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither fork nor SIGKILL")
@pytest.mark.parametrize("next_as_well", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_killed_at_every_step(next_as_well: bool, tmp_path: Path) -> None:
    *failures, (steps, _) = Child(tmp_path, kill_at_every_step, tmp_path, next_as_well).result(300)
    assert not failures
    assert steps > 20


def test_active_runs_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(OLD["config.json"])
    with staged_directory(tmp_path), pytest.raises(FileExistsError, match="another run that is still active"):
        check_target(tmp_path, tmp_path / "source", overwrite=True)
    check_target(tmp_path, tmp_path / "source", overwrite=True)


def test_a_kept_model_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()  # where a file is to be moved
    with pytest.raises(OSError, match=r"finished model is kept in .*/kept: it could not be moved"):
        write(tmp_path)
    for _ in range(2):
        with pytest.raises(FileExistsError, match="kept is the finished model of another run"):
            write_again(tmp_path)
    assert content(next(tmp_path.glob(".unfinished-*/kept"))) == NEW


def test_moves_that_cannot_be_finished_lose_nothing(tmp_path: Path) -> None:
    staging = tmp_path / "out" / ".unfinished-1"
    for folder in ("new", "old"):
        (staging / folder).mkdir(parents=True)
    (staging / "new" / "config.json").write_bytes(NEW["config.json"])
    (staging / "old" / "config.json").write_bytes(OLD["config.json"])
    (staging / "moves.json").write_text('{"replaced": ["config.json", "../../evil"]}')
    (tmp_path / "out" / "config.json").write_text('{"model_type": "qwen", "mine": 1}')  # since then
    for _ in range(2):
        with pytest.raises(OSError, match=r"finished model of an interrupted run is in .*config.json already exists"):
            check_target(tmp_path / "out", tmp_path / "source", overwrite=True)
    assert (staging / "new" / "config.json").read_bytes() == NEW["config.json"]
    assert (staging / "old" / "config.json").read_bytes() == OLD["config.json"]


@pytest.mark.parametrize("link", ["", "new", "old", "lock", "moves.json"])
def test_links_in_leftovers_are_not_followed(link: str, tmp_path: Path) -> None:
    """A model of strangers may have a folder that looks like that of a killed run."""
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "moves.json").write_text('{"replaced": []}')
    (other / "mine.txt").write_text("mine")
    staging = out / ".unfinished-1"
    staging.parent.mkdir()
    (out / "config.json").write_bytes(OLD["config.json"])
    if link:
        for name in ("new", "old"):
            (staging / name).mkdir(parents=True)
        (staging / "moves.json").write_text('{"replaced": []}')
        if link in ("new", "old"):
            (staging / link).rmdir()
        else:
            (staging / link).unlink(missing_ok=True)
        (staging / link).symlink_to(other / "mine.txt" if link == "lock" else other)
    else:
        staging.symlink_to(other)
    with pytest.raises(FileExistsError, match="is or has a link"):
        write_again(out)
    assert content(other) == {"moves.json": b'{"replaced": []}', "mine.txt": b"mine"}
