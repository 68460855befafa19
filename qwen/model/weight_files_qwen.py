"""Reads names of tensors from weight files, and checks a folder before a model of its size is built."""

import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .json_qwen import MAX_INDEX_BYTES, read_json_object

INDEX_SUFFIX = ".index.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in transformers' order of preference

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
        tensors = torch.load(path, mmap=is_zip, weights_only=True, map_location="cpu")
        return {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:  # of any type, if someone made the file
        reason = str(error).strip().partition("\n")[0].partition(". ")[0][:200]
        if isinstance(error, (RuntimeError, OSError)) and "weights_only" not in reason:
            raise damaged(path, reason) from error
        raise OSError(  # not torch's message, which advises to execute the file
            f"{os.fspath(path)} does not hold a dict of tensors and is not loaded: download the weights from where "
            "they were published."
        ) from error


def damaged(path: str | os.PathLike, reason: object) -> OSError:
    """Return the error of a weight file that cannot be read."""
    return OSError(
        f"{os.fspath(path)} cannot be read ({reason}): its download stopped early, or it is damaged. Delete it and "
        "download it again."
    )


def tensor_names(path: Path) -> Iterable[str]:
    """Return the names of the tensors in a weight file.

    Raises:
        OSError: the file cannot be read.
    """
    if path.suffix != ".safetensors":
        return open_bin(path)
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise damaged(path, error) from error


def check_weight_files(folder: Path, num_layers: int) -> None:
    """Check the weights that transformers would load from a folder, which takes long for those of a wrong size.

    Args:
        folder: of a checkpoint. Without weight files of the usual names, nothing is checked.
        num_layers: of the model to build.

    Raises:
        ValueError: an index is invalid.
        OSError: a file cannot be read, or there are fewer layers.
    """
    names: Iterable[str]
    for single in WEIGHTS:
        if (folder / single).is_file():
            names = tensor_names(folder / single)
            break
        if (folder / f"{single}{INDEX_SUFFIX}").is_file():
            index = folder / f"{single}{INDEX_SUFFIX}"
            names = files = files_of_index(read_json_object(index, MAX_INDEX_BYTES), index)
            for file in sorted(set(files.values())):
                if (folder / file).suffix != ".safetensors" and (folder / file).is_file():
                    open_bin(folder / file)
            break
    else:
        return
    layers = {int(match[1]) for name in names if (match := _LAYER.search(name))}
    if num_layers > len(layers):
        raise OSError(
            f"num_hidden_layers is {num_layers} in the config, but the weight files in {folder} have {len(layers)} "
            "layers: the two come from different models. Download the whole checkpoint again."
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
    return isinstance(name, str) and Path(name).name == name and "\0" not in name
