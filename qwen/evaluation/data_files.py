"""Files of benchmarks, as they are published: read whole, checked, and complained about by name and line.

Knows formats, and no benchmark.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Fields = Sequence[str] | Mapping[str, type]
"""Names of fields that an object must have, perhaps with what they must be: str, int, list or dict."""
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


class DataError(ValueError):
    """A file of a benchmark is missing or not as it should be; the text says which one and what to do."""


def read_csv(
    path: Path, columns: Sequence[str], *, header: bool, one_of: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Args:
        columns: what each row must have. With a header they are looked up in it, and others are kept as well; without
            one they name the columns in order.
        one_of: all that a column may hold, by its name: {"answer": "ABCD"}.

    Raises:
        DataError: no such file, not text, no rows, a row of another width, or one that holds something else.
    """
    with _Opened(path, newline="") as file:
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
                f"{path}: its header has no column {', '.join(map(repr, missing))}, only "
                f"{', '.join(map(repr, names))}. It should have {', '.join(columns)}."
            )
    if not rows:
        raise DataError(f"{path} holds no rows. It should have {', '.join(columns)} in each.")
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {line}: {len(row)} columns, where {len(names)} are needed: {', '.join(names)}."
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


def read_jsonl(path: Path, required: Fields) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, which may be compressed (.gz).

    Raises:
        DataError: no such file, not text, no lines, or a line that is no object with the required fields.
    """
    records = []
    with _Opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
            check_fields(record, required, f"{path}, line {number}")
            records.append(record)
    if not records:
        raise DataError(f"{path} is empty. It should hold JSON lines with {', '.join(required)}.")
    return records


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: no such file, or not JSON.
    """
    with _Opened(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}). Download the file again.") from error


def check_fields(record: Any, required: Fields, where: str) -> None:
    """Raise DataError unless this is an object that has the required fields; `where` is how the text begins."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: an object with {', '.join(required)} is needed, not {type(record).__name__}.")
    if missing := [name for name in required if name not in record]:
        raise DataError(
            f"{where}: no field {', '.join(map(repr, missing))}, only {', '.join(map(repr, record)) or 'none at all'}."
        )
    for name, kind in required.items() if isinstance(required, Mapping) else ():
        if not isinstance(record[name], kind):
            raise DataError(f"{where}: {name!r} must be {_KINDS[kind]}, not {type(record[name]).__name__}.")


class _Opened:
    """A text file that is opened, and read, with errors that name it."""

    def __init__(self, path: Path, newline: str | None = None):
        self.path, self.newline = Path(path), newline

    def __enter__(self) -> TextIO:
        try:
            opener = gzip.open if self.path.suffix == ".gz" else open
            # A byte-order mark, which spreadsheets write, belongs to no column.
            self.file = opener(self.path, "rt", encoding="utf-8-sig", newline=self.newline)
        except OSError as error:
            raise self._explained(error) from error
        return self.file

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.file.close()
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{self.path} is not UTF-8 text ({error}). Download it again.") from error
        if isinstance(error, OSError | EOFError | zlib.error):
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> DataError:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return DataError(f"{self.path} does not exist. {_beside(self.path)}")
        if isinstance(error, IsADirectoryError):
            return DataError(f"{self.path} is a folder, where a file is needed.")
        return DataError(f"{self.path} cannot be read: {error}.")


def _beside(path: Path) -> str:
    """What there is in place of a missing file."""
    folder = next(parent for parent in (*path.absolute().parents, Path("/")) if parent.exists())
    where = "eval/EVALUATION.md tells how the data have to lie."
    if not folder.is_dir():
        return f"{folder} is a file, where a folder is needed. {where}"
    if folder != path.absolute().parent:
        return f"There is no folder {folder / path.absolute().relative_to(folder).parts[0]}. {where}"
    found = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"{folder} holds {', '.join(found[:5]) + more if found else 'nothing'}. {where}"


def existing(path: Path, names: Sequence[str]) -> Iterator[Path]:
    """The files of these names in a folder.

    Raises:
        DataError: some are missing; names the first and counts the others.
    """
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        more = f" (nor do {len(missing) - 1} more of the {len(names)} that are needed)" if len(missing) > 1 else ""
        raise DataError(f"{path / missing[0]} does not exist{more}. {_beside(path / missing[0])}")
    return (path / name for name in names)
