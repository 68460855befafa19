"""The engine under random requests that come, are read, cancelled and left in any order, with extreme settings."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.engine.replies import admit_too_many, is_empty, start, token_ids, wait_until

PROMPTS = [[7], [7, *range(40)], [7, *range(40), 9], [*range(130)], [255] * 64]
PLAIN = [5, *range(20)]


@pytest.fixture(scope="module")
def engine(tiny_chat_checkpoint: Path) -> Iterator:
    """An engine whose cache is so small that sequences are preempted."""
    from qwen.checkpoint.loading import load_model
    from qwen.serving.engine import Engine

    model, tokenizer = load_model(tiny_chat_checkpoint, cpu_only=True)
    engine = Engine(model, tokenizer, cache_tokens=320, max_batch_size=4, max_queue=40)
    admit_too_many(engine)
    yield engine
    engine.close(timeout=0)


@pytest.mark.slow
def test_nothing_is_lost_and_every_block_comes_back(engine) -> None:
    from hypothesis import given
    from hypothesis import strategies as st

    from qwen.serving.engine import EngineError
    from tests.fuzzing.strategies import SAMPLING_PARAMS, some_fields
    from tests.fuzzing.test_server import fixed

    actions = st.one_of(
        st.tuples(st.sampled_from(PROMPTS), some_fields(SAMPLING_PARAMS), st.sampled_from([None, "one", "two"])),
        st.tuples(st.sampled_from(["read", "cancel", "leave"]), st.integers(0, 30)),
    )
    alone = token_ids(start(engine, PLAIN, max_tokens=8))
    accepted = 0

    @fixed(25)
    @given(st.lists(actions, min_size=8, max_size=30))
    def run(actions) -> None:
        nonlocal accepted
        streams, readers = [], []
        beside = start(engine, PLAIN, max_tokens=8)
        for first, *others in actions:
            if isinstance(first, list):
                settings, name = others
                try:
                    streams.append(start(engine, first, group=name, salt=name, **{"max_tokens": 12} | settings))
                except (ValueError, OverflowError):  # refused, before the engine has it
                    continue
                readers.append(iter(streams[-1]))
            elif streams:
                chosen = others[0] % len(streams)
                if first == "cancel":
                    streams[chosen].cancel()
                elif first == "leave":
                    readers[chosen].close()
                else:
                    with contextlib.suppress(EngineError):
                        next(readers[chosen], None)
        accepted += len(streams)
        for reader in readers:
            with contextlib.suppress(EngineError):  # of its own: settings beyond those of the API
                list(reader)
        assert token_ids(beside) == alone
        wait_until(lambda: is_empty(engine))
        assert all(stream.finish_reason in ("stop", "length", "cancelled", "error") for stream in streams)
        assert not engine.failed

    run()
    assert accepted > 100
