"""Tokens to text, as it grows.

Revolves around one rule: text that has been given away cannot be taken back. So a character appears when all of its
bytes are there, and what may still become a stop string, or be stripped, waits. Knows a tokenizer; of requests and of
models nothing.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from ...model.tokenization_qwen import QWenTokenizer
from .sampler import SampledToken


class TokenLogprob(NamedTuple):
    """A token of the reply, its log-probability, and the likeliest tokens at its place with theirs."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """Text that is new, and the tokens that it begins with or within; the tokens only where log-probabilities are."""

    text: str
    tokens: list[TokenLogprob]


class IncrementalText:
    """The text of one reply.

    Args:
        tokenizer: what the tokens are of.
        stop: the reply ends in front of the first of these strings.
        lstrip, rstrip: leave out white space at the beginning, at the end of the reply.
    """

    def __init__(
        self,
        tokenizer: QWenTokenizer,
        stop: Sequence[str] = (),
        lstrip: bool = False,
        rstrip: bool = False,
    ):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.lstrip, self.rstrip = lstrip, rstrip
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # decoded, and not given away yet
        self.begun = False
        self.tokens: list[tuple[int, TokenLogprob]] = []  # not given away yet, with the place in `held` they begin at
        self.stopped = False

    def feed(self, token: SampledToken) -> Piece:
        """The text that a token adds, which may be none. Sets `stopped` when a stop string is complete."""
        if token.logprob is not None:
            self.tokens.append((len(self.held), TokenLogprob(token.token_id, token.logprob, token.top or [])))
        self.held += self._decode(token.token_id)
        found = [place for place in (self.held.find(word) for word in self.stop) if place >= 0]
        if found:
            self.stopped = True
            self.held = self.held[: min(found)]
            return self._give(len(self.held))
        return self._give(len(self.held) - max((_overlap(self.held, word) for word in self.stop), default=0))

    def finish(self) -> Piece:
        """What was still waiting, once no token follows."""
        if self.stopped:
            return Piece("", [])
        self.held += self.decoder.decode(b"", final=True)
        piece = self._give(len(self.held))
        return Piece(piece.text, [*piece.tokens, *(token for _, token in self.tokens)])

    def _decode(self, token_id: int) -> str:
        if token_id >= len(self.tokenizer):  # a matrix may have more rows than there are tokens
            return ""
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if isinstance(token, bytes):
            return self.decoder.decode(token)
        return self.decoder.decode(b"", final=True) + token  # a control token ends an unfinished character

    def _give(self, end: int) -> Piece:
        if self.rstrip:  # white space waits until something follows it
            end = len(self.held[:end].rstrip())
        text, self.held = self.held[:end], self.held[end:]
        if self.lstrip and not self.begun:
            text = text.lstrip()
        self.begun |= bool(text)
        given = [token for place, token in self.tokens if place < end]
        self.tokens = [(place - end, token) for place, token in self.tokens if place >= end]
        return Piece(text, given)


def _overlap(text: str, word: str) -> int:
    """How much of the end of `text` may be the beginning of `word`."""
    return next((size for size in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:size])), 0)
