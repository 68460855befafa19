"""Writes model folders atomically: files are staged in a hidden subfolder and moved into place when all are written."""

import contextlib
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from transformers.utils import CONFIG_NAME

from .._renamed import old_names
from ..model.configuration_qwen import QWenConfig
from .adapters import ADAPTER_CONFIG
from .files import BIN, BIN_INDEX, SAFETENSORS, SAFETENSORS_INDEX, CheckpointError, read_json

_STAGING_PREFIX = ".unfinished-"  # name prefix of the staging folder
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def handle_signals_as_ctrl_c() -> None:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP as on Ctrl-C, so that scripts clean up."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)


def check_target(target: Path, source: Path, overwrite: bool, model_type: str = QWenConfig.model_type) -> None:
    """Raise an error if a model cannot be written to `target`, or if files there would be lost.

    Args:
        target: folder to write to; it may be missing or empty.
        source: folder or hub id of the source model.
        overwrite: allow replacing a model in `target`.
        model_type: `model_type` of models that may be replaced.

    Raises:
        OSError: `target` is not writable or holds other files.
        CheckpointError: the model in `target` is damaged.
    """
    if target.resolve() == source.resolve() or (target / ADAPTER_CONFIG).is_file():
        raise FileExistsError(f"{target} holds the source model or an adapter. Name another folder.")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file. Name a folder.")
    if target.is_dir() and (found := sorted(target.iterdir())):
        if leftovers := [path for path in found if path.name.startswith(_STAGING_PREFIX)]:
            raise FileExistsError(
                f"{leftovers[0]} belongs to another run that is still active or was interrupted. If it is not active, "
                "keep what you need from it and delete it, or name another folder."
            )
        if not overwrite:
            raise FileExistsError(
                f"{target} is not empty. Name another folder, or add --overwrite to replace the model in it."
            )
        if not _holds_model(target, model_type):
            raise FileExistsError(f"{target} holds no model that can be replaced. Name another folder.")
        _weight_files(target)
    place = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{target} cannot be written to: {place} is not a writable folder. Name another folder.")


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
        weight_map = read_json(folder / index, folder).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index} of {folder} does not list the weight files. Delete it and the weights.")
        names |= {Path(shard).name for shard in weight_map.values()}
    return {name for name in names if _file_exists(folder / name)}


def _file_exists(path: Path) -> bool:
    """Whether the path is a file or a link, including a broken link."""
    return os.path.lexists(path) and not path.is_dir()


@contextlib.contextmanager
def staged_directory(target: Path, replaces: Collection[str] = ()) -> Iterator[Path]:
    """Yield a staging directory that is moved into `target` on success and deleted on error.

    If the move fails, the finished files are kept. The directory is inside `target`, which may be a mounted volume:
    only there are space and permissions certain to suffice.

    Args:
        replaces: names of files in `target` to delete if the new model has no file of that name.

    Raises:
        OSError: the finished files could not be moved.
    """
    created = [folder for folder in (target, *target.parents) if not folder.exists()]
    staging = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Named first, so that cleanup works even if mkdir is interrupted.
        staging = target / f"{_STAGING_PREFIX}{secrets.token_hex(4)}"
        staging.mkdir(mode=0o700)
        new, old = staging / "new", staging / "old"
        new.mkdir()
        old.mkdir()
        yield new
    except BaseException:
        with _defer_signals():
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            for folder in created:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise
    with _defer_signals():
        try:
            _move(new, old, target, replaces)
        except OSError as error:
            raise OSError(f"The finished model is kept in {new}: it could not be moved to {target}: {error}") from error
        shutil.rmtree(staging, ignore_errors=True)


def _move(new: Path, old: Path, target: Path, replaces: Collection[str]) -> None:
    """Move files from `new` to `target`, and the files they replace to `old`. On error, undo all moves."""
    names = {path.name for path in new.iterdir()}
    # Old weights that stay could be loaded instead of the new ones.
    replaced = _weight_files(target) | {name for name in names.union(replaces) if _file_exists(target / name)}
    # config.json leaves first and arrives last: without it, the folder is not taken for a model during the moves.
    moves = [(target / name, old / name) for name in sorted(replaced, key=lambda name: name != CONFIG_NAME)]
    moves += [(new / name, target / name) for name in sorted(names, key=lambda name: name == CONFIG_NAME)]
    done = []
    try:
        for source, destination in moves:
            source.rename(destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            with contextlib.suppress(OSError):
                destination.rename(source)
        raise


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
