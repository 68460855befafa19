"""Text completions: the model goes on from a text, as base models do.

Revolves around `plan`, which says what the engine has to do for a request, and `TextWriter`, which makes chunks of what
the engine says. It knows no messages and trims nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..tokenization_qwen import QWenTokenizer
from .choices import Choice, Chunk, Envelope, Plan, sampling_params
from .engine import Engine
from .errors import invalid
from .logprobs import CompletionLogprobs
from .protocol import CompletionRequest
from .text import Piece


def plan(request: CompletionRequest, engine: Engine) -> Plan:
    """What the engine has to do. Encodes the prompts, which may take a while.

    Raises:
        ApiError: fields that do not go together, token ids that there are not.
    """
    if request.best_of is not None and request.best_of != request.choices:
        raise invalid("best_of must equal n: every choice is returned, none is ranked.", "best_of")
    if request.echo and request.logprobs is not None:
        raise invalid("echo and logprobs do not go together: there are no log-probabilities of prompts.", "echo")
    choices: list[Choice] = []
    prompts = _prompts(request, engine.tokenizer)
    for ids in prompts:
        echo = engine.tokenizer.decode(ids) if request.echo else ""
        for params in sampling_params(engine, request, len(ids), top_logprobs=request.logprobs):
            writer = TextWriter(len(choices), engine.tokenizer, echo)
            choices.append(Choice(ids, params, writer, request.stop_strings))
    return Plan(choices, sum(map(len, prompts)), "prompt")


def _prompts(request: CompletionRequest, tokenizer: QWenTokenizer) -> list[list[int]]:
    """The token ids of each prompt. Control tokens in a text are control tokens: whoever sends it writes all of it."""
    prompt = request.prompt
    if isinstance(prompt, str) or prompt is None:
        prompts: list[str | list[int]] = [prompt or ""]
    elif isinstance(prompt[0], int):
        prompts = [prompt]
    else:
        prompts = prompt
    encoded = [tokenizer.encode(text) if isinstance(text, str) else text for text in prompts]
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
