"""Serves concurrent requests from one model: prompts in, streams of text out."""

import asyncio
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from ...model.modeling_qwen import QWenLMHeadModel
from ...model.tokenization_qwen import QWenTokenizer
from .detokenizer import IncrementalText, Piece
from .sampler import Constraint, ConstraintError, SampledToken, SamplingParams
from .scheduler import EndReason, GenerationSequence, Load, QueueFull, Scheduler, SchedulerClosed

# Like the published server, decode greedily below this temperature: some clients send 0.001 for 0.
GREEDY_BELOW = 0.01


class PromptTooLong(ValueError):
    """The prompt leaves no room for a reply."""


class EngineError(RuntimeError):
    """The model failed while generating a reply."""


class TextStream:
    """A reply that is being generated. Iterate over its pieces once, with `for` in a thread or with `async for`.

    Attributes:
        prompt_tokens: length of the prompt.
        completion_tokens: tokens of the reply so far, without the end token.
        finish_reason: None while it runs, then "stop", "length" or "cancelled".
        first_token_seconds: time from the request to its first token; None before that.
    """

    def __init__(self, prompt_tokens: int, text: IncrementalText):
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.finish_reason: str | None = None
        self.first_token_seconds: float | None = None
        self._text = text
        self._started = time.perf_counter()
        self._items: deque[Piece | BaseException | None] = deque()  # None marks the end
        self._wake: Callable[[], object] = lambda: None
        self.on_cancel: Callable[[], None] = lambda: None  # set by the engine

    def cancel(self) -> None:
        """End the reply before its next token. May be called from any thread, at any time."""
        self.on_cancel()

    def __iter__(self) -> Iterator[Piece]:
        arrived = threading.Event()
        self._wake = arrived.set
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
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
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

    # Called by the scheduler.

    def on_token(self, token: SampledToken) -> bool:
        """Add a token; return whether the reply is complete."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self._started
        self.completion_tokens += 1
        self._put(self._text.feed(token))
        return self._text.stopped

    def on_end(self, reason: EndReason, error: Exception | None) -> None:
        """Send the rest of the text, or the error, to the reader."""
        if isinstance(error, ConstraintError):  # caused by the request, not by the model
            self._put(error)
            return
        if reason is EndReason.ERROR:
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
        try:
            self._wake()
        except RuntimeError:  # the reader's event loop is closed
            self.cancel()


class Engine:
    """Serves many requests from one model.

    Args:
        model: model in eval mode, for the exclusive use of the engine.
        tokenizer: tokenizer of the model.
        max_batch_size: maximum number of concurrent requests.
        max_queue: maximum number of waiting requests.
        cache_tokens: size of the key/value cache in tokens; None to use the free memory.

    Attributes:
        context_length: maximum number of tokens of prompt and reply together.
    """

    def __init__(
        self,
        model: QWenLMHeadModel,
        tokenizer: QWenTokenizer,
        *,
        max_batch_size: int = 16,
        max_queue: int = 128,
        cache_tokens: int | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.scheduler = Scheduler(model, max_batch_size=max_batch_size, max_queue=max_queue, cache_tokens=cache_tokens)
        self.max_batch_size, self.max_queue = max_batch_size, max_queue
        limit = model.config.max_context_length
        self.context_length = min(limit, self.scheduler.cache_tokens)
        eos = model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        stop_words = getattr(model.generation_config, "stop_words_ids", None) or []
        ends = [words[0] for words in stop_words if len(words) == 1]
        self.end_token_ids = frozenset([*eos, *ends, tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id])
        self.stop = [tokenizer.decode(words) for words in stop_words if len(words) > 1]

    def params(self, **overrides: Any) -> SamplingParams:
        """Return the checkpoint's sampling settings with the given overrides.

        Args:
            overrides: fields of SamplingParams; None keeps the checkpoint's value.

        Raises:
            ValueError: a value out of range.
        """
        config = self.model.generation_config
        settings = {name: getattr(config, name, None) for name in ("top_k", "top_p", "repetition_penalty")}
        settings["temperature"] = config.temperature if config.do_sample else 0.0
        settings["max_tokens"] = config.max_new_tokens or self.context_length
        settings |= {name: value for name, value in overrides.items() if value is not None}
        params = SamplingParams(**{name: value for name, value in settings.items() if value is not None})
        return dataclasses.replace(params, temperature=0.0) if params.temperature < GREEDY_BELOW else params

    def start(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        stop: Sequence[str] = (),
        lstrip: bool = False,
        rstrip: bool = False,
        constraint: Constraint | None = None,
    ) -> TextStream:
        """Queue a prompt and return immediately. Iterate over the result for the text of the reply.

        Args:
            prompt_ids: token ids of the prompt.
            params: sampling settings; `max_tokens` is limited to the rest of the context.
            stop: the reply ends before the first occurrence of any of these strings.
            lstrip, rstrip: strip whitespace at the start or end of the reply.
            constraint: grammar that the reply must follow.

        Raises:
            PromptTooLong: the prompt alone fills the model's context.
            QueueFull: too many requests are waiting.
            SchedulerClosed: the engine is closed or has failed.
            ValueError: an empty prompt, or token ids out of range.
        """
        room = self.context_length - len(prompt_ids)
        if room < 1:
            raise PromptTooLong(
                f"The prompt is too long: it has {len(prompt_ids)} tokens, and prompt and reply together may have at "
                f"most {self.context_length}. Shorten the prompt."
            )
        known = range(self.model.config.vocab_size)
        for name, ids in (("The prompt", prompt_ids), ("logit_bias", params.logit_bias)):
            if any(token not in known for token in ids):
                raise ValueError(f"{name} has invalid token ids: valid ids are 0 to {known[-1]}.")
        text = IncrementalText(self.tokenizer, [*stop, *self.stop], lstrip, rstrip)
        stream = TextStream(len(prompt_ids), text)
        sequence = GenerationSequence(
            prompt_ids,
            dataclasses.replace(params, max_tokens=min(params.max_tokens, room)),
            self.end_token_ids,
            stream.on_token,
            stream.on_end,
            constraint,
        )
        stream.on_cancel = lambda: self.scheduler.cancel(sequence)
        self.scheduler.submit(sequence)
        return stream

    def load(self) -> Load:
        """Return the number of running and of waiting requests."""
        return self.scheduler.load()

    @property
    def failed(self) -> bool:
        """Whether the engine has stopped because of an error and rejects all requests."""
        return self.scheduler.failed

    def close(self, timeout: float | None = None) -> None:
        """Reject new requests, finish the others (for at most `timeout` seconds), and end the thread."""
        self.scheduler.close(timeout)


__all__ = ["Engine", "EngineError", "Load", "PromptTooLong", "QueueFull", "SchedulerClosed", "TextStream"]
