"""Log-probabilities of prompts equal those of a forward pass, whatever the cache, and whoever else is being served."""

import pytest
import torch

from qwen.serving.engine import Engine, EngineError, TextStream, model_runner, sampler
from qwen.serving.engine.sequence import PromptLogprob
from tests.serving.engine.replies import admit_too_many, generated, is_empty, start, token_ids, wait_until

TOP = 2
TOLERANCE = 3e-5  # a few units in the last place of logits of 30


@pytest.fixture(scope="module")
def expected(tiny, prompts) -> list[torch.Tensor]:
    """Log-probabilities of the tokens after those of each prompt: (tokens, vocabulary)."""
    with torch.inference_mode():
        return [tiny[0](torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in prompts]


def score(engine: Engine, prompt: list[int], **settings) -> TextStream:
    return start(engine, prompt, **{"prompt_logprobs": TOP} | settings)


def read(stream: TextStream) -> tuple[list[PromptLogprob], list[int]]:
    """Return the scores of a prompt, which come before the reply, and the tokens of the reply."""
    pieces = list(stream)
    assert pieces[0].prompt is not None
    assert not any(piece.prompt for piece in pieces[1:])
    return pieces[0].prompt, [token.token_id for piece in pieces for token in piece.tokens]


def check(scores: list[PromptLogprob], prompt: list[int], expected: torch.Tensor) -> None:
    assert [each.token_id for each in scores] == prompt[1:]
    for each, row in zip(scores, expected, strict=False):
        assert each.logprob == pytest.approx(row[each.token_id].item(), abs=TOLERANCE)
        surely_above, perhaps_above = ((row > row[each.token_id] + shift).sum() for shift in (TOLERANCE, -TOLERANCE))
        assert surely_above < each.rank <= perhaps_above
        assert [token_id for token_id, _ in each.top] == row.topk(TOP).indices.tolist()
        assert [logprob for _, logprob in each.top] == pytest.approx(row.topk(TOP).values.tolist(), abs=TOLERANCE)


def test_scores_equal_the_model_beside_other_requests(tiny, engine, prompts, expected):
    others = [start(engine, prompt) for prompt in prompts]
    scored = [score(engine, prompt) for prompt in prompts]
    for stream, prompt, rows in zip(scored, prompts, expected, strict=True):
        scores, reply = read(stream)
        check(scores, prompt, rows)
        assert reply == generated(tiny[0], prompt, 20)
        assert stream.cached_tokens == 0
    assert [token_ids(stream) for stream in others] == [generated(tiny[0], prompt, 20) for prompt in prompts]
    wait_until(lambda: is_empty(engine))


def test_prompts_are_scored_in_chunks_and_pieces(engine, prompts, expected, monkeypatch):
    sizes = []
    logprobs = sampler.token_logprobs

    def observed(logits, *args):
        sizes.append(len(logits))
        return logprobs(logits, *args)

    monkeypatch.setattr(model_runner, "token_logprobs", observed)
    monkeypatch.setattr(model_runner, "SCORED_LOGITS", 512 * 10)  # ten tokens
    monkeypatch.setattr(engine.scheduler.budget, "maximum", 48)
    check(read(score(engine, prompts[8]))[0], prompts[8], expected[8])
    assert sum(sizes) == len(prompts[8]) - 1
    assert max(sizes) == 10


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no reuse"])
def test_a_preempted_prompt_is_scored_once(tiny, start_engine, prompts, expected, monkeypatch, reuse):
    engine = start_engine(cache_tokens=320, prefix_reuse=reuse)
    admit_too_many(engine)
    monkeypatch.setattr(engine.scheduler.budget, "tokens", lambda decoding, requests=1: 24)
    count = []
    logprobs = sampler.token_logprobs

    def counted(logits, *args):
        count.append(len(logits))
        return logprobs(logits, *args)

    monkeypatch.setattr(model_runner, "token_logprobs", counted)
    chosen = (3, 4, 5, 6, 9)
    with engine._changed:
        streams = [score(engine, prompts[index], max_tokens=60) for index in chosen]
    for index, stream in zip(chosen, streams, strict=True):
        scores, reply = read(stream)
        check(scores, prompts[index], expected[index])
        assert reply[:20] == generated(tiny[0], prompts[index], 20)
    assert engine.scheduler.num_preemptions > 0
    assert sum(count) == sum(len(prompts[index]) - 1 for index in chosen)


def test_a_prompt_that_is_in_the_cache_is_scored_and_leaves_its_own(engine, prompts, expected):
    token_ids(start(engine, prompts[7]))
    stream = score(engine, prompts[7])
    check(read(stream)[0], prompts[7], expected[7])
    assert stream.cached_tokens == 0
    after = score(engine, prompts[6])
    read(after)
    again = start(engine, prompts[6])
    token_ids(again)
    assert again.cached_tokens == 128


def test_nothing_but_scores(engine, prompts, expected):
    for index in (0, 1, 5):
        stream = score(engine, prompts[index], max_tokens=0)
        scores, reply = read(stream)
        check(scores, prompts[index], expected[index])
        assert (reply, stream.finish_reason, stream.completion_tokens) == ([], "length", 0)
    stream = start(engine, prompts[5], max_tokens=0, top_logprobs=None)
    assert list(stream) == []
    assert stream.finish_reason == "length"
    wait_until(lambda: is_empty(engine))


def test_a_prompt_as_long_as_the_context_can_be_scored(start_engine):
    engine = start_engine(cache_tokens=64)
    assert len(read(score(engine, [5] * 64, max_tokens=0))[0]) == 63


def test_scores_that_are_not_numbers_are_an_error(engine, prompts, monkeypatch):
    monkeypatch.setattr(model_runner, "token_logprobs", lambda logits, *_: torch.full((len(logits), 6), float("nan")))
    with pytest.raises(EngineError, match="NaN"):
        list(score(engine, prompts[4]))
    monkeypatch.undo()
    assert len(token_ids(start(engine, prompts[4]))) == 20
    wait_until(lambda: is_empty(engine))
