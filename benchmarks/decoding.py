"""Times greedy decoding of one sequence with a fixed number of tokens, for any engine."""

import time
from collections.abc import Callable

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

Decoder = Callable[[list[int], int, Callable[[], None]], list[int]]
"""(prompt ids, number of tokens, callback for each token) → generated ids."""


def token_times(
    decode: Decoder, ids: list[int], tokens: int, progress: Callable[[int], None] = lambda done: None
) -> list[float]:
    """Return the start time and the time of each token, in seconds. `progress` is called with the token count."""
    times = [time.perf_counter()]

    def on_token() -> None:
        times.append(time.perf_counter())
        progress(len(times) - 1)

    decode(ids, tokens, on_token)
    return times


def decode_greedily(
    model: PreTrainedModel, ids: list[int], tokens: int, on_token: Callable[[], None] = lambda: None
) -> list[int]:
    """Decode with a transformers model, as a `Decoder`. Replaces its generation config, which could stop early."""
    model.generation_config = GenerationConfig()
    row = torch.tensor([ids], device=model.device)
    output = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        do_sample=False,
        max_new_tokens=tokens,
        streamer=_CallbackStreamer(on_token),
    )
    return output[0, len(ids) :].tolist()


class _CallbackStreamer(BaseStreamer):
    """Calls back for each token. Tokens arrive on the CPU, so the device has finished."""

    def __init__(self, on_token: Callable[[], None]):
        self.on_token = on_token
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self.seen_prompt:
            self.on_token()
        self.seen_prompt = True

    def end(self) -> None:
        pass
