"""Text completions: `build_plan` converts a request for the engine, `TextWriter` converts the reply to chunks.

Prompts have no chat template, and replies are not trimmed.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...model.tokenization_qwen import QWenTokenizer
from ..engine import Engine
from ..engine.detokenizer import Piece
from ..engine.grammar import ConstraintFactory
from ..engine.sequence import PromptLogprob
from .errors import invalid_request
from .generation import Choice, Envelope, Plan, check_num_choices
from .logprobs import CompletionLogprobs, format_prompt_logprobs
from .request_types import CompletionRequest
from .response_types import StopReason, TextChoice, TextFinishReason, TextLogprobs
from .sampling import check_length, check_token_ids, sampling_params, truncate_prompt
from .structured_output import requested_grammar


def build_plan(
    request: CompletionRequest, engine: Engine, constraints: ConstraintFactory, *, any_length: bool = False
) -> Plan:
    """Build the generation plan of a request. Encodes the prompts and builds a grammar, which may be slow.

    Args:
        any_length: also encode prompts that are much too long to be continued.

    Raises:
        ApiError: incompatible fields, or token ids out of range.
        PromptTooLong: a prompt is much too long; those that are a little too long are refused by the engine.
    """
    if request.best_of is not None and request.best_of != request.num_choices:
        raise invalid_request("best_of must equal n: all choices are returned, without ranking.", "best_of")
    inputs = _prompt_inputs(request)
    check_num_choices(engine, len(inputs) * request.num_choices)
    if not any_length and request.truncate_prompt_tokens is None:
        for text_or_ids in inputs:
            if isinstance(text_or_ids, str):
                check_length(engine, [text_or_ids])
            elif len(text_or_ids) > engine.context_length:
                raise engine.prompt_too_long(len(text_or_ids))
    prompts = [
        truncate_prompt(engine, request, ids, request.max_tokens) for ids in _encode_prompts(inputs, engine.tokenizer)
    ]
    lengths = [len(ids) for ids in prompts]
    scores = [request.prompt_logprobs, request.logprobs if request.echo else None]
    settings = sampling_params(
        engine,
        request,
        lengths,
        max_tokens=request.max_tokens,
        top_logprobs=request.logprobs,
        prompt_logprobs=max((count for count in scores if count is not None), default=None),
    )
    wanted = requested_grammar(request)
    constraint = None if wanted is None else wanted.create(constraints)
    choices: list[Choice] = []
    for ids, prompt_params in zip(prompts, settings, strict=True):
        echo = engine.tokenizer.decode(ids) if request.echo else ""
        for params in prompt_params:
            writer = TextWriter(len(choices), request, engine.tokenizer, ids, echo)
            choice_constraint = None if constraint is None else constraint.copy()
            choices.append(Choice(ids, params, writer, request.stop_strings, constraint=choice_constraint))
    return Plan(choices, sum(lengths), "prompt", request.cache_salt, None if wanted is None else wanted.param)


def _prompt_inputs(request: CompletionRequest) -> list[str] | list[list[int]]:
    """Return the prompts as text or token ids."""
    prompt = request.prompt
    if isinstance(prompt, str) or prompt is None:
        return [prompt or ""]
    return [prompt] if isinstance(prompt[0], int) else prompt


def _encode_prompts(inputs: list[str] | list[list[int]], tokenizer: QWenTokenizer) -> list[list[int]]:
    """Encode the prompts. Control tokens in a text are encoded as such, since the client writes the whole prompt."""
    encoded = [tokenizer.encode(text) if isinstance(text, str) else text for text in inputs]
    for ids in encoded:
        check_token_ids(tokenizer, "prompt", ids, with_index=False)
    return [ids or [tokenizer.eod_id] for ids in encoded]  # <|endoftext|> precedes a document


class TextWriter:
    """Converts the text pieces of one choice to chunks.

    Args:
        index: index of the choice.
        prompt_ids: the prompt.
        echo: the prompt as text, to put before the reply, or "".
    """

    reasoning_tokens = 0

    def __init__(
        self, index: int, request: CompletionRequest, tokenizer: QWenTokenizer, prompt_ids: list[int], echo: str
    ):
        self.index, self.request, self.tokenizer = index, request, tokenizer
        self.prompt_ids, self.echo = prompt_ids, echo
        self.scores_echo = bool(request.echo) and request.logprobs is not None
        self.logprobs = CompletionLogprobs(tokenizer, as_ids=bool(request.return_tokens_as_token_ids))

    def begin(self) -> Iterable[TextChoice]:
        scored = self.scores_echo or self.request.prompt_logprobs is not None
        return [] if scored else self._prompt_chunks([])  # the scores are in the first piece

    def write(self, piece: Piece) -> Iterable[TextChoice]:
        return [self._chunk(piece)] if piece.prompt is None else self._prompt_chunks(piece.prompt)

    def end(self, reason: TextFinishReason, stop_reason: StopReason) -> Iterable[TextChoice]:
        return [{**self._chunk(Piece("", []), reason), "stop_reason": stop_reason}]

    def _prompt_chunks(self, logprobs: list[PromptLogprob]) -> list[TextChoice]:
        """Return what the request wants to have of its prompt: a chunk, or none."""
        request = self.request
        if not (self.echo or request.return_token_ids or request.prompt_logprobs is not None):
            return []
        chunk = self._chunk(Piece(self.echo, []))
        if self.scores_echo:
            chunk["logprobs"] = self.logprobs.of_prompt(self.prompt_ids[0], logprobs, request.logprobs)
        if request.prompt_logprobs is not None:
            chunk["prompt_logprobs"] = format_prompt_logprobs(self.tokenizer, logprobs, request.prompt_logprobs)
        if request.return_token_ids:
            chunk["prompt_token_ids"] = self.prompt_ids
        return [chunk]

    def _chunk(self, piece: Piece, finish_reason: TextFinishReason | None = None) -> TextChoice:
        tokens = piece.tokens
        if self.scores_echo and piece.end is not None:  # lm-eval counts on a token after those of the prompt
            tokens = [*tokens, piece.end]
        chunk: TextChoice = {
            "index": self.index,
            "text": piece.text,
            "logprobs": self.logprobs(tokens) if tokens else None,
            "finish_reason": finish_reason,
        }
        if self.request.return_token_ids:
            chunk["token_ids"] = list(piece.token_ids)
        return chunk


def merge_chunks(chunks: list[TextChoice]) -> TextChoice:
    """Merge the chunks of one choice."""
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    choice: TextChoice = {
        "index": chunks[0]["index"],
        "text": "".join(chunk["text"] for chunk in chunks),
        "logprobs": _concat_logprobs(parts) if parts else None,
        "finish_reason": chunks[-1]["finish_reason"],
        "stop_reason": chunks[-1].get("stop_reason"),
    }
    if "prompt_logprobs" in chunks[0]:
        choice["prompt_logprobs"] = chunks[0]["prompt_logprobs"]
    if "prompt_token_ids" in chunks[0]:
        choice["prompt_token_ids"] = chunks[0]["prompt_token_ids"]
        choice["token_ids"] = [token for chunk in chunks for token in chunk["token_ids"]]
    return choice


def _concat_logprobs(parts: list[TextLogprobs]) -> TextLogprobs:
    return {
        "tokens": [token for part in parts for token in part["tokens"]],
        "token_logprobs": [logprob for part in parts for logprob in part["token_logprobs"]],
        "top_logprobs": [likeliest for part in parts for likeliest in part["top_logprobs"]],
        "text_offset": [offset for part in parts for offset in part["text_offset"]],
    }


ENVELOPE = Envelope("text_completion", "text_completion", "cmpl-", merge_chunks)
