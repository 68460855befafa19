"""Samples the next token of each row of a batch, with its own settings, for all rows at once.

The result for a row depends on its logits, its settings and its random number alone. The host decides which operations
a step needs by the settings of its rows; nothing depends on values on the device, which the host waits for once, when
it reads the result.

Shapes: R rows, V vocabulary.
"""

from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch

from ..._renamed import old_names
from .paged_kv_cache import lazy_zeros
from .sequence import ConstraintError, SampledToken, Sequence

# Top-p needs the most likely tokens in order. On a CPU so many are sorted first, and all where they do not suffice.
RANKED_FIRST = 1024
SETTINGS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "top_k")
LARGEST = torch.finfo(torch.float32).max
NOT_FINITE, NONE_ALLOWED = -1, -2  # instead of a token: its logits contain NaN or infinity; all are forbidden


class SampleRequest(NamedTuple):
    """What the host decides about the sampling of a step.

    Args:
        settings: for each row the values of `SETTINGS`, within float32, and the random number.
        forbidden: rows and the tokens that must not come there next.
    """

    sequences: Rows[Sequence]
    settings: list[list[float]]
    forbidden: list[tuple[int, int]]

    @classmethod
    def of(cls, sequences: Rows[Sequence]) -> "SampleRequest":
        """Draw the random numbers of some sequences."""
        settings = []
        forbidden: list[tuple[int, int]] = []
        for row, sequence in enumerate(sequences):
            values = (getattr(sequence.params, name) for name in SETTINGS)
            settings.append([*(min(max(value, -LARGEST), LARGEST) for value in values), sequence.next_uniform()])
            if sequence.restricts_next:
                forbidden += [(row, token_id) for token_id in sequence.forbidden_ids]
        return cls(sequences, settings, forbidden)


class Sampler:
    """The state of all rows on the device, and the operations on it.

    Args:
        vocab_size: number of logits.
        num_slots: rows of the state; each running sequence has one.

    Attributes:
        last_tokens: (num_slots), the last token of each sequence: the next step reads it there.
    """

    def __init__(self, vocab_size: int, num_slots: int, device: torch.device):
        self.vocab_size, self.num_slots, self.device = vocab_size, num_slots, device
        self.last_tokens = torch.zeros(num_slots, dtype=torch.long, device=device)
        # Allocated when the first request needs them.
        self._in_text: torch.Tensor | None = None  # tokens of prompt and reply: (num_slots, V), bool
        self._counts: torch.Tensor | None = None  # of tokens in the reply: (num_slots, V), int32
        self._bias: torch.Tensor | None = None  # (num_slots, V), float32

    def add(self, sequence: Sequence) -> None:
        """Set the state of a sequence that has a slot from now on."""
        params, slot = sequence.params, sequence.slot
        self.last_tokens[slot] = sequence.token_ids[-1]
        if params.penalizes:
            if self._in_text is None or self._counts is None:
                shape = (self.num_slots, self.vocab_size)
                self._in_text = lazy_zeros(shape, torch.bool, self.device)
                self._counts = lazy_zeros(shape, torch.int32, self.device)
            self._in_text[slot].zero_()
            self._in_text[slot].index_fill_(0, self._ids(sequence.token_ids), True)
            self._counts[slot].zero_()
            reply = self._ids(sequence.reply_ids)
            self._counts[slot].index_add_(0, reply, torch.ones_like(reply, dtype=torch.int32))
        if self._bias is not None:
            self._bias[slot].zero_()
        if params.logit_bias or params.bans:
            if self._bias is None:
                self._bias = lazy_zeros((self.num_slots, self.vocab_size), torch.float32, self.device)
            bias = self._bias[slot]
            if params.allowed_token_ids is not None:
                bias.fill_(-float("inf"))
                bias.index_fill_(0, self._ids(params.allowed_token_ids), 0.0)
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            bias.index_add_(0, self._ids(list(params.logit_bias)), values.to(self.device))
            bias.index_fill_(0, self._ids(params.banned_ids), -float("inf"))

    def _ids(self, token_ids: Rows[int]) -> torch.Tensor:
        return torch.tensor(token_ids, dtype=torch.long).to(self.device)

    def sample(
        self,
        logits: torch.Tensor,
        request: SampleRequest,
        slots: torch.Tensor,
        settings: torch.Tensor,
        allowed: torch.Tensor | None = None,
        forbidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Choose a token for every row and update its state.

        The order is that of transformers: penalties and bias, constraint, temperature, top-k, top-p, min-p.

        Args:
            logits: (R, V).
            slots: (R), the slot of each row.
            settings: (R, 8), `request.settings` on the device.
            allowed: (R, V), bool, the tokens that constraints allow.
            forbidden: (…, 2), `request.forbidden` on the device.

        Returns:
            (R, 1 + …), float64, for `unpack`.
        """
        logits = logits.float()
        params = [sequence.params for sequence in request.sequences]
        temperature, top_p, min_p, repetition, presence, frequency, top_k, _ = settings.float()[:, :, None].unbind(1)
        scores = logits
        penalizes = any(each.penalizes for each in params)
        if penalizes:
            assert self._in_text is not None
            assert self._counts is not None
            penalized = torch.where(scores > 0, scores / repetition, scores * repetition)
            scores = penalized.where(self._in_text[slots] & (repetition != 1), scores)
            if any(each.presence_penalty or each.frequency_penalty for each in params):
                counts = self._counts[slots]
                scores = scores - presence * (counts > 0) - frequency * counts
        bans = any(each.bans for each in params)
        if bans or any(each.logit_bias for each in params):
            assert self._bias is not None
            scores = scores + self._bias[slots]
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -float("inf"))
        if forbidden is not None:
            scores = scores.index_put((forbidden[:, 0], forbidden[:, 1]), scores.new_full((), -float("inf")))
        chosen = scores.argmax(-1)
        if any(each.temperature > 0 for each in params):
            drawn = self._draw(scores, params, temperature, top_k, top_p, min_p, settings[:, -1:])
            chosen = drawn.where(temperature[:, 0] > 0, chosen)
        self.last_tokens.index_copy_(0, slots, chosen)
        if penalizes:
            assert self._in_text is not None
            assert self._counts is not None
            self._in_text.index_put_((slots, chosen), torch.ones_like(chosen, dtype=torch.bool))
            self._counts.index_put_((slots, chosen), torch.ones_like(chosen, dtype=torch.int32), accumulate=True)
        tokens = chosen.where(logits.amax(-1) < float("inf"), NOT_FINITE)[:, None]  # false for NaN, too
        if bans or allowed is not None or forbidden is not None:
            tokens = tokens.masked_fill(scores.isneginf().all(-1, keepdim=True), NONE_ALLOWED)
        widest = max((each.top_logprobs for each in params if each.top_logprobs is not None), default=None)
        if widest is None:
            return tokens.double()
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(widest, self.vocab_size))
        return torch.cat([part.double() for part in (tokens, logprobs.gather(1, chosen[:, None]), *top)], dim=1)

    def _draw(
        self,
        scores: torch.Tensor,
        params: Rows,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """Apply temperature, top-k, top-p and min-p to each row, and draw a token. scores: (R, V); settings: (R, 1) →
        (R).

        Draws by inverting the cumulative distribution, in the order of the vocabulary, with one random number per row.
        The limits are applied as thresholds on scores and probabilities, so that equally likely tokens, which are
        common in 16 bits, are kept or dropped together: their order in a sort would depend on the other rows.
        """
        temperature = temperature.where(temperature > 0, 1.0)
        scores = (scores - scores.amax(-1, keepdim=True)) / temperature  # ≤ 0, so that no temperature leads to inf
        widths = [each.top_k for each in params if 0 < each.top_k < self.vocab_size]
        if widths:
            ranked = scores.topk(max(widths)).values
            last = (top_k.long() - 1).clamp(0, ranked.shape[1] - 1)
            limited = (top_k > 0) & (top_k < self.vocab_size)
            scores = scores.masked_fill((scores < ranked.gather(1, last)) & limited, -float("inf"))
        probabilities = scores.softmax(-1)
        if any(each.top_p < 1 for each in params):
            least = _top_p_threshold(probabilities, top_p)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        if any(each.min_p > 0 for each in params):
            least = min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        # Rounding may place the number after the last token with a nonzero probability.
        last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)
        return torch.minimum(place, last)[:, 0]


def _top_p_threshold(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return the probability of the least likely token that is kept: (R, 1). It is the one that reaches top_p."""

    def threshold(ranked: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
        mass = ranked.cumsum(-1, dtype=torch.float64)
        reached = (mass - ranked < top_p).sum(-1, keepdim=True)
        return ranked.gather(-1, (reached - 1).clamp(min=0)).where(top_p < 1, 0.0)

    if probabilities.device.type != "cpu" or probabilities.shape[1] <= RANKED_FIRST:
        return threshold(probabilities.sort(-1, descending=True).values, top_p)
    ranked = probabilities.topk(RANKED_FIRST).values
    found = threshold(ranked, top_p)
    short = ((ranked.sum(-1, keepdim=True) < top_p) & (top_p < 1))[:, 0]
    if short.any():
        found[short] = threshold(probabilities[short].sort(-1, descending=True).values, top_p[short])
    return found


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, top: int) -> torch.Tensor:
    """Return the log-probability and the rank of a token for each row, the most likely tokens, and theirs.

    Args:
        logits: (R, V).
        token_ids: (R).
        top: how many of the most likely tokens to return.

    Returns:
        (R, 2 + 2 · top), float64.
    """
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, token_ids[:, None])
    rank = (logprobs > own).sum(-1, keepdim=True) + 1
    likely = logprobs.topk(min(top, logprobs.shape[1]))
    return torch.cat([part.double() for part in (own, rank, likely.indices, likely.values)], dim=1)


def unpack(values: list[list[float]], sequences: Rows[Sequence]) -> list[SampledToken | Exception]:
    """Convert the result of `Sampler.sample`, as lists, to tokens, or an error for a row without one."""
    tokens: list[SampledToken | Exception] = []
    for row, sequence in zip(values, sequences, strict=True):
        token_id, width = int(row[0]), (len(row) - 2) // 2
        number = sequence.params.top_logprobs
        if token_id < 0:
            tokens.append(not_finite() if token_id == NOT_FINITE else _none_allowed())
        elif number is None:
            tokens.append(SampledToken(token_id))
        else:
            ids = map(int, row[2 + width :])
            tokens.append(SampledToken(token_id, row[1], list(zip(ids, row[2:], strict=False))[:number]))
    return tokens


def not_finite() -> Exception:
    """Return the error of a sequence whose logits contain NaN or infinity."""
    return FloatingPointError("the logits contain NaN or infinity; load the model in bfloat16 or float32")


def _none_allowed() -> Exception:
    return ConstraintError(
        "No token can come next: allowed_token_ids, bad_words, min_tokens and the grammar of the reply leave none. "
        "Allow more."
    )


__getattr__ = old_names(
    __name__,
    {
        "Constraint": "qwen.serving.engine.sequence.Constraint",
        "SamplingParams": "qwen.serving.engine.sampling_params.SamplingParams",
    },
)
