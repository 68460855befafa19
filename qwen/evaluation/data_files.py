"""Reads and checks published benchmark files (CSV, JSON, JSON lines), with errors that name the file and line."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from ..model.json_qwen import MAX_VALUES, count_values, one_line
from .case import JSONObject

Fields = Sequence[str] | Mapping[str, type]
"""Required fields of an object, optionally with their types: str, int, list or dict."""
MAX_BYTES = 64 << 20  # of a file, unpacked
_TYPE_NAMES = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


class DataError(ValueError):
    """A benchmark file is missing or invalid; the message says which one and what to do, in one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def read_csv(
    path: Path, columns: Sequence[str], *, header: bool, one_of: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, str]]:
    """Read the rows of a CSV file.

    Args:
        columns: required columns. With a header they are looked up in it and other columns are kept; without one they
            name the columns in order.
        one_of: allowed values of a column, by its name: {"answer": "ABCD"}.

    Raises:
        DataError: the file is missing, not text or empty; a row has the wrong width or a value that is not allowed.
    """
    with _OpenText(path, newline="") as file:
        reader = csv.reader(file)
        try:
            rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not CSV ({error}). Download the file again.") from error
    names = list(columns)
    if header and rows:
        names = [name.strip() for name in rows.pop(0)[1]]
        if missing := [column for column in columns if column not in names]:
            raise DataError(
                f"{path}: the header has no column {', '.join(map(repr, missing))}, only "
                f"{', '.join(map(repr, names))}. Required columns: {', '.join(columns)}."
            )
    if not rows:
        raise DataError(f"{path} has no rows. Required columns: {', '.join(columns)}.")
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {line}: {len(row)} columns, but {len(names)} are needed: {', '.join(names)}."
            )
    records = [dict(zip(names, row, strict=True)) for _, row in rows]
    for column, allowed in (one_of or {}).items():
        for (line, _), record in zip(rows, records, strict=True):
            record[column] = record[column].strip()
            if record[column] not in allowed:
                raise DataError(
                    f"{path}, line {line}: {column} is {record[column]!r}, not one of {', '.join(allowed)}."
                )
    return records


def read_jsonl(path: Path, required: Fields) -> list[JSONObject]:
    """Read the objects of a JSON lines file, which may be compressed (.gz).

    Raises:
        DataError: the file is missing, not text or empty, or a line is not an object with the required fields.
    """
    records = []
    with _OpenText(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
            records.append(check_fields(record, required, f"{path}, line {number}"))
    if not records:
        raise DataError(f"{path} is empty. Each line must be a JSON object with {', '.join(required)}.")
    return records


def read_json(path: Path) -> object:
    """Read a JSON file.

    Raises:
        DataError: the file is missing or not JSON.
    """
    with _OpenText(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}). Download the file again.") from error


def check_fields(record: object, required: Fields, where: str) -> JSONObject:
    """Return `record`. Raises DataError unless it is an object with the required fields; `where` starts the message."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be an object with {', '.join(required)}, not {type(record).__name__}.")
    if missing := [name for name in required if name not in record]:
        raise DataError(
            f"{where}: no field {', '.join(map(repr, missing))}. It has {', '.join(map(repr, record)) or 'no fields'}."
        )
    for name, kind in required.items() if isinstance(required, Mapping) else ():
        if not isinstance(record[name], kind):
            raise DataError(f"{where}: {name!r} must be {_TYPE_NAMES[kind]}, not {type(record[name]).__name__}.")
    return record


class _OpenText:
    """Opens a text file, and turns errors on opening and reading it into `DataError`."""

    def __init__(self, path: Path, newline: str | None = None):
        self.path, self.newline = Path(path), newline

    def __enter__(self) -> TextIO:
        try:
            if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):
                raise DataError(f"{self.path} is a pipe or device, but a file is needed.")
            with gzip.open(self.path) if self.path.suffix == ".gz" else open(self.path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise self._data_error(error) from error
        if len(content) > MAX_BYTES or count_values(content) > MAX_VALUES:
            limits = f"{MAX_BYTES >> 20} MB or {MAX_VALUES:,} values"
            raise DataError(f"{self.path} has more than {limits}. Download it again.")
        # utf-8-sig: spreadsheets write a byte-order mark, which is not part of the first column.
        self.file = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline=self.newline)
        return self.file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.file.close()
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{self.path} is not UTF-8 text ({error}). Download it again.") from error

    def _data_error(self, error: Exception) -> DataError:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return DataError(f"{self.path} does not exist. {_describe_folder(self.path)}")
        if isinstance(error, IsADirectoryError):
            return DataError(f"{self.path} is a folder, but a file is needed.")
        return DataError(f"{self.path} cannot be read: {error}.")


def _describe_folder(path: Path) -> str:
    """Describe what exists where a file is missing."""
    folder = next(parent for parent in (*path.absolute().parents, Path("/")) if parent.exists())
    hint = "eval/EVALUATION.md describes the layout of the data."
    if not folder.is_dir():
        return f"{folder} is a file, but a folder is needed. {hint}"
    if folder != path.absolute().parent:
        return f"There is no folder {folder / path.absolute().relative_to(folder).parts[0]}. {hint}"
    found = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"{folder} contains {', '.join(found[:5]) + more if found else 'nothing'}. {hint}"


def require_files(path: Path, names: Sequence[str]) -> Iterator[Path]:
    """Return the paths of the named files in the folder `path`.

    Raises:
        DataError: some are missing; names the first and counts the others.
    """
    try:
        missing = [name for name in names if not (path / name).is_file()]
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL
        raise DataError(f"{path} cannot have a file of a name that the data give ({error}).") from error
    if missing:
        more = f" (nor do {len(missing) - 1} more of the {len(names)} required files)" if len(missing) > 1 else ""
        raise DataError(f"{path / missing[0]} does not exist{more}. {_describe_folder(path / missing[0])}")
    return (path / name for name in names)
