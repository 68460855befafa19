"""The text of a reply, as it is generated."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Set

from .detokenizer import IncrementalText, Piece, TokenLogprob
from .sequence import ConstraintError, FinishReason, PromptLogprob, SampledToken


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
        finish_reason: None while it runs, then "stop", "length", "cancelled" or "error".
        stop_reason: what the request gave to end the reply and has ended it: a string of `stop` or a token of
            `stop_token_ids`; None for the model's own ends.
        queue_seconds: time from the request until it was first in a step; None until the first token.
        first_token_seconds: time from the request to its first token; None before that.
        seconds: time from the request to the end of the reply; None before that.
        cached_tokens: tokens of the prompt that were in the cache, and not encoded again; 0 until the first token.
    """

    def __init__(self, prompt_tokens: int, text: IncrementalText, wakeups: Wakeups, stop_token_ids: Set[int]):
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self._stop_token_ids = stop_token_ids
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.queue_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.seconds: float | None = None
        self.cached_tokens = 0
        self._text = text
        self._prompt_logprobs: list[PromptLogprob] | None = None  # until they are sent
        self._started = time.perf_counter()
        self._items: deque[Piece | BaseException | None] = deque()  # None marks the end
        self._wakeups = wakeups
        self.arrived: threading.Event | asyncio.Event = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None  # of the reader
        self.on_cancel: Callable[[], None] = lambda: None  # set by the engine, like the following
        self.on_begin: Callable[[], tuple[int, float | None]] = lambda: (0, None)

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

    def on_prompt_logprobs(self, logprobs: list[PromptLogprob]) -> None:
        """Add the log-probabilities of the next tokens of the prompt. All come before the reply's first token."""
        if self._prompt_logprobs is None:
            self._prompt_logprobs = []
        self._prompt_logprobs += logprobs

    def on_token(self, token: SampledToken) -> bool:
        """Add a token; return whether the reply is complete."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self._started
            self.cached_tokens, admitted_at = self.on_begin()
            self.queue_seconds = None if admitted_at is None else admitted_at - self._started
            self._send_prompt_logprobs()
        self.completion_tokens += 1
        self._put(self._text.feed(token))
        return self._text.stopped

    def on_end(self, reason: FinishReason, error: Exception | None, end_token: SampledToken | None) -> None:
        """Send the rest of the text, or the error, to the reader."""
        self.seconds = time.perf_counter() - self._started
        self.finish_reason = reason.value
        if isinstance(error, ConstraintError):  # caused by the request, not by the model
            self._put(error)
            return
        if reason is FinishReason.ERROR:
            failure = EngineError(f"The model failed ({type(error).__name__}: {error}).")
            failure.__cause__ = error
            self._put(failure)
            return
        self.stop_reason = self._text.stop_string
        self._send_prompt_logprobs()
        piece = self._text.finish()
        if end_token is not None:
            is_own = end_token.token_id in self._stop_token_ids
            if is_own:
                self.stop_reason = end_token.token_id
            if end_token.logprob is not None and not (is_own and self._text.include_stop):
                piece = piece._replace(end=TokenLogprob(end_token.token_id, end_token.logprob, end_token.top or []))
        self._put(piece)
        self._put(None)

    def _send_prompt_logprobs(self) -> None:
        if self._prompt_logprobs is not None:
            self._put(Piece("", [], self._prompt_logprobs))
            self._prompt_logprobs = None

    def _put(self, item: Piece | BaseException | None) -> None:
        if isinstance(item, Piece) and item.is_empty:
            return
        self._items.append(item)
        self._wakeups.add(self)


def _wake(streams: list[TextStream]) -> None:
    for stream in streams:
        stream.arrived.set()
