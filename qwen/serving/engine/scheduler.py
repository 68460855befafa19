"""Continuous batching: sequences of token ids in, tokens out.

One thread owns the model and repeats a step (Yu et al. 2022, Orca, section 3.2): take in waiting sequences, encode a
piece of prompt, give every running sequence its next token. Sequences join and leave between steps. What one gets does
not depend on the others: each keeps its sampling settings, its random numbers and the NTK base of its own prompt.

Memory: a sequence is taken in only when there is room for all the tokens it may ever have, so that a running one is
never pushed out. Rows of about the same reach share a cache, so that one long sequence does not pad the short ones.
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

SHORTEST_REACH = 512  # tokens; the reaches of the caches are this times powers of 4
PREFILL_TOKENS = 1024  # encoded between two decoding steps: longer prompts come in pieces, short ones share a forward
# Parameters from which on the cores of a CPU share the work. Below, they would spend their time waiting for each other.
SHARED_FROM = 50_000_000
MEMORY_SHARE = 0.9  # of the memory that is free once the model is loaded


class QueueFull(Exception):
    """More sequences wait than the scheduler was told to keep."""


class SchedulerClosed(Exception):
    """The scheduler takes no more sequences."""


class EndReason(enum.Enum):
    """Why a sequence has no more tokens."""

    STOP = "stop"  # an end token, or `on_token` had enough
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Load(NamedTuple):
    """Sequences that are being continued, and sequences that wait."""

    running: int
    queued: int


@dataclass(eq=False)
class GenerationSequence:
    """A prompt to be continued, and who is told.

    Args:
        prompt_ids: the prompt, at least one token.
        params: how it is continued.
        end_token_ids: tokens that end it; they are not handed on.
        on_token: called with each token, from the scheduler's thread; True ends the sequence.
        on_end: called once, from the scheduler's thread, with the reason and the error if there was one.
        constraint: what the reply may consist of.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    end_token_ids: frozenset[int]
    on_token: Callable[[SampledToken], bool]
    on_end: Callable[[EndReason, Exception | None], None]
    constraint: Constraint | None = None
    state: SamplingState = field(init=False)  # from its first token on
    last_token: int = field(default=-1, init=False)
    generated: int = field(default=0, init=False)
    cancelled: bool = field(default=False, init=False)
    ended: bool = field(default=False, init=False)

    @property
    def reach(self) -> int:
        """Tokens it may come to."""
        return len(self.prompt_ids) + self.params.max_tokens


class Batch:
    """Sequences of about the same reach and their cache, row by row."""

    def __init__(self, cache: RaggedCache):
        self.cache = cache
        self.sequences: list[GenerationSequence] = []

    def join(self, sequence: GenerationSequence, prompts: DynamicCache, row: int) -> None:
        """Take over a sequence, whose prompt is row `row` of `prompts`."""
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
    """Prompts that are being encoded together: several in one forward, or one in pieces."""

    sequences: list[GenerationSequence]
    cache: DynamicCache
    encoded: int = 0


Group = TypeVar("Group", Prefill, Batch)


class Scheduler:
    """Continues many sequences at once.

    Args:
        model: in eval mode; used by the scheduler's thread alone from now on.
        max_batch_size: sequences that are continued at once.
        max_queue: sequences that may wait beside them.
        cache_tokens: tokens that the caches may hold together; from the free memory if None.
    """

    def __init__(
        self, model: QWenLMHeadModel, *, max_batch_size: int = 16, max_queue: int = 128, cache_tokens: int | None = None
    ):
        self.model, self.config, self.device = model, model.config, model.device
        self.max_batch_size, self.max_queue = max_batch_size, max_queue
        self.cache_tokens = cache_tokens or _affordable_tokens(model)
        self.batches: dict[int, Batch] = {}  # by reach
        self.prefills: list[Prefill] = []  # at most two: a long prompt, and short ones that pass it
        self.waiting: deque[GenerationSequence] = deque()
        self.changed = threading.Condition()  # guards `waiting` and the flags
        self.closing = self.cancelling = self.failed = False
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.thread.start()

    def submit(self, sequence: GenerationSequence) -> None:
        """Have a sequence continued. Returns at once.

        Raises:
            QueueFull: as many sequences wait as may.
            SchedulerClosed: after `close`, or after an error that ended the thread.
            ValueError: an empty prompt, or more tokens than the caches hold.
        """
        if not sequence.prompt_ids:
            raise ValueError("The prompt is empty: it needs one token at least.")
        if self._capacity(sequence.reach) > self.cache_tokens:
            raise ValueError(
                f"Prompt and reply may come to {sequence.reach} tokens, and the memory holds {self.cache_tokens}: "
                "shorten the prompt, or ask for fewer tokens."
            )
        with self.changed:
            if self.closing:
                raise SchedulerClosed("No more requests are taken.")
            if sum(self.load()) >= self.max_batch_size + self.max_queue:
                raise QueueFull(f"{len(self.waiting)} requests are waiting already.")
            self.waiting.append(sequence)
            self.changed.notify()

    def cancel(self, sequence: GenerationSequence) -> None:
        """End a sequence before its next token; nothing happens where it has ended."""
        with self.changed:
            sequence.cancelled = True
            self.changed.notify()

    def load(self) -> Load:
        """How busy it is."""
        groups: list[Prefill | Batch] = [*self.prefills, *list(self.batches.values())]
        return Load(sum(len(group.sequences) for group in groups), len(self.waiting))

    def close(self, timeout: float | None = None) -> None:
        """Take no more sequences, finish those there are, and end the thread.

        Args:
            timeout: seconds after which the unfinished ones are cancelled; None waits for them.
        """
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(timeout)
        self.cancelling = True
        self.thread.join()

    # What follows runs in the scheduler's thread.

    @torch.inference_mode()
    def _run(self) -> None:
        if self.device.type == "cpu" and self.model.num_parameters() < SHARED_FROM:
            torch.set_num_threads(1)
        error: Exception | None = None
        try:
            while self._wait_for_work():
                self._step()
        except Exception as unexpected:  # nobody may wait for a thread that has ended
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
        """Blocks while there is nothing to do; False when there will never be anything again."""
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
            if batch.sequences:  # else all of them were cancelled
                self._guarded(self._decode, batch)
        self.prefills = [prefill for prefill in self.prefills if prefill.sequences]
        self.batches = {reach: batch for reach, batch in self.batches.items() if batch.sequences}

    def _guarded(self, work: Callable[[Group], None], group: Group) -> None:
        """An error costs the sequences it happened to, not the others."""
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
        """Begin with the prompts that came first, as far as rows and memory allow."""
        admitted: list[GenerationSequence] = []
        with self.changed:
            while self.waiting and self._fits(self.waiting[0], admitted):
                admitted.append(self.waiting.popleft())
            if not admitted:
                return
            prefill = Prefill(admitted, DynamicCache(config=self.config))
            self.prefills.append(prefill)
        # The whole length counts for NTK, also where the first forward sees a piece of the prompt only.
        lengths = [len(sequence.prompt_ids) for sequence in admitted]
        prompt_state(prefill.cache).lengths = torch.tensor(lengths, device=self.device)

    def _fits(self, sequence: GenerationSequence, admitted: list[GenerationSequence]) -> bool:
        """Whether a sequence can be taken in, after those that have just been."""
        encoding = [other for prefill in self.prefills for other in prefill.sequences]
        running = [other for batch in self.batches.values() for other in batch.sequences]
        together = [*running, *encoding, *admitted, sequence]
        if len(together) > self.max_batch_size:
            return False
        width = max(len(other.prompt_ids) for other in [*admitted, sequence]) * (len(admitted) + 1)
        if width > PREFILL_TOKENS and (admitted or encoding):  # a long prompt is encoded alone
            return False
        rows: dict[int, int] = {}
        for other in together:
            reach = self._capacity(other.reach)
            rows[reach] = rows.get(reach, 0) + 1
        return sum(RaggedCache.room_for(count) * reach for reach, count in rows.items()) <= self.cache_tokens

    def _capacity(self, reach: int) -> int:
        """Tokens a row gets that may come to `reach` tokens."""
        capacity = SHORTEST_REACH
        while capacity < reach:
            capacity *= 4
        # The longest are not rounded up to more than the memory holds.
        return max(reach, min(capacity, self.cache_tokens))

    def _encode(self, prefill: Prefill) -> None:
        """One piece of the prompts; behind the last piece the first token, and on to the batch."""
        prompts = [sequence.prompt_ids for sequence in prefill.sequences]
        end = min(max(map(len, prompts)), prefill.encoded + PREFILL_TOKENS)
        # Padded on the right: no token sees what comes after it, so that padding needs no mask.
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
        """The batch of sequences that reach about as far."""
        reach = self._capacity(sequence.reach)
        if reach not in self.batches:
            self.batches[reach] = Batch(
                RaggedCache(
                    self.config.num_hidden_layers,
                    reach,
                    self.device,
                    quantized=self.config.use_cache_quantization,
                    fused=self.model.transformer.fused,
                )
            )
        return self.batches[reach]

    def _decode(self, batch: Batch) -> None:
        """One token for every row."""
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
        """Tell of a token; whether the sequence has ended with it."""
        if isinstance(token, Exception):
            return self._end(sequence, EndReason.ERROR, token)
        if token.token_id in sequence.end_token_ids:
            return self._end(sequence, EndReason.STOP)
        sequence.last_token = token.token_id
        sequence.generated += 1
        try:
            enough = sequence.on_token(token)
        except Exception as error:  # in the code of one request
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
    """Tokens of key/value cache that the free memory has room for.

    A prompt exists twice while it moves from the cache that it was encoded in, always in full precision, to that of its
    batch; and one may be as long as all of it.
    """
    config = model.config
    full = config.kv_channels * model.dtype.itemsize
    stored = config.kv_channels + 2 * model.dtype.itemsize if config.use_cache_quantization else full
    per_token = 2 * config.num_hidden_layers * config.num_attention_heads * (full + stored)
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if gpus:
        # Layers are spread evenly: the fullest device decides.
        free = len(gpus) * min(torch.cuda.mem_get_info(device)[0] for device in gpus)
    else:
        free = psutil.virtual_memory().available
    return max(SHORTEST_REACH, int(MEMORY_SHARE * free / per_token))
