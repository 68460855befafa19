"""Reads files and folders as one long text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from .data_files import DataError


def read_texts(paths: Sequence[Path]) -> str:
    """Return the texts of files, and of all *.txt and *.md in folders, sorted by name, separated by blank lines.

    Raises:
        DataError: a path does not exist or is not UTF-8, or there is no text.
    """
    texts = []
    for file in _files(paths):
        try:
            texts.append(file.read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            raise DataError(f"{file} does not exist.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    whole = "\n\n".join(texts)
    if not whole.strip():
        raise DataError(f"There is no text in {', '.join(map(str, paths))} (in folders, only *.txt and *.md are read).")
    return whole


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
        else:
            yield path
