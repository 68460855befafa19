"""Faults of one sequence, wherever they are raised: its neighbours are answered as alone."""

import logging

import pytest

from qwen.serving.engine import EngineError
from qwen.serving.engine.detokenizer import IncrementalText
from qwen.serving.engine.model_runner import ScoredTokens
from qwen.serving.engine.sampler import Sampler
from qwen.serving.engine.sequence import Sequence
from qwen.serving.engine.stream import TextStream
from tests.serving.engine.replies import generated, is_empty, start, token_ids, wait_until

MARKED = 7  # max_tokens of the sequence that fails
NEIGHBOURS = 6


class Fault(Exception):
    """What the marked sequence raises."""


class Constraint:
    """Allows all tokens, or fails."""

    def __init__(self, call: str):
        self.call = call

    def allowed(self):
        import torch

        if self.call == "allowed":
            raise Fault
        return torch.ones(3 if self.call == "wrong size" else 512, dtype=torch.bool)

    def accept(self, token_id: int) -> None:
        if self.call == "accept":
            raise Fault


def is_marked(subject: object) -> bool:
    """Return whether a sequence, or what belongs to one, is the one that fails."""
    sequence = getattr(subject, "sequence", subject)
    return getattr(getattr(sequence, "params", None), "max_tokens", None) == MARKED


def fail_for_marked(monkeypatch, owner: type, name: str, subject: int = 0) -> None:
    """Let a method fail for the marked sequence.

    Args:
        subject: index of the argument that tells the sequence.
    """
    whole = getattr(owner, name)
    function = whole.fget if isinstance(whole, property) else whole

    def failing(*args, **kwargs):
        if is_marked(args[subject]):
            raise Fault
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, property(failing) if isinstance(whole, property) else failing)


def fail_in_stream(monkeypatch, owner: type, name: str) -> None:
    """Let a method fail for the stream, or the text, of the marked sequence; its reader marks them."""
    function = getattr(owner, name)

    def failing(self, *args, **kwargs):
        if getattr(self, "marked", False) or getattr(getattr(self, "_text", None), "marked", False):
            raise Fault
        return function(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


FAULTS = {
    "state of the sampler": lambda patch: fail_for_marked(patch, Sampler, "add", 1),
    "random number": lambda patch: fail_for_marked(patch, Sequence, "next_uniform"),
    "forbidden tokens": lambda patch: fail_for_marked(patch, Sequence, "forbidden_ids"),
    "scores of the prompt": lambda patch: fail_for_marked(patch, ScoredTokens, "logprobs"),
    "delivery of the scores": lambda patch: fail_in_stream(patch, TextStream, "on_prompt_logprobs"),
    "text": lambda patch: fail_in_stream(patch, IncrementalText, "feed"),
    "delivery": lambda patch: fail_in_stream(patch, TextStream, "on_token"),
    "end of the text": lambda patch: fail_in_stream(patch, IncrementalText, "finish"),
    "allowed": lambda patch: None,
    "wrong size": lambda patch: None,
    "accept": lambda patch: None,
}


@pytest.fixture(scope="module")
def neighbours(prompts) -> list[list[int]]:
    return [[*prompts[2][:10], index] for index in range(NEIGHBOURS)]


@pytest.fixture(scope="module")
def alone(tiny, neighbours) -> list[list[int]]:
    """Replies to the neighbours without others."""
    return [generated(tiny[0], prompt, 20) for prompt in neighbours]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_that_of_its_sequence(engine, neighbours, alone, monkeypatch, caplog, fault):
    FAULTS[fault](monkeypatch)
    with engine._changed:
        broken = engine.start(
            [5, 6],
            engine.params(max_tokens=MARKED, min_tokens=2, prompt_logprobs=0, temperature=0),
            constraint=Constraint(fault),
            request_id="mine",
        )
        broken.marked = broken._text.marked = True
        fine = [start(engine, prompt) for prompt in neighbours]
    assert [token_ids(stream) for stream in fine] == alone
    with pytest.raises(EngineError):
        list(broken)
    assert broken.finish_reason == "error"
    wait_until(lambda: is_empty(engine))
    assert not engine.failed
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage().partition(":")[0] for record in errors] == ["Request mine failed"]
    assert errors[0].exc_info is not None


def test_a_fault_in_decoding_is_that_of_its_sequence(engine, prompts, monkeypatch):
    """In a step without prompts, which only fails as a whole; the random numbers are drawn once nevertheless."""
    settings = {"temperature": 1.0, "seed": 3}
    prompts = [[*prompts[2][:10], index] for index in range(NEIGHBOURS)]
    alone = [token_ids(start(engine, prompt, **settings)) for prompt in prompts]
    launch = engine.runner.launch

    def launched(chunks):
        step = launch(chunks)
        if any(is_marked(chunk) and chunk.end > 14 for chunk in chunks):  # after sampling has changed its state
            for sequence in step.sequences:
                sequence.num_pending -= 1
            raise Fault
        return step

    monkeypatch.setattr(engine.runner, "launch", launched)
    with engine._changed:
        broken = start(engine, [5, *prompts[0]], max_tokens=MARKED)
        fine = [start(engine, prompt, **settings, repetition_penalty=1.0) for prompt in prompts]
    assert [token_ids(stream) for stream in fine] == alone
    with pytest.raises(EngineError, match="Fault"):
        list(broken)
    wait_until(lambda: is_empty(engine))


@pytest.mark.parametrize("penalty", [0.01, 1.3])
def test_a_step_that_is_repeated_counts_its_tokens_once(engine, prompts, monkeypatch, penalty):
    settings = {"repetition_penalty": penalty, "frequency_penalty": 1.5, "logit_bias": {3: 4.0}}
    alone = [token_ids(start(engine, prompt, **settings)) for prompt in prompts[:4]]
    launch = engine.runner.launch

    def launched(chunks):
        step = launch(chunks)
        if len(chunks) > 1:
            for sequence in step.sequences:
                sequence.num_pending -= 1
            raise MemoryError
        return step

    monkeypatch.setattr(engine.runner, "launch", launched)
    with engine._changed:
        together = [start(engine, prompt, **settings) for prompt in prompts[:4]]
    assert [token_ids(stream) for stream in together] == alone


def test_any_seed_draws_numbers(engine):
    seeds = [0, 1, 2, 2**63, 2**63 + 10**4300 - 1]
    texts = []
    for seed in seeds:
        params = engine.params(seed=seed, temperature=9.0, top_p=1.0, max_tokens=20, top_logprobs=0)
        texts.append(tuple(token_ids(engine.start([1, 2, 3], params))))
    assert len(set(texts)) == len(seeds)


def test_numbers_without_meaning_are_rejected(engine):
    for wrong in ({"repetition_penalty": 1e-40}, {"logit_bias": {1: float("nan")}}, {"logit_bias": {1: float("inf")}}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            engine.params(**wrong)
