"""Translates the chunks of a chat completion to the events of a response.

A response that is sent at once is that of the last event, so that it cannot differ from a streamed one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ..errors import ApiError
from ..response_types import ChatChunkChoice, ContentLogprob, Usage
from .convert import new_id
from .types import (
    OutputFunctionCall,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningContent,
    Response,
    ResponseUsage,
)

Event = dict[str, Any]
Fields = tuple[str, dict[str, Any]]
"""Type and fields of an event of an item; the writer adds where the item is."""


class ResponseWriter:
    """Adds what a chat completion generates to a response, and yields the events.

    Events refer to the response and its items: send each one before the next one changes them.

    Args:
        response: the response, without output. It is completed in place.
    """

    def __init__(self, response: Response):
        self.response = response
        self._item: _MessageItem | _ReasoningItem | _FunctionCallItem | None = None  # the one being written
        self._is_cut_off = False
        self._events = 0

    def begin(self) -> Iterator[Event]:
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def write(self, chunk: ChatChunkChoice) -> Iterator[Event]:
        delta = chunk["delta"]
        logprobs = [] if chunk["logprobs"] is None else chunk["logprobs"]["content"]
        if thought := delta.get("reasoning_content"):
            if not isinstance(self._item, _ReasoningItem):
                yield from self._open(_ReasoningItem())
            yield from self._write(thought)
        if text := delta.get("content"):
            if not isinstance(self._item, _MessageItem):
                yield from self._open(_MessageItem())
            yield from self._write(text, logprobs)
        elif isinstance(self._item, _MessageItem):
            self._item.logprobs += logprobs  # of tokens without text, like the blanks at the end of a reply
        for call in delta.get("tool_calls", []):
            if "id" in call:
                yield from self._open(_FunctionCallItem(call["id"], call["function"]["name"]))
            if arguments := call["function"]["arguments"]:
                yield from self._write(arguments)
        if (reason := chunk["finish_reason"]) is not None:
            self._is_cut_off = reason == "length"
            if not self.response["output"] and not self._is_cut_off:
                yield from self._open(_MessageItem())  # the reply is empty
            yield from self._close()

    def finish(self, usage: Usage) -> Event:
        """Complete the response and return the last event."""
        response = self.response
        response["usage"] = _usage(usage)
        if self._is_cut_off:
            response["status"], response["incomplete_details"] = "incomplete", {"reason": "max_output_tokens"}
        else:
            response["status"], response["completed_at"] = "completed", int(time.time())
        return self._event(f"response.{response['status']}", response=response)

    def fail(self, error: ApiError) -> Iterator[Event]:
        """End the response with an error."""
        body = error.body["error"]
        yield self._event("error", code=body["code"] or body["type"], message=body["message"], param=body["param"])
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": str(body["message"])}
        yield self._event("response.failed", response=self.response)

    def _open(self, item: _MessageItem | _ReasoningItem | _FunctionCallItem) -> Iterator[Event]:
        yield from self._close()
        self._item = item
        self.response["output"].append(item.item)
        yield self._event("response.output_item.added", output_index=self._index, item=item.item)
        yield from self._located(item.begin())

    def _write(self, text: str, logprobs: list[ContentLogprob] | None = None) -> Iterator[Event]:
        assert self._item is not None
        yield from self._located(self._item.write(text, logprobs or []))

    def _close(self) -> Iterator[Event]:
        if (item := self._item) is not None:
            yield from self._located(item.end())
            item.item["status"] = "incomplete" if self._is_cut_off else "completed"
            yield self._event("response.output_item.done", output_index=self._index, item=item.item)
            self._item = None

    @property
    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _located(self, events: Iterator[Fields]) -> Iterator[Event]:
        for type, fields in events:
            yield self._event(type, item_id=self.response["output"][-1]["id"], output_index=self._index, **fields)

    def _event(self, type: str, **fields: object) -> Event:
        event = {"type": type, "sequence_number": self._events, **fields}
        self._events += 1
        return event


class _MessageItem:
    """A message while it is written. It has one part."""

    def __init__(self) -> None:
        self.part: OutputText = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.item: OutputMessage = {
            "id": new_id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self.texts: list[str] = []
        self.logprobs = self.part["logprobs"]

    def begin(self) -> Iterator[Fields]:
        yield "response.content_part.added", {"content_index": 0, "part": self.part}

    def write(self, text: str, logprobs: list[ContentLogprob]) -> Iterator[Fields]:
        self.texts.append(text)
        fields = {"content_index": 0, "delta": text, "logprobs": _without_bytes(logprobs)}
        yield "response.output_text.delta", fields
        self.logprobs += logprobs

    def end(self) -> Iterator[Fields]:
        self.part["text"] = "".join(self.texts)
        logprobs = _without_bytes(self.logprobs)
        yield "response.output_text.done", {"content_index": 0, "text": self.part["text"], "logprobs": logprobs}
        yield "response.content_part.done", {"content_index": 0, "part": self.part}
        self.item["content"] = [self.part]


class _ReasoningItem:
    """The thought before a function call while it is written."""

    def __init__(self) -> None:
        self.part: ReasoningContent = {"type": "reasoning_text", "text": ""}
        self.item: OutputReasoning = {
            "id": new_id("rs"),
            "type": "reasoning",
            "status": "in_progress",
            "summary": [],
            "content": [],
        }
        self.texts: list[str] = []

    def begin(self) -> Iterator[Fields]:
        yield "response.content_part.added", {"content_index": 0, "part": self.part}

    def write(self, text: str, logprobs: list[ContentLogprob]) -> Iterator[Fields]:
        self.texts.append(text)
        yield "response.reasoning_text.delta", {"content_index": 0, "delta": text}

    def end(self) -> Iterator[Fields]:
        self.part["text"] = "".join(self.texts)
        yield "response.reasoning_text.done", {"content_index": 0, "text": self.part["text"]}
        yield "response.content_part.done", {"content_index": 0, "part": self.part}
        self.item["content"] = [self.part]


class _FunctionCallItem:
    """A function call while its arguments are written."""

    def __init__(self, call_id: str, name: str):
        self.item: OutputFunctionCall = {
            "id": new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id,
            "name": name,
            "arguments": "",
        }
        self.texts: list[str] = []

    def begin(self) -> Iterator[Fields]:
        return iter(())

    def write(self, text: str, logprobs: list[ContentLogprob]) -> Iterator[Fields]:
        self.texts.append(text)
        yield "response.function_call_arguments.delta", {"delta": text}

    def end(self) -> Iterator[Fields]:
        self.item["arguments"] = "".join(self.texts)
        done = {"name": self.item["name"], "arguments": self.item["arguments"]}  # openai 2 requires the name
        yield "response.function_call_arguments.done", done


def _without_bytes(logprobs: list[ContentLogprob]) -> list[dict[str, Any]]:
    """Return log-probabilities as events have them: without the bytes of tokens."""
    return [
        {
            "token": entry["token"],
            "logprob": entry["logprob"],
            "top_logprobs": [{"token": top["token"], "logprob": top["logprob"]} for top in entry["top_logprobs"]],
        }
        for entry in logprobs
    ]


def _usage(usage: Usage) -> ResponseUsage:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,  # OpenAI charges for them; here they are part of the others
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
    }
