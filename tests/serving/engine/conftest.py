"""A tiny random model with a trained length of 64, which makes prompts beyond it cheap, and engines that serve it."""

import random
from collections.abc import Callable, Iterator

import pytest

from qwen.checkpoint.loading import load_model
from qwen.serving.engine import Engine

LENGTHS = (1, 3, 17, 63, 64, 65, 130, 200, 257, 40)  # of prompts, below and above 64, 128 and 256


@pytest.fixture(scope="session")
def tiny(tiny_chat_checkpoint):
    """A random model that never ends a reply, and its tokenizer."""
    return load_model(tiny_chat_checkpoint, cpu_only=True)


@pytest.fixture
def start_engine(tiny) -> Iterator[Callable[..., Engine]]:
    """Function that starts an engine, of the tiny model unless told otherwise, which ends with the test."""
    engines = []

    def make(model=None, tokenizer=None, **settings) -> Engine:
        engine = Engine(model or tiny[0], tokenizer or tiny[1], **{"max_batch_size": 16, "max_queue": 8} | settings)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close(timeout=0)


@pytest.fixture
def engine(start_engine) -> Engine:
    return start_engine()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(256) for _ in range(length)] for length in LENGTHS]
