"""A model's reply, read while it grows or as a whole."""

import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from .react import ACTION, ACTION_INPUT, FINAL_ANSWER, MARKERS, STOP_WORD, THOUGHT

_LINES = re.compile(r"[^\n]*\n|[^\n]+")
# An answer this long (in characters) is sent and stays; a shorter one may still be replaced.
_OPENING = 32


class Reply(NamedTuple):
    """What a model's reply means to the caller of an API.

    `content` is the answer, or the thought that led to a tool call. `function_call` is None or
    `{"name": str, "arguments": str}`; the arguments are the model's own text, which need not be valid JSON.
    `finish_reason` is "function_call" or "stop".
    """

    content: str
    function_call: dict[str, str] | None
    finish_reason: str


class ContentDelta(NamedTuple):
    """The next piece of a reply's content, never empty."""

    text: str


class CallDelta(NamedTuple):
    """The next piece of a tool call: first its whole name and no arguments, then arguments only (name None)."""

    name: str | None
    arguments: str


Delta = ContentDelta | CallDelta


def parse_response(response: str, continues: bool = False) -> Reply:
    """Reads a model's whole reply as a tool call, a final answer or plain text, by the rules of ReplyReader."""
    reader = ReplyReader(continues)
    content: list[str] = []
    name: str | None = None
    arguments: list[str] = []
    for delta in [*reader.feed(response), *reader.finish()]:
        if isinstance(delta, ContentDelta):
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
    """Reads a reply as it grows. What the deltas add up to does not depend on how the text was cut.

    The words of the format count at the start of a line, and before the first of them there may be blanks.

    - A call is an `Action:` line with a name and, but for blank lines, right below it `Action Input:`. Its arguments
      go on to an `Observation:` or `Final Answer:` line and are trimmed. The first call counts, and nothing after it.
    - What follows `Thought:` is held back until it is known what it leads to: before a call it is the content,
      trimmed; before a final answer it is dropped.
    - What follows `Final Answer:` is the content, trimmed, whatever it holds. Only while it is no longer than 32
      characters, a further `Final Answer:` line starts it anew: models like to fill in the form twice.
    - Anything else is plain text: content as it stands and as it comes, up to a call, a thought or a final answer.
      A thought that leads nowhere is plain text, too. No text raises.

    Text that was sent stays in front of what follows.

    Args:
        continues: the reply goes on right after the "Thought:" that the prompt ended in.
    """

    def __init__(self, continues: bool = False):
        self._state = _State.THINKING if continues else _State.PLAIN
        self._blank = True  # nothing but blanks so far
        self._line_start = True
        self._head = ""  # the start of a line that may yet become a marker
        self._action: str | None = None  # an "Action:" line, and blanks below it, that may yet become a call
        self._thought: list[str] = []
        self._opening: str | None = ""  # of an answer, until it is long enough to be sent
        self._gap = ""  # blanks that are sent if and when more text follows
        self._sent = False

    def feed(self, text: str) -> list[Delta]:
        """The next piece of the reply → what it makes certain, perhaps nothing."""
        return [delta for marker, rest in self._split(text) for delta in self._read(marker, rest)]

    def finish(self) -> list[Delta]:
        """The end of the reply → what was held back until now. What is fed later is ignored."""
        deltas = list(self._read("", self._head))
        if self._action is not None:
            deltas += self._add(self._action)
            self._action = None
        if self._state is _State.THINKING:
            deltas += self._content(self._gap + "".join(self._thought))
        elif self._state is _State.PLAIN:
            deltas += self._content(self._gap)
        elif self._state is _State.ANSWERING and self._opening:
            deltas += self._content(self._gap + self._opening.rstrip())
        self._state = _State.DONE
        return deltas

    def _split(self, text: str) -> Iterator[tuple[str, str]]:
        """Text → (marker, "") and ("", text within one line)."""
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
            yield from self._look_out(marker, text)
        elif self._state is _State.CALLING:
            if marker in (STOP_WORD, FINAL_ANSWER):
                self._state = _State.DONE
            else:
                text = marker + text
                if arguments := self._flow(text if self._sent else text.lstrip()):
                    yield CallDelta(None, arguments)
        elif self._state is _State.ANSWERING:
            yield from self._answer(marker, text)

    def _look_out(self, marker: str, text: str) -> Iterator[Delta]:
        if self._action is not None:
            name, _, below = (self._action + text).removeprefix(ACTION).partition("\n")
            if marker == ACTION_INPUT and name.strip():
                yield from self._content(self._thought_before_call())
                yield CallDelta(name.strip(), "")
                self._state, self._action, self._gap, self._sent = _State.CALLING, None, "", False
                return
            if not marker and not below.strip():
                self._action += text
                return
            action, self._action = self._action, None
            if marker != FINAL_ANSWER:
                yield from self._add(action)
        if marker == ACTION:
            self._action = marker
        elif marker == FINAL_ANSWER:
            self._state, self._gap = _State.ANSWERING, self._gap if self._sent else ""
        else:
            if marker == THOUGHT:
                self._state = _State.THINKING
            yield from self._add(marker + text)

    def _thought_before_call(self) -> str:
        thought = "".join(self._thought).strip().removeprefix(THOUGHT).strip()
        return self._gap + thought if thought and self._sent else thought

    def _answer(self, marker: str, text: str) -> Iterator[Delta]:
        text = marker + text
        if self._opening is not None:
            self._opening = "" if marker == FINAL_ANSWER else (self._opening + text).lstrip()
            if len(self._opening) <= _OPENING:
                return
            text, self._opening = self._opening, None
        yield from self._content(self._flow(text))

    def _add(self, text: str) -> Iterator[Delta]:
        """Text that means nothing in the format."""
        if self._state is _State.THINKING:
            self._thought.append(text)
        else:
            yield from self._content(self._flow(text))

    def _flow(self, text: str) -> str:
        """Text → all of it that may be sent now; blanks at its end wait for more."""
        text = self._gap + text
        body = text.rstrip()
        self._gap = text[len(body) :]
        self._sent |= bool(body)
        return body

    @staticmethod
    def _content(text: str) -> Iterator[Delta]:
        if text:
            yield ContentDelta(text)
