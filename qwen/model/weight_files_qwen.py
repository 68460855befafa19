"""Reads names of tensors from weight files, and checks a folder before a model of its size is built."""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from .json_qwen import MAX_INDEX_BYTES, MAX_VALUES, count_values, first_line, read_json_object

MAX_NAME = 255  # characters of the name of a file
INDEX_SUFFIX = ".index.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in transformers' order of preference

_SIZES: dict[str, tuple[int, str, Callable[[PreTrainedConfig], int]]] = {
    "wte.weight": (0, "vocab_size", lambda config: config.vocab_size),
    "ln_f.weight": (0, "hidden_size", lambda config: config.hidden_size),
    "c_attn.bias": (
        0,
        "3 * num_attention_heads * kv_channels",
        lambda config: 3 * config.num_attention_heads * config.kv_channels,
    ),
    "w1.weight": (0, "intermediate_size / 2", lambda config: config.intermediate_size // 2),
    "w1.qweight": (1, "intermediate_size / 2", lambda config: config.intermediate_size // 2),
}
"""Tensors that show the sizes of a model, by the ends of their names: the dimension and what it must be."""
_LAYER = re.compile(r"(?:^|\.)h\.(\d{1,9})\.")


def open_bin(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return the tensors of a .bin file. Code in it is never executed.

    Tensors are read on access, except from files of torch < 1.6, which are no zip archives and cannot be mapped.

    Raises:
        OSError: the file is damaged, or holds something else.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                # torch does not compress: an archive that grows on reading was made to fill the memory.
                if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                    raise pickle.UnpicklingError("compressed")
        with warnings.catch_warnings():  # of TorchScript and of new pickles, which are refused here
            warnings.simplefilter("ignore")
            tensors = torch.load(path, mmap=is_zip, weights_only=True, map_location="cpu")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name!r} is no tensor")
            if tensor.nbytes > tensor.untyped_storage().nbytes():  # strides of 0: a copy would fill the memory
                raise RuntimeError(f"{name[:60]!r} is larger than its data")
        return tensors
    except Exception as error:  # of any type, if someone made the file
        reason = first_line(error).partition(". ")[0][:200]
        if isinstance(error, (RuntimeError, OSError)) and "weights_only" not in reason:
            raise damaged(path, reason) from error
        raise OSError(  # not torch's message, which advises to execute the file
            f"{os.fspath(path)} does not hold a dict of tensors and is not loaded: download the weights from where "
            "they were published."
        ) from error


def damaged(path: str | os.PathLike, reason: object) -> OSError:
    """Return the error of a weight file that cannot be read."""
    return OSError(
        f"{os.fspath(path)} cannot be read ({first_line(reason)[:200]}): its download stopped early, or it is damaged. "
        "Delete it and download it again."
    )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a weight file by their names.

    Raises:
        OSError: the file cannot be read.
    """
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in open_bin(path).items()}
    with path.open("rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), MAX_INDEX_BYTES))
    if count_values(header) > MAX_VALUES:
        raise damaged(path, f"its header has more than {MAX_VALUES:,} values")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise damaged(path, error) from error


def check_weight_files(folder: Path, config: PreTrainedConfig) -> None:
    """Check the weights that transformers would load from a folder, before a model of the sizes in `config` is built.

    A wrong size would take minutes and all memory before transformers notices it.

    Args:
        folder: of a checkpoint. Without weight files of the usual names, nothing is checked.
        config: of the model to build.

    Raises:
        ValueError: an index is invalid.
        OSError: a file cannot be read, or has fewer layers or other sizes than `config`.
    """
    names: Iterable[str]
    shapes: dict[str, tuple[int, ...]] = {}
    for single in WEIGHTS:
        if (folder / single).is_file():
            names = shapes = tensor_shapes(folder / single)
            break
        if (folder / f"{single}{INDEX_SUFFIX}").is_file():
            index = folder / f"{single}{INDEX_SUFFIX}"
            names = files = files_of_index(read_json_object(index, MAX_INDEX_BYTES), index)
            # .bin files are opened here since transformers' errors for them advise to execute code.
            needed = {file for name, file in files.items() if name.endswith(tuple(_SIZES)) or file.endswith(".bin")}
            for file in sorted(set(files.values())):
                if (folder / file).exists() and not (folder / file).is_file():  # transformers would read a pipe
                    raise damaged(folder / file, "no regular file")
                if file in needed and (folder / file).is_file():
                    shapes |= tensor_shapes(folder / file)
            break
    else:
        return
    check_layers(names, config, f"the weight files in {folder} have")
    check_sizes(shapes, config, folder)


def check_layers(names: Iterable[str], config: PreTrainedConfig, subject: str) -> None:
    """Raise OSError if there are fewer layers among the names of tensors than in the config.

    Args:
        subject: what has the tensors, for the error message, e.g. "the weight files have".
    """
    layers = {int(match[1]) for name in names if (match := _LAYER.search(name))}
    if config.num_hidden_layers > len(layers):
        raise OSError(
            f"num_hidden_layers is {config.num_hidden_layers} in the config, but {subject} {len(layers)} layers: the "
            "two come from different models. Download the whole checkpoint again."
        )


def check_sizes(shapes: Mapping[str, tuple[int, ...]], config: PreTrainedConfig, folder: Path) -> None:
    """Raise OSError if the first tensors that show the sizes of a model have others than the config.

    The tensors of further layers are compared when they are loaded.
    """
    for suffix, (dimension, field, size_in) in _SIZES.items():
        expected = size_in(config)
        name = next((name for name in shapes if name.endswith(suffix)), None)
        if name is not None and len(shapes[name]) > dimension and shapes[name][dimension] != expected:
            raise OSError(
                f"{field} is {expected} in the config, but {shapes[name][dimension]} in {name} of the weight files in "
                f"{folder}: the two come from different models. Download the whole checkpoint again."
            )


def files_of_index(index: dict[str, Any], path: Path) -> dict[str, str]:
    """Return the weight file of each tensor from the content of the index of a sharded checkpoint.

    Args:
        path: of the index, for error messages.

    Raises:
        ValueError: the index is invalid, or names a file outside its folder.
    """
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not all(map(_is_file_name, files.values())):
        raise ValueError(f"{path} does not list weight files in its folder.")
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f'{path} has no object "metadata", which transformers needs: add `"metadata": {{}}`.')
    return files


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.isprintable() and len(name) <= MAX_NAME
