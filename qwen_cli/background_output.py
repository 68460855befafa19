"""Standard output and standard error of servers, which a thread writes.

Printing then neither fails nor waits, so that it decides neither whether a request is answered nor whether the server
ends: the reader of a pipe may have gone or have stopped reading, a disk may be full, a descriptor may be closed.
"""

import contextlib
import io
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

from .console import open_closed_streams

MAX_PENDING = 4096  # texts that wait to be written; what is printed beyond is lost
CLOSE_SECONDS = 1.0  # to write what is pending at the end


class BackgroundStream(io.TextIOBase):
    """A text stream that hands on what is written to it.

    Args:
        stream: the stream that it replaces, with a file descriptor.
        put: called with the descriptor and each text, encoded.
    """

    def __init__(self, stream: TextIO, put: Callable[[int, bytes], None]):
        self._stream, self._put, self._descriptor = stream, put, stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # an attribute of the base class
        return self._stream.encoding

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._put(self._descriptor, text.encode(self.encoding, "backslashreplace"))
        return len(text)


@contextlib.contextmanager
def output_in_background() -> Iterator[None]:
    """Replace standard output and standard error with streams that a thread writes; see the module.

    Streams without a descriptor, like those of notebooks and tests, stay as they are.
    """
    open_closed_streams()
    pending: queue.Queue[tuple[int, bytes] | None] = queue.Queue(MAX_PENDING)

    def put(descriptor: int, data: bytes) -> None:
        with contextlib.suppress(queue.Full):
            pending.put_nowait((descriptor, data))

    def write() -> None:
        while (item := pending.get()) is not None:
            descriptor, data = item
            with contextlib.suppress(OSError):  # there is nobody to tell
                while data:
                    data = data[os.write(descriptor, data) :]

    def replacement(stream: TextIO) -> TextIO:
        try:
            stream.flush()
            return BackgroundStream(stream, put)  # type: ignore[return-value]  # has the methods that print uses
        except (OSError, ValueError):  # io.UnsupportedOperation is both
            return stream

    before = sys.stdout, sys.stderr
    thread = threading.Thread(target=write, name="output", daemon=True)  # it may hang in a write
    thread.start()
    sys.stdout, sys.stderr = map(replacement, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        with contextlib.suppress(queue.Full):
            pending.put_nowait(None)
        thread.join(CLOSE_SECONDS)
