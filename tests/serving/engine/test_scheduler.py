"""The scheduler without a model: which tokens each step computes, in which blocks, and who waits.

`Machine` stands for the model. It keeps what each slot of the cache holds, so that a step that attends to something
else than the tokens of its own sequence is noticed, whatever was shared, evicted or preempted before.
"""

import ast
import itertools
import random
from collections.abc import Callable, Hashable
from pathlib import Path

import pytest

from qwen.serving.engine import block_manager, scheduler, sequence
from qwen.serving.engine.block_manager import BLOCK_SIZE, BlockManager
from qwen.serving.engine.scheduler import SCORED_TOKENS, Chunk, PrefillBudget, Scheduler
from qwen.serving.engine.sequence import Sequence
from tests.serving.engine.sequences import sequence as new_sequence

PREFILL_TOKENS = 2048


class Machine:
    """Runs the steps of a scheduler with a clock of its own.

    Args:
        seconds: duration of a step, from the numbers of sequences that decode and of tokens of prompts.
        checks: keep the contents of the cache and compare them.
        reply_tokens: length of replies that admission expects; 0 leads to preemption.

    Attributes:
        time: of the clock, in seconds.
        computed: tokens of all steps.
        finished: sequences with all their tokens, in that order.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        max_num_seqs: int = 256,
        prefill_tokens: int = PREFILL_TOKENS,
        reuse: bool = True,
        seconds: Callable[[int, int], float] = lambda decoding, prefilled: 0.01 + 0.001 * prefilled,
        checks: bool = True,
        reply_tokens: float | None = None,
    ):
        blocks = BlockManager(num_blocks, block_size, reuse)
        self.scheduler = Scheduler(blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=prefill_tokens)
        if reply_tokens is not None:
            self.scheduler.reply_tokens = reply_tokens
        self.seconds, self.checks = seconds, checks
        self.time, self.steps, self.computed = 0.0, 0, 0
        self.finished: list[Sequence] = []
        self._contents: dict[int, Hashable] = {}  # by slot: the tokens up to there, as a hash
        self._beginnings: dict[Sequence, list[Hashable]] = {}
        self._draw = random.Random(0)

    def add(self, length: int, max_tokens: int = 10, **settings) -> Sequence:
        """Queue a prompt of random tokens."""
        prompt = [self._draw.randrange(150_000) for _ in range(length)]
        return self.add_prompt(prompt, max_tokens, **settings)

    def add_prompt(self, prompt: list[int], max_tokens: int = 10, **settings) -> Sequence:
        added = new_sequence(prompt, max_tokens=max_tokens, **settings)
        self.scheduler.add(added)
        return added

    def step(self) -> list[Chunk]:
        """Run a step and return its chunks."""
        before = {each: each.blocks for each in self.scheduler.running if each.num_uncomputed == 1}
        chunks = self.scheduler.schedule()
        if self.checks:
            self._check(before, chunks)
        decoding = sum(chunk.start >= chunk.sequence.num_prompt_tokens for chunk in chunks)
        lengths = sum(chunk.end - chunk.start for chunk in chunks)
        self.computed += lengths
        seconds = self.seconds(decoding, lengths - decoding)
        for chunk in chunks:
            if chunk.samples:
                self._sample(chunk.sequence)
        self.scheduler.budget.observe(seconds, decoding, lengths - decoding)
        self.time += seconds
        self.steps += 1
        return chunks

    def run(self, steps: int = 10_000) -> None:
        """Run until nothing is left."""
        while self.scheduler.sequences():
            self.step()
            assert self.steps < steps, "the scheduler makes no progress"

    def _sample(self, sampled: Sequence) -> None:
        sampled.token_ids.append(self._draw.randrange(150_000))
        if len(sampled.reply_ids) == sampled.params.max_tokens:
            self.finished.append(sampled)
            self.scheduler.name_blocks(sampled)
            self.scheduler.remove(sampled)

    def _check(self, before: dict[Sequence, list[int]], chunks: list[Chunk]) -> None:
        """What the model relies on, and what running sequences may expect."""
        size = self.scheduler.block_manager.block_size
        served = [chunk.sequence for chunk in chunks]
        assert len(set(served)) == len(served)
        kept = [each for each, blocks in before.items() if each.blocks is blocks]  # not preempted
        assert set(kept) <= set(served), "a running sequence does not decode"
        assert len({each.slot for each in self.scheduler.running}) == len(self.scheduler.running)
        for chunk in chunks:
            assert 0 <= chunk.start < chunk.end <= chunk.sequence.num_tokens
            assert chunk.samples == (chunk.end == chunk.sequence.num_tokens)
            assert len(chunk.sequence.blocks) * size >= chunk.end
            for position in range(chunk.start, chunk.end):
                self._contents[self._slot(chunk.sequence, position)] = self._beginning(chunk.sequence, position)
        for chunk in chunks:
            for position in range(chunk.end):
                found = self._contents.get(self._slot(chunk.sequence, position))
                assert found == self._beginning(chunk.sequence, position), "a sequence attends to another's tokens"

    def _slot(self, owner: Sequence, position: int) -> int:
        size = self.scheduler.block_manager.block_size
        return owner.blocks[position // size] * size + position % size

    def _beginning(self, owner: Sequence, position: int) -> Hashable:
        found = self._beginnings.setdefault(owner, [hash(owner._block_names[0])])
        while len(found) <= position + 1:
            found.append(hash((found[-1], owner.token_ids[len(found) - 1])))
        return found[position + 1]

    def is_empty(self) -> bool:
        """Whether every block and every slot came back."""
        held = self.scheduler
        blocks = held.block_manager
        slots = sorted(held._free_slots) == list(range(held.max_num_seqs))
        return slots and blocks.num_free == blocks.num_blocks and not any(blocks._holders)


def test_scheduling_needs_no_torch():
    """A rule of the design: what is decided here can be simulated."""
    for module in (scheduler, block_manager, sequence):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        imports = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
        imports |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not {name for name in imports if name.split(".")[0] in ("torch", "numpy", "transformers")}


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_random_requests(seed, reuse):
    """Requests with shared beginnings arrive, are cancelled and preempted: each attends to its own tokens only, and in
    the end every block is free."""
    draw = random.Random(seed)
    machine = Machine(draw.choice([20, 26]), 4, draw.choice([4, 8]), 24, reuse, reply_tokens=0)
    beginnings = [[draw.randrange(100) for _ in range(40)] for _ in range(3)]
    added: list[Sequence] = []
    for _ in range(400):
        if draw.random() < 0.4 and machine.scheduler.num_waiting < 10:
            beginning = draw.choice(beginnings)[: draw.randrange(1, 40)]
            prompt = beginning + [draw.randrange(100) for _ in range(draw.randrange(4))]
            settings = {"group": draw.choice([None, "one", "two"]), "cache_key": draw.choice([(), ("salt",)])}
            added.append(machine.add_prompt(prompt, draw.randrange(1, 36), **settings))
        if added and draw.random() < 0.1:
            leaving = draw.choice(added)
            if leaving in machine.scheduler.sequences():
                machine.scheduler.name_blocks(leaving)
                machine.scheduler.remove(leaving)
        machine.step()
    machine.run()
    assert machine.is_empty()
    assert machine.scheduler.num_preemptions > 0
    assert machine.finished
    assert (max(each.cached_tokens for each in added) > 0) == reuse


def test_prompts_and_replies_are_found_again():
    machine = Machine(100)
    first = machine.add(100, 20)
    machine.run()
    assert first.cached_tokens == 0
    again = machine.add_prompt(first.token_ids[:100], 4)
    longer = machine.add_prompt([*first.token_ids, 1, 2, 3], 4)
    machine.run()
    assert again.cached_tokens == 96  # full blocks; at least one token is encoded for its logits
    assert longer.cached_tokens == 112  # of 119: the last token of the reply was never encoded
    exact = machine.add_prompt(first.token_ids[:96], 4)
    machine.run()
    assert exact.cached_tokens == 80


def test_equal_prompts_of_one_group_are_encoded_once():
    machine = Machine(1000)
    prompt = list(range(330))
    choices = [machine.add_prompt(prompt, 8, group="request") for _ in range(16)]
    machine.run()
    assert machine.computed == 330 + 15 * 10 + 16 * 7
    assert [each.cached_tokens for each in choices] == [0] + 15 * [320]


@pytest.mark.parametrize("different", [{"alpha_index": 1}, {"cache_key": ("salt 'a'",)}, {"cache_key": ("adapter",)}])
def test_alpha_adapter_and_salt_are_not_shared(different):
    machine = Machine(100)
    prompt = list(range(50))
    machine.add_prompt(prompt)
    machine.run()
    other, same = machine.add_prompt(prompt, **different), machine.add_prompt(prompt)
    machine.run()
    assert (other.cached_tokens, same.cached_tokens) == (0, 48)


def test_the_youngest_is_preempted_and_runs_again_first():
    machine = Machine(8, 4, max_num_seqs=2, reply_tokens=0)
    old, young, later = machine.add(7, 20), machine.add(6, 20), machine.add(5, 20)
    machine.run()
    assert machine.scheduler.num_preemptions > 0
    assert old.num_lost == 0
    assert young.num_lost > 0
    assert machine.finished.index(young) < machine.finished.index(later)
    assert machine.is_empty()


def test_admission_leaves_room_for_the_growth_of_running_sequences():
    """So that none is preempted; without it, they would be."""
    preempted = []
    for reply_tokens in (60, 0):
        machine = Machine(100, 4, reply_tokens=reply_tokens)
        for _ in range(20):
            machine.add(38, 60)
        machine.step()
        if reply_tokens:
            assert len(machine.scheduler.running) == 4  # 38 tokens each, and 54 more
        machine.run()
        preempted.append(machine.scheduler.num_preemptions > 0)
    assert preempted == [False, True]


def test_expected_replies_are_as_long_as_the_last_ones():
    """Admission does not take `max_tokens` for granted, which clients set to what they like."""
    machine = Machine(1000, 16, checks=False)
    for _ in range(200):
        machine.add(100, 20)
    machine.run()
    assert 20 <= machine.scheduler.reply_tokens < 30
    for _ in range(100):
        machine.add(100, 4000)
    machine.step()
    assert len(machine.scheduler.running) == 100


def test_a_prompt_of_the_whole_cache_runs_alone():
    machine = Machine(10, 4)
    machine.add(30, 10)
    machine.add(5, 5)
    machine.run()
    assert machine.is_empty()


def test_a_request_counts_as_one_in_admission():
    """Sixteen choices of one request and one of another: the other one waits for one of them, not for all."""
    machine = Machine(1000, max_num_seqs=2)
    choices = [machine.add(20, 5, group="many") for _ in range(16)]
    other = machine.add(20, 5)
    machine.step()
    assert machine.scheduler.running == [choices[0], other]
    late = machine.add(20, 5)
    machine.run()
    assert [machine.finished.index(each) for each in (other, late)] <= [1, 3]


def test_a_request_counts_as_one_in_prefill():
    """Four long prompts of one request get half of the budget beside one prompt of another."""
    machine = Machine(4000, prefill_tokens=64)
    many = [machine.add(1000, group="many") for _ in range(4)]
    other = machine.add(1000)
    computed = dict.fromkeys((*many, other), 0)
    for _ in range(20):
        for chunk in machine.step():
            computed[chunk.sequence] += chunk.end - chunk.start
    assert computed[other] == sum(computed[each] for each in many) == 20 * 32


def test_shares_that_are_not_needed_are_left_to_others():
    machine = Machine(1000, prefill_tokens=100)
    machine.add(10)
    long = machine.add(500)
    chunks = machine.step()
    assert {chunk.sequence: chunk.end - chunk.start for chunk in chunks}[long] == 90


def test_steps_score_few_tokens():
    machine = Machine(1000)
    scored = [machine.add(700, prompt_logprobs=0) for _ in range(2)]
    other = machine.add(300)
    lengths = {chunk.sequence: chunk.end - chunk.start for chunk in machine.step()}
    assert sum(lengths.get(each, 0) for each in scored) == SCORED_TOKENS
    assert lengths[other] == 300


# The time of a 7B on an H100, in seconds, and of the bundled model on a CPU.
SPEEDS = {
    "gpu": lambda decoding, prefilled: 0.012 + 5e-5 * prefilled,
    "cpu": lambda decoding, prefilled: 0.004 + 0.0005 * decoding + 2e-4 * prefilled,
    "slow cpu": lambda decoding, prefilled: 0.3 + 0.02 * decoding + 0.02 * prefilled,
}


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("steps_before", [0, 1, 4, 8])
def test_a_short_prompt_starts_within_ten_steps(speed, steps_before):
    """While 6,000 tokens are encoded and others decode."""
    machine = Machine(2000, seconds=SPEEDS[speed])
    running = [machine.add(100, 4000) for _ in range(4)]
    for _ in range(20):
        machine.step()
    long = machine.add(6000)
    for _ in range(steps_before):
        machine.step()
    short = machine.add(14)
    for step in itertools.count(1):
        machine.step()
        if short.reply_ids:
            break
        assert step < 10
    assert not long.reply_ids
    assert all(len(each.reply_ids) >= 20 + steps_before for each in running)


@pytest.mark.parametrize("speed", SPEEDS)
def test_short_prompts_do_not_starve_a_long_one(speed):
    """A short prompt comes with every step, while a reply is running."""
    machine = Machine(4000, seconds=SPEEDS[speed], checks=False)
    machine.add(100, 10**6)
    for _ in range(20):
        machine.step()
    long = machine.add(3000)
    for step in itertools.count(1):
        machine.add(20, 1)
        machine.step()
        if long.reply_ids:
            break
        assert step < 3000


@pytest.mark.parametrize("speed", SPEEDS)
def test_prompts_and_running_replies_share_the_time(speed):
    """Running replies keep almost half their speed while 6,000 tokens are encoded, which take little more than twice
    their time alone."""
    seconds = SPEEDS[speed]
    machine = Machine(4000, seconds=seconds, checks=False)
    running = machine.add(100, 10**6)
    for _ in range(50):
        machine.step()
    long, start, replied = machine.add(6000), machine.time, len(running.reply_ids)
    while not long.reply_ids:
        machine.step()
    took = machine.time - start
    alone = 3 * seconds(0, 0) + seconds(0, 6000) - seconds(0, 0)
    assert took < 2.5 * alone
    assert (len(running.reply_ids) - replied) * seconds(1, 0) > 0.42 * took


def test_what_is_admitted_does_not_starve_what_is_running():
    """Prompts keep coming, more than can be served: every running sequence decodes in every step (checked by the
    machine), and gets at least 40 % of its speed."""
    machine = Machine(4000, seconds=SPEEDS["gpu"])
    running = machine.add(100, 10**6)
    for _ in range(20):
        machine.step()
    start, replied = machine.time, len(running.reply_ids)
    while machine.time - start < 5:
        while machine.scheduler.num_waiting < 4:
            machine.add(1000, 1)
        machine.step()
    assert (len(running.reply_ids) - replied) * SPEEDS["gpu"](1, 0) > 0.4 * (machine.time - start)


def test_the_prefill_budget_follows_the_measured_time():
    budget = PrefillBudget(2048)
    assert budget.tokens(0) == 2048
    for _ in range(20):
        budget.observe(0.01, 1, 0)
    for _ in range(200):
        tokens = budget.tokens(1)
        budget.observe(0.01 + 0.0001 * tokens, 1, tokens)
    assert 500 < budget._tokens <= 2048  # chunks of 0.1 seconds
    budget.observe(5.0, 1, budget._tokens)  # a step that took very long makes the next ones smaller
    assert budget._tokens < 1025
    assert budget.tokens(1) == 0
    for _ in range(1000):
        budget.observe(0.01, 1, 0)
    assert budget.tokens(1) > 0


@pytest.mark.slow
def test_steady_state_of_a_7b_on_80_gb():
    """At least 140 requests run at once, and at most 5 % of the work is done again because of preemption.

    Prompts around 300 tokens, 512 to generate, always enough of them waiting.
    """
    bytes_per_token = 2 * 32 * 32 * 128 * 2  # keys and values, layers, heads, channels, 16 bits
    tokens = int(0.9 * (80e9 - 15.4e9) / bytes_per_token)
    machine = Machine(tokens // BLOCK_SIZE, BLOCK_SIZE, seconds=SPEEDS["gpu"], checks=False)
    draw, added = random.Random(0), itertools.count()
    running, computed, recomputed = [], [], []
    for step in range(3000):
        while machine.scheduler.num_waiting < 8:
            machine.add_prompt([next(added)] * max(1, int(300 * draw.lognormvariate(0, 0.5))), 512)
        machine.step()
        if step >= 1500:  # the first replies have ended
            running.append(len(machine.scheduler.running))
            computed.append(machine.computed)
            recomputed.append(machine.scheduler.recomputed_tokens)
    assert sum(running) / len(running) >= 140
    assert recomputed[-1] - recomputed[0] <= 0.05 * (computed[-1] - computed[0])
