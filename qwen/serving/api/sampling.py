"""Converts the sampling fields of a request to the engine's settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...model.tokenization_qwen import QWenTokenizer
from ..engine import Engine
from ..engine.sampling_params import SamplingParams
from .errors import invalid_request
from .request_types import GenerationRequest

SLICE = 2**16  # characters that are encoded at once to find out whether a text is too long
SLICE_SLACK = 512  # tokens of a slice that are not counted: a cut splits a token, of up to 128 bytes, at either end


def sampling_params(
    engine: Engine,
    request: GenerationRequest,
    prompt_lengths: Sequence[int],
    *,
    max_tokens: int | None,
    top_logprobs: int | None,
    prompt_logprobs: int | None,
) -> list[list[SamplingParams]]:
    """Build the sampling settings of all choices: a list of `n` for each prompt.

    Args:
        prompt_lengths: tokens of each prompt.
        max_tokens, top_logprobs, prompt_logprobs: fields of SamplingParams, which differ between the two endpoints.

    Raises:
        ApiError: settings out of range for this model.
    """
    if request.stream and request.prompt_logprobs is not None:
        raise invalid_request("prompt_logprobs cannot be streamed. Omit one of the two fields.", "prompt_logprobs")
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    check_token_ids(engine.tokenizer, "logit_bias", bias, with_index=False)
    check_token_ids(engine.tokenizer, "stop_token_ids", request.stop_token_ids or ())
    check_token_ids(engine.tokenizer, "allowed_token_ids", request.allowed_token_ids or ())
    bad_words = [ids for word in request.bad_words or () for ids in _encode_bad_word(engine.tokenizer, word)]
    greedy = request.top_p == 0  # only the most likely token remains

    def build_params(limit: int | None, seed: int | None) -> SamplingParams:
        return engine.params(
            temperature=0.0 if greedy else request.temperature,
            top_p=None if greedy else request.top_p,
            top_k=None if request.top_k is None else max(request.top_k, 0),
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=bias or None,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
            return_token_ids=request.counts_tokens or None,
            stop_token_ids=frozenset(request.stop_token_ids or ()),
            include_stop=request.includes_stop,
            ignore_eos=request.ignore_eos,
            skip_special_tokens=request.skip_special_tokens,
            min_tokens=request.min_tokens,
            bad_words=bad_words,
            allowed_token_ids=request.allowed_token_ids,
            max_tokens=limit,
            seed=seed,
        )

    seeds = [None if request.seed is None else request.seed + index for index in range(request.num_choices)]
    try:
        params = [
            [build_params(limit, seed) for seed in seeds]
            for limit in (_max_tokens(request, length, max_tokens) for length in prompt_lengths)
        ]
    except ValueError as error:
        raise invalid_request(str(error), str(error).split()[0]) from error
    return params


def check_token_ids(tokenizer: QWenTokenizer, param: str, token_ids: Iterable[int], *, with_index: bool = True) -> None:
    """Raise ApiError for token ids that the tokenizer does not have.

    Args:
        param: request field that holds them.
        with_index: name their place in the field as well.
    """
    valid = range(len(tokenizer))
    for index, token in enumerate(token_ids):
        if token not in valid:
            path = f"{param}.{index}" if with_index else param
            raise invalid_request(f"{path}: invalid token id {token}, valid ids are 0 to {valid[-1]}.", path)


def _encode_bad_word(tokenizer: QWenTokenizer, word: str) -> list[list[int]]:
    """Return the tokens of a word at the start of a text and after a space."""
    texts = dict.fromkeys((word, f" {word.lstrip()}"))
    return [tokenizer.encode(text, allowed_special=set(), disallowed_special=()) for text in texts]


def check_length(engine: Engine, texts: Sequence[str]) -> None:
    """Raise PromptTooLong if a prompt with these texts cannot fit, without encoding megabytes to find out."""
    if (count := fewest_tokens(engine.tokenizer, texts, engine.context_length)) > engine.context_length:
        raise engine.prompt_too_long(count, "at least ")


def fewest_tokens(tokenizer: QWenTokenizer, texts: Sequence[str], limit: int) -> int:
    """Return how many tokens texts have at least: 0 for short ones. Stops counting at more than `limit`."""
    if sum(map(len, texts)) <= SLICE:
        return 0
    text = "\n".join(texts)
    count = 0
    for start in range(0, len(text), SLICE):
        ids = tokenizer.encode(text[start : start + SLICE], allowed_special="all")
        count += max(0, len(ids) - SLICE_SLACK)
        if count > limit:
            break
    return count


def truncate_prompt(
    engine: Engine, request: GenerationRequest, prompt_ids: list[int], max_tokens: int | None
) -> list[int]:
    """Return the last tokens of a prompt, as many as `truncate_prompt_tokens` says.

    Raises:
        ApiError: more tokens than the context has.
    """
    limit = request.truncate_prompt_tokens
    if limit is None:
        return prompt_ids
    if limit > engine.context_length:
        raise invalid_request(
            f"truncate_prompt_tokens: should be at most {engine.context_length}, this model's maximum context length, "
            f"not {limit}.",
            "truncate_prompt_tokens",
        )
    if limit == -1:
        limit = max(1, engine.context_length - (1 if max_tokens is None else max_tokens))
    return prompt_ids[-limit:]


def _max_tokens(request: GenerationRequest, prompt_tokens: int, max_tokens: int | None) -> int | None:
    if request.max_length is None:
        return max_tokens
    remaining = request.max_length - prompt_tokens
    if remaining < 1:
        raise invalid_request(
            f"max_length includes the prompt, which has {prompt_tokens} tokens: use a larger value.",
            "max_length",
        )
    return remaining if max_tokens is None else min(remaining, max_tokens)
