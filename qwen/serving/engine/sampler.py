"""Samples the next token of each row of a batch, with its own settings.

The result of `sample` for a row depends on the logits of that row alone, and each row has its own random number
generator.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch


class ConstraintError(ValueError):
    """The constraint of a reply failed."""


class Constraint(Protocol):
    """Restricts the tokens of one sequence."""

    def allowed(self) -> torch.Tensor:
        """Return the allowed next tokens: (vocab_size), bool, on the CPU. May raise ConstraintError."""

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token."""


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

    def __post_init__(self):
        largest = float("inf")
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "an integer >= 1"),
            "temperature": (0 <= self.temperature < largest, "a finite number >= 0"),
            "top_k": (self.top_k >= 0, "an integer >= 0"),
            "top_p": (0 < self.top_p <= 1, "a number > 0 and <= 1"),
            "repetition_penalty": (0 < self.repetition_penalty < largest, "a finite number > 0"),
            "presence_penalty": (abs(self.presence_penalty) < largest, "a finite number"),
            "frequency_penalty": (abs(self.frequency_penalty) < largest, "a finite number"),
            "top_logprobs": (self.top_logprobs is None or self.top_logprobs >= 0, "an integer >= 0"),
        }
        for name, (holds, meaning) in ranges.items():
            if not holds:
                raise ValueError(f"{name} must be {meaning}, not {getattr(self, name)!r}.")


class SampledToken(NamedTuple):
    """A token and, if requested, its log-probability and the most likely tokens with theirs (natural logarithm, of the
    model's distribution before any settings are applied)."""

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class SamplingState:
    """Sampler state of one sequence."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        vocab_size: int,
        device: torch.device,
        constraint: Constraint | None = None,
    ):
        self.params, self.constraint = params, constraint
        # As a string: random.Random treats -1 and 1 as the same seed.
        self.random = random.Random(None if params.seed is None else str(params.seed))
        self.seen = self.counts = self.bias = None
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt_ids, device=device)] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)
        if params.logit_bias:
            self.bias = torch.zeros(vocab_size, device=device)
            self.bias[list(params.logit_bias)] = torch.tensor(list(params.logit_bias.values()), device=device).float()

    @property
    def adjusts(self) -> bool:
        """Whether any setting other than temperature, top-k and top-p is used."""
        return any(part is not None for part in (self.seen, self.counts, self.bias, self.constraint))

    def accept(self, token_id: int) -> None:
        """Update the state with the chosen token."""
        if self.seen is not None:
            self.seen[token_id] = True
        if self.counts is not None:
            self.counts[token_id] += 1
        if self.constraint is not None:
            self.constraint.accept(token_id)


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[SampledToken | Exception]:
    """Choose a token for every row and update its state.

    The order is that of transformers: penalties and bias, constraint, temperature, top-k, top-p.

    Args:
        logits: (B, vocab_size).
        states: one per row.

    Returns:
        One per row. An exception if the logits contain NaN or the constraint failed; other rows are unaffected.
    """
    logits = logits.float()
    adjusted, failures = _adjust(logits, states)
    chosen = adjusted.argmax(-1)
    drawing = [row for row, state in enumerate(states) if state.params.temperature > 0]
    if drawing:
        drawn = _draw(adjusted[drawing], [states[row] for row in drawing])
        chosen[torch.tensor(drawing, device=chosen.device)] = drawn
    broken = logits.isnan().any(-1)
    token_ids = torch.where(broken, -1, chosen).tolist()
    return [
        failures[row] if row in failures else _accept(logits[row], token_id, state)
        for row, (token_id, state) in enumerate(zip(token_ids, states, strict=True))
    ]


def _adjust(logits: torch.Tensor, states: Sequence[SamplingState]) -> tuple[torch.Tensor, dict[int, Exception]]:
    """Apply penalties, bias and constraints to the rows that have them. Returns the new logits, and the errors of rows
    whose constraint failed."""
    adjusted, failures = logits.clone(), {}
    for row, state in enumerate(states):
        if not state.adjusts:
            continue
        params, scores = state.params, adjusted[row]
        if state.seen is not None:
            penalised = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
            scores = torch.where(state.seen, penalised, scores)
        if state.counts is not None:
            scores = scores - params.presence_penalty * (state.counts > 0) - params.frequency_penalty * state.counts
        if state.bias is not None:
            scores = scores + state.bias
        if state.constraint is not None:
            try:
                allowed = state.constraint.allowed().to(scores.device)
            except Exception as error:
                failures[row] = error
                continue
            scores = scores.masked_fill(~allowed, -float("inf"))
        adjusted[row] = scores
    return adjusted, failures


def _draw(scores: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Apply temperature, top-k and top-p to each row and draw a token. scores: (B, vocab_size) → (B).

    Draws by inverting the cumulative distribution, in the order of the vocabulary, with one random number per row.
    Top-k and top-p are applied as thresholds on scores and probabilities, so that equally likely tokens, which are
    common in 16 bits, are kept or dropped together: their order in a sort would depend on the other rows.
    """
    vocab_size, params = scores.shape[-1], [state.params for state in states]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    scores = scores.double() - scores.amax(-1, keepdim=True)  # so that a small temperature cannot lead to inf
    scores /= column([each.temperature for each in params])
    widths = [min(each.top_k or vocab_size, vocab_size) for each in params]
    limited = [row for row, width in enumerate(widths) if width < vocab_size]
    if limited:
        ranked = scores.topk(max(widths[row] for row in limited)).values
        for row in limited:
            scores[row].masked_fill_(scores[row] < ranked[row, widths[row] - 1], -float("inf"))
    probabilities = scores.softmax(-1)
    top_p = column([each.top_p for each in params])
    if any(each.top_p < 1 for each in params):
        ranked = probabilities.sort(-1, descending=True).values
        reached = (ranked.cumsum(-1) - ranked < top_p).sum(-1, keepdim=True)  # the token that reaches top_p is kept
        probabilities = probabilities.masked_fill(probabilities < ranked.gather(-1, (reached - 1).clamp(min=0)), 0.0)
    cumulative = probabilities.cumsum(-1)
    uniform = column([state.random.random() for state in states])
    place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    # Rounding may place the number after the last token with a nonzero probability.
    last = torch.where(probabilities > 0, torch.arange(vocab_size, device=scores.device), 0).amax(-1, keepdim=True)
    return torch.minimum(place, last)[:, 0]


def _accept(logits: torch.Tensor, token_id: int, state: SamplingState) -> SampledToken | Exception:
    """Update the state; return the chosen token, with log-probabilities if requested. logits: (vocab_size)."""
    if token_id < 0:
        return FloatingPointError("the logits contain NaN; load the model in bfloat16 or float32")
    try:
        state.accept(token_id)
    except Exception as error:
        return error
    if state.params.top_logprobs is None:
        return SampledToken(token_id)
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(state.params.top_logprobs, len(logprobs)))
    return SampledToken(token_id, logprobs[token_id].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))
