"""Converts the chunks of a chat completion to the events of a message, and the events to a whole message."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic_core import from_json

from ..response_types import ChatChunkChoice, ToolDelta, Usage
from .types import Content, Message, MessageUsage, StopReason

Event = dict[str, Any]

PING: Event = {"type": "ping"}
STOP_REASONS: dict[str, StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageWriter:
    """Converts the chunks of one reply to events. A change of what the chunks hold ends a block and begins the next.

    Args:
        model: name of the model.
        stop_sequences: those of the request.
        shows_thought: give the thought before a tool call as a block of its own.
    """

    def __init__(self, model: str, stop_sequences: Sequence[str], shows_thought: bool):
        self.model, self.stop_sequences, self.shows_thought = model, stop_sequences, shows_thought
        self.block: str | None = None  # type of the open block
        self.index = -1
        self.stop_reason: StopReason = "end_turn"
        self.stop_sequence: str | None = None

    def begin(self, usage: Usage) -> Iterable[Event]:
        """Begin the message. Nothing is known of the cache yet, so the whole prompt counts as not cached."""
        message: Message = {
            "id": f"msg_{secrets.token_hex(16)}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": message_usage(usage),
        }
        return [{"type": "message_start", "message": message}, PING]

    def write(self, chunk: ChatChunkChoice) -> Iterator[Event]:
        """Convert a chunk."""
        delta = chunk["delta"]
        if (thought := delta.get("reasoning_content")) and self.shows_thought:
            yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": thought})
        if text := delta.get("content"):
            yield from self._open({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": text})
        for call in delta.get("tool_calls", []):
            yield from self._write_call(call)
        if (reason := chunk["finish_reason"]) is not None:
            self.stop_reason = STOP_REASONS[reason]
            if reason == "stop" and (matched := chunk.get("stop_reason")) in self.stop_sequences:
                self.stop_reason, self.stop_sequence = "stop_sequence", str(matched)

    def end(self, usage: Usage) -> Iterator[Event]:
        """End the message."""
        yield from self._close()
        stop = {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}
        yield {"type": "message_delta", "delta": stop, "usage": message_usage(usage)}
        yield {"type": "message_stop"}

    def _write_call(self, call: ToolDelta) -> Iterator[Event]:
        function = call["function"]
        if "name" in function:
            yield from self._close()
            id_ = call["id"].replace("call_", "toolu_", 1)
            yield from self._open({"type": "tool_use", "id": id_, "name": function["name"], "input": {}})
        if function["arguments"]:
            yield self._delta({"type": "input_json_delta", "partial_json": function["arguments"]})

    def _open(self, block: Content) -> Iterator[Event]:
        """Begin a block, unless one of its type is open."""
        if self.block != block["type"]:
            yield from self._close()
            self.block = block["type"]
            self.index += 1
            yield {"type": "content_block_start", "index": self.index, "content_block": block}

    def _close(self) -> Iterator[Event]:
        if self.block is not None:
            self.block = None
            yield {"type": "content_block_stop", "index": self.index}

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": self.index, "delta": delta}


def message_usage(usage: Usage) -> MessageUsage:
    """Convert the token counts of a chat completion."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def merge_events(events: Iterable[Event]) -> Message:
    """Merge the events of a message as a client of the stream does."""
    message: Any = {}
    texts: dict[int, list[str]] = {}  # index of a block → its deltas
    for event in events:
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            text = next(value for key, value in event["delta"].items() if key != "type")
            texts.setdefault(event["index"], []).append(text)
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    for index, block in enumerate(message["content"]):
        text = "".join(texts.get(index, []))
        if block["type"] == "tool_use":
            block["input"] = _read_input(text)
        else:
            block[block["type"]] = text
    return message


def _read_input(arguments: str) -> dict[str, Any]:
    """Return the arguments of a call, as far as they go if they were cut off.

    A model may write something else than a JSON object. Clients can only take an object, so it becomes an empty one.
    """
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
