"""Long texts for measurements: read from files and folders, as one. Knows no tokens."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from .data_files import DataError


def read_texts(paths: Sequence[Path]) -> str:
    """The texts of files, and of all *.txt and *.md in folders, by name, with a blank line between them.

    Raises:
        DataError: a path does not exist, is not UTF-8, or there is no text at all.
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
        raise DataError(f"There is no text in {', '.join(map(str, paths))} (of a folder, *.txt and *.md are read).")
    return whole


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
        else:
            yield path
