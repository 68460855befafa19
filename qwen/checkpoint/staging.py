"""Writes model folders atomically: files are staged in a hidden subfolder and moved into place when all are written.

A process that is killed leaves the old model, or, during the moves, both models in the staging folder with a list of
the moves. The next run that writes to the folder finishes the moves, or deletes the unfinished model.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import CONFIG_NAME

from .._renamed import old_names
from ..model.configuration_qwen import QWenConfig
from ..model.json_qwen import MAX_INDEX_BYTES
from .adapters import ADAPTER_CONFIG
from .files import BIN, BIN_INDEX, SAFETENSORS, SAFETENSORS_INDEX, CheckpointError, read_json

logger = logging.getLogger(__name__)

_STAGING_PREFIX = ".unfinished-"  # name prefix of the staging folder
# In it: the folders `new` and `old`, `lock`, which the run holds, and `moves.json` during the moves. If the moves fail,
# `new` is renamed to `kept`. A folder that holds neither `moves.json` nor `kept` may be deleted.
_LOCK, _MOVES, _KEPT = "lock", "moves.json", "kept"
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def handle_signals_as_ctrl_c() -> None:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP as on Ctrl-C, so that scripts clean up."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)


def check_target(target: Path, source: Path, overwrite: bool, model_type: str = QWenConfig.model_type) -> None:
    """Raise an error if a model cannot be written to `target`, or if files there would be lost.

    Finishes or deletes first what a killed run left in `target`, and logs it.

    Args:
        target: folder to write to; it may be missing or empty.
        source: folder or hub id of the source model.
        overwrite: allow replacing a model in `target`.
        model_type: `model_type` of models that may be replaced.

    Raises:
        OSError: `target` is not writable, holds other files, or another run is writing to it.
        CheckpointError: the model in `target` is damaged.
    """
    if target.resolve() == source.resolve() or (target / ADAPTER_CONFIG).is_file():
        raise FileExistsError(f"{target} holds the source model or an adapter. Name another folder.")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file. Name a folder.")
    if target.is_dir():
        clean_up_leftovers(target)
        if any(target.iterdir()):
            if not overwrite:
                raise FileExistsError(
                    f"{target} is not empty. Name another folder, or add --overwrite to replace the model in it."
                )
            if not _holds_model(target, model_type):
                raise FileExistsError(f"{target} holds no model that can be replaced. Name another folder.")
            _weight_files(target)
    check_writable(target)


def check_writable(target: Path) -> None:
    """Raise PermissionError if the folder, or the one that it would be created in, is not writable."""
    place = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{target} cannot be written to: {place} is not a writable folder. Name another folder.")


def clean_up_leftovers(target: Path) -> None:
    """Finish the moves of a run that was killed during them, and delete what other killed runs left in `target`.

    Raises:
        OSError: a run is still writing to `target`, or moves cannot be finished.
    """
    for staging in sorted(target.glob(f"{_STAGING_PREFIX}*")):
        parts = [staging / name for name in ("new", "old", _LOCK, _MOVES)]
        # A link would let a folder of strangers have files moved from, or emptied in, another place.
        if not staging.is_dir() or any(path.is_symlink() for path in (staging, *parts)):
            raise FileExistsError(f"{staging} is or has a link, or is a file. Delete it, or name another folder.")
        if (staging / _KEPT).exists():
            raise FileExistsError(
                f"{staging / _KEPT} is the finished model of another run, which could not be moved to {target}. Keep "
                f"what you need from it and delete {staging}, or name another folder."
            )
        lock = FileLock(staging / _LOCK)
        try:
            lock.acquire(timeout=0)  # the system releases that of a killed process
        except Timeout:
            raise FileExistsError(
                f"{staging} belongs to another run that is still active. Wait for it, or name another folder."
            ) from None
        except OSError as error:
            raise FileExistsError(
                f"{staging} is left from another run and cannot be deleted ({error}). Delete it, or name another "
                "folder."
            ) from error
        try:
            if (staging / _MOVES).is_file():
                with _defer_signals():
                    _finish_moves(staging, target)
                logger.warning("%s: the finished model of an interrupted run was moved to %s.", staging, target)
            else:
                logger.warning("%s: the unfinished model of an interrupted run is deleted.", staging)
        finally:
            lock.release()
        shutil.rmtree(staging, ignore_errors=True)


def interrupted_moves(folder: Path) -> Path | None:
    """Return the staging folder of a run that was killed while it moved its files into `folder`, if there is one."""
    return next((path.parent for path in folder.glob(f"{_STAGING_PREFIX}*/{_MOVES}")), None)


def _finish_moves(staging: Path, target: Path) -> None:
    """Do the moves of `_move` that were not done yet.

    Raises:
        OSError: one failed, or `target` has a new file of that name.
    """
    new, old = staging / "new", staging / "old"
    try:
        replaced = [Path(name).name for name in read_json(staging / _MOVES, staging)["replaced"]]
        names = sorted((path.name for path in new.iterdir()), key=lambda name: name == CONFIG_NAME)
        moves = [(target / name, old / name) for name in replaced if not os.path.lexists(old / name)]
        moves += [(new / name, target / name) for name in names]
        for source, destination in moves:
            if os.path.lexists(source):
                if os.path.lexists(destination):
                    raise FileExistsError(f"{destination} already exists")
                source.rename(destination)
        _end_moves(staging, target)
    except (OSError, LookupError, TypeError) as error:
        raise OSError(
            f"The finished model of an interrupted run is in {new}, the replaced one in {old}: moving it to {target} "
            f"failed ({error}). Keep what you need, delete {staging}, or name another folder."
        ) from error


def _holds_model(folder: Path, model_type: str) -> bool:
    """Whether config.json has this `model_type`. Other programs also use a config.json, which must not be replaced."""
    config = folder / CONFIG_NAME
    return config.is_file() and read_json(config, folder).get("model_type") == model_type


def _weight_files(folder: Path) -> set[str]:
    """Return the names of the weight files in `folder`. Shards are found through the index only.

    Raises:
        CheckpointError: an index does not list weight files.
    """
    names = {SAFETENSORS, SAFETENSORS_INDEX, BIN, BIN_INDEX}
    for index in (SAFETENSORS_INDEX, BIN_INDEX):
        if not (folder / index).is_file():
            continue
        weight_map = read_json(folder / index, folder, max_bytes=MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index} of {folder} does not list the weight files. Delete it and the weights.")
        names |= {Path(shard).name for shard in weight_map.values()}
    return {name for name in names if _file_exists(folder / name)}


def _file_exists(path: Path) -> bool:
    """Whether the path is a file or a link, including a broken link."""
    return os.path.lexists(path) and not path.is_dir()


@contextlib.contextmanager
def staged_directory(target: Path, replaces: Collection[str] = (), *, replaces_weights: bool = True) -> Iterator[Path]:
    """Yield a staging directory that is moved into `target` on success and deleted on error.

    If the move fails, the finished files are kept. The directory is inside `target`, which may be a mounted volume:
    only there are space and permissions certain to suffice.

    Args:
        replaces: names of files and folders in `target` to delete, also if the new model has none of that name.
        replaces_weights: delete the weight files in `target`; False if they belong to the new model, too.

    Raises:
        OSError: the finished files could not be moved.
    """
    created = [folder for folder in (target, *target.parents) if not folder.exists()]
    staging = lock = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Named first, so that cleanup works even if mkdir is interrupted.
        staging = target / f"{_STAGING_PREFIX}{secrets.token_hex(4)}"
        staging.mkdir(mode=0o700)
        lock = FileLock(staging / _LOCK)
        lock.acquire(timeout=0)
        new, old = staging / "new", staging / "old"
        new.mkdir()
        old.mkdir()
        yield new
        for path in new.rglob("*"):
            sync(path)
        sync(new)
    except BaseException:
        with _defer_signals():
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            if lock is not None:
                lock.release()
            for folder in created:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise
    with _defer_signals():
        try:
            _move(staging, target, replaces, replaces_weights)
        except OSError as error:
            kept = staging / _KEPT
            try:
                new.rename(kept)  # needs no space on a full disk
            except OSError:
                kept = new
            raise OSError(
                f"The finished model is kept in {kept}: it could not be moved to {target}: {error}"
            ) from error
        finally:
            lock.release()
        shutil.rmtree(staging, ignore_errors=True)


def _move(staging: Path, target: Path, replaces: Collection[str], replaces_weights: bool) -> None:
    """Move files from `new` in `staging` to `target`, and the files they replace to `old`. On error, undo all moves."""
    new, old = staging / "new", staging / "old"
    names = {path.name for path in new.iterdir()}
    replaced = {name for name in names if _file_exists(target / name)}
    replaced |= {name for name in replaces if os.path.lexists(target / name)}
    if replaces_weights:  # old ones that stay could be loaded instead of the new ones
        replaced |= _weight_files(target)
    # config.json leaves first and arrives last: without it, the folder is not taken for a model during the moves.
    moves = [(target / name, old / name) for name in sorted(replaced, key=lambda name: name != CONFIG_NAME)]
    moves += [(new / name, target / name) for name in sorted(names, key=lambda name: name == CONFIG_NAME)]
    list_of_moves = staging / _MOVES
    done = []
    try:
        # Complete or absent: renamed when its content is on the disk.
        draft = list_of_moves.with_suffix(".new")
        draft.write_text(json.dumps({"replaced": [source.name for source, to in moves if to.parent == old]}))
        sync(draft)
        draft.rename(list_of_moves)
        sync(staging)
        for source, destination in moves:
            source.rename(destination)
            done.append((source, destination))
        _end_moves(staging, target)
    except BaseException:
        for source, destination in reversed(done):
            with contextlib.suppress(OSError):
                destination.rename(source)
        list_of_moves.unlink(missing_ok=True)
        raise


def _end_moves(staging: Path, target: Path) -> None:
    """Delete the list of moves, when all are on the disk: once `old` is being deleted, they must not be repeated."""
    for folder in (target, staging / "new", staging / "old"):
        sync(folder)
    (staging / _MOVES).unlink()
    sync(staging)


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk.

    Raises:
        OSError: the file could not be written.
    """
    if path.is_symlink():
        return  # it is in the list of its folder, and where it leads may be somebody else's
    if path.is_dir():
        with contextlib.suppress(OSError):  # not every system can open folders, nor every file system write their lists
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _defer_signals() -> Iterator[None]:
    """Defer signals until the block ends. Signals that raise KeyboardInterrupt, e.g. Ctrl-C, are dropped."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    received = []
    deferred = [number for number in _SIGNALS if signal.getsignal(number) is not None]  # None: handler not from Python
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in deferred}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received:
            if handlers[number] is not signal.default_int_handler:
                signal.raise_signal(number)


__getattr__ = old_names(
    __name__, {"end_like_ctrl_c": "handle_signals_as_ctrl_c", "filled_at_the_end": "staged_directory"}
)
