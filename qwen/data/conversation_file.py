"""Files of conversations to samples.

Revolves around one file, a JSON list or JSON Lines, which may be larger than memory: where each sample begins and ends,
and what is wrong with it. What a sample is stands in `samples`; tokens are not known here.
"""

import codecs
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

from tqdm import tqdm

from .samples import MalformedSample, check_sample

_CHUNK = 1 << 18  # bytes read at a time; a window that stays in the processor's cache is read twice as fast
_BLANK = re.compile(r"[ \t\r\n]*")
PROGRESS_DELAY = 2  # seconds; what is done sooner needs no progress bar


class DataFileError(ValueError):
    """A file of conversations that cannot be used as a whole; the text says what is wrong, where, and what to do."""


class ConversationFile(Sequence[dict]):
    """The samples of a file, read from it one by one when they are asked for.

    The file holds a JSON list of samples or JSON Lines, in UTF-8. It is read through once, at construction, to check
    every sample and to note where it begins and ends: 16 bytes of memory a sample, however long the samples are.
    Whatever Python's json reads is taken for JSON, NaN included.

    Nothing is kept open, so that data loader workers, forked or spawned, can share it; each access opens the file and
    makes sure that it is still the same (by size and time).

    Args:
        path: the file.
        progress: show a progress bar on standard error where reading takes seconds.

    Raises:
        DataFileError: the file is missing, empty, no JSON, no list; on access: it was changed.
        MalformedSample: a sample is not as it should be.
    """

    def __init__(self, path: str | os.PathLike, progress: bool = False):
        self.path = Path(path).absolute()
        self._starts, self._ends = array("Q"), array("Q")  # bytes
        with self._open() as file:
            self._version = _version(file)
            size, _ = self._version
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
                    self._starts.append(start)
                    self._ends.append(end)
                    bar.update(end - bar.n)
            self._require_unchanged(file)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> dict: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict]: ...

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        start, end = self._starts[places], self._ends[places]
        with self._open() as file:
            self._require_unchanged(file)
            file.seek(start)
            try:
                return json.loads(file.read(end - start))
            except ValueError:  # written to in this very moment
                raise self._changed() from None

    def _open(self) -> BinaryIO:
        try:
            if self.path.is_file():  # opening a pipe would wait for someone to write to it
                return open(self.path, "rb")
            if self.path.is_dir():
                what = "is a folder: name the file in it that holds the conversations."
            elif self.path.exists():
                what = "is no regular file: write the conversations to a file first, they are not read in one go."
            else:
                what = "does not exist: check the path."
        except OSError as error:
            what = f"cannot be read: {error.strerror}."
        raise DataFileError(f"{self.path} {what}")

    def _check(self, file: BinaryIO, start: int, sample: Any) -> None:
        try:
            check_sample(sample, len(self))
        except MalformedSample as error:
            if len(self) == 0 and isinstance(sample, dict) and (key := _key_of_samples(sample)) is not None:
                raise DataFileError(
                    f"{self.path} holds an object with the samples under {key!r}: write that list alone to the file."
                ) from None
            line, _ = _position(file, start)
            raise MalformedSample(f"{self.path}, line {line}: {error}") from None

    def _require_unchanged(self, file: BinaryIO) -> None:
        if _version(file) != self._version:
            raise self._changed()

    def _changed(self) -> DataFileError:
        return DataFileError(f"{self.path} has changed since it was first read: leave it as it is, and start again.")


class _JsonReader:
    """The values of a JSON list or of JSON Lines, with the bytes where each begins and ends: (start, end, value).

    Sees the text through a window that slides on by `_CHUNK` bytes and grows only where a value is longer.

    Raises DataFileError.
    """

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.decoder = json.JSONDecoder()
        self.rest = b""  # the beginning of a character whose end has not been read
        self.window, self.at = "", 0  # what was read, and where in it the text begins that was not used
        self.offset = 0  # of window[at] in the file, in bytes
        opening = file.read(4)
        if opening.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in opening:
            raise DataFileError(f"{path} is not UTF-8 (it looks like UTF-16 or binary data): save it as JSON in UTF-8.")
        if opening.startswith(codecs.BOM_UTF8):
            self.offset = len(codecs.BOM_UTF8)
        file.seek(self.offset)

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        form = "a JSON list of samples, [{…}, …], or JSON Lines, a sample {…} on each line"
        opening = self._peek()
        if not opening:
            raise DataFileError(f"{self.path} is empty: it should be {form}.")
        if opening not in "[{":
            raise self._mistake(f"this is not JSON: the file should be {form}")
        if opening == "{":
            while opening:
                if opening != "{":
                    raise self._mistake("this is no sample: in JSON Lines samples {…} follow one another, and no more")
                yield self._value()
                opening = self._peek()
            return

        self._skip_character()
        if self._peek() == "]":
            raise DataFileError(f"{self.path} holds an empty list: add samples.")
        while True:
            yield self._value()
            following = self._peek()
            if not following:
                raise self._mistake('the file ends before the list does: it was cut off, or a "]" is missing')
            if following not in ",]":
                raise self._mistake('"," or "]" should follow a sample')
            self._skip_character()
            if following == "]":
                break
            if self._peek() == "]":
                raise self._mistake('a "," stands before the end of the list: remove it')
        if self._peek():
            raise self._mistake("text follows the end of the list: remove it, or make it one list")

    def _value(self) -> tuple[int, int, Any]:
        start = self.offset
        while True:
            try:
                value, end = self.decoder.raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                # The end of the window looks like this too: within a word such as -Infinity or an escape, or anywhere
                # behind the beginning of a string.
                near_end = error.msg.startswith("Unterminated string") or error.pos > len(self.window) - 16
                if near_end and self._read_on():
                    continue
                self._advance(error.pos)
                what = f"this is not JSON ({error.msg.removesuffix(' starting at').removesuffix(' at')})"
                if error.msg.startswith("Unterminated string") or self.at == len(self.window):
                    what = f"the file ends within a sample, it was cut off or something is not closed: {what}"
            except RecursionError:
                what = "this is not a sample: brackets are nested too deeply"
            except ValueError as error:  # a number of thousands of digits
                what = f"this is not a sample: {error}"
            else:
                if end == len(self.window) and self._read_on():
                    continue
                self._advance(end)
                return start, self.offset, value
            raise self._mistake(what, start) from None

    def _peek(self) -> str:
        """The next character that is not white space, or "" at the end of the file."""
        while True:
            blank = _BLANK.match(self.window, self.at)
            self._advance(blank.end() if blank else self.at)
            if self.at < len(self.window):
                return self.window[self.at]
            if not self._read_on():
                return ""

    def _skip_character(self) -> None:
        self._advance(self.at + 1)

    def _advance(self, at: int) -> None:
        self.offset += len(self.window[self.at : at].encode())
        self.at = at

    def _read_on(self) -> bool:
        """Slides the window on; False, and nothing changes, at the end of the file."""
        # As much again as is kept, so that a long value is not parsed anew for every chunk of it.
        chunk = self.file.read(max(_CHUNK, len(self.window) - self.at))
        data = self.rest + chunk
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
        self.rest = data[used:]
        self.window, self.at = self.window[self.at :] + text, 0
        return True

    def _mistake(self, what: str, start: int | None = None) -> DataFileError:
        """What is wrong at the place that was reached, in the sample that begins at `start`."""
        while len(self.window) - self.at < 30 and self._read_on():  # enough to recognize the place by
            pass
        here = self.window[self.at : self.at + 30]
        seen = f"here: {here!r}" if here else "here the file ends"
        line, column = _position(self.file, self.offset)
        if start is not None:
            seen += f"; the sample begins on line {_position(self.file, start)[0]}"
        return DataFileError(f"{self.path}, line {line}, column {column}: {what} ({seen}).")


def _version(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _key_of_samples(value: dict) -> str | None:
    """The key of an object under which samples stand."""
    for key, held in value.items():
        if isinstance(held, list) and held and isinstance(held[0], dict) and "conversations" in held[0]:
            return key
    return None


def _position(file: BinaryIO, offset: int) -> tuple[int, int]:
    """Line and column, in characters, of a byte of the file, both from 1."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
    line = column = 1
    file.seek(0)
    while offset > 0 and (chunk := file.read(min(_CHUNK, offset))):
        offset -= len(chunk)
        text = decoder.decode(chunk)
        line += text.count("\n")
        column = len(text) - text.rfind("\n") if "\n" in text else column + len(text)
    return line, column
