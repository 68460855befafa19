"""Sampling settings of one sequence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from numbers import Integral

_INFINITY = float("inf")
# Much smaller divisors make logits infinite in float32. At this one, a reply already only repeats its prompt.
LEAST_REPETITION_PENALTY = 0.01


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one sequence.

    Args:
        max_tokens: maximum number of new tokens; 0 to have only the prompt's log-probabilities.
        temperature: divisor of the logits; 0 for greedy decoding.
        top_k: number of most likely tokens to choose among; 0 for all.
        top_p: choose among the most likely tokens that together have this probability (Holtzman et al. 2019,
            https://arxiv.org/abs/1904.09751, section 3.1).
        min_p: choose among the tokens that are at least this likely, relative to the most likely one (Nguyen et al.
            2024, https://arxiv.org/abs/2407.01082); 0 for all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the reply
            (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1).
        presence_penalty: subtracted from the logits of tokens in the reply.
        frequency_penalty: subtracted once for each occurrence of a token in the reply.
        logit_bias: token id → value added to its logit.
        seed: seed of the random numbers; None for a random one.
        top_logprobs: report log-probabilities of the chosen token and of this many most likely ones; None for none.
        prompt_logprobs: the same for each token of the prompt after the first.
        return_token_ids: the pieces of the reply have the ids of their tokens.
        stop_token_ids: tokens that end the reply, beside the model's own.
        include_stop: the string or the token of the request that ends the reply is part of it.
        ignore_eos: the model's own end tokens do not end the reply.
        skip_special_tokens: such tokens have no text then.
        min_tokens: minimum number of new tokens: no end token is chosen before, and no stop string looked for.
        bad_words: sequences of tokens, none empty, that do not come in the reply.
        allowed_token_ids: the only tokens that may come; None for all.

    Raises:
        ValueError: a value out of range; the message begins with the field's name.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    bad_words: Sequence[Sequence[int]] = ()
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": (_is_integer(self.max_tokens, 0), "an integer >= 0"),
            "temperature": (0 <= self.temperature < _INFINITY, "a finite number >= 0"),
            "top_k": (_is_integer(self.top_k, 0), "an integer >= 0"),
            "top_p": (0 < self.top_p <= 1, "a number > 0 and <= 1"),
            "min_p": (0 <= self.min_p <= 1, "a number >= 0 and <= 1"),
            "repetition_penalty": (
                LEAST_REPETITION_PENALTY <= self.repetition_penalty < _INFINITY,
                f"a finite number >= {LEAST_REPETITION_PENALTY}",
            ),
            "presence_penalty": (abs(self.presence_penalty) < _INFINITY, "a finite number"),
            "frequency_penalty": (abs(self.frequency_penalty) < _INFINITY, "a finite number"),
            "logit_bias": (all(map(isfinite, self.logit_bias.values())), "finite numbers"),
            "seed": (self.seed is None or isinstance(self.seed, Integral), "an integer"),
            "top_logprobs": (self.top_logprobs is None or _is_integer(self.top_logprobs, 0), "an integer >= 0"),
            "prompt_logprobs": (
                self.prompt_logprobs is None or _is_integer(self.prompt_logprobs, 0),
                "an integer >= 0",
            ),
            "min_tokens": (
                _is_integer(self.min_tokens, 0) and self.min_tokens <= self.max_tokens,
                f"an integer >= 0 and at most max_tokens, {self.max_tokens}",
            ),
            "bad_words": (all(self.bad_words), "sequences of at least one token"),
            "allowed_token_ids": (self.allowed_token_ids is None or bool(self.allowed_token_ids), "at least one token"),
        }
        for name, (holds, meaning) in ranges.items():
            if not holds:
                raise ValueError(f"{name} must be {meaning}, not {getattr(self, name)!r:.200}.")

    @cached_property
    def penalizes(self) -> bool:
        """Whether a setting depends on the tokens so far."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    @cached_property
    def banned_ids(self) -> list[int]:
        """Tokens that are bad words by themselves."""
        return [ids[0] for ids in self.bad_words if len(ids) == 1]

    @cached_property
    def bans(self) -> bool:
        """Whether some tokens never come."""
        return bool(self.banned_ids) or self.allowed_token_ids is not None


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int | Integral) and int(value) >= least
