"""Reads the small files of a checkpoint within limits: they may be damaged, or made to harm who loads them.

Without limits, a named pipe or a device hangs the process, the objects of a JSON text take up to 25 times its size, and
code that walks nested values exceeds the recursion limit.
"""

import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 20
MAX_INDEX_BYTES = 8 << 20  # of lists of tensors
MAX_VOCABULARY_BYTES = 8 << 20  # the published one has 2.6 MB
MAX_DEPTH = 64  # levels of brackets
MAX_VALUES = 1 << 20  # each takes up to 60 bytes, also one of two characters
MAX_MESSAGE = 1000  # characters of an error


def read_small_file(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a regular file, which may be named by a link.

    Raises:
        ValueError: it is something else, for example a named pipe, or larger than `max_bytes`.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{os.fspath(path)} is not a regular file but a folder, pipe or device. Put a file there.")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{os.fspath(path)} is larger than {max_bytes >> 20} MB. Download it again.")
    return content


def count_values(data: str | bytes) -> int:
    """Return how many values a JSON text has at most: signs in its texts are counted, too."""
    signs: tuple[Any, ...] = (",", "[", "{") if isinstance(data, str) else (b",", b"[", b"{")
    return sum(map(data.count, signs))


def parse_json_object(
    data: bytes, where: str, *, allow_nan: bool = False, max_values: int = MAX_VALUES
) -> dict[str, Any]:
    """Parse a JSON object in UTF-8.

    Args:
        where: the file, for error messages.
        allow_nan: accept NaN and Infinity, which Python writes although they are not JSON.
        max_values: how many values it may have.

    Raises:
        ValueError: it is not valid, no object, nested too deeply, has too many values, or a number beyond the range of
            floats.
    """
    if count_values(data) > max_values:
        raise ValueError(f"{where} has more than {max_values:,} values. Fix it or download it again.")

    def parse_float(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"the number {text[:20]} is too large")
        return number

    def parse_constant(name: str) -> float:
        if not allow_nan:
            raise ValueError(f"{name} is not a number in JSON")
        return float(name)

    try:
        content = json.loads(data.decode("utf-8"), parse_float=parse_float, parse_constant=parse_constant)
        check_depth(content)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"nested deeper than {MAX_DEPTH} levels"
        raise ValueError(f"{where} is not valid JSON ({reason}). Fix it or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} is not a JSON object. Fix it or download it again.")
    return content


def check_depth(content: object) -> None:
    """Raise ValueError if parsed JSON is nested deeper than MAX_DEPTH levels."""
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _children(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_json_object(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ValueError: the file is no JSON object within the limits; the message names it.
        OSError: it cannot be read.
    """
    return parse_json_object(read_small_file(path, max_bytes), os.fspath(path))


def first_line(reason: object) -> str:
    """Return the first line of a text, or of an error's, with control characters escaped, which a file may have put
    there and a terminal would act on."""
    return _printable(next(iter(str(reason).strip().splitlines()), ""))


def one_line(text: str) -> str:
    """Return an error message as one line of at most MAX_MESSAGE characters: it may quote what a file holds.

    Of a longer one, the start and the end, which has the advice, are kept.
    """
    line = _printable(" ".join(text.split()) if not text.isprintable() else text)
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE // 2]} … {line[-(MAX_MESSAGE // 2) + 3 :]}"


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def local_folder(name_or_path: object, subfolder: str | None = None) -> Path | None:
    """Return the folder of a checkpoint by the arguments of `from_pretrained`; None if it is on a hub."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        return None
    folder = Path(name_or_path, subfolder or "")
    return folder if folder.is_dir() else None


def check_json_files(folder: Path, names: Iterable[str]) -> None:
    """Check those of the named files that a folder has, before transformers reads them.

    Raises:
        ValueError: one is no JSON object within the limits; the message names it.
        OSError: one cannot be read.
    """
    for name in names:
        if (folder / name).exists():
            read_json_object(folder / name)
