"""The text of a reply, as it is generated."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from .detokenizer import IncrementalText, Piece
from .sequence import ConstraintError, FinishReason, SampledToken


class EngineError(RuntimeError):
    """The model failed while generating a reply."""


class Wakeups:
    """Wakes the readers of the streams that got something in a step. Those of one event loop are woken at once, since
    each call into another thread's loop costs the engine as much as several operations of the model."""

    def __init__(self) -> None:
        self._streams: list[TextStream] = []

    def add(self, stream: "TextStream") -> None:
        """Have the reader of a stream woken at the end of the step."""
        self._streams.append(stream)

    def flush(self) -> None:
        """Wake the readers."""
        by_loop: dict[asyncio.AbstractEventLoop, list[TextStream]] = {}
        for stream in dict.fromkeys(self._streams):
            if stream.loop is None:
                stream.arrived.set()
            else:
                by_loop.setdefault(stream.loop, []).append(stream)
        self._streams.clear()
        for loop, streams in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake, streams)
            except RuntimeError:  # the loop is closed
                for stream in streams:
                    stream.cancel()


class TextStream:
    """A reply that is being generated. Iterate over its pieces once, with `for` in a thread or with `async for`.

    Attributes:
        prompt_tokens: length of the prompt.
        completion_tokens: tokens of the reply so far, without the end token.
        finish_reason: None while it runs, then "stop", "length" or "cancelled".
        first_token_seconds: time from the request to its first token; None before that.
        cached_tokens: tokens of the prompt that were in the cache, and not encoded again; 0 until the first token.
    """

    def __init__(self, prompt_tokens: int, text: IncrementalText, wakeups: Wakeups):
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.finish_reason: str | None = None
        self.first_token_seconds: float | None = None
        self.cached_tokens = 0
        self._text = text
        self._started = time.perf_counter()
        self._items: deque[Piece | BaseException | None] = deque()  # None marks the end
        self._wakeups = wakeups
        self.arrived: threading.Event | asyncio.Event = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None  # of the reader
        self.on_cancel: Callable[[], None] = lambda: None  # set by the engine, like the following
        self.on_begin: Callable[[], int] = lambda: 0

    def cancel(self) -> None:
        """End the reply before its next token. May be called from any thread, at any time."""
        self.on_cancel()

    def __iter__(self) -> Iterator[Piece]:
        arrived = threading.Event()
        self.arrived = arrived
        try:
            while True:
                while self._items:
                    if (piece := self._next()) is None:
                        return
                    yield piece
                arrived.wait()
                arrived.clear()
        finally:
            self.cancel()  # the reader may have stopped early

    async def __aiter__(self) -> AsyncIterator[Piece]:
        arrived = asyncio.Event()
        self.arrived, self.loop = arrived, asyncio.get_running_loop()
        try:
            while True:
                while self._items:
                    if (piece := self._next()) is None:
                        return
                    yield piece
                await arrived.wait()
                arrived.clear()
        finally:
            self.cancel()

    def _next(self) -> Piece | None:
        item = self._items.popleft()
        if isinstance(item, BaseException):
            raise item
        return item

    # Called by the engine.

    def on_token(self, token: SampledToken) -> bool:
        """Add a token; return whether the reply is complete."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self._started
            self.cached_tokens = self.on_begin()
        self.completion_tokens += 1
        self._put(self._text.feed(token))
        return self._text.stopped

    def on_end(self, reason: FinishReason, error: Exception | None) -> None:
        """Send the rest of the text, or the error, to the reader."""
        if isinstance(error, ConstraintError):  # caused by the request, not by the model
            self._put(error)
            return
        if reason is FinishReason.ERROR:
            failure = EngineError(f"The model failed ({type(error).__name__}: {error}).")
            failure.__cause__ = error
            self._put(failure)
            return
        self.finish_reason = reason.value
        self._put(self._text.finish())
        self._put(None)

    def _put(self, item: Piece | BaseException | None) -> None:
        if isinstance(item, Piece) and not item.text and not item.tokens:
            return
        self._items.append(item)
        self._wakeups.add(self)


def _wake(streams: list[TextStream]) -> None:
    for stream in streams:
        stream.arrived.set()
