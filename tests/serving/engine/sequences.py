"""Sequences for tests without a model."""

from collections.abc import Callable, Iterable
from typing import Any

from qwen.serving.engine.sampling_params import SamplingParams
from qwen.serving.engine.sequence import FinishReason, SampledToken, Sequence


def sequence(
    prompt_ids: Iterable[int],
    *,
    on_end: Callable[[FinishReason, Exception | None, SampledToken | None], None] = lambda reason, error, token: None,
    group: object = None,
    alpha_index: int = 0,
    cache_key: tuple[str, ...] = (),
    **params: Any,
) -> Sequence:
    """Return a sequence that nobody reads."""
    settings = SamplingParams(**{"max_tokens": 10} | params)
    return Sequence(
        list(prompt_ids),
        settings,
        frozenset(),
        lambda token: False,
        on_end,
        group=group,
        alpha_index=alpha_index,
        cache_key=cache_key,
    )
