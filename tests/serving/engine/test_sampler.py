"""The sampler: the distribution is that of transformers, and a row depends on nothing but itself."""

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen.serving.engine.sampler import Sampler, SampleRequest, unpack
from qwen.serving.engine.sequence import ConstraintError, SampledToken, Sequence
from tests.serving.engine.sequences import sequence


class State:
    """A sequence with settings, and the sampler that it is in."""

    def __init__(self, sampled: Sequence, vocab_size: int):
        self.sequence, self.vocab_size = sampled, vocab_size
        self.sampler: Sampler | None = None


def state(vocab_size: int = 50, prompt=(1, 2, 3), **settings) -> State:
    return State(sequence(prompt, **settings), vocab_size)


def sample(logits: torch.Tensor, states: list[State], allowed: torch.Tensor | None = None) -> list[SampledToken]:
    """Sample a token for each row. The same states must be sampled together again."""
    if states[0].sampler is None:
        sampler = Sampler(states[0].vocab_size, len(states), torch.device("cpu"))
        for slot, each in enumerate(states):
            each.sampler, each.sequence.slot = sampler, slot
            sampler.add(each.sequence)
    sequences = [each.sequence for each in states]
    request = SampleRequest.of(sequences)
    slots = torch.tensor([each.slot for each in sequences])
    settings = torch.tensor(request.settings, dtype=torch.float64)
    forbidden = torch.tensor(request.forbidden) if request.forbidden else None
    values = states[0].sampler.sample(logits, request, slots, settings, allowed, forbidden)
    tokens = unpack(values.tolist(), sequences)
    for each, token in zip(sequences, tokens, strict=True):
        if isinstance(token, SampledToken):
            each.token_ids.append(token.token_id)
    return tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_p": 0.5},
        {"top_p": 0.9, "temperature": 0.7},
        {"top_k": 8, "top_p": 0.6, "temperature": 2.0},
        {"min_p": 0.3},
        {"top_k": 20, "top_p": 0.95, "min_p": 0.2, "temperature": 1.5},
        {},
    ],
    ids=str,
)
def test_sampling_distribution_equals_transformers(settings):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2)])
    if "temperature" in settings:
        warpers.append(TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    expected = warpers(torch.tensor([[1, 2, 3]]), logits[None].clone())[0].softmax(-1)

    rows = 2000
    rows_of = [state(repetition_penalty=1.2, seed=seed, **settings) for seed in range(rows)]
    counts = Counter(token.token_id for token in sample(logits.expand(rows, -1), rows_of))
    assert set(counts) <= set(expected.nonzero().flatten().tolist())
    drawn = torch.tensor([counts[token] / rows for token in range(50)])
    assert (drawn - expected).abs().max() < 4 * (0.25 / rows) ** 0.5  # four standard deviations


def test_sampling_does_not_depend_on_other_rows():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    settings = [{"seed": 1, "min_p": 0.1}, {"seed": 2, "top_k": 3}, {"temperature": 0.0}, {"seed": 4, "top_p": 0.4}]
    together = [[], [], [], []]
    states = [state(**each) for each in settings]
    for _ in range(20):
        for row, token in enumerate(sample(logits, states)):
            together[row].append(token.token_id)
    for row, each in enumerate(settings):
        alone = state(**each)
        assert [sample(logits[row : row + 1], [alone])[0].token_id for _ in range(20)] == together[row]


def test_sampling_of_ties_does_not_depend_on_other_rows():
    """Ties are common in 16 bits; their order in a sort must not depend on other rows."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    for seed in range(60):
        settings = {"seed": seed, "top_k": 20, "top_p": 0.9}
        alone = sample(logits[None], [state(2000, **settings)])[0]
        for other in ({}, {"top_k": 50}, {"top_k": 3}, {"temperature": 0.0}):
            states = [state(2000, seed=1, **other), state(2000, **settings)]
            assert sample(logits.expand(2, -1), states)[1] == alone


def test_negative_and_positive_seeds_differ():
    logits = torch.zeros(1, 10**4)
    drawn = {sample(logits, [state(10**4, seed=seed)])[0].token_id for seed in (-2, -1, 0, 1, 2, 2**70, -(2**70))}
    assert len(drawn) == 7


def test_presence_and_frequency_penalties_count_the_reply_only():
    logits = torch.zeros(1, 50)
    logits[0, 1] = 9.0  # in the prompt, which is not counted
    logits[0, 7] = 8.9
    frequent = state(temperature=0.0, frequency_penalty=0.3)
    assert [sample(logits, [frequent])[0].token_id for _ in range(6)] == [1, 7, 1, 7, 1, 7]
    present = state(temperature=0.0, presence_penalty=0.3)
    assert [sample(logits, [present])[0].token_id for _ in range(6)] == [1, 7, 1, 1, 1, 1]


def test_bias_bans_and_forces_tokens():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    best = int(logits.argmax())
    assert sample(logits, [state(temperature=0.0, logit_bias={best: -100.0})])[0].token_id != best
    assert sample(logits, [state(logit_bias={11: 100.0})])[0].token_id == 11


def test_allowed_tokens_and_bad_words_limit_their_own_rows():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    ranked = logits.argsort(-1, descending=True).tolist()
    states = [
        state(temperature=0.0),
        state(temperature=0.0, bad_words=[ranked[1][:1], ranked[1][1:2]]),
        state(seed=0, allowed_token_ids=[7, 9], logit_bias={7: 1.0}, bad_words=[[9]]),
        state(temperature=0.0, allowed_token_ids=ranked[3][5:]),
    ]
    tokens = [token.token_id for token in sample(logits, states)]
    assert tokens == [ranked[0][0], ranked[1][2], 7, ranked[3][5]]


def test_bad_phrases_are_not_completed():
    logits = torch.zeros(1, 50)
    logits[0, 7], logits[0, 8], logits[0, 9] = 3.0, 2.0, 1.0
    phrases = state(temperature=0.0, prompt=(7, 7), bad_words=[[7, 7], [7, 8, 7], [8, 7]])
    assert [sample(logits, [phrases])[0].token_id for _ in range(5)] == [7, 8, 8, 8, 8]  # the prompt does not count
    assert phrases.sequence.needs_last_token
    assert not state(bad_words=[[7]]).sequence.needs_last_token


def test_end_tokens_do_not_come_before_the_minimum():
    logits = torch.zeros(1, 50)
    logits[0, 7], logits[0, 8] = 3.0, 2.0
    short = state(temperature=0.0, min_tokens=2, stop_token_ids=frozenset([7]))
    assert [sample(logits, [short])[0].token_id for _ in range(4)] == [8, 8, 7, 7]


def test_row_without_a_token_left_does_not_affect_others():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(4, 50, dtype=torch.bool)
    allowed[3] = False
    none = {"allowed_token_ids": [7], "bad_words": [[7]]}
    states = [state(temperature=0.0, **none), state(seed=0, top_k=3, top_p=0.5, **none), state(seed=0), state()]
    *empty, fine, without = sample(logits, states, allowed)
    assert all(isinstance(token, ConstraintError) for token in [*empty, without])
    assert fine == sample(logits[2:3], [state(seed=0)])[0]


def test_logprobs_ignore_sampling_settings():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    token = sample(logits, [state(temperature=0.3, top_k=2, repetition_penalty=2.0, top_logprobs=3, seed=0)])[0]
    expected = logits[0].log_softmax(-1)
    assert token.logprob == pytest.approx(expected[token.token_id].item())
    assert [token_id for token_id, _ in token.top] == expected.topk(3).indices.tolist()
    assert sample(logits, [state(seed=0)])[0].logprob is None


def test_extreme_settings_do_not_break():
    logits = torch.tensor([[1e30, -1e30, 0.0, -float("inf")]] * 3)
    states = [
        state(4, (0,), temperature=1e-30),
        state(4, (0,), temperature=1e30, top_k=10**400),
        state(4, (0,), top_p=1e-9),
    ]
    tokens = sample(logits, states)
    assert tokens[0].token_id == tokens[2].token_id == 0
    assert tokens[1].token_id != 3


def test_row_with_nan_does_not_affect_others():
    logits = torch.zeros(2, 50)
    logits[0, 3] = float("nan")
    logits[1, 4] = 1.0
    broken, fine = sample(logits, [state(seed=0), state(temperature=0.0)])
    assert isinstance(broken, FloatingPointError)
    assert fine.token_id == 4


def test_constraints_limit_their_own_rows():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(3, 50, dtype=torch.bool)
    allowed[1:] = False
    allowed[1:, [7, 9]] = True
    states = [state(temperature=0.0), state(temperature=0.0), state(seed=0, top_k=5)]
    tokens = [token.token_id for token in sample(logits, states, allowed)]
    assert tokens[0] == int(logits[0].argmax())
    assert tokens[1] == (7 if logits[1, 7] > logits[1, 9] else 9)
    assert tokens[2] in (7, 9)


def test_top_p_beyond_the_tokens_that_are_ranked_first():
    """A flat distribution over a large vocabulary needs all of it in order."""
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0)) / 10
    drawn = [token.token_id for token in sample(logits, [state(5000, seed=seed, top_p=0.8) for seed in range(40)])]
    for row, token_id in enumerate(drawn):
        probabilities = logits[row].softmax(-1)
        more_likely = probabilities[probabilities > probabilities[token_id]].sum()
        assert more_likely < 0.8
    assert len(set(drawn)) > 30
    alone = [sample(logits[row : row + 1], [state(5000, seed=row, top_p=0.8)])[0].token_id for row in range(40)]
    assert alone == drawn


def test_a_row_of_the_state_keeps_nothing_of_the_sequence_before():
    """Penalties and biases of one that has ended do not reach the next one there."""
    logits = torch.zeros(2, 50)
    logits[0, 5], logits[0, 6], logits[1, 7] = 3.0, 2.0, 1.0
    settings = {"temperature": 0.0, "repetition_penalty": 2.0, "presence_penalty": 1.0, "logit_bias": {6: 0.1, 9: 9.0}}
    settings |= {"bad_words": [[5]], "allowed_token_ids": [6, 9]}
    first, other = state(**settings), state(temperature=0.0, logit_bias={7: 1.0}, frequency_penalty=0.1)
    for _ in range(3):
        sample(logits, [first, other])
    sampler = first.sampler
    following = state(temperature=0.0)
    following.sampler, following.sequence.slot = sampler, 0
    sampler.add(following.sequence)
    assert [token.token_id for token in sample(logits, [following, other])] == [5, 7]


def test_the_state_of_a_sequence_can_be_set_again():
    """After it was preempted: prompt and reply count as before."""
    logits = torch.zeros(1, 50)
    logits[0, 1], logits[0, 7], logits[0, 8] = 9.0, 8.9, 8.7
    settings = {"temperature": 0.0, "frequency_penalty": 0.3, "repetition_penalty": 1.01}
    whole, parts = state(**settings), state(**settings)
    expected = [sample(logits, [whole])[0].token_id for _ in range(12)]
    found = []
    for index in range(12):
        if index % 3 == 0:
            parts.sampler = None
        found += [sample(logits, [parts])[0].token_id]
    assert found == expected
    assert len(set(found)) > 2


def test_the_next_step_reads_the_last_token_on_the_device():
    first = state(temperature=0.0)
    logits = torch.zeros(1, 50)
    logits[0, 9] = 1
    sample(logits, [first])
    assert first.sampler.last_tokens.tolist() == [9]
    again = sequence([4, 5, 6])
    again.slot = 0
    first.sampler.add(again)
    assert first.sampler.last_tokens.tolist() == [6]


def test_a_step_that_failed_draws_the_same_number_again():
    one, other = sequence([1, 2], seed=3), sequence([1, 2], seed=3)
    drawn = []
    for _ in range(4):
        assert one.next_uniform() == one.next_uniform()
        drawn.append(one.next_uniform())
        one.token_ids.append(0)
    for number in drawn:
        assert other.next_uniform() == number
        other.num_pending += 1
    assert len(set(drawn)) == 4
