"""A folder of a model that is complete or not there at all.

What is written comes into a hidden folder inside first, and takes its place when all is done. Knows which files make a
model, and not what writes them.
"""

import contextlib
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from transformers.utils import CONFIG_NAME

from ..model.configuration_qwen import QWenConfig
from .adapters import ADAPTER_CONFIG
from .files import BIN, BIN_INDEX, SAFETENSORS, SAFETENSORS_INDEX, CheckpointError, read_json

_WORK = ".unfinished-"  # how the folder begins that is filled meanwhile
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def end_like_ctrl_c() -> None:
    """Let a scheduler's signal and a lost connection clean up as Ctrl-C does. For scripts."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores one
            signal.signal(number, signal.default_int_handler)


def check_target(target: Path, source: Path, overwrite: bool, model_type: str = QWenConfig.model_type) -> None:
    """Refuse a folder that cannot be filled, or in which something would be lost.

    Args:
        target: to be made, or empty.
        source: the model's own folder, or a hub id.
        overwrite: a model in `target` may be replaced.
        model_type: what such a model is of; others are not replaced.

    Raises:
        OSError: says what is in the way.
        CheckpointError: the model in `target` is broken.
    """
    if target.resolve() == source.resolve() or (target / ADAPTER_CONFIG).is_file():
        raise FileExistsError(f"{target} holds the model that is read, or an adapter. Name a folder of its own.")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file. Name a folder.")
    if target.is_dir() and (found := sorted(target.iterdir())):
        if leftovers := [path for path in found if path.name.startswith(_WORK)]:
            raise FileExistsError(
                f"{leftovers[0]} is of another run, which is at work or broke off. If it is not at work, take from "
                "there what you need and delete it, or name another folder."
            )
        if not overwrite:
            raise FileExistsError(
                f"{target} is not empty. Name another folder, or add --overwrite to replace the model in it."
            )
        if not _holds_model(target, model_type):
            raise FileExistsError(f"{target} holds no model that could be replaced. Name another folder.")
        _weight_files(target)
    place = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{target} cannot be written to: {place} does not allow it. Name another folder.")


def _holds_model(folder: Path, model_type: str) -> bool:
    """Whether config.json is of such a model: other programs have one too, which is not to be replaced."""
    config = folder / CONFIG_NAME
    return config.is_file() and read_json(config, folder).get("model_type") == model_type


def _weight_files(folder: Path) -> set[str]:
    """The names of its files of weights. Shards are known by the index alone.

    Raises:
        CheckpointError: an index does not name them.
    """
    names = {SAFETENSORS, SAFETENSORS_INDEX, BIN, BIN_INDEX}
    for index in (SAFETENSORS_INDEX, BIN_INDEX):
        if not (folder / index).is_file():
            continue
        weight_map = read_json(folder / index, folder).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index} of {folder} does not name the files of weights. Delete it and them.")
        names |= {Path(shard).name for shard in weight_map.values()}
    return {name for name in names if _is_there(folder / name)}


def _is_there(path: Path) -> bool:
    """Whether it is a file, or a link that leads nowhere."""
    return os.path.lexists(path) and not path.is_dir()


@contextlib.contextmanager
def filled_at_the_end(target: Path, replaces: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder inside `target`, whose files take their places there when all is done, and which otherwise
    goes without a trace; but what is done is kept, if it cannot take its place.

    Args:
        replaces: files that go where the new model has none of that name.

    Inside, because that is where there is room and permission for sure: `target` may be a mounted volume.
    """
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    work = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        work = target / f"{_WORK}{secrets.token_hex(4)}"  # known before it is there, so that it goes whatever comes
        work.mkdir(mode=0o700)
        new, old = work / "new", work / "old"
        new.mkdir()
        old.mkdir()
        yield new
    except BaseException:
        with _undisturbed():
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise
    with _undisturbed():
        try:
            _move(new, old, target, replaces)
        except OSError as error:
            raise OSError(
                f"The model is done and kept in {new}, for it could not take its place in {target}: {error}"
            ) from error
        shutil.rmtree(work, ignore_errors=True)


def _move(new: Path, old: Path, target: Path, replaces: Collection[str]) -> None:
    """From `new` to `target`, from where older weights and what has the same name goes to `old`; or nothing at all."""
    names = {path.name for path in new.iterdir()}
    # Some of the older weights would be loaded instead of what is new, if they stayed.
    replaced = _weight_files(target) | {name for name in names.union(replaces) if _is_there(target / name)}
    # Without its config.json a folder is no model: it is none for the moment that the others take.
    moves = [(target / name, old / name) for name in sorted(replaced, key=lambda name: name != CONFIG_NAME)]
    moves += [(new / name, target / name) for name in sorted(names, key=lambda name: name == CONFIG_NAME)]
    done = []
    try:
        for here, there in moves:
            here.rename(there)
            done.append((here, there))
    except BaseException:
        for here, there in reversed(done):
            with contextlib.suppress(OSError):
                there.rename(here)
        raise


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no signal stop halfway what takes a moment. Ctrl-C comes too late then; others are heard afterwards."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    came = []
    ours = [number for number in _SIGNALS if signal.getsignal(number) is not None]  # None: set by a program around us
    handlers = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in ours}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            if handlers[number] is not signal.default_int_handler:
                signal.raise_signal(number)
