"""The directory in which a model is written before it takes its place."""

import itertools
import os
import signal
import stat
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
MOVES = 6  # renames: of the list of moves, of two files out of the folder, and of three into it


def write_and_die(out: Path, moment: int) -> None:
    """Replace the old model by the new one, and die before the given rename."""
    rename, count = Path.rename, itertools.count()

    def rename_or_die(here: Path, there: Path) -> Path:
        if next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(here, there)

    Path.rename = rename_or_die
    with staged_directory(out) as staging:
        for name, data in NEW.items():
            (staging / name).write_bytes(data)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    "moment", [0, 3, *(pytest.param(each, marks=pytest.mark.nightly) for each in (1, 2, 4, 5, MOVES))]
)
def test_killed_during_the_moves(moment: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, data in OLD.items():
        (out / name).write_bytes(data)
    child = Child(tmp_path, write_and_die, out, moment)
    assert child.wait(60) == (0 if moment == MOVES else -signal.SIGKILL)
    if 0 < moment < MOVES:  # it is no model meanwhile, and the message says where both are
        assert not (out / "config.json").exists() or content(out) == OLD
    if 1 < moment < MOVES:
        with pytest.raises(CheckpointError, match="was killed while it moved the finished model from"):
            Checkpoint.open(out)
    check_target(out, tmp_path / "source", overwrite=True)
    assert content(out) == (OLD if moment == 0 else OLD | NEW)
    assert not list(out.glob(".unfinished-*"))
    assert (".unfinished-" in caplog.text) == (moment < MOVES)


def test_active_runs_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(OLD["config.json"])
    with staged_directory(tmp_path), pytest.raises(FileExistsError, match="another run that is still active"):
        check_target(tmp_path, tmp_path / "source", overwrite=True)
    check_target(tmp_path, tmp_path / "source", overwrite=True)


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
