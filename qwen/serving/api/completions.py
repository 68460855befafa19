"""Text completions: `build_plan` converts a request for the engine, `TextWriter` converts the reply to chunks.

Prompts have no chat template, and replies are not trimmed.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...model.tokenization_qwen import QWenTokenizer
from ..engine import Engine
from ..engine.detokenizer import Piece
from .errors import invalid_request
from .generation import Choice, Envelope, Plan, check_num_choices, sampling_params
from .logprobs import CompletionLogprobs
from .request_types import CompletionRequest
from .response_types import TextChoice, TextFinishReason, TextLogprobs


def build_plan(request: CompletionRequest, engine: Engine) -> Plan:
    """Build the generation plan of a request. Encodes the prompts, which may be slow.

    Raises:
        ApiError: incompatible fields, or token ids out of range.
    """
    if request.best_of is not None and request.best_of != request.num_choices:
        raise invalid_request("best_of must equal n: all choices are returned, without ranking.", "best_of")
    if request.echo and request.logprobs is not None:
        raise invalid_request("echo cannot be combined with logprobs: prompts have no log-probabilities.", "echo")
    inputs = _prompt_inputs(request)
    check_num_choices(engine, len(inputs) * request.num_choices)
    prompts = _encode_prompts(inputs, engine.tokenizer)
    lengths = [len(ids) for ids in prompts]
    settings = sampling_params(engine, request, lengths, max_tokens=request.max_tokens, top_logprobs=request.logprobs)
    choices: list[Choice] = []
    for ids, prompt_params in zip(prompts, settings, strict=True):
        echo = engine.tokenizer.decode(ids) if request.echo else ""
        for params in prompt_params:
            writer = TextWriter(len(choices), engine.tokenizer, echo)
            choices.append(Choice(ids, params, writer, request.stop_strings))
    return Plan(choices, sum(lengths), "prompt", request.cache_salt)


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
        if unknown := [token for token in ids if token >= len(tokenizer)]:
            raise invalid_request(
                f"prompt: invalid token id {unknown[0]}, valid ids are 0 to {len(tokenizer) - 1}.", "prompt"
            )
    return [ids or [tokenizer.eod_id] for ids in encoded]  # <|endoftext|> precedes a document


class TextWriter:
    """Converts the text pieces of one choice to chunks.

    Args:
        index: index of the choice.
        echo: prompt to put before the reply, or "".
    """

    def __init__(self, index: int, tokenizer: QWenTokenizer, echo: str = ""):
        self.index, self.echo = index, echo
        self.logprobs = CompletionLogprobs(tokenizer)

    def begin(self) -> Iterable[TextChoice]:
        return [self._chunk(Piece(self.echo, []))] if self.echo else []

    def write(self, piece: Piece) -> Iterable[TextChoice]:
        return [self._chunk(piece)]

    def end(self, reason: TextFinishReason) -> Iterable[TextChoice]:
        return [self._chunk(Piece("", []), reason)]

    def _chunk(self, piece: Piece, finish_reason: TextFinishReason | None = None) -> TextChoice:
        return {
            "index": self.index,
            "text": piece.text,
            "logprobs": self.logprobs(piece.tokens) if piece.tokens else None,
            "finish_reason": finish_reason,
        }


def merge_chunks(chunks: list[TextChoice]) -> TextChoice:
    """Merge the chunks of one choice."""
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    return {
        "index": chunks[0]["index"],
        "text": "".join(chunk["text"] for chunk in chunks),
        "logprobs": _concat_logprobs(parts) if parts else None,
        "finish_reason": chunks[-1]["finish_reason"],
    }


def _concat_logprobs(parts: list[TextLogprobs]) -> TextLogprobs:
    return {
        "tokens": [token for part in parts for token in part["tokens"]],
        "token_logprobs": [logprob for part in parts for logprob in part["token_logprobs"]],
        "top_logprobs": [likeliest for part in parts for likeliest in part["top_logprobs"]],
        "text_offset": [offset for part in parts for offset in part["text_offset"]],
    }


ENVELOPE = Envelope("text_completion", "text_completion", "cmpl-", merge_chunks)
