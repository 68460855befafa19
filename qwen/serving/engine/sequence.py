"""One sequence: a prompt, how to continue it, and how far that has got."""

import enum
import hashlib
import random
from array import array
from collections import abc
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch


class ConstraintError(ValueError):
    """The constraint of a reply failed."""


class Constraint(Protocol):
    """Restricts the tokens of one sequence."""

    def allowed(self) -> "torch.Tensor":
        """Return the allowed next tokens: (vocab_size), bool, on the CPU. May raise ConstraintError."""

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token."""


class SampledToken(NamedTuple):
    """A token and, if requested, its log-probability and the most likely tokens with theirs (natural logarithm, of the
    model's distribution before any settings are applied)."""

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class PromptLogprob(NamedTuple):
    """A token of a prompt, its log-probability after those before it and its rank among all tokens (from 1), and the
    most likely tokens there with their log-probabilities; as in `SampledToken`."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class FinishReason(enum.Enum):
    """Why a sequence has ended."""

    STOP = "stop"  # an end token, or `on_token` returned True
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Sequence:
    """A prompt to continue, with callbacks for the result, and its state in the scheduler.

    Args:
        prompt_ids: the prompt, at least one token.
        params: sampling settings.
        end_token_ids: tokens that end the sequence, beside those of `params.stop_token_ids`; not passed to `on_token`,
            except for the latter with `params.include_stop`.
        on_token: called with each token, in the engine's thread; True ends the sequence.
        on_end: called once, in the engine's thread, with the reason, the error, if any, and the end token, if one ended
            the sequence.
        constraint: grammar that the reply must follow.
        group: sequences of one request, which take turns as one; None for a group of its own.
        alpha_index: doublings of the trained length that hold the prompt: the α of its keys is 2^(alpha_index + 1) − 1.
        cache_key: what else the keys and values depend on, or must not be shared across: adapter and cache salt.
        on_prompt_logprobs: called with the log-probabilities of the prompt's tokens after the first, in their order,
            before the first call of `on_token`; only if `params.prompt_logprobs` asks for them.
        request_id: what the log calls the request.

    Attributes:
        token_ids: prompt and reply, as far as the host has them.
        num_pending: tokens that the device has been asked for and the host has not seen.
        num_computed: tokens whose keys and values are in the cache, or will be after the steps launched so far.
        blocks: blocks of the cache that hold them.
        slot: row of the sampler's state; −1 if it is not running.
        num_named_blocks: of these, how many others can find.
        cached_tokens: tokens of the prompt that were found in the cache.
        admitted_at: time.perf_counter() when it first ran; None before that.
        num_lost: tokens that were computed when the sequence was last preempted; 0 if it was not.
        num_to_score: tokens of the prompt after which the log-probability of the next one is wanted.
        num_scored: those after which it is known, or will be after the steps launched so far.
        needs_last_token: the host must have seen the last token before the next one can be sampled.
        restricts_next: `forbidden_ids` may not be empty.
    """

    def __init__(
        self,
        prompt_ids: abc.Sequence[int],
        params: SamplingParams,
        end_token_ids: frozenset[int],
        on_token: Callable[[SampledToken], bool],
        on_end: Callable[[FinishReason, Exception | None, SampledToken | None], None],
        constraint: Constraint | None = None,
        group: Hashable | None = None,
        alpha_index: int = 0,
        cache_key: tuple[str, ...] = (),
        on_prompt_logprobs: Callable[[list[PromptLogprob]], None] = lambda logprobs: None,
        request_id: str | None = None,
    ):
        self.params, self.end_token_ids, self.constraint = params, end_token_ids | params.stop_token_ids, constraint
        self.on_token, self.on_end, self.on_prompt_logprobs = on_token, on_end, on_prompt_logprobs
        self.group: Hashable = self if group is None else group
        self.request_id = request_id
        self.alpha_index = alpha_index
        self.num_prompt_tokens = len(prompt_ids)
        self.token_ids = list(prompt_ids)
        self.num_pending = self.num_computed = 0
        self.blocks: list[int] = []
        self.slot = -1
        self.num_named_blocks = self.cached_tokens = self.num_lost = 0
        self.num_to_score = 0 if params.prompt_logprobs is None else self.num_prompt_tokens - 1
        self.num_scored = 0
        self.admitted_at: float | None = None
        self.cancelled = self.ended = False
        self._bad_phrases = [ids for ids in params.bad_words if len(ids) > 1]  # the others are a bias of the sampler
        self.needs_last_token = constraint is not None or bool(self._bad_phrases)
        self.restricts_next = bool(self._bad_phrases or params.min_tokens)
        # As a string: random.Random treats -1 and 1 as the same seed. Of 1,024 bits: str() has a limit of digits.
        seed = params.seed
        self._random = random.Random(None if seed is None else f"{'-' * (seed < 0)}{abs(seed) % 2**1024}")
        self._uniforms: list[float] = []  # of the tokens of the reply
        self._block_names = [hashlib.sha256(repr((alpha_index, cache_key)).encode()).digest()]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and reply, including those the host has not seen."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens to encode before the next one can be sampled; 0 if no more are wanted.

        One is sampled even if `max_tokens` is 0, and dropped: what such a request wants are the scores of its prompt.
        """
        if self.num_tokens - self.num_prompt_tokens >= (self.params.max_tokens or 1):
            return 0
        return self.num_tokens - self.num_computed

    @property
    def num_reusable(self) -> int:
        """Tokens whose keys and values may be taken over from another sequence, because no logits are wanted there."""
        return self.num_scored if self.num_scored < self.num_to_score else len(self.token_ids) - 1

    @property
    def forbidden_ids(self) -> list[int]:
        """Tokens that must not come next, because of `min_tokens` or of a bad word that has begun."""
        too_short = self.num_tokens - self.num_prompt_tokens < self.params.min_tokens
        forbidden = list(self.end_token_ids) if too_short else []
        for *beginning, last in self._bad_phrases:
            start = len(self.token_ids) - len(beginning)
            if start >= self.num_prompt_tokens and self.token_ids[start:] == beginning:
                forbidden.append(last)
        return forbidden

    @property
    def reply_ids(self) -> list[int]:
        """Tokens of the reply."""
        return self.token_ids[self.num_prompt_tokens :]

    def block_name(self, index: int, block_size: int) -> bytes:
        """Return the name of a full block: a SHA-256 over all tokens up to its end, α and the cache key.

        A collision would give a request the text of another one, so that a hash of 64 bits is too short.
        """
        while len(self._block_names) <= index + 1:
            start = (len(self._block_names) - 1) * block_size
            tokens = array("q", self.token_ids[start : start + block_size])
            self._block_names.append(hashlib.sha256(self._block_names[-1] + tokens.tobytes()).digest())
        return self._block_names[index + 1]

    def forget_blocks(self) -> None:
        """Begin anew without blocks."""
        self.blocks = []
        self.num_computed = self.num_named_blocks = 0

    def next_uniform(self) -> float:
        """Return the random number of the next token, in [0, 1): the same one again after a step that failed."""
        index = self.num_tokens - self.num_prompt_tokens
        while len(self._uniforms) <= index:
            self._uniforms.append(self._random.random())
        return self._uniforms[index]
