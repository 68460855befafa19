"""The splits of a data set that comes as one: JSON lines side by side, or a folder that `datasets` saved.

Knows no benchmark.
"""

from pathlib import Path
from typing import Any

from .data_files import DataError, Fields, check_fields, read_jsonl

_SAVED = "dataset_dict.json"  # how `datasets` marks a folder of splits


def read_split(path: Path, split: str, required: Fields) -> list[dict[str, Any]]:
    """The samples of a split.

    Args:
        path: the file of the test split, with SPLIT.jsonl of other splits beside it; a folder of such files; or a
            folder that `DatasetDict.save_to_disk` wrote.
        required: the fields that each sample must have.

    Raises:
        DataError: there is no such split, it is empty, or a sample lacks a field.
    """
    if (path / _SAVED).is_file():
        return _saved_split(path, split, required)
    if path.is_dir() and next(path.glob("*.arrow"), None):
        raise DataError(f"{path} is one split of a saved data set. Name the folder above it, which holds {_SAVED}.")
    file = split_file(path, split)
    if split != "test" and file == path:
        raise DataError(f"{path} is the {split} split: name the file of the test split, which lies beside it.")
    return read_jsonl(file, required)


def split_file(path: Path, split: str) -> Path:
    """Where the JSON lines of a split are: see `read_split`."""
    if path.is_dir():
        return path / f"{split}.jsonl"
    return path if split == "test" else path.with_name(f"{split}{''.join(path.suffixes)}")


def _saved_split(folder: Path, split: str, required: Fields) -> list[dict[str, Any]]:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise DataError(f"{folder} was saved by `datasets`, which is not installed: pip install datasets.") from error
    try:
        splits = load_from_disk(str(folder))
    except Exception as error:  # pyarrow, json and datasets itself each have their own
        raise DataError(f"{folder} is not a whole saved data set ({error}). Save or download it again.") from error
    if split not in splits:
        raise DataError(f"{folder} has no split {split!r}, only {', '.join(map(repr, splits))}.")
    samples = splits[split].to_list()
    if not samples:
        raise DataError(f"{folder}: the split {split!r} is empty.")
    for number, sample in enumerate(samples):
        check_fields(sample, required, f"{folder}, sample {number} of {split}")
    return samples
