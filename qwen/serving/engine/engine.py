"""A model, its tokenizer and a scheduler: prompts in, growing texts out.

The way in for everything that serves several people from one model. Knows token ids and text; it knows nothing of
messages, tools or HTTP.
"""

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

# Below this the published server decodes greedily; clients send 0.001 or so where they mean 0.
GREEDY_BELOW = 0.01


class PromptTooLong(ValueError):
    """A prompt that leaves no room for a reply."""


class EngineError(RuntimeError):
    """The model failed while it wrote a reply."""


class TextStream:
    """A reply while it is being written: iterate over its pieces once, with `for` from a thread or `async for`.

    Attributes:
        prompt_tokens: length of the prompt.
        completion_tokens: tokens of the reply so far, without the one that ends it.
        finish_reason: None while it runs, then "stop", "length" or "cancelled".
        first_token_seconds: from the request to its first token, None before.
    """

    def __init__(self, prompt_tokens: int, text: IncrementalText):
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.finish_reason: str | None = None
        self.first_token_seconds: float | None = None
        self._text = text
        self._started = time.perf_counter()
        self._items: deque[Piece | BaseException | None] = deque()  # None is the end
        self._wake: Callable[[], Any] = lambda: None
        self.on_cancel: Callable[[], None] = lambda: None  # set by the engine

    def cancel(self) -> None:
        """End the reply before its next token. Callable from any thread, at any time."""
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
            self.cancel()  # a reader that leaves early needs no more

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
        """Take a token in; True where the reply is complete."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self._started
        self.completion_tokens += 1
        self._put(self._text.feed(token))
        return self._text.stopped

    def on_end(self, reason: EndReason, error: Exception | None) -> None:
        """Hand the reader the rest of the text, or the error."""
        if isinstance(error, ConstraintError):  # of the request, not of the model
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
        except RuntimeError:  # the event loop of the reader is closed
            self.cancel()


class Engine:
    """Serves many requests from one model.

    Args:
        model: in eval mode; nobody else may use it from now on.
        tokenizer: its tokenizer.
        max_batch_size: requests that are answered at once.
        max_queue: requests that may wait beside them.
        cache_tokens: tokens of key/value cache; from the free memory if None.

    Attributes:
        context_length: tokens that prompt and reply may have together.
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
        """Sampling settings as the checkpoint's generation config has them, and what is given here in their place.

        Args:
            overrides: fields of SamplingParams; None leaves a field as the checkpoint has it.

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
        """Have a prompt continued. Returns at once; iterate over the result for the text.

        Args:
            prompt_ids: the prompt.
            params: sampling settings; `max_tokens` is cut to what the model has room for.
            stop: the reply ends in front of the first of these strings.
            lstrip, rstrip: leave out white space at the beginning, at the end of the reply.
            constraint: what the reply may consist of.

        Raises:
            PromptTooLong: the prompt alone fills the model's context.
            QueueFull: too many requests wait already.
            SchedulerClosed: after `close`.
            ValueError: an empty prompt, token ids that the model does not have.
        """
        room = self.context_length - len(prompt_ids)
        if room < 1:
            raise PromptTooLong(
                f"The prompt has {len(prompt_ids)} tokens, and prompt and reply together may have "
                f"{self.context_length}: shorten it."
            )
        known = range(self.model.config.vocab_size)
        for name, ids in (("The prompt", prompt_ids), ("logit_bias", params.logit_bias)):
            if any(token not in known for token in ids):
                raise ValueError(f"{name} holds token ids that the model does not have: they go from 0 to {known[-1]}.")
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
        """How many requests are being answered, and how many wait."""
        return self.scheduler.load()

    @property
    def failed(self) -> bool:
        """Whether it has stopped because of an error, and answers nothing any more."""
        return self.scheduler.failed

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, finish those there are (for at most `timeout` seconds), and end the thread."""
        self.scheduler.close(timeout)


__all__ = ["Engine", "EngineError", "Load", "PromptTooLong", "QueueFull", "SchedulerClosed", "TextStream"]
