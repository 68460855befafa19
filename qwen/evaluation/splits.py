"""Reads a split of a dataset: from JSON lines files, or from a folder that `datasets` saved."""

from pathlib import Path

from .case import JSONObject
from .data_files import DataError, Fields, check_fields, read_jsonl

_SAVED = "dataset_dict.json"  # in a folder of splits saved by `datasets`


def read_split(path: Path, split: str, required: Fields) -> list[JSONObject]:
    """Read the samples of a split.

    Args:
        path: the file of the test split, with SPLIT.jsonl of other splits next to it; a folder of such files; or a
            folder written by `DatasetDict.save_to_disk`.
        required: the fields that each sample must have.

    Raises:
        DataError: the split is missing or empty, or a sample lacks a field.
    """
    if (path / _SAVED).is_file():
        return _saved_split(path, split, required)
    if path.is_dir() and next(path.glob("*.arrow"), None):
        raise DataError(f"{path} is one split of a saved dataset. Pass its parent folder, which contains {_SAVED}.")
    file = split_file(path, split)
    if split != "test" and file == path:
        raise DataError(f"{path} is the {split} split: pass the file of the test split next to it.")
    return read_jsonl(file, required)


def split_file(path: Path, split: str) -> Path:
    """Return the path of the JSON lines of a split; see `read_split`."""
    if path.is_dir():
        return path / f"{split}.jsonl"
    return path if split == "test" else path.with_name(f"{split}{''.join(path.suffixes)}")


def _saved_split(folder: Path, split: str, required: Fields) -> list[JSONObject]:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise DataError(f"{folder} was saved by `datasets`, which is not installed: pip install datasets.") from error
    try:
        splits = load_from_disk(str(folder))
    except Exception as error:  # pyarrow, json and datasets raise different types
        raise DataError(f"{folder} is not a complete saved dataset ({error}). Save or download it again.") from error
    if split not in splits:
        raise DataError(f"{folder} has no split {split!r}, only {', '.join(map(repr, splits))}.")
    samples = splits[split].to_list()
    if not samples:
        raise DataError(f"{folder}: the split {split!r} is empty.")
    return [
        check_fields(sample, required, f"{folder}, sample {number} of {split}") for number, sample in enumerate(samples)
    ]
