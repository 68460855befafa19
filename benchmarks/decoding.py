"""Greedy decoding of one row by the clock, exactly as many tokens as asked for, whatever engine decodes."""

import time
from collections.abc import Callable

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

Decoder = Callable[[list[int], int, Callable[[], None]], list[int]]
"""Of the ids of a prompt, how many tokens are wanted, and what to call as soon as each of them is known: the tokens."""


def token_times(
    decode: Decoder, ids: list[int], tokens: int, progress: Callable[[int], None] = lambda done: None
) -> list[float]:
    """Seconds: when decoding began, and when each of the tokens was known. `progress` gets how many there are."""
    times = [time.perf_counter()]

    def on_token() -> None:
        times.append(time.perf_counter())
        progress(len(times) - 1)

    decode(ids, tokens, on_token)
    return times


def decode_greedily(
    model: PreTrainedModel, ids: list[int], tokens: int, on_token: Callable[[], None] = lambda: None
) -> list[int]:
    """A `Decoder`, of a model of transformers. Its own generation config counts no more: that could end early."""
    model.generation_config = GenerationConfig()
    row = torch.tensor([ids], device=model.device)
    output = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        do_sample=False,
        max_new_tokens=tokens,
        streamer=_Call(on_token),
    )
    return output[0, len(ids) :].tolist()


class _Call(BaseStreamer):
    """Calls for each token. It comes as a number, so the device has done its work."""

    def __init__(self, on_token: Callable[[], None]):
        self.on_token = on_token
        self.prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_came:
            self.on_token()
        self.prompt_came = True

    def end(self) -> None:
        pass
