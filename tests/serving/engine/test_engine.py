"""The engine from the outside: streams, limits, errors, cancellation, its end."""

import asyncio
import copy
import random
import threading

import psutil
import pytest

from qwen.serving.engine import EngineClosed, EngineError, PromptTooLong, QueueFull
from qwen.serving.engine.sequence import ConstraintError
from tests.serving.engine.replies import admit_too_many, generated, is_empty, served, start, token_ids, wait_until


def test_memory_that_runs_out_makes_requests_wait(start_engine, prompts):
    engine = start_engine(cache_tokens=256)
    streams = [start(engine, prompts[4], max_tokens=30, salt=str(index)) for index in range(6)]
    assert max(engine.load().running for _ in streams[0]) <= 3  # six blocks each
    assert len({"".join(piece.text for piece in stream) for stream in streams[1:]}) == 1


def test_a_prompt_longer_than_the_cache_is_refused_with_the_numbers(start_engine):
    engine = start_engine(cache_tokens=330)
    assert engine.context_length == 320
    with pytest.raises(PromptTooLong, match=r"it has 320 tokens\. This model's maximum context length is 320 "):
        engine.start([1] * 320, engine.params())
    stream = start(engine, [1] * 318, max_tokens=100)
    assert len(token_ids(stream)) == 2  # the reply ends where the cache does
    assert stream.finish_reason == "length"


def test_a_cancelled_request_frees_its_blocks_within_a_step(start_engine, prompts, monkeypatch):
    engine = start_engine()
    leaving, staying = start(engine, prompts[6], max_tokens=5000), start(engine, prompts[7], max_tokens=5000)
    wait_until(lambda: leaving.completion_tokens > 3 and staying.completion_tokens > 3)
    scheduler, after = engine.scheduler, []
    step = engine._step

    def counted():
        step()
        held = scheduler.block_manager.num_blocks - scheduler.block_manager.num_free
        after.append((len(scheduler.running), held - len(scheduler.running[0].blocks)))

    with engine._changed:
        monkeypatch.setattr(engine, "_step", counted)
        assert len(scheduler.running) == 2
        leaving.cancel()
    wait_until(lambda: len(after) > 3)
    assert after[1] == (1, 0)  # the first may have begun before
    list(leaving)
    assert leaving.finish_reason == "cancelled"


def test_a_reader_that_stops_early_cancels(engine, prompts):
    stream = engine.start(prompts[0], engine.params(max_tokens=5000))
    iterator = iter(stream)
    next(iterator)
    wait_until(lambda: engine.load().running == 1)
    iterator.close()
    wait_until(lambda: is_empty(engine))
    assert sum(engine.load()) == 0
    assert stream.finish_reason == "cancelled"


def test_a_waiting_request_can_be_cancelled(start_engine, prompts):
    engine = start_engine(max_batch_size=1, max_queue=4)
    first = engine.start(prompts[0], engine.params(max_tokens=5000))
    second = engine.start(prompts[0], engine.params(max_tokens=5))
    second.cancel()
    assert list(second) == []
    assert second.finish_reason == "cancelled"
    assert second.cached_tokens == 0
    first.cancel()
    wait_until(lambda: is_empty(engine))


def test_a_preempted_request_can_be_cancelled(start_engine, prompts):
    engine = start_engine(cache_tokens=160, max_batch_size=2)
    admit_too_many(engine)
    streams = [start(engine, prompts[index], max_tokens=90) for index in (2, 9)]
    wait_until(lambda: engine.scheduler.num_preemptions)
    streams[1].cancel()
    assert [len(token_ids(stream)) < 90 for stream in streams] == [False, True]
    wait_until(lambda: is_empty(engine))


def test_a_full_queue_rejects_requests(start_engine, prompts):
    engine = start_engine(max_batch_size=2, max_queue=3)
    streams = [engine.start(prompts[0], engine.params(max_tokens=2000)) for _ in range(5)]
    wait_until(lambda: engine.load() == (2, 3))
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        engine.start(prompts[0], engine.params())
    streams[0].cancel()
    wait_until(lambda: sum(engine.load()) < 5)
    engine.start(prompts[0], engine.params(max_tokens=1))


def test_close_finishes_running_requests(start_engine, prompts):
    engine = start_engine()
    streams = [engine.start(prompt, engine.params(max_tokens=30)) for prompt in prompts]
    engine.close()
    assert not engine.thread.is_alive()
    assert [stream.finish_reason for stream in streams] == ["length"] * len(prompts)
    assert is_empty(engine)
    with pytest.raises(EngineClosed):
        engine.start(prompts[0], engine.params())


def test_close_cancels_after_the_timeout(start_engine, prompts):
    engine = start_engine(max_batch_size=2)
    streams = [engine.start(prompts[0], engine.params(max_tokens=8000)) for _ in range(4)]
    engine.close(timeout=0.2)
    assert not engine.thread.is_alive()
    assert {stream.finish_reason for stream in streams} == {"cancelled"}
    assert is_empty(engine)


class Failing:
    """A constraint that fails at one of its calls."""

    def __init__(self, error: Exception, call: str, after: int = 0):
        self.error, self.call, self.after = error, call, after

    def allowed(self):
        import torch

        if self.call == "allowed" and self.after == 0:
            raise self.error
        return torch.ones(512, dtype=torch.bool)

    def accept(self, token_id: int) -> None:
        if self.call == "accept" and self.after == 0:
            raise self.error
        self.after -= 1


@pytest.mark.parametrize("call", ["allowed", "accept"])
@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize(("raised", "seen"), [(KeyError, EngineError), (ConstraintError, ConstraintError)])
def test_a_failing_constraint_does_not_affect_others(tiny, engine, prompts, raised, seen, call, after):
    with engine._changed:
        constraint = Failing(raised("no such token"), call, after)
        broken = engine.start(prompts[1], engine.params(), constraint=constraint)
        fine = start(engine, prompts[2])
    assert token_ids(fine) == generated(tiny[0], prompts[2], 20)
    with pytest.raises(seen, match="no such token"):
        list(broken)
    wait_until(lambda: is_empty(engine))


def test_a_failing_callback_does_not_affect_others(tiny, engine, prompts, monkeypatch):
    with engine._changed:
        broken, fine = start(engine, prompts[1]), start(engine, prompts[2])
        monkeypatch.setattr(broken._text, "feed", lambda token: 1 / 0)
    assert token_ids(fine) == generated(tiny[0], prompts[2], 20)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        list(broken)
    wait_until(lambda: is_empty(engine))


def fail_at(engine, monkeypatch, condition) -> None:
    """Let the steps whose chunks fulfil a condition fail, after some of their keys have been written."""
    launch, block = engine.runner.launch, engine.model.transformer.h[1]
    forward = type(block).forward

    def launched(chunks):
        with monkeypatch.context() as broken:
            if condition(chunks):
                broken.setattr(type(block), "forward", fail)
            return launch(chunks)

    def fail(self, *args, **kwargs):
        if self is block:
            raise MemoryError("no room")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(engine.runner, "launch", launched)


@pytest.mark.parametrize("seed", [None, 5])
def test_a_step_that_fails_ends_only_its_prompts(tiny, engine, prompts, monkeypatch, seed):
    settings = {} if seed is None else {"seed": seed, "temperature": 1.0}
    alone = served(engine, prompts[2:4], **settings, max_tokens=60)
    fail_at(engine, monkeypatch, lambda chunks: any(chunk.sequence.num_prompt_tokens == 130 for chunk in chunks))
    running = [start(engine, prompt, **settings, max_tokens=60) for prompt in prompts[2:4]]
    wait_until(lambda: all(stream.completion_tokens > 3 for stream in running))
    with pytest.raises(EngineError, match="MemoryError: no room"):
        list(start(engine, prompts[6]))
    assert [token_ids(stream) for stream in running] == alone
    assert served(engine, [prompts[6][:90]]) == [generated(tiny[0], prompts[6][:90], 20)]
    wait_until(lambda: is_empty(engine))


def test_what_a_failed_step_shared_is_computed_again(tiny, engine, prompts, monkeypatch):
    """The second request takes the blocks that the first one is writing, and has only one token of its own."""
    failures = []

    def first_time(chunks):
        failures.append(len(failures) < 2)  # also alone
        return failures[-1]

    fail_at(engine, monkeypatch, first_time)
    prompt = prompts[6][:49]
    with engine._changed:
        streams = [start(engine, prompt, group="one"), start(engine, prompt, group="one")]
    with pytest.raises(EngineError, match="no room"):
        list(streams[0])
    assert token_ids(streams[1]) == generated(tiny[0], prompt, 20)
    assert served(engine, [prompt]) == [generated(tiny[0], prompt, 20)]


def test_a_step_without_prompts_that_fails_ends_all_of_it(tiny, engine, prompts, monkeypatch):
    fail_at(engine, monkeypatch, lambda chunks: any(chunk.start == 20 for chunk in chunks))
    with pytest.raises(EngineError, match="no room"):
        list(start(engine, prompts[2]))
    wait_until(lambda: is_empty(engine))
    assert not engine.failed
    assert served(engine, [prompts[1]], max_tokens=5) == [generated(tiny[0], prompts[1], 5)]


@pytest.mark.parametrize(
    "settings", [{}, {"cache_tokens": 480}, {"cache_tokens": 480, "prefix_reuse": False}], ids=["", "small", "no reuse"]
)
def test_nan_ends_its_own_reply_only(tiny, start_engine, prompts, settings):
    """Also later, when others get the blocks that it was in."""
    model = copy.deepcopy(tiny[0])
    model.transformer.wte.weight.data[300] = float("nan")
    prompts = [prompts[index] for index in (1, 2, 4, 6, 7)]
    alone = [generated(tiny[0], prompt, 8) for prompt in prompts]
    engine = start_engine(model, **settings)
    for _ in range(3):
        with engine._changed:
            broken = [start(engine, [300, *prompt]) for prompt in prompts]
            fine = [start(engine, prompt, max_tokens=8) for prompt in prompts]
        assert [token_ids(stream) for stream in fine] == alone
        for stream in broken:
            with pytest.raises(EngineError, match="NaN or infinity; load the model in bfloat16 or float32"):
                list(stream)
    wait_until(lambda: is_empty(engine))


def test_a_crash_of_the_loop_is_reported(start_engine, prompts, monkeypatch):
    def die():
        raise RuntimeError("a bug")

    engine = start_engine()
    with engine._changed:
        streams = [start(engine, prompt, max_tokens=8000) for prompt in prompts[:2]]
        monkeypatch.setattr(engine.scheduler, "schedule", die)
        assert not engine.failed
    for stream in streams:
        with pytest.raises(EngineError, match="a bug"):
            list(stream)
    wait_until(lambda: engine.failed)
    with pytest.raises(EngineClosed):
        engine.start(prompts[0], engine.params())


def test_a_short_prompt_overtakes_a_long_one(tiny, start_engine, monkeypatch):
    """A short request is answered while a prompt of 100 chunks is encoded, and both replies are correct."""
    monkeypatch.setattr("qwen.serving.engine.engine.PREFILL_TOKENS", 40)
    draw = random.Random(2)
    long, short = ([draw.randrange(256) for _ in range(length)] for length in (4000, 30))
    engine = start_engine()
    streams = [start(engine, long, max_tokens=2), start(engine, short, max_tokens=2)]
    replies = [token_ids(stream) for stream in streams]
    assert replies == [generated(tiny[0], prompt, 2) for prompt in (long, short)]
    assert streams[1].first_token_seconds < streams[0].first_token_seconds


def test_async_iteration(engine, prompts):
    async def read(stream):
        return "".join([piece.text async for piece in stream])

    async def read_all():
        return await asyncio.gather(*(read(start(engine, prompt, max_tokens=9)) for prompt in prompts))

    texts = asyncio.run(read_all())
    assert texts == ["".join(piece.text for piece in start(engine, prompt, max_tokens=9)) for prompt in prompts]


def test_a_reader_whose_event_loop_is_closed_cancels(engine, prompts):
    async def read_one(stream):
        async for _ in stream:
            return

    stream = start(engine, prompts[0], max_tokens=8000)
    asyncio.run(read_one(stream))
    wait_until(lambda: is_empty(engine))


def test_many_threads_submit(tiny, engine, prompts):
    results = {}

    def ask(index):
        results[index] = served(engine, [prompts[index]], max_tokens=5)[0]

    threads = [threading.Thread(target=ask, args=[index]) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(len(prompts))] == [generated(tiny[0], prompt, 5) for prompt in prompts]


def test_invalid_input_is_rejected(engine):
    with pytest.raises(ValueError, match="empty"):
        engine.start([], engine.params())
    with pytest.raises(ValueError, match="0 to 511"):
        engine.start([512], engine.params())
    with pytest.raises(ValueError, match="logit_bias"):
        engine.start([1], engine.params(logit_bias={-1: 5.0}))
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_tokens": -1}, {"repetition_penalty": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            engine.params(**wrong)


def test_settings_come_from_the_checkpoint(engine):
    params = engine.params()
    assert (params.top_p, params.top_k, params.max_tokens, params.temperature) == (0.8, 0, 24, 1.0)
    assert engine.params(temperature=0.001).temperature == 0


def test_stop_words_of_the_checkpoint_end_a_reply(tiny, start_engine, prompts, monkeypatch):
    model, tokenizer = tiny
    text = tokenizer.decode(generated(model, prompts[2], 20))
    monkeypatch.setattr(model.generation_config, "stop_words_ids", [tokenizer.encode(text[9:12])], raising=False)
    engine = start_engine()
    stream = engine.start(prompts[2], engine.params(temperature=0, max_tokens=20))
    assert "".join(piece.text for piece in stream) == text[: text.index(text[9:12])]
    assert stream.finish_reason == "stop"


@pytest.mark.slow
def test_two_thousand_requests_that_come_and_go(start_engine):
    """With disconnects, cancellations and preemptions: every block and slot comes back, and memory stays flat."""
    engine = start_engine(cache_tokens=320, max_batch_size=8, max_queue=24)
    admit_too_many(engine)
    draw = random.Random(0)
    beginnings = [[draw.randrange(256) for _ in range(64)] for _ in range(5)]
    process, memory, open_streams = psutil.Process(), [], []

    def leave(stream) -> None:
        """Read to the end, cancel, or go away after some pieces."""
        way = draw.random()
        if way < 0.3:
            stream.cancel()
        for index, _ in enumerate(stream):
            if way < 0.6 and index > 3:
                break

    for index in range(2000):
        if index in (1000, 1500):
            memory.append(process.memory_info().rss)
        prompt = [*draw.choice(beginnings)[: draw.randrange(1, 64)], draw.randrange(256)]
        settings = {"max_tokens": draw.randrange(1, 20), "temperature": draw.choice([0.0, 1.0])}
        settings |= draw.choice([{}, {"repetition_penalty": 1.1}, {"logit_bias": {70: 1.0}}, {"group": "one"}])
        open_streams.append(start(engine, prompt, salt=draw.choice([None, "salt"]), **settings))
        while len(open_streams) > 20:
            leave(open_streams.pop(draw.randrange(len(open_streams))))
    memory.append(process.memory_info().rss)
    for stream in open_streams:
        leave(stream)
    wait_until(lambda: is_empty(engine))
    assert engine.scheduler.num_preemptions > 10
    assert memory[-1] - memory[0] < 8e6
    alone = start_engine()
    assert served(engine, [beginnings[0]], max_tokens=20) == served(alone, [beginnings[0]], max_tokens=20)
