"""Continuous batching: sequences of token ids in, tokens out.

One thread owns the model and repeats a step (Yu et al. 2022, Orca, section 3.2): admit waiting sequences, prefill a
chunk of their prompts, decode one token of every running sequence. Sequences are added and removed between steps. Each
has its own sampling settings, random numbers and NTK base, so that its output does not depend on the others: exactly in
float32 on the CPU. In 16 bits and on GPUs, kernels are chosen by batch size and round differently, which can change a
token where two are almost equally likely.

Memory: a sequence is admitted only if there is room for its maximum length, so that running sequences are never
evicted. Rows of a similar maximum length share a cache, so that a long sequence does not pad short ones.
"""

import enum
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import psutil
import torch
from transformers import DynamicCache

from ...model.kv_cache_qwen import prompt_state
from ...model.modeling_qwen import QWenLMHeadModel
from .batched_kv_cache import RaggedCache
from .sampler import Constraint, SampledToken, SamplingParams, SamplingState, sample

logger = logging.getLogger(__name__)

SHORTEST_REACH = 512  # tokens; row lengths of the caches are this times powers of 4
PREFILL_TOKENS = 1024  # per step: longer prompts are prefilled in chunks, short ones share a forward
# Minimum number of parameters to use several CPU cores. In smaller models they would mostly wait for each other.
SHARED_FROM = 50_000_000
MEMORY_SHARE = 0.9  # of the memory that is free after loading the model


class QueueFull(Exception):
    """The queue of waiting sequences is full."""


class SchedulerClosed(Exception):
    """The scheduler accepts no more sequences."""


class EndReason(enum.Enum):
    """Why a sequence has ended."""

    STOP = "stop"  # an end token, or `on_token` returned True
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Load(NamedTuple):
    """Numbers of running and of waiting sequences."""

    running: int
    queued: int


@dataclass(eq=False)
class GenerationSequence:
    """A prompt to continue, with callbacks for the result.

    Args:
        prompt_ids: the prompt, at least one token.
        params: sampling settings.
        end_token_ids: tokens that end the sequence; not passed to `on_token`.
        on_token: called with each token, in the scheduler's thread; True ends the sequence.
        on_end: called once, in the scheduler's thread, with the reason and the error, if any.
        constraint: grammar that the reply must follow.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    end_token_ids: frozenset[int]
    on_token: Callable[[SampledToken], bool]
    on_end: Callable[[EndReason, Exception | None], None]
    constraint: Constraint | None = None
    state: SamplingState = field(init=False)  # set at its first token
    last_token: int = field(default=-1, init=False)
    generated: int = field(default=0, init=False)
    cancelled: bool = field(default=False, init=False)
    ended: bool = field(default=False, init=False)

    @property
    def reach(self) -> int:
        """Maximum number of tokens of prompt and reply."""
        return len(self.prompt_ids) + self.params.max_tokens


class Batch:
    """Sequences of a similar maximum length, and their cache with a row for each."""

    def __init__(self, cache: RaggedCache):
        self.cache = cache
        self.sequences: list[GenerationSequence] = []

    def join(self, sequence: GenerationSequence, prompts: DynamicCache, row: int) -> None:
        """Add a sequence whose prompt is row `row` of `prompts`."""
        self.cache.join(prompts, row, len(sequence.prompt_ids))
        self.sequences.append(sequence)

    def leave(self, row: int) -> None:
        """Remove a sequence; the last one takes its place."""
        self.cache.leave(row)
        last = self.sequences.pop()
        if row < len(self.sequences):
            self.sequences[row] = last


@dataclass
class Prefill:
    """Prompts that are prefilled together: several in one forward, or one in chunks."""

    sequences: list[GenerationSequence]
    cache: DynamicCache
    encoded: int = 0


Group = TypeVar("Group", Prefill, Batch)


class Scheduler:
    """Continues many sequences concurrently.

    Args:
        model: model in eval mode, for the exclusive use of the scheduler's thread.
        max_batch_size: maximum number of running sequences.
        max_queue: maximum number of waiting sequences.
        cache_tokens: maximum number of tokens in all caches together; None to use the free memory.
    """

    def __init__(
        self, model: QWenLMHeadModel, *, max_batch_size: int = 16, max_queue: int = 128, cache_tokens: int | None = None
    ):
        self.model, self.config, self.device = model, model.config, model.device
        self.max_batch_size, self.max_queue = max_batch_size, max_queue
        self.cache_tokens = cache_tokens or _affordable_tokens(model)
        self.batches: dict[int, Batch] = {}  # by the row length of the cache
        self.prefills: list[Prefill] = []  # at most two: a long prompt, and short ones that overtake it
        self.waiting: deque[GenerationSequence] = deque()
        self.changed = threading.Condition()  # guards `waiting` and the flags
        self.closing = self.cancelling = self.failed = False
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.thread.start()

    def submit(self, sequence: GenerationSequence) -> None:
        """Queue a sequence and return immediately.

        Raises:
            QueueFull: too many sequences are waiting.
            SchedulerClosed: after `close`, or after an error that ended the thread.
            ValueError: an empty prompt, or more tokens than the caches can hold.
        """
        if not sequence.prompt_ids:
            raise ValueError("The prompt is empty. Give at least one token.")
        if self._capacity(sequence.reach) > self.cache_tokens:
            raise ValueError(
                f"Prompt and reply may have {sequence.reach} tokens, but the cache holds {self.cache_tokens}. Shorten "
                "the prompt, or ask for fewer tokens."
            )
        with self.changed:
            if self.closing:
                raise SchedulerClosed("The scheduler accepts no more requests.")
            if sum(self.load()) >= self.max_batch_size + self.max_queue:
                raise QueueFull(f"The queue is full: {len(self.waiting)} requests are waiting.")
            self.waiting.append(sequence)
            self.changed.notify()

    def cancel(self, sequence: GenerationSequence) -> None:
        """End a sequence before its next token. Does nothing if it has ended already."""
        with self.changed:
            sequence.cancelled = True
            self.changed.notify()

    def load(self) -> Load:
        """Return the numbers of running and of waiting sequences."""
        groups: list[Prefill | Batch] = [*self.prefills, *list(self.batches.values())]
        return Load(sum(len(group.sequences) for group in groups), len(self.waiting))

    def close(self, timeout: float | None = None) -> None:
        """Reject new sequences, finish the others, and end the thread.

        Args:
            timeout: seconds after which unfinished sequences are cancelled; None to wait for them.
        """
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(timeout)
        self.cancelling = True
        self.thread.join()

    # The following methods run in the scheduler's thread.

    @torch.inference_mode()
    def _run(self) -> None:
        if self.device.type == "cpu" and self.model.num_parameters() < SHARED_FROM:
            torch.set_num_threads(1)
        error: Exception | None = None
        try:
            while self._wait_for_work():
                self._step()
        except Exception as unexpected:  # callers must not wait for a thread that has ended
            logger.exception("The scheduler stopped")
            error = unexpected
        with self.changed:
            self.closing, self.failed = True, error is not None
        for prefill in self.prefills:
            self._fail(prefill.sequences, error)
        for batch in self.batches.values():
            self._fail(batch.sequences, error)
        self._fail(self.waiting, error)

    def _wait_for_work(self) -> bool:
        """Block until there is work; return False if there is none left and the scheduler is closing."""
        with self.changed:
            while not (self.waiting or self.prefills or self.batches or self.closing):
                self.changed.wait()
            return bool(self.waiting or self.prefills or self.batches)

    def _step(self) -> None:
        self._drop_cancelled()
        if len(self.prefills) < 2:
            self._admit()
        for prefill in self.prefills:
            self._guarded(self._encode, prefill)
        for batch in list(self.batches.values()):
            if batch.sequences:  # empty if all were cancelled
                self._guarded(self._decode, batch)
        self.prefills = [prefill for prefill in self.prefills if prefill.sequences]
        self.batches = {reach: batch for reach, batch in self.batches.items() if batch.sequences}

    def _guarded(self, work: Callable[[Group], None], group: Group) -> None:
        """Run a step of a group. An error ends its sequences only."""
        try:
            work(group)
        except Exception as error:
            logger.exception("%d sequences failed", len(group.sequences))
            failed, group.sequences = group.sequences, []
            self._fail(failed, error)

    def _fail(self, sequences: Sequence[GenerationSequence], error: Exception | None) -> None:
        for sequence in sequences:
            self._end(sequence, EndReason.ERROR, error)

    def _drop_cancelled(self) -> None:
        def gone(sequence: GenerationSequence) -> bool:
            return sequence.cancelled or self.cancelling

        with self.changed:
            dropped = [sequence for sequence in self.waiting if gone(sequence)]
            for sequence in dropped:
                self.waiting.remove(sequence)
        for prefill in self.prefills:
            if all(map(gone, prefill.sequences)):
                dropped += prefill.sequences
                prefill.sequences = []
        self.prefills = [prefill for prefill in self.prefills if prefill.sequences]
        for batch in self.batches.values():
            for row in reversed(range(len(batch.sequences))):
                if gone(batch.sequences[row]):
                    dropped.append(batch.sequences[row])
                    batch.leave(row)
        for sequence in dropped:
            self._end(sequence, EndReason.CANCELLED)

    def _admit(self) -> None:
        """Admit waiting sequences in order, as far as rows and memory allow."""
        admitted: list[GenerationSequence] = []
        with self.changed:
            while self.waiting and self._fits(self.waiting[0], admitted):
                admitted.append(self.waiting.popleft())
            if not admitted:
                return
            prefill = Prefill(admitted, DynamicCache(config=self.config))
            self.prefills.append(prefill)
        # NTK needs the whole length, even if the first forward has only a chunk of the prompt.
        lengths = [len(sequence.prompt_ids) for sequence in admitted]
        prompt_state(prefill.cache).prompt_lens = torch.tensor(lengths, device=self.device)

    def _fits(self, sequence: GenerationSequence, admitted: list[GenerationSequence]) -> bool:
        """Return whether a sequence can be admitted in addition to `admitted`."""
        encoding = [other for prefill in self.prefills for other in prefill.sequences]
        running = [other for batch in self.batches.values() for other in batch.sequences]
        together = [*running, *encoding, *admitted, sequence]
        if len(together) > self.max_batch_size:
            return False
        width = max(len(other.prompt_ids) for other in [*admitted, sequence]) * (len(admitted) + 1)
        if width > PREFILL_TOKENS and (admitted or encoding):  # a long prompt is prefilled alone
            return False
        rows: dict[int, int] = {}
        for other in together:
            reach = self._capacity(other.reach)
            rows[reach] = rows.get(reach, 0) + 1
        return sum(RaggedCache.room_for(count) * reach for reach, count in rows.items()) <= self.cache_tokens

    def _capacity(self, reach: int) -> int:
        """Return the row length for a sequence of up to `reach` tokens."""
        capacity = SHORTEST_REACH
        while capacity < reach:
            capacity *= 4
        # Do not round up beyond the available memory.
        return max(reach, min(capacity, self.cache_tokens))

    def _encode(self, prefill: Prefill) -> None:
        """Prefill one chunk of the prompts. After the last chunk, sample the first token and move to the batch."""
        prompts = [sequence.prompt_ids for sequence in prefill.sequences]
        end = min(max(map(len, prompts)), prefill.encoded + PREFILL_TOKENS)
        # Padded on the right: attention is causal, so that padding needs no mask.
        pieces = [
            [*prompt[prefill.encoded : end], *[0] * (end - max(len(prompt), prefill.encoded))] for prompt in prompts
        ]
        ids = torch.tensor(pieces, device=self.device)
        positions = torch.arange(prefill.encoded, end, device=ids.device)[None]
        hidden = self._forward(ids, positions, prefill.cache)
        prefill.encoded = end
        if end < max(map(len, prompts)):
            return
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden.device)
        for sequence in prefill.sequences:
            sequence.state = SamplingState(
                sequence.prompt_ids, sequence.params, self.config.vocab_size, self.device, sequence.constraint
            )
        logits = self._logits(hidden[torch.arange(len(ends), device=hidden.device), ends - (end - len(pieces[0]))])
        tokens = sample(logits, [sequence.state for sequence in prefill.sequences])
        for row, (sequence, token) in enumerate(zip(tuple(prefill.sequences), tokens, strict=True)):
            if not self._hand_on(sequence, token):
                self._batch(sequence).join(sequence, prefill.cache, row)
            prefill.sequences.remove(sequence)

    def _batch(self, sequence: GenerationSequence) -> Batch:
        """Return the batch for sequences of this maximum length; create it if needed."""
        reach = self._capacity(sequence.reach)
        if reach not in self.batches:
            self.batches[reach] = Batch(
                RaggedCache(
                    self.config.num_hidden_layers,
                    reach,
                    self.device,
                    quantized=self.config.use_cache_quantization,
                    fused=self.model.transformer.use_fused_decode,
                )
            )
        return self.batches[reach]

    def _decode(self, batch: Batch) -> None:
        """Decode one token of every row."""
        cache = batch.cache
        ids = torch.tensor([[sequence.last_token] for sequence in batch.sequences], device=self.device)
        hidden = self._forward(ids, cache.lengths.tensor[:, None], cache, cache.attention_mask())
        cache.advance()
        tokens = sample(self._logits(hidden[:, -1]), [sequence.state for sequence in batch.sequences])
        ended = [self._hand_on(*pair) for pair in zip(batch.sequences, tokens, strict=True)]
        for row in reversed(range(len(ended))):
            if ended[row]:
                batch.leave(row)

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: DynamicCache | RaggedCache,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model.transformer(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden).to(self.device)

    def _hand_on(self, sequence: GenerationSequence, token: SampledToken | Exception) -> bool:
        """Pass a token to its sequence; return whether the sequence has ended."""
        if isinstance(token, Exception):
            return self._end(sequence, EndReason.ERROR, token)
        if token.token_id in sequence.end_token_ids:
            return self._end(sequence, EndReason.STOP)
        sequence.last_token = token.token_id
        sequence.generated += 1
        try:
            enough = sequence.on_token(token)
        except Exception as error:  # raised by the callback of one request
            return self._end(sequence, EndReason.ERROR, error)
        if enough:
            return self._end(sequence, EndReason.STOP)
        if sequence.generated >= sequence.params.max_tokens:
            return self._end(sequence, EndReason.LENGTH)
        return False

    def _end(self, sequence: GenerationSequence, reason: EndReason, error: Exception | None = None) -> bool:
        if not sequence.ended:
            sequence.ended = True
            sequence.on_end(reason, error)
        return True


def _affordable_tokens(model: QWenLMHeadModel) -> int:
    """Return the number of key/value cache tokens that fit into the free memory.

    A prompt, which may fill the whole budget, is in memory twice while it is copied from its prefill cache, always in
    full precision, to the cache of its batch.
    """
    config = model.config
    full = config.kv_channels * model.dtype.itemsize
    stored = config.kv_channels + 2 * model.dtype.itemsize if config.use_cache_quantization else full
    per_token = 2 * config.num_hidden_layers * config.num_attention_heads * (full + stored)
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if gpus:
        # Layers are distributed evenly, so the device with the least free memory limits all.
        free = len(gpus) * min(torch.cuda.mem_get_info(device)[0] for device in gpus)
    else:
        free = psutil.virtual_memory().available
    return max(SHORTEST_REACH, int(MEMORY_SHARE * free / per_token))
