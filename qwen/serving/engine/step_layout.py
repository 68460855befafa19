"""Where the tokens of a step are in the cache, and how sequences with one new token read it in place.

Shapes: N tokens of a step, R sequences of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from .block_manager import BLOCK_SIZE, REGION_SIZE

REGION_SLOTS = REGION_SIZE * BLOCK_SIZE  # new runs begin at multiples of this number of slots


class Row(NamedTuple):
    """A sequence in a step.

    Args:
        query_start, query_end: its new tokens among those of the step.
        length: its tokens in the cache, with the new ones.
        runs: the slots that hold them, as (first slot, last slot + 1).
    """

    query_start: int
    query_end: int
    length: int
    runs: list[tuple[int, int]]


@dataclass(frozen=True)
class RunGroup:
    """Runs of `count` sequences that one call attends to in place.

    Args:
        first: first slot of the first run.
        stride: slots from the beginning of one run to that of the next; 0 if all are the same run.
        length: slots of the longest run.
        mask: (count, 1, 1, length), additive, for what follows shorter runs; None if all have the same length.
    """

    count: int
    first: int
    stride: int
    length: int
    mask: torch.Tensor | None


class DecodePlan(NamedTuple):
    """How sequences with one new token attend to their runs.

    Args:
        groups: all runs.
        rows: the sequence of each run, in the order of the groups.
        places: the run of each sequence; None if a sequence has several.
        is_ordered: whether the runs are in the order of the sequences, one for each.
    """

    groups: list[RunGroup]
    rows: torch.Tensor
    places: torch.Tensor | None
    is_ordered: bool

    @classmethod
    def of(cls, parts: list[tuple[int, int, int]], num_rows: int, device: torch.device) -> DecodePlan:
        """Group runs that are the same, or begin at equal distances and have similar lengths.

        Args:
            parts: runs as (first slot, last slot + 1, sequence).
        """
        parts.sort()
        groups: list[RunGroup] = []
        start = 0
        while start < len(parts):
            end = _group_end(parts, start)
            firsts = [part[0] for part in parts[start:end]]
            lengths = [part[1] - part[0] for part in parts[start:end]]
            stride = firsts[1] - firsts[0] if len(firsts) > 1 else 0
            mask = None
            if len(set(lengths)) > 1:
                beyond = torch.arange(max(lengths), device=device) >= torch.tensor(lengths, device=device)[:, None]
                mask = torch.zeros(beyond.shape, device=device).masked_fill(beyond, -float("inf"))[:, None, None]
            groups.append(RunGroup(end - start, firsts[0], stride, max(lengths), mask))
            start = end
        order = [part[2] for part in parts]
        rows = torch.tensor(order, device=device)
        places = rows.argsort() if len(parts) == num_rows else None
        return cls(groups, rows, places, order == list(range(num_rows)))


def _group_end(parts: list[tuple[int, int, int]], start: int) -> int:
    """Return the end of the largest group that begins at part `start`."""
    first, last, _ = parts[start]
    end = start + 1
    if end < len(parts) and parts[end][:2] == (first, last):
        while end < len(parts) and parts[end][:2] == (first, last):
            end += 1
        return end
    stride = parts[end][0] - first if end < len(parts) else 0
    if stride == 0:  # the next run has the same beginning, and is longer
        return end
    shortest = longest = last - first
    # A mask does not remove another sequence's NaN. What is masked lies in the region of the run itself, where nobody
    # else writes unless the run is a shared beginning.
    room = -last % REGION_SLOTS + longest
    while end < len(parts) and parts[end][0] == first + (end - start) * stride:
        length = parts[end][1] - parts[end][0]
        shortest, longest = min(shortest, length), max(longest, length)
        room = min(room, -parts[end][1] % REGION_SLOTS + length)
        if longest > room or longest > 2 * shortest + 64:
            break
        end += 1
    return end


@dataclass
class StepLayout:
    """Where the tokens of a step are in the cache. The tensors have fixed addresses in a captured step.

    Args:
        slots: (N), where the keys and values of new tokens go.
        lengths: (R), int32, tokens of each sequence in the cache, with the new ones.
        block_tables: (R, blocks), int32, the blocks of each sequence.
        query_starts: (R + 1), int32, where the tokens of each sequence begin, and the number of all.
        rows: the same on the host, those with one new token first; empty in a captured step.
        num_decoding: number of sequences with one new token.
        max_query: most new tokens of a sequence.
        max_length: most tokens of a sequence in the cache; in a captured step, of any sequence that can be served.
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    rows: list[Row]
    num_decoding: int
    max_query: int
    max_length: int
    _plans: dict[int | None, DecodePlan] = field(default_factory=dict)

    def to(self, device: torch.device) -> StepLayout:
        """Return a copy on a device."""
        if device == self.slots.device:
            return self
        names = ("slots", "lengths", "block_tables", "query_starts")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved, _plans={})

    def decode_plan(self, window: int | None) -> DecodePlan:
        """Return how the sequences with one new token attend to the cache in place."""
        if window not in self._plans:
            parts = []
            for index, row in enumerate(self.rows[: self.num_decoding]):
                start = 0 if window is None else max(0, row.length - window)
                parts += [(*run, index) for run in take_slots(row.runs, start, row.length)]
            self._plans[window] = DecodePlan.of(parts, self.num_decoding, self.slots.device)
        return self._plans[window]


def take_slots(runs: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Return the part of some runs, (first slot, last slot + 1) each, that holds the tokens from `start` to `end`."""
    found, position = [], 0
    for first, last in runs:
        low, high = max(start - position, 0), min(end - position, last - first)
        if low < high:
            found.append((first + low, first + high))
        position += last - first
    return found
