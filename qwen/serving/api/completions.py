"""Text completions: the model goes on from a text, as base models do.

Revolves around `plan`, which says what the engine has to do for a request, and `TextWriter`, which makes chunks of what
the engine says. It knows no messages and trims nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...model.tokenization_qwen import QWenTokenizer
from ..engine import Engine
from ..engine.detokenizer import Piece
from .errors import invalid
from .generation import Choice, Chunk, Envelope, Plan, check_room, sampling_params
from .logprobs import CompletionLogprobs
from .requests import CompletionRequest


def plan(request: CompletionRequest, engine: Engine) -> Plan:
    """What the engine has to do. Encodes the prompts, which may take a while.

    Raises:
        ApiError: fields that do not go together, token ids that there are not.
    """
    if request.best_of is not None and request.best_of != request.choices:
        raise invalid("best_of must equal n: every choice is returned, none is ranked.", "best_of")
    if request.echo and request.logprobs is not None:
        raise invalid("echo and logprobs do not go together: there are no log-probabilities of prompts.", "echo")
    texts = _texts(request)
    check_room(engine, len(texts) * request.choices)
    prompts = _prompts(texts, engine.tokenizer)
    lengths = [len(ids) for ids in prompts]
    settings = sampling_params(engine, request, lengths, max_tokens=request.max_tokens, top_logprobs=request.logprobs)
    choices: list[Choice] = []
    for ids, params_of_prompt in zip(prompts, settings, strict=True):
        echo = engine.tokenizer.decode(ids) if request.echo else ""
        for params in params_of_prompt:
            writer = TextWriter(len(choices), engine.tokenizer, echo)
            choices.append(Choice(ids, params, writer, request.stop_strings))
    return Plan(choices, sum(lengths), "prompt")


def _texts(request: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts, as text or token ids."""
    prompt = request.prompt
    if isinstance(prompt, str) or prompt is None:
        return [prompt or ""]
    return [prompt] if isinstance(prompt[0], int) else prompt


def _prompts(texts: list[str] | list[list[int]], tokenizer: QWenTokenizer) -> list[list[int]]:
    """The token ids of each prompt. Control tokens in a text are control tokens: whoever sends it writes all of it."""
    encoded = [tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
    for ids in encoded:
        if unknown := [token for token in ids if token >= len(tokenizer)]:
            raise invalid(
                f"prompt: {unknown[0]} is no token id of this model, they go from 0 to {len(tokenizer) - 1}.", "prompt"
            )
    return [ids or [tokenizer.eod_id] for ids in encoded]  # documents follow upon <|endoftext|>


class TextWriter:
    """Makes chunks of the pieces of one text.

    Args:
        index: of the choice.
        echo: the prompt, where it is wanted in front.
    """

    def __init__(self, index: int, tokenizer: QWenTokenizer, echo: str = ""):
        self.index, self.echo = index, echo
        self.logprobs = CompletionLogprobs(tokenizer)

    def begin(self) -> Iterable[Chunk]:
        return [self._chunk(Piece(self.echo, []))] if self.echo else []

    def write(self, piece: Piece) -> Iterable[Chunk]:
        return [self._chunk(piece)]

    def end(self, reason: str) -> Iterable[Chunk]:
        return [self._chunk(Piece("", []), reason)]

    def _chunk(self, piece: Piece, finish_reason: str | None = None) -> Chunk:
        return {
            "index": self.index,
            "text": piece.text,
            "logprobs": self.logprobs(piece.tokens) if piece.tokens else None,
            "finish_reason": finish_reason,
        }


def collect(chunks: list[Chunk]) -> dict[str, Any]:
    """The chunks of one choice put together."""
    shown = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    return {
        "index": chunks[0]["index"],
        "text": "".join(chunk["text"] for chunk in chunks),
        "logprobs": {key: [item for part in shown for item in part[key]] for key in shown[0]} if shown else None,
        "finish_reason": chunks[-1]["finish_reason"],
    }


ENVELOPE = Envelope("text_completion", "text_completion", "cmpl-", collect)
