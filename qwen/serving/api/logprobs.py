"""Log-probabilities of a reply's tokens, in the two shapes that OpenAI's endpoints have for them.

A token of these models is a string of bytes and need not be text by itself: a Chinese character may take two or three.
The bytes are exact; the text of a token that is none is written as OpenAI does, `bytes:\\\\xe4\\\\xbd`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from ...model.tokenization_qwen import QWenTokenizer
from ..engine.detokenizer import TokenLogprob

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have


def token_bytes(tokenizer: QWenTokenizer, token_id: int) -> bytes:
    """What a token stands for; nothing for a row of the model's matrix that has no token."""
    if token_id >= len(tokenizer):
        return b""
    token = tokenizer.convert_ids_to_tokens(token_id)
    return token if isinstance(token, bytes) else token.encode()


def token_text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def chat_logprobs(tokenizer: QWenTokenizer, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As `choices[].logprobs` of a chat completion has them."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        content = token_bytes(tokenizer, token_id)
        return {"token": token_text(content), "logprob": max(logprob, LOWEST), "bytes": list(content)}

    content = [
        entry(token.token_id, token.logprob) | {"top_logprobs": [entry(*likely) for likely in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """As `choices[].logprobs` of a text completion has them, which also says where in the text each token begins.

    Args:
        offset: characters in front of the first token.
    """

    def __init__(self, tokenizer: QWenTokenizer, offset: int = 0):
        self.tokenizer, self.offset = tokenizer, offset
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, tokens: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """The next tokens of the text."""
        shape: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            content = token_bytes(self.tokenizer, token.token_id)
            likeliest = {
                token_text(token_bytes(self.tokenizer, id_)): max(logprob, LOWEST) for id_, logprob in token.top
            }
            shape["tokens"].append(token_text(content))
            shape["token_logprobs"].append(max(token.logprob, LOWEST))
            shape["top_logprobs"].append(likeliest)
            new = self.decoder.decode(content)
            self.offset += len(new)
            shape["text_offset"].append(self.offset - len(_own(content, new)))
        return shape


def _own(content: bytes, new: str) -> str:
    """What of the text that a token made certain is its own: not the replacement of a character that broke off."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(content)
    except UnicodeDecodeError:  # the rest of a character
        return new
