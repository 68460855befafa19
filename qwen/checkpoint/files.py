"""Validates a local checkpoint folder: completeness of its files, and the architecture.

Finds what interrupted downloads, clones and copies leave behind, and says what to do about it. Reads names, sizes and
headers, never weights.
"""

import importlib.util
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from ..model.configuration_qwen import QWenConfig

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
VOCABULARY = "qwen.tiktoken"
LFS_POINTER = b"version https://git-lfs"


class CheckpointError(OSError):
    """A checkpoint cannot be loaded. The text is for people: what is wrong, where, and what to do."""


def check_architecture(config: dict[str, Any], name: str | Path) -> None:
    """Raise CheckpointError unless this is the config.json of a first-generation Qwen that can be loaded here.

    Args:
        config: the content of the file.
        name: the checkpoint, as errors call it.
    """
    model_type = config.get("model_type")
    if model_type == QWenConfig.model_type:
        if quantization := config.get("quantization_config"):
            check_quantization(quantization, name)
        return
    if model_type is None:
        raise CheckpointError(
            f"config.json of {name} names no model_type, so it is not known which model this is. If it is a "
            'first-generation Qwen, add `"model_type": "qwen"`.'
        )
    newer = str(model_type).startswith("qwen")
    raise CheckpointError(
        f"{name} is a model of type {model_type!r}, "
        + ("a newer Qwen" if newer else "another architecture")
        + ' than the first-generation Qwen (type "qwen") that this code is for. '
        "transformers loads it by itself: AutoModelForCausalLM.from_pretrained."
    )


def check_quantization(quantization: Any, name: str | Path) -> None:
    """Raise CheckpointError unless weights quantized like this can be loaded here.

    Args:
        quantization: `quantization_config` of config.json.
    """
    known = {
        "quant_method": ("gptq",),
        "bits": (2, 3, 4, 8),
        "group_size": (-1, 16, 32, 64, 128, 256, 512, 1024),
        "checkpoint_format": ("gptq", "gptq_v2"),
    }
    usual = {"group_size": 128, "checkpoint_format": "gptq"}  # where the file names none
    found = usual | quantization if isinstance(quantization, dict) else {}
    for field, values in known.items():
        if type(found.get(field)) not in (int, str) or found[field] not in values:
            raise CheckpointError(
                f"quantization_config in config.json of {name} cannot be used: {field} is {found.get(field)!r} and "
                f"should be {' or '.join(map(json.dumps, values))}. Mend it, or take the same model in another form."
            )


def check_gptq_installed(name: str | Path) -> None:
    """Raise CheckpointError unless there is what runs quantized weights."""
    if importlib.util.find_spec("gptqmodel") is None:
        raise CheckpointError(
            f"{name} is quantized (GPTQ), which needs two more packages: `pip install gptqmodel optimum`. "
            "Or take the same model without -Int4 or -Int8."
        )


def weight_files(folder: Path) -> list[str]:
    """The names of the files of weights that a folder has or should have, in transformers' order of preference.

    Raises:
        CheckpointError: there are none, or an index does not name them.
    """
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (BIN, BIN_INDEX)):
        if (folder / single).is_file():
            return [single]
        if (folder / index).is_file():
            return shards_of(folder, index)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".gguf"))
    raise CheckpointError(
        f"{folder} has no weights: neither {SAFETENSORS} nor {BIN} nor the index of a sharded checkpoint. "
        + (f"It does have {listing(others)}, which are not looked for under such names. " if others else "")
        + download_advice(folder)
    )


def shards_of(folder: Path, index: str) -> list[str]:
    """The files that an index names, all of them beside it.

    Raises:
        CheckpointError: it does not name files there.
    """
    weight_map = read_json(folder / index, folder).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{folder / index} does not name files of weights beside it. {download_advice(folder)}")
    return sorted(set(names))


def check_weights(folder: Path) -> None:
    """Raise CheckpointError where weights are missing: all, a shard, what a git-lfs pointer stands for, or the end."""
    shards = weight_files(folder)
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(
            f"{folder} is half downloaded: {len(missing)} of its {len(shards)} weight files are missing "
            f"({listing(missing)}). {download_advice(folder)}"
        )
    if pointers := [shard for shard in shards if is_lfs_pointer(folder / shard)]:
        raise CheckpointError(pointer_text(folder, pointers))
    if broken := [shard for shard in shards if not is_complete(folder / shard)]:
        raise CheckpointError(
            f"{folder} is half downloaded: {listing(broken)} {'is' if len(broken) == 1 else 'are'} cut off or damaged. "
            f"Delete {'it' if len(broken) == 1 else 'them'} and download again. {download_advice(folder)}"
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
        raise CheckpointError(pointer_text(folder, [VOCABULARY]))


def is_lfs_pointer(path: Path) -> bool:
    """Whether git left a note in the file's place, as it does where git-lfs is not installed."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def is_complete(path: Path) -> bool:
    """Whether a weight file is as long as its own directory of tensors says."""
    if path.suffix != ".safetensors":
        # A .bin file is a zip archive with its directory at the end; torch < 1.6 wrote bare pickles: let them through.
        with path.open("rb") as file:
            return file.read(2) not in (b"PK", b"") or zipfile.is_zipfile(path)
    # https://github.com/huggingface/safetensors#format: 8 bytes N (little endian), N bytes of JSON, the tensors.
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 + header_size:
            return False
        try:
            tensors = json.loads(file.read(header_size))
            end = max((t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, LookupError, AttributeError):
            return False
    return size == 8 + header_size + end


def read_json(path: Path, name: str | Path) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint `name`.

    Raises:
        CheckpointError: it is a git-lfs pointer, no JSON, or no object.
    """
    data = path.read_bytes()
    if data.startswith(LFS_POINTER):
        raise CheckpointError(pointer_text(path.parent, [path.name]))
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} of {name} is not valid JSON ({first_line(error)}). Mend it, or download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} of {name} is not a JSON object. Mend it, or download it again.")
    return content


def pointer_text(folder: Path, files: list[str]) -> str:
    """What to do about git-lfs pointers."""
    return (
        f"{folder} was cloned without its large files: {listing(files)} {'is a' if len(files) == 1 else 'are'} git-lfs "
        f"{'pointer' if len(files) == 1 else 'pointers'}. Run `git lfs install` and `git lfs pull` in that folder."
    )


def download_advice(folder: Path) -> str:
    """How to complete a folder."""
    return f"To fetch what is missing: `hf download Qwen/MODEL --local-dir {folder}`."


def listing(names: list[str], most: int = 5) -> str:
    """Some names, in the length of a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """What a library's error says first; the rest is for its developers."""
    return str(error).strip().partition("\n")[0]


def let_others_read(folder: Path) -> None:
    """Give weight files the permissions of a new file: safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o666 & ~mask)
