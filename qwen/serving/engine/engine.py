"""Serves concurrent requests from one model: prompts in, streams of text out.

One thread owns the model and repeats a step: drop what was cancelled, choose the tokens to compute, launch, and hand on
the tokens of the step before. Each sequence has its own sampling settings, random numbers, α of dynamic NTK and
grammar, so that its reply does not depend on the others: exactly in float32 on the CPU. In 16 bits and on GPUs, kernels
are chosen by batch size and round differently, which can change a token where two are almost equally likely.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Hashable
from collections.abc import Sequence as Ids
from itertools import chain
from typing import Any, NamedTuple

import psutil
import torch

from ...kernels.fused_block import prepare
from ...model.modeling_qwen import QWenLMHeadModel
from ...model.tokenization_qwen import QWenTokenizer
from .block_manager import BLOCK_SIZE, BlockManager
from .detokenizer import IncrementalText
from .model_runner import ModelRunner, PendingStep, ScoredTokens, alpha_index
from .paged_kv_cache import bytes_per_token
from .sampling_params import SamplingParams
from .scheduler import Chunk, Scheduler
from .sequence import Constraint, ConstraintError, FinishReason, SampledToken, Sequence
from .stream import TextStream, Wakeups

logger = logging.getLogger(__name__)

# Like the published server, decode greedily below this temperature: some clients send 0.001 for 0.
GREEDY_BELOW = 0.01
PREFILL_TOKENS = 2048  # per step, while nothing else runs
# Minimum number of parameters to use several CPU cores. In smaller models they would mostly wait for each other.
SHARED_FROM = 50_000_000
TOKENS_PER_REQUEST = 512  # of the cache at most, for each of max_batch_size, unless two contexts are more
# Of the memory that is free after loading the model. On a CPU others need it, too.
MEMORY_SHARE = {"cuda": 0.9, "cpu": 0.5}


class PromptTooLong(ValueError):
    """The prompt leaves no room for a reply.

    Args:
        tokens: how many it has, at least.
    """

    def __init__(self, message: str, tokens: int):
        super().__init__(message)
        self.tokens = tokens


class QueueFull(Exception):
    """The queue of waiting sequences is full."""


class EngineClosed(Exception):
    """The engine accepts no more requests."""


class Load(NamedTuple):
    """Numbers of running and of waiting sequences."""

    running: int
    queued: int


class Engine:
    """Serves many requests from one model.

    Args:
        model: model in eval mode, for the exclusive use of the engine.
        tokenizer: tokenizer of the model.
        max_batch_size: maximum number of concurrent requests.
        max_queue: maximum number of waiting requests.
        cache_tokens: size of the key/value cache in tokens; None to use the free memory.
        prefix_reuse: do not encode the beginning of a prompt again that is still in the cache.

    Attributes:
        context_length: maximum number of tokens of prompt and reply together.
    """

    def __init__(
        self,
        model: QWenLMHeadModel,
        tokenizer: QWenTokenizer,
        *,
        max_batch_size: int = 256,
        max_queue: int = 128,
        cache_tokens: int | None = None,
        prefix_reuse: bool = True,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.max_queue = max_batch_size, max_queue
        config = model.config
        prepare(model, devices=("cpu", "cuda"), owned=True)
        if cache_tokens is None:
            # No more than replies can use: what prefixes would fill beyond that, others may need.
            most = max(2 * config.max_context_length, TOKENS_PER_REQUEST * max_batch_size)
            cache_tokens = min(affordable_tokens(model), most)
        blocks = BlockManager(max(1, cache_tokens // BLOCK_SIZE), BLOCK_SIZE, prefix_reuse)
        self.context_length = min(config.max_context_length, blocks.num_blocks * BLOCK_SIZE)
        is_small = self.context_length < config.max_context_length
        self._limit_reason = ", since the key/value cache has room for no more" if is_small else ""
        self.scheduler = Scheduler(
            blocks,
            max_num_seqs=max_batch_size,
            max_num_batched_tokens=PREFILL_TOKENS,
        )
        with torch.inference_mode():  # like the steps, which write to its tensors
            self.runner = ModelRunner(model, blocks, max_batch_size, self.context_length)
        eos = model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        stop_words = getattr(model.generation_config, "stop_words_ids", None) or []
        ends = [words[0] for words in stop_words if len(words) == 1]
        self.end_token_ids = frozenset([*eos, *ends, tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id])
        self.stop = [tokenizer.decode(words) for words in stop_words if len(words) > 1]
        self.params()  # so that a wrong setting of the checkpoint is an error here, not one of each request

        self._changed = threading.Condition()  # guards what follows
        self._arrived: deque[Sequence] = deque()
        self._unfinished = 0
        self._closing = self._cancelling = self._failed = False
        self._wakeups = Wakeups()  # this and the following are the thread's own
        self._in_flight: deque[PendingStep] = deque()
        self._last_ready = 0.0
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def params(self, **overrides: Any) -> SamplingParams:
        """Return the checkpoint's sampling settings with the given overrides.

        Args:
            overrides: fields of SamplingParams; None keeps the checkpoint's value.

        Raises:
            ValueError: a value out of range.
        """
        config = self.model.generation_config
        settings = {name: getattr(config, name, None) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
        settings["temperature"] = config.temperature if config.do_sample else 0.0
        settings["max_tokens"] = max(config.max_new_tokens or self.context_length, overrides.get("min_tokens") or 0)
        settings |= {name: value for name, value in overrides.items() if value is not None}
        params = SamplingParams(**{name: value for name, value in settings.items() if value is not None})
        return dataclasses.replace(params, temperature=0.0) if params.temperature < GREEDY_BELOW else params

    def start(
        self,
        prompt_ids: Ids[int],
        params: SamplingParams,
        *,
        stop: Ids[str] = (),
        lstrip: bool = False,
        rstrip: bool = False,
        end_strings: Ids[str] = (),
        constraint: Constraint | None = None,
        group: Hashable | None = None,
        cache_salt: str | None = None,
        request_id: str | None = None,
    ) -> TextStream:
        """Queue a prompt and return immediately. Iterate over the result for the text of the reply.

        Args:
            prompt_ids: token ids of the prompt.
            params: sampling settings; `max_tokens` is limited to the rest of the context.
            stop: the reply ends before the first occurrence of any of these strings.
            lstrip, rstrip: strip whitespace at the start or end of the reply.
            end_strings: like `stop`, but never included or reported, since they belong to the format of the prompt.
            constraint: grammar that the reply must follow.
            group: prompts of one request have the same group, and take turns with others as one.
            cache_salt: prompts share the cache only with those of the same salt.
            request_id: what the log calls the request if it fails.

        Raises:
            PromptTooLong: the prompt alone fills the model's context, or the cache.
            QueueFull: too many requests are waiting.
            EngineClosed: the engine is closed or has failed.
            ValueError: an empty prompt, token ids out of range, or `ignore_eos` with a constraint.
        """
        if not prompt_ids:
            raise ValueError("The prompt is empty. Give at least one token.")
        room = self.context_length - len(prompt_ids)
        if room < min(1, params.max_tokens):
            raise self.prompt_too_long(len(prompt_ids))
        given: dict[str, Collection[int]] = {
            "The prompt": prompt_ids,
            "logit_bias": params.logit_bias,
            "stop_token_ids": params.stop_token_ids,
            "bad_words": list(chain.from_iterable(params.bad_words)),
            "allowed_token_ids": params.allowed_token_ids or (),
        }
        last = self.model.config.vocab_size - 1
        for name, ids in given.items():
            # An id out of range would fail in the middle of a step.
            if ids and not (min(ids) >= 0 and max(ids) <= last):
                raise ValueError(f"{name} has invalid token ids: valid ids are 0 to {last}.")
        if params.ignore_eos and constraint is not None:
            raise ValueError("ignore_eos cannot be combined with a grammar, which decides where the reply ends.")
        config = self.model.config
        text = IncrementalText(
            self.tokenizer,
            stop,
            lstrip,
            rstrip,
            include_stop=params.include_stop,
            end_strings=[*end_strings, *([] if params.ignore_eos else self.stop)],
            min_tokens=params.min_tokens,
            skipped_ids=self.end_token_ids if params.skip_special_tokens else frozenset(),
            keep_ids=params.return_token_ids,
        )
        end_token_ids = frozenset() if params.ignore_eos else self.end_token_ids
        params = dataclasses.replace(
            params,
            max_tokens=min(params.max_tokens, room),
            min_tokens=min(params.min_tokens, room),
            stop_token_ids=params.stop_token_ids - end_token_ids,
        )
        stream = TextStream(len(prompt_ids), text, self._wakeups, params.stop_token_ids)
        sequence = Sequence(
            prompt_ids,
            params,
            end_token_ids,
            stream.on_token,
            stream.on_end,
            constraint,
            group,
            alpha_index(len(prompt_ids), config.seq_length) if config.use_dynamic_ntk else 0,
            (*_active_adapters(self.model), f"salt {cache_salt!r}"),
            stream.on_prompt_logprobs,
            request_id,
        )
        if params.prompt_logprobs is not None:
            stream.on_prompt_logprobs([])  # a prompt of one token has none
        stream.on_cancel = lambda: self._cancel(sequence)
        stream.on_begin = lambda: (sequence.cached_tokens, sequence.admitted_at)
        with self._changed:
            if self._closing:
                raise EngineClosed("The engine accepts no more requests.")
            if self._unfinished >= self.max_batch_size + self.max_queue:
                raise QueueFull(f"The queue is full: {self.load().queued} requests are waiting.")
            self._unfinished += 1
            self._arrived.append(sequence)
            self._changed.notify()
        return stream

    def prompt_too_long(self, tokens: int, about: str = "") -> PromptTooLong:
        """Return the error of a prompt that has so many tokens, or `about` so many."""
        return PromptTooLong(
            # Clients look for these words: "prompt is too long", "This model's maximum context length is".
            f"The prompt is too long: it has {about}{tokens} tokens. This model's maximum context length is "
            f"{self.context_length} tokens of prompt and reply together{self._limit_reason}. Shorten the prompt.",
            tokens,
        )

    def load(self) -> Load:
        """Return the numbers of running and of waiting sequences."""
        running = len(self.scheduler.running)
        return Load(running, max(0, self._unfinished - running))

    @property
    def failed(self) -> bool:
        """Whether the engine has stopped because of an error and rejects all requests."""
        return self._failed

    def close(self, timeout: float | None = None) -> None:
        """Reject new requests, finish the others (for at most `timeout` seconds), and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.thread.join(timeout)
        self._cancelling = True
        self.thread.join()

    def _cancel(self, sequence: Sequence) -> None:
        with self._changed:
            sequence.cancelled = True
            self._changed.notify()

    # The following methods run in the engine's thread.

    @torch.inference_mode()
    def _run(self) -> None:
        if self.model.device.type == "cpu" and self.model.num_parameters() < SHARED_FROM:
            torch.set_num_threads(1)
        error: Exception | None = None
        try:
            self.runner.warm_up()
            while self._wait_for_work():
                self._step()
        except Exception as unexpected:  # callers must not wait for a thread that has ended
            logger.exception("The engine stopped")
            error = unexpected
        with self._changed:
            self._closing, self._failed = True, error is not None
        for sequence in [*self.scheduler.sequences(), *self._arrived]:
            self._end(sequence, FinishReason.ERROR, error)
        self._wakeups.flush()

    def _wait_for_work(self) -> bool:
        """Block until there is work; return False if there is none left and the engine is closing."""
        with self._changed:
            while not (self._unfinished or self._closing):
                self._changed.wait()
            while self._arrived:
                self.scheduler.add(self._arrived.popleft())
            return self._unfinished > 0

    def _step(self) -> None:
        for sequence in self.scheduler.sequences():
            if sequence.cancelled or self._cancelling:
                self._end(sequence, FinishReason.CANCELLED)
        if any(sequence.needs_last_token for sequence in self.scheduler.running):
            self._finish_steps()
        chunks = self.scheduler.schedule()
        if chunks:
            started = time.perf_counter()
            self._launch(chunks)
            if not self._in_flight or len(self._in_flight) == 1:
                self._last_ready = started
        self._finish_steps(keep=1 if chunks and self.runner.is_asynchronous else 0)
        self._wakeups.flush()

    def _finish_steps(self, keep: int = 0) -> None:
        """Wait for the steps that were launched, but the last `keep`, and hand on their tokens."""
        while len(self._in_flight) > keep:
            step = self._in_flight.popleft()
            tokens = step.wait()
            self._observe(step.chunks)
            for scored in step.scored:
                if not scored.sequence.ended:
                    self._hand_on_scores(scored)
            for sequence, token in zip(step.sequences, tokens, strict=True):
                sequence.num_pending -= 1
                if not sequence.ended:
                    self._hand_on(sequence, token)

    def _observe(self, chunks: list[Chunk]) -> None:
        now = time.perf_counter()
        prompts = [chunk for chunk in chunks if not chunk.is_single]
        prefilled = sum(chunk.end - chunk.start for chunk in prompts)
        requests = len({chunk.sequence.group for chunk in prompts})
        self.scheduler.budget.observe(now - self._last_ready, len(chunks) - len(prompts), prefilled, requests)
        self._last_ready = now

    def _launch(self, chunks: list[Chunk]) -> None:
        """Start a step. If it fails, start one for each of its sequences, and end those that fail alone: what one of
        them brings, such as its settings or the memory for its prompt, must not end the others."""
        try:
            self._in_flight.append(self.runner.launch(chunks))
            return
        except Exception as error:
            if len(chunks) == 1:
                self.scheduler.roll_back(self.scheduler.written_blocks(chunks[0]))
                self._end(chunks[0].sequence, FinishReason.ERROR, error)
                return
            reason = f"{type(error).__name__}: {error}"
        # Not in the except clause, where the traceback still holds the memory of the step.
        logger.warning("A step of %d sequences failed (%s); each is computed alone.", len(chunks), reason)
        written = [self.scheduler.written_blocks(chunk) for chunk in chunks]
        self._finish_steps()
        for chunk, blocks in zip(chunks, written, strict=True):
            if chunk.sequence.ended or chunk.sequence.num_computed != chunk.end:  # with the last token, or rolled back
                self.scheduler.roll_back(blocks)
            else:
                self.runner.drop(chunk.sequence)  # the sampler may have counted a token already
                self._launch([chunk])

    def _hand_on_scores(self, scored: ScoredTokens) -> None:
        """Pass the log-probabilities of a prompt to its sequence."""
        try:
            scored.sequence.on_prompt_logprobs(scored.logprobs())
        except Exception as error:
            self._discard(scored.sequence, error)

    def _hand_on(self, sequence: Sequence, token: SampledToken | Exception) -> None:
        """Pass a token to its sequence, which may end with it."""
        if isinstance(token, Exception):
            self._discard(sequence, token)
            return
        try:
            if sequence.constraint is not None:
                sequence.constraint.accept(token.token_id)
            if not sequence.params.max_tokens:  # see `Sequence.num_uncomputed`
                self._end(sequence, FinishReason.LENGTH)
                return
            if token.token_id in sequence.end_token_ids:
                self._end_at(sequence, token)
                return
            sequence.token_ids.append(token.token_id)
            enough = sequence.on_token(token)
        except Exception as error:  # raised by the callback or the grammar of one request
            self._end(sequence, FinishReason.ERROR, error)
            return
        if enough:
            self._end(sequence, FinishReason.STOP)
        elif len(sequence.token_ids) - sequence.num_prompt_tokens >= sequence.params.max_tokens:
            self._end(sequence, FinishReason.LENGTH)

    def _discard(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence whose keys and values may be NaN, which must not reach those who would share its blocks, or
        take them next."""
        manager, blocks = self.scheduler.block_manager, sequence.blocks
        manager.forget(blocks)
        self._end(sequence, FinishReason.ERROR, error)
        self.runner.cache.zero([block for block in blocks if manager.is_free(block)])

    def _end_at(self, sequence: Sequence, token: SampledToken) -> None:
        """End a sequence at an end token, which is part of the reply if it is the request's own and included."""
        if sequence.params.include_stop and token.token_id in sequence.params.stop_token_ids:
            sequence.token_ids.append(token.token_id)
            sequence.on_token(token)
        self._end(sequence, FinishReason.STOP, end_token=token)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: Exception | None = None,
        end_token: SampledToken | None = None,
    ) -> None:
        if sequence.ended:
            return
        sequence.ended = True
        if sequence.slot >= 0:
            self.scheduler.name_blocks(sequence)
        self.scheduler.remove(sequence)
        self.runner.drop(sequence)
        with self._changed:
            self._unfinished -= 1
        try:
            sequence.on_end(reason, error, end_token)
        except Exception as unexpected:
            error = unexpected
            with contextlib.suppress(Exception):  # the reader must not wait for ever
                sequence.on_end(FinishReason.ERROR, error, None)
        if error is not None:
            name = "A reply" if sequence.request_id is None else f"Request {sequence.request_id}"
            by_client = isinstance(error, ConstraintError)  # which may have written a part of the message
            logger.log(
                logging.WARNING if by_client else logging.ERROR,
                "%s failed: %s: %r",
                name,
                type(error).__name__,
                str(error),
                exc_info=None if by_client or self._failed else error,  # that of the engine is there already
            )


def affordable_tokens(model: QWenLMHeadModel) -> int:
    """Return the number of tokens of the key/value cache that fit into the free memory."""
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if gpus:
        # Layers are distributed evenly, so the device with the least free memory limits all.
        free = len(gpus) * min(torch.cuda.mem_get_info(device)[0] for device in gpus)
    else:
        free = psutil.virtual_memory().available
    return int(MEMORY_SHARE["cuda" if gpus else "cpu"] * free / bytes_per_token(model))


def _active_adapters(model: QWenLMHeadModel) -> list[str]:
    try:
        return model.active_adapters()
    except (ValueError, ImportError):  # none are loaded
        return []
