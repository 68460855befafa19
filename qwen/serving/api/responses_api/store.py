"""Keeps responses in memory, so that a later request can continue their conversations.

A turn of a conversation refers to the one before it. A conversation of many turns is therefore kept once, although
each turn can be continued by itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_BYTES = 64 * 2**20  # of JSON, in all responses together


@dataclass(eq=False)
class Turn:
    """The items that one request and its response added to a conversation, as JSON.

    Args:
        input: the items of the request, a JSON array.
        output: the items of the response, a JSON array.
        output_ids: ids of the items of the response.
        previous: the turn before it.
    """

    input: bytes
    output: bytes
    output_ids: list[str]
    previous: Turn | None
    users: int = field(default=0, init=False)  # stored responses and later turns that need this one

    @property
    def size(self) -> int:
        return len(self.input) + len(self.output)

    def conversation(self) -> list[Turn]:
        """Return the turns up to this one, the first turn first."""
        turns = list(_chain(self))
        turns.reverse()
        return turns


class StoredResponse(NamedTuple):
    """A response as JSON, and its turn."""

    response: bytes
    turn: Turn


class ResponseStore:
    """The least recently used responses go when there are too many, or too large ones. Safe to use from any thread.

    A response that is deleted, or that had to go, cannot be read or continued any more. Later responses of its
    conversation still can: they keep its turn.

    Args:
        max_responses: maximum number of responses; 0 stores none.
        max_bytes: maximum size of all together.
    """

    def __init__(self, max_responses: int, max_bytes: int = MAX_BYTES):
        self.max_responses, self.max_bytes = max_responses, max_bytes
        self.bytes = 0
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._turns: dict[str, Turn] = {}  # by the ids of their output items
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._responses)

    def add(self, id: str, response: bytes, turn: Turn) -> None:
        """Store a response, unless it and its conversation alone exceed the limits."""
        conversation = sum(each.size for each in _chain(turn))
        if not self.max_responses or len(response) + conversation > self.max_bytes:
            return
        with self._lock:
            self._responses[id] = StoredResponse(response, turn)
            self.bytes += len(response)
            self._keep(turn)
            while len(self._responses) > self.max_responses or self.bytes > self.max_bytes:
                self._forget(next(iter(self._responses)))

    def get(self, id: str) -> StoredResponse | None:
        """Return a response, which becomes the most recently used one."""
        with self._lock:
            if id in self._responses:
                self._responses.move_to_end(id)
            return self._responses.get(id)

    def find_turn(self, item_id: str) -> Turn | None:
        """Return the turn that an output item belongs to."""
        with self._lock:
            return self._turns.get(item_id)

    def delete(self, id: str) -> bool:
        """Delete a response; return whether it was there."""
        with self._lock:
            found = id in self._responses
            if found:
                self._forget(id)
            return found

    def _forget(self, id: str) -> None:
        response, turn = self._responses.pop(id)
        self.bytes -= len(response)
        self._release(turn)

    def _keep(self, turn: Turn | None) -> None:
        """Count one more user of a turn. The turns before it have to be kept only if it was not kept yet."""
        while turn is not None:
            turn.users += 1
            if turn.users > 1:
                return
            self.bytes += turn.size
            self._turns.update(dict.fromkeys(turn.output_ids, turn))
            turn = turn.previous

    def _release(self, turn: Turn | None) -> None:
        while turn is not None:
            turn.users -= 1
            if turn.users:
                return
            self.bytes -= turn.size
            for item_id in turn.output_ids:
                del self._turns[item_id]
            turn = turn.previous


def _chain(turn: Turn | None) -> Iterator[Turn]:
    """Yield a turn and those before it."""
    while turn is not None:
        yield turn
        turn = turn.previous
