"""Reads samples from a JSON or JSON Lines file that may be larger than memory, and reports errors with their position.

The format of a sample is defined in `samples`.
"""

import codecs
import contextlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast, overload

from tqdm import tqdm

from ..model.json_qwen import MAX_VALUES, count_values
from .samples import MalformedSample, check_sample, unlearned_turns

_CHUNK = 1 << 18  # bytes per read; a window that fits into the processor's cache is twice as fast
_SHORT = 1 << 16  # characters
_VALUE = re.compile(r"[,\[{]")  # before each value
_BLANK = re.compile(r"[ \t\r\n]*")
PROGRESS_DELAY = 2  # seconds before a progress bar is shown


class DataFileError(ValueError):
    """A file of conversations cannot be used. The message says what is wrong, where, and what to do."""


class ConversationFile(Sequence[dict]):
    """The samples of a file, read on access.

    The file is a JSON list of samples or JSON Lines, in UTF-8. It is read once at construction, to check all samples
    and to index where they begin and end: 16 bytes of memory per sample of any length. JSON is what Python's json
    accepts, including NaN.

    The file is not kept open, so that forked and spawned data loader workers can share the object. Each access opens
    the file and checks by size and modification time that it is unchanged.

    Args:
        path: the file.
        progress: show a progress bar on standard error if reading takes seconds.

    Attributes:
        notes: sentences that say what training skips in the samples, how many have it, and where the first one is.

    Raises:
        DataFileError: the file is missing, empty, not JSON or not a list; on access: it was changed.
        MalformedSample: a sample is invalid.
    """

    def __init__(self, path: str | os.PathLike, progress: bool = False):
        self.path = Path(path).absolute()
        self._starts, self._ends = array("Q"), array("Q")  # bytes
        with self._open() as file:
            self._size_and_mtime = _size_and_mtime(file)
            size, _ = self._size_and_mtime
            unlearned: dict[str, list[int]] = {}  # what is skipped → [number of samples, start of the first one]
            with tqdm(
                desc=f"Reading {self.path.name}",
                total=size,
                unit="B",
                unit_scale=True,
                delay=PROGRESS_DELAY,
                disable=not progress,
            ) as bar:
                for start, end, sample in _JsonReader(file, self.path):
                    self._check(file, start, sample)
                    for what in unlearned_turns(cast(dict, sample)):  # _check accepts only dicts
                        unlearned.setdefault(what, [0, start])[0] += 1
                    self._starts.append(start)
                    self._ends.append(end)
                    bar.update(end - bar.n)
            self.notes = [
                f"{count} of {len(self)} samples {what}. The first: {self.path}, line {_position(file, first)[0]}."
                for what, (count, first) in unlearned.items()
            ]
            self._require_unchanged(file)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> dict: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict]: ...

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        resolved = range(len(self))[index]
        if isinstance(resolved, range):
            return [self[i] for i in resolved]
        start, end = self._starts[resolved], self._ends[resolved]
        with self._open() as file:
            self._require_unchanged(file)
            file.seek(start)
            try:
                return json.loads(file.read(end - start))
            except ValueError:  # changed since the check above
                raise self._changed_error() from None

    def _open(self) -> BinaryIO:
        try:
            if self.path.is_file():  # opening a pipe would block until a process writes to it
                return open(self.path, "rb")
            if self.path.is_dir():
                what = "is a folder: name the file in it that holds the conversations."
            elif self.path.exists():
                what = "is not a regular file: write the conversations to a file first; it is read more than once."
            else:
                what = "does not exist: check the path."
        except OSError as error:
            what = f"cannot be read: {error.strerror}."
        raise DataFileError(f"{self.path} {what}")

    def _check(self, file: BinaryIO, start: int, sample: object) -> None:
        try:
            check_sample(sample, len(self))
        except MalformedSample as error:
            if len(self) == 0 and isinstance(sample, dict) and (key := _key_of_samples(sample)) is not None:
                raise DataFileError(
                    f"{self.path} holds an object with the samples under {key!r}: write only that list to the file."
                ) from None
            line, _ = _position(file, start)
            raise MalformedSample(f"{self.path}, line {line}: {error}") from None

    def _require_unchanged(self, file: BinaryIO) -> None:
        if _size_and_mtime(file) != self._size_and_mtime:
            raise self._changed_error()

    def _changed_error(self) -> DataFileError:
        return DataFileError(f"{self.path} has changed since it was first read: start again and do not change it.")


class _JsonReader:
    """Iterates over the values of a JSON list or JSON Lines file: (start, end, value), with offsets in bytes.

    Decodes the text in a sliding window, which advances by `_CHUNK` bytes and grows only for longer values.

    Raises:
        DataFileError: the file is not UTF-8, not JSON, or neither a list nor JSON Lines.
    """

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.decoder = json.JSONDecoder()
        self.partial = b""  # start of a character whose end has not been read yet
        self.window, self.pos = "", 0  # decoded text, and the position of the first unused character
        self.has_few_values = True  # whether the window has up to MAX_VALUES
        self.offset = 0  # of window[pos] in the file, in bytes
        first_bytes = file.read(4)
        if first_bytes.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in first_bytes:
            raise DataFileError(f"{path} is not UTF-8 (it looks like UTF-16 or binary data): save it as JSON in UTF-8.")
        if first_bytes.startswith(codecs.BOM_UTF8):
            self.offset = len(codecs.BOM_UTF8)
        file.seek(self.offset)

    def __iter__(self) -> Iterator[tuple[int, int, object]]:
        expected_format = "a JSON list of samples, [{…}, …], or JSON Lines, a sample {…} on each line"
        first_char = self._peek()
        if not first_char:
            raise DataFileError(f"{self.path} is empty: it should be {expected_format}.")
        if first_char not in "[{":
            raise self._error(f"this is not JSON: the file should be {expected_format}")
        if first_char == "{":
            while first_char:
                if first_char != "{":
                    raise self._error("this is not a sample: JSON Lines may contain only samples {…}, without commas")
                yield self._value()
                first_char = self._peek()
            return

        self._skip_character()
        if self._peek() == "]":
            raise DataFileError(f"{self.path} holds an empty list: add samples.")
        while True:
            yield self._value()
            following = self._peek()
            if not following:
                raise self._error('the file ends before the list does: it was cut off, or a "]" is missing')
            if following not in ",]":
                raise self._error('"," or "]" should follow a sample')
            self._skip_character()
            if following == "]":
                break
            if self._peek() == "]":
                raise self._error('there is a "," before the end of the list: remove it')
        if self._peek():
            raise self._error("text follows the end of the list: remove it, or merge it into the list")

    def _value(self) -> tuple[int, int, object]:
        start = self.offset
        while True:
            window = self._window_of_value()
            try:
                value, end = self.decoder.raw_decode(window, self.pos)
            except json.JSONDecodeError as error:
                # The window may end within a string, within a word like -Infinity, or within an escape: read more.
                near_end = error.msg.startswith("Unterminated string") or error.pos > len(window) - 16
                if near_end and len(window) < len(self.window):
                    raise self._error(f"this sample has more than {MAX_VALUES:,} values", start) from None
                if near_end and self._read_more():
                    continue
                self._advance(error.pos)
                what = f"this is not JSON ({error.msg.removesuffix(' starting at').removesuffix(' at')})"
                if error.msg.startswith("Unterminated string") or self.pos == len(self.window):
                    what = f"the file ends within a sample, it was cut off or a quote or bracket is missing: {what}"
            except RecursionError:
                what = "this is not a sample: brackets are nested too deeply"
            except ValueError as error:  # a number with thousands of digits
                what = f"this is not a sample: {error}"
            else:
                if end == len(self.window) and self._read_more():
                    continue
                self._advance(end)
                return start, self.offset, value
            raise self._error(what, start) from None

    def _window_of_value(self) -> str:
        """Return the window, cut after MAX_VALUES values unless the next sample is short."""
        if self.has_few_values:
            return self.window
        short = self.window[self.pos : self.pos + _SHORT]
        with contextlib.suppress(ValueError, RecursionError):
            if self.decoder.raw_decode(short)[1] < len(short):
                return self.window
        last = next(islice(_VALUE.finditer(self.window, self.pos), MAX_VALUES, None), None)
        return self.window if last is None else self.window[: last.start()]

    def _peek(self) -> str:
        """Return the next character that is not white space, or "" at the end of the file."""
        while True:
            blank = _BLANK.match(self.window, self.pos)
            self._advance(blank.end() if blank else self.pos)
            if self.pos < len(self.window):
                return self.window[self.pos]
            if not self._read_more():
                return ""

    def _skip_character(self) -> None:
        self._advance(self.pos + 1)

    def _advance(self, pos: int) -> None:
        self.offset += len(self.window[self.pos : pos].encode())
        self.pos = pos

    def _read_more(self) -> bool:
        """Advance the window. At the end of the file, return False and change nothing."""
        # Double the unused text, so that a long value is not parsed again for each of its chunks.
        chunk = self.file.read(max(_CHUNK, len(self.window) - self.pos))
        data = self.partial + chunk
        if not data:
            return False
        try:
            text, used = codecs.utf_8_decode(data, "strict", not chunk)
        except UnicodeDecodeError as error:
            line, column = _position(self.file, self.file.tell() - len(data) + error.start)
            raise DataFileError(
                f"{self.path}, line {line}, column {column}: the byte 0x{data[error.start]:02x} is not UTF-8. Save the "
                "file as JSON in UTF-8; unpack it, if it is compressed."
            ) from None
        self.partial = data[used:]
        self.window, self.pos = self.window[self.pos :] + text, 0
        self.has_few_values = count_values(self.window) <= MAX_VALUES
        return True

    def _error(self, what: str, start: int | None = None) -> DataFileError:
        """Return an error for the current position, in the sample that begins at byte `start`."""
        while len(self.window) - self.pos < 30 and self._read_more():  # enough text to quote
            pass
        here = self.window[self.pos : self.pos + 30]
        context = f"here: {here!r}" if here else "here: end of file"
        line, column = _position(self.file, self.offset)
        if start is not None:
            context += f"; the sample begins on line {_position(self.file, start)[0]}"
        return DataFileError(f"{self.path}, line {line}, column {column}: {what} ({context}).")


def _size_and_mtime(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _key_of_samples(value: dict) -> str | None:
    """Return the key of an object whose value is a list of samples, if there is one."""
    for key, items in value.items():
        if isinstance(items, list) and items and isinstance(items[0], dict) and "conversations" in items[0]:
            return key
    return None


def _position(file: BinaryIO, offset: int) -> tuple[int, int]:
    """Return the line and column of a byte offset, both from 1; columns count characters."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
    line = column = 1
    file.seek(0)
    while offset > 0 and (chunk := file.read(min(_CHUNK, offset))):
        offset -= len(chunk)
        text = decoder.decode(chunk)
        line += text.count("\n")
        column = len(text) - text.rfind("\n") if "\n" in text else column + len(text)
    return line, column
