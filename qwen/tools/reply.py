"""Parses a model's reply, streamed or complete."""

import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from .react import ACTION, ACTION_INPUT, FINAL_ANSWER, MARKERS, STOP_WORD, THOUGHT

_LINES = re.compile(r"[^\n]*\n|[^\n]+")
# Answers of up to this many characters are held back, because a second "Final Answer:" may replace them.
_MAX_HELD_CHARS = 32


class Reply(NamedTuple):
    """A parsed reply.

    Attributes:
        content: the answer, or the thought that led to a tool call.
        function_call: None or `{"name": str, "arguments": str}`. The arguments may be invalid JSON.
        finish_reason: "function_call" or "stop".
    """

    content: str
    function_call: dict[str, str] | None
    finish_reason: str


class ContentDelta(NamedTuple):
    """The next piece of a reply's content, never empty."""

    text: str


class ThoughtDelta(NamedTuple):
    """The thought that led to a tool call, never empty. It comes right before the call.

    If content precedes it, it begins with the whitespace between them.
    """

    text: str


class CallDelta(NamedTuple):
    """The next piece of a tool call: first its complete name without arguments, then arguments only (name None)."""

    name: str | None
    arguments: str


Delta = ContentDelta | ThoughtDelta | CallDelta


def parse_response(response: str, continues: bool = False) -> Reply:
    """Parse a complete reply as a tool call, a final answer or plain text, by the rules of `ReplyReader`."""
    reader = ReplyReader(continues)
    content: list[str] = []
    name: str | None = None
    arguments: list[str] = []
    for delta in [*reader.feed(response), *reader.finish()]:
        if isinstance(delta, ContentDelta | ThoughtDelta):
            content.append(delta.text)
        elif delta.name is not None:
            name, arguments = delta.name, []
        else:
            arguments.append(delta.arguments)
    if name is None:
        return Reply("".join(content), None, "stop")
    return Reply("".join(content), {"name": name, "arguments": "".join(arguments)}, "function_call")


class _State(Enum):
    PLAIN = auto()
    THINKING = auto()
    CALLING = auto()
    ANSWERING = auto()
    DONE = auto()


class ReplyReader:
    """Parses a streamed reply. The concatenated deltas do not depend on how the text was split.

    Markers count at the start of a line; the first one may be preceded by whitespace.

    - A call is an `Action:` line with a name, followed by `Action Input:` (blank lines between them are allowed). Its
      arguments extend to an `Observation:` or `Final Answer:` line and are stripped. Text after the first call is
      ignored.
    - Text after `Thought:` is held back until its purpose is clear: before a call it is the thought, stripped; before a
      final answer it is dropped.
    - Text after `Final Answer:` is the content, stripped, even if it contains markers. While it has at most 32
      characters, another `Final Answer:` line restarts it: models often fill in the form twice.
    - Other text is plain content, emitted unchanged as it arrives, up to a call, a thought or a final answer. A thought
      that leads to neither is plain content, too. Any text is accepted.

    Content that was already emitted is kept.

    Args:
        continues: the reply continues a prompt that ends in "Thought:".
    """

    def __init__(self, continues: bool = False):
        self._state = _State.THINKING if continues else _State.PLAIN
        self._blank = True  # only whitespace so far
        self._line_start = True
        self._head = ""  # start of a line that may become a marker
        self._action: str | None = None  # "Action:" line and blank lines after it, which may become a call
        self._thought: list[str] = []
        self._answer_start: str | None = ""  # held back until it is longer than _MAX_HELD_CHARS, then None
        self._gap = ""  # whitespace that is emitted if more text follows
        self._emitted = False

    def feed(self, text: str) -> list[Delta]:
        """Add a piece of the reply and return the deltas that are now certain."""
        return [delta for marker, rest in self._split(text) for delta in self._read(marker, rest)]

    def finish(self) -> list[Delta]:
        """End the reply and return what was held back. Text fed later is ignored."""
        deltas = list(self._read("", self._head))
        if self._action is not None:
            deltas += self._add_text(self._action)
            self._action = None
        if self._state is _State.THINKING:
            deltas += self._content(self._gap + "".join(self._thought))
        elif self._state is _State.PLAIN:
            deltas += self._content(self._gap)
        elif self._state is _State.ANSWERING and self._answer_start:
            deltas += self._content(self._gap + self._answer_start.rstrip())
        self._state = _State.DONE
        return deltas

    def _split(self, text: str) -> Iterator[tuple[str, str]]:
        """Split text into (marker, "") and ("", text within one line)."""
        for piece in _LINES.findall(text):
            if self._blank:
                body = piece.lstrip()
                yield "", piece[: len(piece) - len(body)]
                piece, self._blank = body, not body
                if not body:
                    continue
            if self._line_start:
                piece, self._head = self._head + piece, ""
                marker = next((marker for marker in MARKERS if piece.startswith(marker)), "")
                if not marker and any(marker.startswith(piece) for marker in MARKERS):
                    self._head = piece
                    continue
                if marker:
                    yield marker, ""
                    piece = piece[len(marker) :]
            self._line_start = piece.endswith("\n")
            yield "", piece

    def _read(self, marker: str, text: str) -> Iterator[Delta]:
        if self._state in (_State.PLAIN, _State.THINKING):
            yield from self._read_text(marker, text)
        elif self._state is _State.CALLING:
            if marker in (STOP_WORD, FINAL_ANSWER):
                self._state = _State.DONE
            else:
                text = marker + text
                if arguments := self._release(text if self._emitted else text.lstrip()):
                    yield CallDelta(None, arguments)
        elif self._state is _State.ANSWERING:
            yield from self._answer(marker, text)

    def _read_text(self, marker: str, text: str) -> Iterator[Delta]:
        if self._action is not None:
            name, _, below = (self._action + text).removeprefix(ACTION).partition("\n")
            if marker == ACTION_INPUT and name.strip():
                if thought := self._thought_before_call():
                    yield ThoughtDelta(thought)
                yield CallDelta(name.strip(), "")
                self._state, self._action, self._gap, self._emitted = _State.CALLING, None, "", False
                return
            if not marker and not below.strip():
                self._action += text
                return
            action, self._action = self._action, None
            if marker != FINAL_ANSWER:
                yield from self._add_text(action)
        if marker == ACTION:
            self._action = marker
        elif marker == FINAL_ANSWER:
            self._state, self._gap = _State.ANSWERING, self._gap if self._emitted else ""
        else:
            if marker == THOUGHT:
                self._state = _State.THINKING
            yield from self._add_text(marker + text)

    def _thought_before_call(self) -> str:
        thought = "".join(self._thought).strip().removeprefix(THOUGHT).strip()
        return self._gap + thought if thought and self._emitted else thought

    def _answer(self, marker: str, text: str) -> Iterator[Delta]:
        text = marker + text
        if self._answer_start is not None:
            self._answer_start = "" if marker == FINAL_ANSWER else (self._answer_start + text).lstrip()
            if len(self._answer_start) <= _MAX_HELD_CHARS:
                return
            text, self._answer_start = self._answer_start, None
        yield from self._content(self._release(text))

    def _add_text(self, text: str) -> Iterator[Delta]:
        """Handle text that is not part of a call or a final answer."""
        if self._state is _State.THINKING:
            self._thought.append(text)
        else:
            yield from self._content(self._release(text))

    def _release(self, text: str) -> str:
        """Return the text to emit now; trailing whitespace is held back until more text follows."""
        text = self._gap + text
        body = text.rstrip()
        self._gap = text[len(body) :]
        self._emitted |= bool(body)
        return body

    @staticmethod
    def _content(text: str) -> Iterator[Delta]:
        if text:
            yield ContentDelta(text)
