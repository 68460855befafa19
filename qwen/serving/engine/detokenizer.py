"""Incremental detokenization, with stop strings.

Emitted text cannot be taken back. A character is emitted once all of its bytes are there, and text that may become part
of a stop string, or be stripped, is held back.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from ...model.tokenization_qwen import QWenTokenizer
from .sequence import SampledToken


class TokenLogprob(NamedTuple):
    """A token of the reply, its log-probability, and the most likely tokens at its position with theirs."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """New text, and the tokens that begin in it; tokens only if log-probabilities were requested."""

    text: str
    tokens: list[TokenLogprob]


class IncrementalText:
    """Incremental text of one reply.

    Args:
        tokenizer: tokenizer of the model.
        stop: the reply ends before the first occurrence of any of these strings.
        lstrip, rstrip: strip whitespace at the start or end of the reply.
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
        self.held = ""  # decoded, not emitted yet
        self.begun = False
        self.tokens: list[tuple[int, TokenLogprob]] = []  # not emitted yet, with their start in `held`
        self.stopped = False

    def feed(self, token: SampledToken) -> Piece:
        """Add a token and return the text to emit, which may be empty. Sets `stopped` at a complete stop string."""
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
        """Return the text held back, when no more tokens follow."""
        if self.stopped:
            return Piece("", [])
        self.held += self.decoder.decode(b"", final=True)
        piece = self._give(len(self.held))
        return Piece(piece.text, [*piece.tokens, *(token for _, token in self.tokens)])

    def _decode(self, token_id: int) -> str:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # the output matrix may have more rows than there are tokens
            return ""
        if isinstance(token, bytes):
            return self.decoder.decode(token)
        return self.decoder.decode(b"", final=True) + token  # a control token ends an unfinished character

    def _give(self, end: int) -> Piece:
        if self.rstrip:  # whitespace is held back until something follows it
            end = len(self.held[:end].rstrip())
        text, self.held = self.held[:end], self.held[end:]
        if self.lstrip and not self.begun:
            text = text.lstrip()
        self.begun |= bool(text)
        given = [token for place, token in self.tokens if place < end]
        self.tokens = [(place - end, token) for place, token in self.tokens if place >= end]
        return Piece(text, given)


def _overlap(text: str, word: str) -> int:
    """Return the length of the longest end of `text` that is a proper prefix of `word`."""
    return next((size for size in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:size])), 0)
