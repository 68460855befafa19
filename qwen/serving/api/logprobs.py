"""Formats the log-probabilities of a reply's tokens for OpenAI's two endpoints.

A token is a byte string and may not be valid text by itself: a Chinese character may take two or three tokens. The
bytes are exact; a token that is not valid text is written as OpenAI does, `bytes:\\\\xe4\\\\xbd`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ...model.tokenization_qwen import QWenTokenizer
from ..engine.detokenizer import TokenLogprob
from ..engine.sequence import PromptLogprob
from .response_types import (
    ChatLogprobs,
    ContentLogprob,
    PromptTokenLogprobs,
    RankedLogprob,
    TextLogprobs,
    TokenProbability,
)

MIN_LOGPROB = -9999.0  # replaces minus infinity, which JSON does not have


def token_bytes(tokenizer: QWenTokenizer, token_id: int) -> bytes:
    """Return the bytes of a token; empty for a row of the output matrix without a token."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    return token.encode() if isinstance(token, str) else token or b""


def token_text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def id_text(token_id: int) -> str:
    """Return what stands for the text of a token with `return_tokens_as_token_ids`."""
    return f"token_id:{token_id}"


def chat_logprobs(tokenizer: QWenTokenizer, tokens: Sequence[TokenLogprob], as_ids: bool = False) -> ChatLogprobs:
    """Format `choices[].logprobs` of a chat completion, with ids in place of the tokens' texts if `as_ids`."""

    def entry(token_id: int, logprob: float) -> TokenProbability:
        content = token_bytes(tokenizer, token_id)
        text = id_text(token_id) if as_ids else token_text(content)
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(content)}

    content: list[ContentLogprob] = [
        {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*likely) for likely in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def format_prompt_logprobs(
    tokenizer: QWenTokenizer, logprobs: Sequence[PromptLogprob], top: int | None = None
) -> list[PromptTokenLogprobs | None]:
    """Format `prompt_logprobs` as vLLM does: null for the first token, which has none, then for each token its own and
    those of the most likely ones, by id.

    Args:
        top: how many likely tokens to show; None for all that there are.
    """

    def entry(token_id: int, logprob: float, rank: int) -> RankedLogprob:
        text = token_text(token_bytes(tokenizer, token_id))
        return {"logprob": max(logprob, MIN_LOGPROB), "rank": rank, "decoded_token": text}

    formatted: list[PromptTokenLogprobs | None] = [None]
    for token_id, logprob, rank, likely in logprobs:
        entries = {str(token_id): entry(token_id, logprob, rank)}
        for place, (likely_id, likely_logprob) in enumerate(likely[:top], start=1):
            entries.setdefault(str(likely_id), entry(likely_id, likely_logprob, place))
        formatted.append(entries)
    return formatted


class CompletionLogprobs:
    """Formats `choices[].logprobs` of a text completion, which includes the text offset of each token.

    Args:
        as_ids: ids in place of the tokens' texts.
    """

    def __init__(self, tokenizer: QWenTokenizer, as_ids: bool = False):
        self.tokenizer, self.as_ids = tokenizer, as_ids
        self.offset = 0  # characters before the next token
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, tokens: Sequence[TokenLogprob]) -> TextLogprobs:
        """Format the next tokens of the text."""
        logprobs: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            content = token_bytes(self.tokenizer, token.token_id)
            text, logprob = self._text(token.token_id), max(token.logprob, MIN_LOGPROB)
            top_logprobs = {self._text(likely_id): max(likely, MIN_LOGPROB) for likely_id, likely in token.top}
            top_logprobs.setdefault(text, logprob)  # OpenAI includes the token itself, after the most likely ones
            logprobs["tokens"].append(text)
            logprobs["token_logprobs"].append(logprob)
            logprobs["top_logprobs"].append(top_logprobs)
            new = self.decoder.decode(content)
            self.offset += len(new)
            logprobs["text_offset"].append(self.offset - len(_text_of_token(content, new)))
        return logprobs

    def of_prompt(self, first_id: int, logprobs: Sequence[PromptLogprob], top: int | None) -> TextLogprobs:
        """Format the tokens of a prompt. The first one has no log-probability.

        Args:
            logprobs: of the others.
            top: how many likely tokens to show.
        """
        tokens = [TokenLogprob(first_id, 0.0, [])]
        tokens += [TokenLogprob(each.token_id, each.logprob, each.top[:top]) for each in logprobs]
        formatted = self(tokens)
        formatted["token_logprobs"][0] = formatted["top_logprobs"][0] = None
        return formatted

    def _text(self, token_id: int) -> str:
        return id_text(token_id) if self.as_ids else token_text(token_bytes(self.tokenizer, token_id))


def _text_of_token(content: bytes, new: str) -> str:
    """Return the token's part of the newly decoded text, without the replacement of an earlier incomplete character."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(content)
    except UnicodeDecodeError:  # the token completes a character
        return new
