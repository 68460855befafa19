"""Replies of an engine, and those of `generate` to compare them with."""

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.serving.engine import Engine, TextStream

T = TypeVar("T")


def generated(model: QWenLMHeadModel, prompt: Sequence[int], tokens: int, **settings) -> list[int]:
    """Return the token ids that `generate` gives for one prompt."""
    ids = torch.tensor([prompt], device=model.device)
    defaults = {"do_sample": False, "top_p": None, "top_k": None, "temperature": None}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **(defaults | settings))
    return output[0, len(prompt) :].tolist()


def start(engine: Engine, prompt: Sequence[int], group: Hashable = None, salt: str | None = None, **settings):
    """Start a greedy reply of 20 tokens, unless the settings say otherwise, whose tokens `token_ids` can read."""
    params = engine.params(**{"temperature": 0.0, "max_tokens": 20, "top_logprobs": 0} | settings)
    return engine.start(prompt, params, group=group, cache_salt=salt)


def token_ids(stream: TextStream) -> list[int]:
    """Read a reply to its end."""
    return [token.token_id for piece in stream for token in piece.tokens]


def served(engine: Engine, prompts: Sequence[Sequence[int]], **settings) -> list[list[int]]:
    """Return the token ids that the engine gives for all prompts, which arrive in the same step."""
    with engine._changed:
        streams = [start(engine, prompt, **settings) for prompt in prompts]
    return [token_ids(stream) for stream in streams]


def admit_too_many(engine: Engine) -> None:
    """Admit as if replies had no tokens, so that sequences are preempted when the cache is small."""
    engine.scheduler._expected_growth = lambda sequence: 0


def wait_until(condition: Callable[[], T], seconds: float = 120.0) -> T:
    """Wait for another thread or process until a condition is true, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)
    return value


def is_empty(engine: Engine) -> bool:
    """Whether an engine without work holds nothing."""
    blocks = engine.scheduler.block_manager
    return (
        blocks.num_free == blocks.num_blocks
        and not any(blocks._holders)
        and sorted(engine.scheduler._free_slots) == list(range(engine.max_batch_size))
        and not engine.scheduler.sequences()
        and engine._unfinished == 0
        and not engine.runner._slots
    )
