"""Sampling settings of one sequence."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral

_INFINITY = float("inf")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one sequence.

    Args:
        max_tokens: maximum number of new tokens.
        temperature: divisor of the logits; 0 for greedy decoding.
        top_k: number of most likely tokens to choose among; 0 for all.
        top_p: choose among the most likely tokens that together have this probability (Holtzman et al. 2019,
            https://arxiv.org/abs/1904.09751, section 3.1).
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the reply
            (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1).
        presence_penalty: subtracted from the logits of tokens in the reply.
        frequency_penalty: subtracted once for each occurrence of a token in the reply.
        logit_bias: token id → value added to its logit.
        seed: seed of the random numbers; None for a random one.
        top_logprobs: report log-probabilities of the chosen token and of this many most likely ones; None for none.

    Raises:
        ValueError: a value out of range; the message begins with the field's name.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": (_is_integer(self.max_tokens, 1), "an integer >= 1"),
            "temperature": (0 <= self.temperature < _INFINITY, "a finite number >= 0"),
            "top_k": (_is_integer(self.top_k, 0), "an integer >= 0"),
            "top_p": (0 < self.top_p <= 1, "a number > 0 and <= 1"),
            "repetition_penalty": (0 < self.repetition_penalty < _INFINITY, "a finite number > 0"),
            "presence_penalty": (abs(self.presence_penalty) < _INFINITY, "a finite number"),
            "frequency_penalty": (abs(self.frequency_penalty) < _INFINITY, "a finite number"),
            "seed": (self.seed is None or isinstance(self.seed, Integral), "an integer"),
            "top_logprobs": (self.top_logprobs is None or _is_integer(self.top_logprobs, 0), "an integer >= 0"),
        }
        for name, (holds, meaning) in ranges.items():
            if not holds:
                raise ValueError(f"{name} must be {meaning}, not {getattr(self, name)!r}.")

    @property
    def penalizes(self) -> bool:
        """Whether a setting depends on the tokens so far."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int | Integral) and int(value) >= least
