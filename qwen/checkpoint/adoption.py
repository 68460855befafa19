"""Writes this package's code beside downloaded weights, so that they load with `trust_remote_code=True` elsewhere.

Published folders contain code for transformers 4, and name neither `<|im_end|>` as the end of a reply nor a chat
template. Files that are replaced are kept in a subfolder, with a list of what was written; `undo` puts them back.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save
from transformers.tokenization_utils_base import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from .._version import __version__
from ..model.configuration_qwen import QWenConfig
from ..model.modeling_qwen import QWenLMHeadModel
from ..model.tokenization_qwen import CHAT_TEMPLATE, QWenTokenizer
from .checkpoint import Checkpoint
from .files import CheckpointError, JSONObject, join_names, read_json
from .staging import check_target, check_writable, clean_up_leftovers, staged_directory

KEPT = "before_adopt"  # folder of the replaced files
RECORD = "adopted.json"  # in it
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
CHUNK = 16 << 20  # bytes of a file that are copied at once


@dataclass(frozen=True)
class AdoptResult:
    """Result of `adopt`.

    Args:
        folder: folder that loads with `trust_remote_code=True`.
        written: names of the files that were written; empty if none needed to be.
        linked_to: folder that the weights are symbolic links to; None if they are files.
    """

    folder: Path
    written: list[str]
    linked_to: Path | None = None


@dataclass(frozen=True)
class Record:
    """Content of the list in `KEPT`.

    Args:
        written: SHA-256 of each file that was written, by name.
        kept: names of those that replaced a file, which is now in `KEPT`.
    """

    written: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def adopt(
    folder: str | os.PathLike, *, to: str | os.PathLike | None = None, overwrite: bool = False, progress: bool = False
) -> AdoptResult:
    """Write code, `auto_map`, end tokens and chat template into a model folder, as `save_pretrained` would.

    Only files whose content changes are replaced, links by files. Weights and vocabulary stay as they are. A second
    call changes nothing, or replaces what an earlier version wrote.

    Args:
        folder: folder of a first-generation Qwen model, published or saved.
        to: write the adopted model there instead and leave `folder` as it is: weights as links where possible, all
            other files as copies, without subfolders and hidden files.
        overwrite: replace a model in `to`.
        progress: show a progress bar on stderr while weights are copied.

    Raises:
        CheckpointError: `folder` holds no complete first-generation Qwen model, or is in the cache of the Hugging Face
            Hub and `to` is None, or a file that would be replaced was changed after it was written.
        OSError: a folder is not writable, or another run is writing to it.
    """
    source = _existing_folder(folder)
    if to is None:
        if _is_in_hub_cache(source):
            raise CheckpointError(
                f"{source} is in the cache of the Hugging Face Hub, which other programs share. Add --to FOLDER for a "
                "copy, whose weights are links."
            )
        clean_up_leftovers(source)
        target = source
    else:
        target = Path(to).expanduser()
        check_target(target, source, overwrite)
    checkpoint = Checkpoint(source)
    if checkpoint.is_adapter:
        raise CheckpointError(f"{source} is an adapter: merge it first (`qwen merge`), or adopt its base model.")
    checkpoint.check()
    record = _read_record(source)
    contents = _new_contents(checkpoint, record)
    changed = {name: data for name, data in contents.items() if not _holds(source / name, data)}
    _check_replaceable(source, changed, record)
    if to is None:
        if not changed:
            return AdoptResult(source, [])
        check_writable(source)
    record = _next_record(source, changed, record)
    with staged_directory(target.absolute(), [KEPT], replaces_weights=to is not None) as staging:
        if to is not None:
            _copy_model(source, staging, changed, progress)
        if record.written:
            (staging / KEPT).mkdir()
            for name in record.kept:
                kept = source / KEPT / name
                _keep(kept if os.path.lexists(kept) else source / name, staging / KEPT / name, link=to is None)
            (staging / KEPT / RECORD).write_bytes(_json({"version": __version__} | vars(record)))
        for name, data in changed.items():
            (staging / name).write_bytes(data)
        has_links = any(path.is_symlink() for path in staging.iterdir())
    return AdoptResult(target, sorted(changed), source if has_links else None)


def undo(folder: str | os.PathLike) -> list[str]:
    """Restore an adopted folder to what it was, byte for byte, with permissions and links.

    Returns:
        The names of the files that were restored or deleted.

    Raises:
        CheckpointError: `folder` was not adopted, or a file was changed since, or is no longer kept.
        OSError: `folder` is not writable, or another run is writing to it.
    """
    folder = _existing_folder(folder)
    clean_up_leftovers(folder)
    record = _read_record(folder)
    if not record.written:
        raise CheckpointError(f"{folder} has no {KEPT}/{RECORD}, as adopted folders have: there is nothing to undo.")
    if changed := [name for name in record.written if _is_edited(folder / name, record)]:
        raise CheckpointError(
            f"{join_names(changed)} of {folder} changed since `qwen adopt` wrote it. Move it elsewhere if you need "
            "it, or delete it, and repeat --undo."
        )
    if missing := [name for name in record.kept if not os.path.lexists(folder / KEPT / name)]:
        raise CheckpointError(
            f"{folder / KEPT} no longer has {join_names(missing)}, the original. Download it to that folder and repeat "
            "--undo."
        )
    check_writable(folder)
    with staged_directory(folder.absolute(), [KEPT, *record.written], replaces_weights=False) as staging:
        for name in record.kept:
            _keep(folder / KEPT / name, staging / name)
    return sorted(record.written)


def write_code(folder: Path, tokenizer: QWenTokenizer) -> tuple[JSONObject, JSONObject]:
    """Write the modules of the model, its config and its tokenizer, and all that they import, into a folder.

    Returns:
        The content of `auto_map` for config.json and for tokenizer_config.json.
    """
    maps: tuple[JSONObject, JSONObject] = {}, {}
    with torch.device("meta"):
        model = QWenLMHeadModel(QWenConfig())  # of any size: transformers takes an object for its class
    for content, objects in zip(maps, ((model.config, model.base_model, model), (tokenizer,)), strict=True):
        for item in objects:
            custom_object_save(item, folder, config=content)
    return maps[0]["auto_map"], maps[1]["auto_map"]


def _existing_folder(name: str | os.PathLike) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {os.fspath(name)!r}. Name one with a model, for example after `hf download "
            "Qwen/Qwen-7B-Chat --local-dir FOLDER`."
        )
    return folder


def _is_in_hub_cache(folder: Path) -> bool:
    """Whether a folder is …/models--OWNER--NAME/snapshots/REVISION, whose files are links to a store, or in one."""
    parts = folder.resolve().parts
    return any(name == "snapshots" and parts[i - 1].startswith("models--") for i, name in enumerate(parts))


def _new_contents(checkpoint: Checkpoint, record: Record) -> dict[str, bytes]:
    """Return the content of the files that an adopted folder must have, by name."""
    tokenizer = checkpoint.tokenizer()
    is_chat = checkpoint.is_chat
    path = checkpoint.find(TOKENIZER_CONFIG_FILE)
    tokenizer_config = {} if path is None else read_json(path, checkpoint.name)
    generation_config = checkpoint.generation_settings
    end = tokenizer.im_end_id if is_chat else tokenizer.eod_id
    pad = tokenizer.pad_token_id

    with tempfile.TemporaryDirectory() as scratch:
        model_map, tokenizer_map = write_code(Path(scratch), tokenizer)
        contents = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    config = {"architectures": [QWenLMHeadModel.__name__], **checkpoint.config_json, "auto_map": model_map}
    if config.get("eos_token_id") in (None, tokenizer.eod_id):
        config["eos_token_id"] = end
    if config.get("pad_token_id") is None:
        config["pad_token_id"] = pad
    contents[CONFIG_NAME] = _json(config)
    tokenizer_config |= {"auto_map": tokenizer_map, "tokenizer_class": QWenTokenizer.__name__}
    for name in ("eos_token", "pad_token"):
        tokenizer_config.setdefault(name, getattr(tokenizer, name))
    contents[TOKENIZER_CONFIG_FILE] = _json(tokenizer_config)
    template = checkpoint.find(CHAT_TEMPLATE_FILE)
    is_ours = template is None or (template.name in record.written and not _is_edited(template, record))
    if is_ours and tokenizer_config.get("chat_template") is None:
        contents[CHAT_TEMPLATE_FILE] = CHAT_TEMPLATE.encode()
    if generation_config:
        ends = generation_config.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if end not in ends:  # both of a chat model's ends of a turn, as in `chat`
            ends = [end, *([tokenizer.im_start_id] if is_chat else []), *ends]
            generation_config = {**generation_config, "eos_token_id": ends if len(ends) > 1 else end}
        if generation_config.get("pad_token_id") is None:
            generation_config = {**generation_config, "pad_token_id": pad}
        contents[GENERATION_CONFIG_NAME] = _json(generation_config)
    return {name: data for name, data in contents.items() if not _is_same_json(checkpoint.find(name), data)}


def _json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _is_same_json(path: Path | None, data: bytes) -> bool:
    """Whether a file has this content except for its layout."""
    return path is not None and path.suffix == ".json" and read_json(path, path.parent) == json.loads(data)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _check_replaceable(source: Path, names: Iterable[str], record: Record) -> None:
    """Raise CheckpointError if a file was changed after it was written, or there is no place for it."""
    for name in names:
        if _is_edited(source / name, record):
            raise CheckpointError(
                f"{source / name} changed since `qwen adopt` wrote it, and would be replaced now. Move it "
                "elsewhere and repeat."
            )
        if (source / name).is_dir():
            raise CheckpointError(f"{source / name} is a folder, but the file of this name belongs there. Move it.")
    if not record.written and os.path.lexists(source / KEPT):
        raise CheckpointError(
            f"{source / KEPT} is in the place for the files to keep, and not from `qwen adopt`. Move it elsewhere."
        )


def _is_edited(path: Path, record: Record) -> bool:
    """Whether a file that was written has another content now; not, if it was deleted."""
    if path.name not in record.written or not os.path.lexists(path):
        return False
    return path.is_symlink() or not path.is_file() or _digest(path.read_bytes()) != record.written[path.name]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_record(folder: Path) -> Record:
    """Return the list in `KEPT`, empty if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / KEPT / RECORD
    if not path.is_file():
        return Record()
    content = read_json(path, folder)
    written, kept = content.get("written"), content.get("kept")
    if not (
        isinstance(written, dict)
        and written
        and all(isinstance(digest, str) for digest in written.values())
        and all(Path(name).name == name and name != KEPT for name in written)
        and isinstance(kept, list)
        and all(isinstance(name, str) and name in written for name in kept)
    ):
        raise CheckpointError(
            f"{path} does not list files of {folder}: it is damaged. Download the folder again, or move {KEPT} away."
        )
    return Record(written, kept)


def _next_record(source: Path, changed: Mapping[str, bytes], record: Record) -> Record:
    """Return the list after `changed` is written. Of a file that was adopted before, the first original stays."""
    replaced = [name for name in changed if name not in record.written and os.path.lexists(source / name)]
    return Record(
        record.written | {name: _digest(data) for name, data in changed.items()}, sorted([*record.kept, *replaced])
    )


def _keep(source: Path, target: Path, link: bool = True) -> None:
    """Give a file a second name, or copy it with its permissions and time.

    Args:
        link: keep it as it is, a link as a link; False copies what a link leads to.
    """
    if link:
        try:
            os.link(source, target, follow_symlinks=False)
        except (OSError, NotImplementedError):  # the file system has none, or the file is somebody else's
            shutil.copy2(source, target, follow_symlinks=False)
    else:
        shutil.copy2(source, target)


def _copy_model(source: Path, target: Path, changed: Mapping[str, bytes], progress: bool) -> None:
    """Link or copy the files of a model folder except those that change."""
    files = [path for path in sorted(source.iterdir()) if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if path.name not in changed]
    weights = [path for path in files if path.suffix in WEIGHT_SUFFIXES]
    for path in files:
        if path not in weights:
            _keep(path, target / path.name, link=False)
    weights = [path for path in weights if not _link(path.resolve(), target / path.name)]
    size = sum(path.stat().st_size for path in weights)
    with tqdm(total=size, unit="B", unit_scale=True, disable=not progress or not weights) as bar:
        for path in weights:
            with path.open("rb") as reader, (target / path.name).open("wb") as writer:
                while chunk := reader.read(CHUNK):
                    writer.write(chunk)
                    bar.update(len(chunk))


def _link(source: Path, target: Path) -> bool:
    """Whether a hard link to a file could be made, or else a symbolic link."""
    for make in (os.link, os.symlink):
        try:
            make(source, target)
        except OSError:  # another file system; one without links
            continue
        return True
    return False
