"""Validates a local checkpoint folder: file completeness and architecture.

Detects the results of interrupted downloads, clones and copies. Reads names, sizes and headers, never weights.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from .._renamed import old_names
from ..model.configuration_qwen import QWenConfig
from ..model.gptq_qwen import explain_missing_packages, missing_packages
from ..model.json_qwen import MAX_INDEX_BYTES, MAX_JSON_BYTES, MAX_VALUES, one_line, parse_json_object, read_small_file
from ..model.json_qwen import first_line as first_line  # re-exported for the other modules of this folder and its users
from ..model.weight_files_qwen import files_of_index

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
VOCABULARY = "qwen.tiktoken"
LFS_POINTER = b"version https://git-lfs"

JSONObject = dict[str, Any]
"""A JSON object whose fields others choose: they are checked where they are used."""


class CheckpointError(OSError):
    """A checkpoint cannot be loaded. The message says what is wrong, where, and what to do, in one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def check_architecture(config: JSONObject, name: str | Path) -> None:
    """Raise CheckpointError unless this is the config.json of a first-generation Qwen that can be loaded here.

    Args:
        config: content of the file.
        name: name of the checkpoint in error messages.
    """
    model_type = config.get("model_type")
    if model_type == QWenConfig.model_type:
        if quantization := config.get("quantization_config"):
            check_quantization(quantization, name)
        return
    if model_type is None:
        raise CheckpointError(
            f"config.json of {name} has no model_type, so the architecture is unknown. If it is a first-generation "
            'Qwen, add `"model_type": "qwen"`.'
        )
    newer = str(model_type).startswith("qwen")
    raise CheckpointError(
        f"{name} is a model of type {model_type!r}, "
        + ("a newer Qwen" if newer else "another architecture")
        + ' than the first-generation Qwen (type "qwen") that this code supports. '
        "Load it with transformers: AutoModelForCausalLM.from_pretrained."
    )


def check_quantization(quantization: object, name: str | Path) -> None:
    """Raise CheckpointError unless weights quantized like this can be loaded here.

    Args:
        quantization: `quantization_config` of config.json.
        name: name of the checkpoint in error messages.
    """
    known = {
        "quant_method": ("gptq",),
        "bits": (2, 3, 4, 8),
        "group_size": (-1, 16, 32, 64, 128, 256, 512, 1024),
        "checkpoint_format": ("gptq", "gptq_v2"),
    }
    defaults = {"group_size": 128, "checkpoint_format": "gptq"}
    found = defaults | quantization if isinstance(quantization, dict) else {}
    for field, values in known.items():
        if type(found.get(field)) not in (int, str) or found[field] not in values:
            raise CheckpointError(
                f"quantization_config in config.json of {name} is not supported: {field} is {found.get(field)!r}, but "
                f"must be {' or '.join(map(json.dumps, values))}. Fix it or use another variant of the model."
            )


def check_gptq_installed(name: str | Path) -> None:
    """Raise CheckpointError unless the packages for quantized weights are installed."""
    if missing_packages():
        raise CheckpointError(explain_missing_packages(name))


def weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files of a folder, present or missing, in transformers' order of preference.

    Raises:
        CheckpointError: there are no weights, or an index does not list them.
    """
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (BIN, BIN_INDEX)):
        if (folder / single).is_file():
            return [single]
        if (folder / index).is_file():
            return shard_files(folder, index)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".gguf"))
    raise CheckpointError(
        f"{folder} has no weights: neither {SAFETENSORS} nor {BIN} nor the index of a sharded checkpoint. "
        + (f"It does have {join_names(others)}, but files with such names are not loaded. " if others else "")
        + download_advice(folder)
    )


def shard_files(folder: Path, index: str) -> list[str]:
    """Return the names of the weight files that an index lists.

    Raises:
        CheckpointError: it lists none, or files outside `folder`.
    """
    try:
        content = read_json(folder / index, folder, max_bytes=MAX_INDEX_BYTES)
        return sorted(set(files_of_index(content, folder / index).values()))
    except ValueError as error:
        raise CheckpointError(f"{error} {download_advice(folder)}") from error


def check_weights(folder: Path) -> None:
    """Raise CheckpointError if weight files or shards are missing, are git-lfs pointers, or are cut off."""
    shards = weight_files(folder)
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(
            f"{folder} is half downloaded: {len(missing)} of its {len(shards)} weight files are missing "
            f"({join_names(missing)}). {download_advice(folder)}"
        )
    if pointers := [shard for shard in shards if is_lfs_pointer(folder / shard)]:
        raise CheckpointError(lfs_pointer_message(folder, pointers))
    if broken := [shard for shard in shards if not is_complete(folder / shard)]:
        raise CheckpointError(
            f"{folder} is half downloaded: {join_names(broken)} {'is' if len(broken) == 1 else 'are'} cut off or "
            f"damaged. Delete {'it' if len(broken) == 1 else 'them'} and download again. {download_advice(folder)}"
        )


def check_vocabulary(folder: Path) -> None:
    """Raise CheckpointError unless the folder has a vocabulary file."""
    vocabulary = folder / VOCABULARY
    if not vocabulary.is_file():
        raise CheckpointError(
            f"{folder} has no {VOCABULARY}, the tokenizer's vocabulary. Copy it from the checkpoint that this one was "
            "made from, or download it from any published one of the same family."
        )
    if is_lfs_pointer(vocabulary):
        raise CheckpointError(lfs_pointer_message(folder, [VOCABULARY]))


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a git-lfs pointer, which git leaves in place of the file if git-lfs is not installed."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def is_complete(path: Path) -> bool:
    """Whether the size of a weight file matches its header or archive directory."""
    if path.suffix != ".safetensors":
        # A .bin file is a zip archive with its directory at the end. torch < 1.6 wrote bare pickles: accept them.
        with path.open("rb") as file:
            return file.read(2) not in (b"PK", b"") or zipfile.is_zipfile(path)
    # https://github.com/huggingface/safetensors#format: 8 bytes N (little endian), N bytes of JSON, the tensors.
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 + header_size:
            return False
        if header_size > MAX_INDEX_BYTES:
            return False
        try:
            tensors = parse_json_object(file.read(header_size), str(path))
            end = max((t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, LookupError):
            return False
    return size == 8 + header_size + end


def read_json(path: Path, name: str | Path, *, allow_nan: bool = False, max_bytes: int = MAX_JSON_BYTES) -> JSONObject:
    """Read a JSON object from a file of the checkpoint `name`.

    Args:
        allow_nan: accept NaN and Infinity, which a run writes into its state.
        max_bytes: maximum size of the file.

    Raises:
        CheckpointError: the file is a git-lfs pointer, invalid JSON, not an object, or beyond the limits of
            `qwen.model.json_qwen`.
    """
    try:
        data = read_small_file(path, max_bytes)
        if data.startswith(LFS_POINTER):
            raise CheckpointError(lfs_pointer_message(path.parent, [path.name]))
        max_values = max(MAX_VALUES, max_bytes // 16)  # as many as the state of a long run has
        return parse_json_object(data, f"{path.name} of {name}", allow_nan=allow_nan, max_values=max_values)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def lfs_pointer_message(folder: Path, files: list[str]) -> str:
    """Return the error message for git-lfs pointers."""
    return (
        f"{folder} was cloned without its large files: {join_names(files)} "
        f"{'is a git-lfs pointer' if len(files) == 1 else 'are git-lfs pointers'}. "
        "Run `git lfs install` and `git lfs pull` in that folder."
    )


def download_advice(folder: Path) -> str:
    """Return the advice for an incomplete folder."""
    return f"To download the missing files: `hf download Qwen/MODEL --local-dir {folder}`."


def join_names(names: list[str], limit: int = 5) -> str:
    """Join names with commas, and shorten the list to `limit` names."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def apply_umask(folder: Path) -> None:
    """Apply the umask to weight files: safetensors makes them readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o666 & ~mask)


__getattr__ = old_names(
    __name__,
    {
        "let_others_read": "apply_umask",
        "listing": "join_names",
        "pointer_text": "lfs_pointer_message",
        "shards_of": "shard_files",
    },
)
