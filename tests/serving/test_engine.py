"""Tests of the engine without HTTP: cache, sampler, scheduler, detokenizer.

Greedy replies are compared with those of `model.generate`. A tiny random model with a trained length of 64 makes longer
prompts cheap.
"""

import asyncio
import random
import threading
import time
from collections import Counter

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen.checkpoint.loading import load_model
from qwen.model.qwen_generation_utils import DEFAULT_SYSTEM, make_context
from qwen.serving.engine import Engine, EngineError, PromptTooLong, QueueFull, SchedulerClosed
from qwen.serving.engine import scheduler as scheduler_module
from qwen.serving.engine.batched_kv_cache import RaggedCache
from qwen.serving.engine.detokenizer import IncrementalText
from qwen.serving.engine.sampler import ConstraintError, SampledToken, SamplingParams, SamplingState, sample
from qwen.serving.engine.scheduler import EndReason, GenerationSequence

LENGTHS = (1, 3, 17, 63, 64, 65, 130, 200, 257, 40)  # of prompts, below and above 64, 128 and 256


@pytest.fixture(scope="module")
def tiny(tiny_chat_checkpoint):
    """A random model with a trained length of 64 that never ends a reply, and its tokenizer."""
    return load_model(tiny_chat_checkpoint, cpu_only=True)


@pytest.fixture
def engine(tiny):
    engine = Engine(*tiny, max_batch_size=16, max_queue=8)
    yield engine
    engine.close(timeout=0)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(length)] for length in LENGTHS]


def generated(model, prompt: list[int], tokens: int, **settings) -> list[int]:
    """Return the token ids that `generate` gives for one prompt."""
    ids = torch.tensor([prompt], device=model.device)
    defaults = {"do_sample": False, "top_p": None, "top_k": None}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **(defaults | settings))
    return output[0, len(prompt) :].tolist()


def served(engine: Engine, prompts: list[list[int]], **settings) -> list[list[int]]:
    """Return the token ids that the engine gives for all prompts at once."""
    params = engine.params(**{"temperature": 0.0, "max_tokens": 20, "top_logprobs": 0} | settings)
    streams = [engine.start(prompt, params) for prompt in prompts]
    return [[token.token_id for piece in stream for token in piece.tokens] for stream in streams]


def test_batched_replies_equal_generate(tiny, engine, prompts):
    assert served(engine, prompts) == [generated(tiny[0], prompt, 20) for prompt in prompts]


def test_ntk_base_changes_replies_past_the_trained_length(tiny, engine, prompts):
    """Shows that the comparison of tokens above would detect rows that share an NTK base."""
    model = tiny[0]
    alone = generated(model, prompts[8], 20)
    model.config.use_dynamic_ntk = model.transformer.config.use_dynamic_ntk = False
    try:
        assert generated(model, prompts[8], 20) != alone
    finally:
        model.config.use_dynamic_ntk = model.transformer.config.use_dynamic_ntk = True


def test_chunked_prefill(tiny, prompts, monkeypatch):
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 48)
    engine = Engine(*tiny)
    try:
        assert served(engine, prompts) == [generated(tiny[0], prompt, 20) for prompt in prompts]
    finally:
        engine.close(timeout=0)


@pytest.mark.parametrize("kernel", [False, True])
def test_eight_bit_cache(tiny_chat_checkpoint, prompts, kernel):
    model, tokenizer = load_model(
        tiny_chat_checkpoint, cpu_only=True, use_cache_quantization=True, use_cache_kernel=kernel
    )
    engine = Engine(model, tokenizer)
    try:
        assert served(engine, prompts) == [generated(model, prompt, 20) for prompt in prompts]
    finally:
        engine.close(timeout=0)


def test_repetition_penalty_equals_transformers(tiny, engine, prompts):
    alone = [generated(tiny[0], prompt, 20, repetition_penalty=1.3) for prompt in prompts]
    assert served(engine, prompts, repetition_penalty=1.3) == alone
    assert alone != [generated(tiny[0], prompt, 20) for prompt in prompts]


def test_other_requests_do_not_change_a_reply(engine, prompts):
    """Compare a seeded request alone and among others that start and stop at random."""
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_tokens": 40}
    alone = served(engine, [prompts[3]], **settings)[0]
    stream = engine.start(prompts[3], engine.params(top_logprobs=0, **settings))
    rng = random.Random(1)
    others = []
    interleaved = []
    for piece in stream:
        interleaved += [token.token_id for token in piece.tokens]
        if rng.random() < 0.5 and engine.load().queued < 4:
            others.append(engine.start(rng.choice(prompts), engine.params(max_tokens=rng.randrange(1, 30))))
        if others and rng.random() < 0.3:
            others.pop(rng.randrange(len(others))).cancel()
    assert interleaved == alone


def test_same_seed_repeats_and_another_differs(engine, prompts):
    drawn = [served(engine, [prompts[2]], temperature=1.0, top_p=1.0, seed=seed)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    unseeded = [served(engine, [prompts[2]], temperature=1.0, top_p=1.0)[0] for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_long_and_short_rows_have_separate_caches(tiny, prompts):
    engine = Engine(*tiny, cache_tokens=8192)
    try:
        long, short = engine.params(temperature=0, max_tokens=1500), engine.params(temperature=0, max_tokens=20)
        streams = [engine.start(prompts[0], long), *(engine.start(prompt, short) for prompt in prompts)]
        wait_until(lambda: set(engine.scheduler.batches) == {512, 2048})
        for stream in streams[1:]:
            for _ in stream:
                pass
            assert stream.finish_reason == "length"
            assert stream.completion_tokens == 20
    finally:
        engine.close(timeout=0)


def test_rows_wait_for_memory_and_then_run(tiny, prompts):
    engine = Engine(*tiny, max_batch_size=16, cache_tokens=1024)  # two rows of 512
    try:
        streams = [engine.start(prompts[4], engine.params(temperature=0, max_tokens=30)) for _ in range(6)]
        seen = max(engine.load().running for _ in streams[0])
        assert seen <= 2
        texts = {"".join(piece.text for piece in stream) for stream in streams[1:]}
        assert len(texts) == 1
        with pytest.raises(PromptTooLong, match="1024"):
            engine.start([1] * 1024, engine.params())
    finally:
        engine.close(timeout=0)


def test_cancelling_frees_the_slot(engine, prompts):
    stream = engine.start(prompts[0], engine.params(max_tokens=5000))
    iterator = iter(stream)
    next(iterator)
    wait_until(lambda: engine.load().running == 1)
    iterator.close()  # the reader stops early
    wait_until(lambda: sum(engine.load()) == 0)
    assert not engine.scheduler.batches
    assert stream.finish_reason == "cancelled"


def test_waiting_request_can_be_cancelled(tiny, prompts):
    engine = Engine(*tiny, max_batch_size=1, max_queue=4)
    try:
        first = engine.start(prompts[0], engine.params(max_tokens=5000))
        second = engine.start(prompts[0], engine.params(max_tokens=5))
        second.cancel()
        assert list(second) == []
        assert second.finish_reason == "cancelled"
        first.cancel()
    finally:
        engine.close(timeout=0)


def test_full_queue_rejects_requests(tiny, prompts):
    engine = Engine(*tiny, max_batch_size=2, max_queue=3)
    try:
        streams = [engine.start(prompts[0], engine.params(max_tokens=2000)) for _ in range(5)]
        with pytest.raises(QueueFull):
            engine.start(prompts[0], engine.params())
        streams[0].cancel()
        wait_until(lambda: sum(engine.load()) < 5)
        engine.start(prompts[0], engine.params(max_tokens=1))
    finally:
        engine.close(timeout=0)


def test_close_finishes_running_requests(tiny, prompts):
    engine = Engine(*tiny)
    streams = [engine.start(prompt, engine.params(max_tokens=30)) for prompt in prompts]
    engine.close()
    assert not engine.scheduler.thread.is_alive()
    assert [stream.finish_reason for stream in streams] == ["length"] * len(prompts)
    with pytest.raises(SchedulerClosed):
        engine.start(prompts[0], engine.params())


def test_close_cancels_after_timeout(tiny, prompts):
    engine = Engine(*tiny, max_batch_size=2)
    streams = [engine.start(prompts[0], engine.params(max_tokens=8000)) for _ in range(4)]
    engine.close(timeout=0.2)
    assert not engine.scheduler.thread.is_alive()
    assert {stream.finish_reason for stream in streams} == {"cancelled"}


@pytest.mark.parametrize(("raised", "seen"), [(KeyError, EngineError), (ConstraintError, ConstraintError)])
def test_failing_row_does_not_affect_others(tiny, engine, prompts, raised, seen):
    class Broken:
        def allowed(self):
            raise raised("no such token")

    broken = engine.start(prompts[1], engine.params(), constraint=Broken())
    fine = served(engine, [prompts[2]])
    with pytest.raises(seen, match="no such token"):
        list(broken)
    assert fine == [generated(tiny[0], prompts[2], 20)]


def test_model_error_ends_the_batch_but_not_the_engine(tiny, engine, prompts, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine.scheduler, "_forward", fail)
        with pytest.raises(EngineError, match="out of memory"):
            list(engine.start(prompts[0], engine.params()))
    assert served(engine, [prompts[2]]) == [generated(tiny[0], prompts[2], 20)]


def test_every_sequence_ends_once_when_memory_runs_out(tiny, engine, prompts, monkeypatch):
    """The second of three prompts that were prefilled together cannot be added to the batch; the first continues."""
    join, calls, ends = RaggedCache.join, [], []

    def fail_second_time(cache, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        join(cache, *arguments)

    monkeypatch.setattr(RaggedCache, "join", fail_second_time)
    hold = threading.Event()
    monkeypatch.setattr(engine.scheduler, "_admit", lambda admit=engine.scheduler._admit: hold.wait() and admit())
    params = engine.params(temperature=0, max_tokens=20)
    for index in range(3):
        engine.scheduler.submit(
            GenerationSequence(
                prompts[2],
                params,
                frozenset(),
                on_token=lambda token: False,
                on_end=lambda reason, error, index=index: ends.append((index, reason)),
            )
        )
    hold.set()
    wait_until(lambda: len(ends) == 3)
    wait_until(lambda: sum(engine.load()) == 0)
    assert sorted(ends) == [(0, EndReason.LENGTH), (1, EndReason.ERROR), (2, EndReason.ERROR)]


def test_scheduler_crash_is_reported(tiny, prompts, monkeypatch):
    engine = Engine(*tiny)

    def die():
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine.scheduler, "_admit", die)
    assert not engine.failed
    with pytest.raises(EngineError, match="a bug"):
        list(engine.start(prompts[0], engine.params()))
    assert engine.failed
    with pytest.raises(SchedulerClosed):
        engine.start(prompts[0], engine.params())


def test_short_prompts_overtake_a_long_one(tiny, monkeypatch):
    """A short request is answered while a prompt of 100 chunks is prefilled, and both replies are correct."""
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 40)
    rng = random.Random(2)
    long, short = ([rng.randrange(256) for _ in range(length)] for length in (4000, 30))
    engine = Engine(*tiny)
    try:
        params = engine.params(temperature=0, max_tokens=4, top_logprobs=0)
        streams = [engine.start(long, params), engine.start(short, params)]
        replies = [[token.token_id for piece in stream for token in piece.tokens] for stream in streams]
        assert replies == [generated(tiny[0], prompt, 4) for prompt in (long, short)]
        assert streams[1].first_token_seconds < streams[0].first_token_seconds / 2
    finally:
        engine.close(timeout=0)


def test_async_iteration(engine, prompts):
    async def read(stream):
        return "".join([piece.text async for piece in stream])

    async def read_all():
        return await asyncio.gather(
            *(read(engine.start(p, engine.params(temperature=0, max_tokens=9))) for p in prompts)
        )

    texts = asyncio.run(read_all())
    for prompt, text in zip(prompts, texts, strict=True):
        stream = engine.start(prompt, engine.params(temperature=0, max_tokens=9))
        assert "".join(piece.text for piece in stream) == text


def test_many_threads_submit(engine, tiny, prompts):
    results = {}

    def ask(index):
        results[index] = served(engine, [prompts[index]], max_tokens=5)[0]

    threads = [threading.Thread(target=ask, args=[index]) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(len(prompts))] == [generated(tiny[0], prompt, 5) for prompt in prompts]


def test_engine_rejects_invalid_input(engine, prompts):
    with pytest.raises(ValueError, match="empty"):
        engine.start([], engine.params())
    with pytest.raises(ValueError, match="0 to 511"):
        engine.start([512], engine.params())
    with pytest.raises(ValueError, match="logit_bias"):
        engine.start([1], engine.params(logit_bias={-1: 5.0}))
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_tokens": 0}, {"repetition_penalty": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            engine.params(**wrong)


def test_settings_come_from_the_checkpoint(engine):
    params = engine.params()
    assert (params.top_p, params.top_k, params.max_tokens, params.temperature) == (0.8, 0, 24, 1.0)
    assert engine.params(temperature=0.001).temperature == 0


def test_stop_words_of_the_checkpoint_end_a_reply(tiny, prompts):
    model, tokenizer = tiny
    text = tokenizer.decode(generated(model, prompts[2], 20))
    model.generation_config.stop_words_ids = [tokenizer.encode(text[9:12])]
    try:
        engine = Engine(model, tokenizer)
        stream = engine.start(prompts[2], engine.params(temperature=0, max_tokens=20))
        assert "".join(piece.text for piece in stream) == text[: text.index(text[9:12])]
        assert stream.finish_reason == "stop"
        engine.close(timeout=0)
    finally:
        del model.generation_config.stop_words_ids


@pytest.mark.parametrize("quantized", [False, True])
def test_removed_rows_are_zeroed(quantized):
    """NaN of a failed reply must not reach the one that takes its row."""
    cache = RaggedCache(1, 64, torch.device("cpu"), quantized)

    def prompt(length: int, value: float) -> DynamicCache:
        encoded = DynamicCache()
        encoded.update(torch.full((1, 2, length, 4), value), torch.full((1, 2, length, 4), value), 0)
        return encoded

    for length, value in ((50, 1.0), (50, float("nan")), (5, 2.0), (50, float("nan"))):
        cache.join(prompt(length, value), 0, length)
    cache.leave(3)  # the last row
    cache.leave(1)  # the short row moves there
    cache.join(prompt(3, 3.0), 0, 3)
    assert cache.lengths.tokens == [50, 5, 3]
    keys, values = cache.update(torch.ones(3, 2, 1, 4), torch.ones(3, 2, 1, 4), 0)
    assert keys.isfinite().all()
    assert values.isfinite().all()
    torch.testing.assert_close(keys[1, :, :5], torch.full((2, 5, 4), 2.0))
    torch.testing.assert_close(keys[2, :, :3], torch.full((2, 3, 4), 3.0))


# Whole replies of the bundled model.


def test_engine_reply_equals_model_chat(bundled_chat):
    model, tokenizer = load_model(bundled_chat, cpu_only=True)
    queries = ["Hello!", "What is 47 + 38?", "你好，你是谁？", "My name is Alice. Please remember it."]
    expected = [model.chat(tokenizer, query, do_sample=False)[0] for query in queries]
    engine = Engine(model, tokenizer)
    try:
        streams = [
            engine.start(
                make_context(tokenizer, query, system=DEFAULT_SYSTEM)[1],
                engine.params(temperature=0),
                lstrip=True,
                rstrip=True,
            )
            for query in queries
        ]
        assert ["".join(piece.text for piece in stream) for stream in streams] == expected
        assert {stream.finish_reason for stream in streams} == {"stop"}
        assert [stream.completion_tokens for stream in streams] == [len(tokenizer.encode(text)) for text in expected]
    finally:
        engine.close(timeout=0)


# The sampler.


def state(vocab_size: int = 50, prompt=(1, 2, 3), **settings) -> SamplingState:
    return SamplingState(prompt, SamplingParams(**{"max_tokens": 10} | settings), vocab_size, torch.device("cpu"))


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_p": 0.5},
        {"top_p": 0.9, "temperature": 0.7},
        {"top_k": 8, "top_p": 0.6, "temperature": 2.0},
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
    expected = warpers(torch.tensor([[1, 2, 3]]), logits[None].clone())[0].softmax(-1)

    rows = 4000
    states = [state(repetition_penalty=1.2, seed=seed, **settings) for seed in range(rows)]
    counts = Counter(token.token_id for token in sample(logits.expand(rows, -1), states))
    assert set(counts) <= set(expected.nonzero().flatten().tolist())
    drawn = torch.tensor([counts[token] / rows for token in range(50)])
    assert (drawn - expected).abs().max() < 4 * (0.25 / rows) ** 0.5  # four standard deviations


def test_sampling_does_not_depend_on_other_rows():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    settings = [{"seed": 1}, {"seed": 2, "top_k": 3}, {"temperature": 0.0}, {"seed": 4, "top_p": 0.4}]
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


# The detokenizer.


def feed_bytes(tokenizer, text: str, **settings) -> tuple[list[str], IncrementalText]:
    """Feed a text byte by byte, each a token."""
    detokenizer = IncrementalText(tokenizer, **settings)
    pieces = []
    for byte in text.encode():
        pieces.append(detokenizer.feed(SampledToken(byte, -1.0, [])))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()], detokenizer


@pytest.mark.parametrize("text", ["plain", "  你好，世界 😀  ", "a\nObs\nObserv\nObservation: x", "ObObservation:", ""])
def test_incremental_text_equals_whole_text(tiny, text):
    pieces, detokenizer = feed_bytes(tiny[1], text, stop=["Observation:", "\nObservation:"], lstrip=True, rstrip=True)
    assert "".join(piece.text for piece in pieces) == text.split("Observation:")[0].strip()
    assert detokenizer.stopped == ("Observation:" in text)


def test_no_part_of_a_stop_string_is_ever_shown(tiny):
    pieces, _ = feed_bytes(tiny[1], "abcSTOdefSTOP never", stop=["STOP"])
    shown = ""
    for piece in pieces:
        shown += piece.text
        assert "abcSTOdef".startswith(shown)
    assert shown == "abcSTOdef"


def test_first_of_several_stop_strings_wins(tiny):
    pieces, _ = feed_bytes(tiny[1], "one, two; three", stop=[";", ",", "one, two; t"])
    assert "".join(piece.text for piece in pieces) == "one"


def test_unfinished_stop_string_is_emitted_at_the_end(tiny):
    pieces, _ = feed_bytes(tiny[1], "almost STO", stop=["STOP"])
    assert pieces[-1].text == "STO"


def test_tokens_come_with_their_text(tiny):
    pieces, _ = feed_bytes(tiny[1], "hi 你STOP", stop=["STOP"])
    given = [token.token_id for piece in pieces for token in piece.tokens]
    assert bytes(given).decode() == "hi 你"
    assert all(piece.text for piece in pieces if piece.tokens)


def test_incomplete_character_is_replaced(tiny):
    detokenizer = IncrementalText(tiny[1])
    assert detokenizer.feed(SampledToken("你".encode()[0])).text == ""
    assert detokenizer.finish().text == "\N{REPLACEMENT CHARACTER}"


def wait_until(condition, seconds: float = 20.0) -> None:
    """Wait for another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)
