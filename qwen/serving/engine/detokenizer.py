"""Incremental detokenization, with stop strings.

Emitted text cannot be taken back. A character is emitted once all of its bytes are there, and text that may become part
of a stop string, or be stripped, is held back.
"""

import codecs
from collections.abc import Sequence, Set
from typing import NamedTuple

from ...model.tokenization_qwen import QWenTokenizer
from .sequence import PromptLogprob, SampledToken


class TokenLogprob(NamedTuple):
    """A token of the reply, its log-probability, and the most likely tokens at its position with theirs."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """New text, and the tokens that begin in it.

    Args:
        tokens: with log-probabilities, if they were requested.
        prompt: those of the prompt's tokens after the first, in the first piece, if they were requested.
        token_ids: ids of the tokens, if they were requested. Those after the end of the text, such as a stop string,
            are in the last piece.
        end: the end token after the text, in the last piece, if log-probabilities were requested.
    """

    text: str
    tokens: list[TokenLogprob]
    prompt: list[PromptLogprob] | None = None
    token_ids: Sequence[int] = ()
    end: TokenLogprob | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.text or self.tokens or self.token_ids) and self.prompt is None and self.end is None


class IncrementalText:
    """Incremental text of one reply.

    Args:
        tokenizer: tokenizer of the model.
        stop: the reply ends before the first occurrence of any of these strings.
        lstrip, rstrip: strip whitespace at the start or end of the reply.
        include_stop: the reply ends after the string of `stop` instead.
        end_strings: like `stop`, but never included or reported, since they belong to the model's own format.
        min_tokens: no such string is searched for in the text of so many tokens.
        skipped_ids: control tokens without text.
        keep_ids: the pieces have the ids of their tokens.

    Attributes:
        stopped: a string ended the reply.
        stop_string: the one of `stop` that did.
    """

    def __init__(
        self,
        tokenizer: QWenTokenizer,
        stop: Sequence[str] = (),
        lstrip: bool = False,
        rstrip: bool = False,
        *,
        include_stop: bool = False,
        end_strings: Sequence[str] = (),
        min_tokens: int = 0,
        skipped_ids: Set[int] = frozenset(),
        keep_ids: bool = False,
    ):
        self.tokenizer, self.stop, self.end_strings = tokenizer, tuple(stop), (*stop, *end_strings)
        self.lstrip, self.rstrip, self.include_stop, self.skipped_ids = lstrip, rstrip, include_stop, skipped_ids
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # decoded, not emitted yet
        self.begun = False
        self.tokens: list[tuple[int, TokenLogprob]] = []  # not emitted yet, with their start in `held`
        self.stopped = False
        self.stop_string: str | None = None
        self._ids: list[tuple[int, int]] | None = [] if keep_ids else None  # like `tokens`
        self._unsearched = min_tokens

    def feed(self, token: SampledToken) -> Piece:
        """Add a token and return the text to emit, which may be empty. Sets `stopped` at a complete stop string."""
        if token.logprob is not None:
            self.tokens.append((len(self.held), TokenLogprob(token.token_id, token.logprob, token.top or [])))
        if self._ids is not None:
            self._ids.append((len(self.held), token.token_id))
        self.held += self._decode(token.token_id)
        if self._unsearched:
            self._unsearched -= 1
            return self._give(len(self.held))
        found = [(place, word) for word in self.end_strings if (place := self.held.find(word)) >= 0]
        if found:
            return self._stop(*min(found, key=lambda each: each[0]))
        return self._give(len(self.held) - max((_overlap(self.held, word) for word in self.end_strings), default=0))

    def finish(self) -> Piece:
        """Return the text held back, when no more tokens follow."""
        if self.stopped:
            return Piece("", [], token_ids=self._rest_of_ids())
        self.held += self.decoder.decode(b"", final=True)
        piece = self._give(len(self.held))
        tokens = [*piece.tokens, *(token for _, token in self.tokens)]
        return Piece(piece.text, tokens, token_ids=[*piece.token_ids, *self._rest_of_ids()])

    def _rest_of_ids(self) -> Sequence[int]:
        return [token_id for _, token_id in self._ids or ()]

    def _stop(self, place: int, word: str) -> Piece:
        """Return the rest of the text, which ends at a string."""
        self.stopped = True
        if word in self.stop:
            self.stop_string = word
            if self.include_stop:
                place += len(word)
        self.held = self.held[:place]
        return self._give(place, keep_space=self.include_stop and self.stop_string is not None)

    def _decode(self, token_id: int) -> str:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # the output matrix may have more rows than there are tokens
            return ""
        if isinstance(token, bytes):
            return self.decoder.decode(token)
        unfinished = self.decoder.decode(b"", final=True)  # a control token ends an unfinished character
        return unfinished if token_id in self.skipped_ids else unfinished + token

    def _give(self, end: int, keep_space: bool = False) -> Piece:
        if self.rstrip and not keep_space:  # whitespace is held back until something follows it
            end = len(self.held[:end].rstrip())
        text, self.held = self.held[:end], self.held[end:]
        if self.lstrip and not self.begun:
            text = text.lstrip()
        self.begun |= bool(text)
        given = [token for place, token in self.tokens if place < end]
        self.tokens = [(place - end, token) for place, token in self.tokens if place >= end]
        if self._ids is None:
            return Piece(text, given)
        ids = [token_id for place, token_id in self._ids if place < end]
        self._ids = [(place - end, token_id) for place, token_id in self._ids if place >= end]
        return Piece(text, given, token_ids=ids)


def _overlap(text: str, word: str) -> int:
    """Return the length of the longest end of `text` that is a proper prefix of `word`."""
    return next((size for size in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:size])), 0)
