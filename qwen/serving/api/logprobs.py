"""Formats the log-probabilities of a reply's tokens for OpenAI's two endpoints.

A token is a byte string and may not be valid text by itself: a Chinese character may take two or three tokens. The
bytes are exact; a token that is not valid text is written as OpenAI does, `bytes:\\\\xe4\\\\xbd`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ...model.tokenization_qwen import QWenTokenizer
from ..engine.detokenizer import TokenLogprob
from .response_types import ChatLogprobs, ContentLogprob, TextLogprobs, TokenProbability

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


def chat_logprobs(tokenizer: QWenTokenizer, tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Format `choices[].logprobs` of a chat completion."""

    def entry(token_id: int, logprob: float) -> TokenProbability:
        content = token_bytes(tokenizer, token_id)
        return {"token": token_text(content), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(content)}

    content: list[ContentLogprob] = [
        {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*likely) for likely in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Formats `choices[].logprobs` of a text completion, which includes the text offset of each token.

    Args:
        offset: characters before the first token.
    """

    def __init__(self, tokenizer: QWenTokenizer, offset: int = 0):
        self.tokenizer, self.offset = tokenizer, offset
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, tokens: Sequence[TokenLogprob]) -> TextLogprobs:
        """Format the next tokens of the text."""
        logprobs: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            content = token_bytes(self.tokenizer, token.token_id)
            top_logprobs = {
                token_text(token_bytes(self.tokenizer, id_)): max(logprob, MIN_LOGPROB) for id_, logprob in token.top
            }
            logprobs["tokens"].append(token_text(content))
            logprobs["token_logprobs"].append(max(token.logprob, MIN_LOGPROB))
            logprobs["top_logprobs"].append(top_logprobs)
            new = self.decoder.decode(content)
            self.offset += len(new)
            logprobs["text_offset"].append(self.offset - len(_text_of_token(content, new)))
        return logprobs


def _text_of_token(content: bytes, new: str) -> str:
    """Return the token's part of the newly decoded text, without the replacement of an earlier incomplete character."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(content)
    except UnicodeDecodeError:  # the token completes a character
        return new
