"""Decides which tokens each step computes: a token of every running sequence, and chunks of prompts.

Sequences join and leave between steps (Yu et al. 2022, Orca, section 3.2). A step has one budget of tokens for
decoding and for chunks of prompts (Agrawal et al. 2024, Sarathi-Serve, https://arxiv.org/abs/2403.02310, section 4).
When the blocks of the cache run out, the youngest sequence is preempted: its blocks are released, and it is encoded
again later.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from ..._renamed import old_names
from .block_manager import BlockManager
from .prefill_budget import PrefillBudget
from .sequence import Sequence

MAX_PASSED_OVER = 8  # steps; then a long prompt has its turn before further short ones
WATERMARK = 0.02  # of all blocks, which admission leaves free
# Expected tokens of a reply before any have ended, and the weight of each that does.
REPLY_TOKENS, REPLY_WEIGHT = 256, 0.02
# The logits of a step's prompts whose tokens are scored. With a small model they take more time than everything else.
SCORED_TOKENS = 512
EXPECTED_SHARE = 0.9  # of the tokens that a sequence is expected to grow by, since not all grow to the end together


class Chunk(NamedTuple):
    """Consecutive tokens of a sequence to compute in a step.

    Args:
        samples: whether the next token is sampled, because no other token follows them.
    """

    sequence: Sequence
    start: int
    end: int
    samples: bool

    @property
    def is_single(self) -> bool:
        """Whether the chunk is one token, as in decoding."""
        return self.end - self.start == 1

    @classmethod
    def of(cls, sequence: Sequence, end: int) -> "Chunk":
        """The tokens from the first that is not computed up to `end`."""
        return cls(sequence, sequence.num_computed, end, end == sequence.num_tokens)


class Scheduler:
    """Chooses the chunks of each step.

    Not thread-safe. Requests (sequences of one group) take turns, in admission and within the budget for prompts.

    Args:
        block_manager: blocks of the cache.
        max_num_seqs: maximum number of running sequences.
        max_num_batched_tokens: maximum number of tokens of prompts in a step.

    Attributes:
        running: admitted sequences, the oldest first.
        num_preemptions: sequences that lost their blocks so far.
        recomputed_tokens: tokens that were in the cache before and are encoded again.
        reply_tokens: average length of the replies that ended last.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ):
        self.block_manager, self.max_num_seqs = block_manager, max_num_seqs
        self._passed_over = 0  # steps that only short prompts were in while a longer one was waiting
        self.budget = PrefillBudget(max_num_batched_tokens)
        self.running: list[Sequence] = []
        self.num_preemptions = self.recomputed_tokens = 0
        self.reply_tokens: float = REPLY_TOKENS
        self._waiting: OrderedDict[Hashable, deque[Sequence]] = OrderedDict()  # by group, the next in turn first
        self._preempted: list[Sequence] = []  # the next to run again last
        self._free_slots = list(reversed(range(max_num_seqs)))

    @property
    def num_waiting(self) -> int:
        """Number of sequences that are not running."""
        return len(self._preempted) + sum(map(len, self._waiting.values()))

    def sequences(self) -> list[Sequence]:
        """Return all sequences, running or not."""
        return [*self.running, *self._preempted, *(each for group in self._waiting.values() for each in group)]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.setdefault(sequence.group, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended, and release its blocks."""
        if sequence.slot >= 0:
            self._stop_running(sequence)
            self.reply_tokens += REPLY_WEIGHT * (
                len(sequence.token_ids) - sequence.num_prompt_tokens - self.reply_tokens
            )
        elif sequence in self._preempted:
            self._preempted.remove(sequence)
        elif (group := self._waiting.get(sequence.group)) and sequence in group:
            group.remove(sequence)
            if not group:
                del self._waiting[sequence.group]

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next step, reserve their blocks, and count their tokens as computed."""
        decoding = [sequence for sequence in self.running if sequence.num_uncomputed == 1]
        for sequence in decoding:
            if sequence.slot >= 0:  # not preempted for one before it
                self._reserve(sequence)
        chunks = [Chunk.of(sequence, sequence.num_tokens) for sequence in decoding if sequence.slot >= 0]
        for chunk in chunks:
            self._advance(chunk)
        self._admit()
        self._schedule_prompts(chunks)
        return chunks

    def written_blocks(self, chunk: Chunk) -> set[int]:
        """Return the blocks that a chunk writes to."""
        return set(chunk.sequence.blocks[chunk.start // self.block_manager.block_size :])

    def roll_back(self, written: set[int]) -> None:
        """Undo a chunk that failed: the blocks that it writes to are not computed, also for those who share them, and
        nothing is to be found any more."""
        self.block_manager.forget()
        size = self.block_manager.block_size
        for sequence in self.running:
            sequence.num_named_blocks = 0
            intact = next((index for index, block in enumerate(sequence.blocks) if block in written), None)
            if intact is not None:
                sequence.num_computed = min(sequence.num_computed, intact * size)

    def name_blocks(self, sequence: Sequence) -> None:
        """Make the full blocks of a sequence findable.

        The blocks that a step fills may be read in the same step: every layer writes before it attends.
        """
        size = self.block_manager.block_size
        full = min(sequence.num_computed, len(sequence.token_ids)) // size
        for index in range(sequence.num_named_blocks, full):
            self.block_manager.set_name(sequence.blocks[index], sequence.block_name(index, size))
        sequence.num_named_blocks = max(sequence.num_named_blocks, full)

    def _advance(self, chunk: Chunk) -> None:
        chunk.sequence.num_computed = chunk.end
        self.name_blocks(chunk.sequence)

    def _schedule_prompts(self, chunks: list[Chunk]) -> None:
        """Append chunks of prompts. Groups share the budget, so that a short prompt overtakes a long one; what a group
        does not need of its share is left to the others."""
        waiting = [sequence for sequence in self.running if sequence.num_uncomputed]
        budget = self.budget.tokens(len(chunks), len({sequence.group for sequence in waiting}))
        if budget > 0:
            self._passed_over = 0
        else:
            budget = self.budget.short_tokens
            short = [sequence for sequence in waiting if sequence.num_uncomputed <= budget]
            self._passed_over += 0 < len(short) < len(waiting)
            waiting = short if self._passed_over <= MAX_PASSED_OVER else []
        groups: dict[Hashable, list[Sequence]] = {}
        for sequence in waiting:
            groups.setdefault(sequence.group, []).append(sequence)
        ordered = sorted(groups.values(), key=lambda group: sum(each.num_uncomputed for each in group))
        scores = SCORED_TOKENS
        for index, group in enumerate(ordered):
            share = max(1, budget // (len(ordered) - index))
            for sequence in group:
                is_scored = sequence.num_scored < sequence.num_to_score
                tokens = min(share, budget, scores) if is_scored else min(share, budget)
                if tokens == 0:
                    break
                chunk = self._prompt_chunk(sequence, tokens, may_preempt=not chunks)
                if chunk is not None:
                    self._advance(chunk)
                    chunks.append(chunk)
                    length = chunk.end - chunk.start
                    share, budget, scores = share - length, budget - length, scores - length * is_scored

    def _prompt_chunk(self, sequence: Sequence, tokens: int, may_preempt: bool) -> Chunk | None:
        """Reserve the blocks of the next tokens of a prompt; None if there are none free.

        Args:
            may_preempt: no chunk is chosen yet, so that no other sequence reads blocks of one that would be preempted.
        """
        if sequence.slot < 0:  # preempted for one before it
            return None
        self._find_computed(sequence)
        end = min(sequence.num_computed + tokens, sequence.num_tokens)
        missing = self.block_manager.blocks_for(end) - len(sequence.blocks)
        while missing > self.block_manager.num_free:
            if not may_preempt or self.running[-1] is sequence:
                return None
            self._preempt(self.running[-1])
        sequence.blocks += self.block_manager.allocate(max(missing, 0))
        return Chunk.of(sequence, end)

    def _reserve(self, sequence: Sequence) -> None:
        """Allocate a block for the last token if it needs one; if none is free, preempt the youngest sequence, which
        may be this one."""
        missing = self.block_manager.blocks_for(sequence.num_tokens) - len(sequence.blocks)
        while missing > self.block_manager.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return
        sequence.blocks += self.block_manager.allocate(max(missing, 0))

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        sequence.num_lost = sequence.num_computed
        self._stop_running(sequence)
        self._preempted.append(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self.block_manager.release(sequence.blocks)
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.forget_blocks()

    def _admit(self) -> None:
        """Start waiting sequences in turn, as far as rows and blocks allow."""
        while self._free_slots and (sequence := self._next_waiting()) is not None:
            if self.running and not self._fits(sequence):
                return
            if self._preempted:
                self._preempted.pop()
            else:
                sequence.admitted_at = time.perf_counter()
                group = self._waiting.pop(sequence.group)
                group.popleft()
                if group:
                    self._waiting[sequence.group] = group  # the next turn is that of another group
            sequence.slot = self._free_slots.pop()
            self.running.append(sequence)
            self._find_computed(sequence)
            self.recomputed_tokens += max(0, sequence.num_lost - sequence.num_computed)

    def _next_waiting(self) -> Sequence | None:
        if self._preempted:
            # The host must have seen its tokens before they are encoded again.
            return None if self._preempted[-1].num_pending else self._preempted[-1]
        return next(iter(self._waiting.values()))[0] if self._waiting else None

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the blocks suffice for a sequence beside the running ones, until they end.

        The most tokens are held shortly before one of them ends, so those moments are looked at: in the order of the
        expected ends, with all that still run then (Gong et al. 2025, https://arxiv.org/abs/2507.10150).
        """
        blocks, size = self.block_manager, self.block_manager.block_size
        found = sum(not blocks.is_free(block) for block in blocks.find(self._names(sequence, 0)))
        shared = blocks.num_blocks - blocks.num_free
        needs = [(self._expected_growth(sequence), sequence.num_tokens - found * size)]
        for other in self.running:
            shared -= len(other.blocks) - other.cached_tokens // size
            needs.append((self._expected_growth(other), other.num_tokens - other.cached_tokens))
        needs.sort(reverse=True)
        held = peak = 0
        for count, (growth, own) in enumerate(needs, start=1):
            held += own + size // 2  # the last block of each is half full on average
            peak = max(peak, held + count * growth)
        return max(shared, 0) * size + peak <= (1 - WATERMARK) * blocks.num_blocks * size

    def _expected_growth(self, sequence: Sequence) -> int:
        """Return how many more tokens a reply is expected to have, judging by the others: at least a block."""
        made = sequence.num_tokens - sequence.num_prompt_tokens
        expected = max(self.reply_tokens - made, self.reply_tokens / 4)
        limit = sequence.params.max_tokens - made
        return min(max(int(EXPECTED_SHARE * min(expected, limit)), self.block_manager.block_size), limit)

    def _names(self, sequence: Sequence, first: int) -> Iterator[bytes]:
        """Yield the names of the full blocks from index `first` on whose contents may be those of others."""
        size = self.block_manager.block_size
        for index in range(first, sequence.num_reusable // size):
            yield sequence.block_name(index, size)

    def _find_computed(self, sequence: Sequence) -> None:
        """Take over blocks with the next tokens of a sequence, if others have computed them."""
        size, first = self.block_manager.block_size, len(sequence.blocks)
        if sequence.num_computed != first * size:
            return
        found = list(self.block_manager.find(self._names(sequence, first)))
        for block in found:
            self.block_manager.share(block)
        sequence.blocks += found
        sequence.num_computed = len(sequence.blocks) * size
        sequence.num_named_blocks = len(sequence.blocks)
        if not sequence.num_lost:
            sequence.cached_tokens += (len(sequence.blocks) - first) * size


__all__ = ["Chunk", "PrefillBudget", "Scheduler"]

__getattr__ = old_names(
    __name__,
    {
        "EndReason": "qwen.serving.engine.sequence.FinishReason",
        "GenerationSequence": "qwen.serving.engine.sequence.Sequence",
        "Load": "qwen.serving.engine.engine.Load",
        "QueueFull": "qwen.serving.engine.engine.QueueFull",
        "SchedulerClosed": "qwen.serving.engine.engine.EngineClosed",
    },
)
