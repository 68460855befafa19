"""Where the tokens of a step are in the cache.

Shapes: N tokens of a step, R sequences of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ...kernels.cpu import TILE_QUERIES, Places

# From so many tokens on, and with so many tokens in the cache, torch's attention reads a chunk of a prompt on a CPU,
# which copies its past; for fewer the kernels do, which read it in place.
LONG_CHUNK, LONG_PAST = 64, 1024


class Row(NamedTuple):
    """A sequence in a step.

    Args:
        table: its row of the block tables.
        query_start, query_end: its new tokens among those of the step.
        length: its tokens in the cache, with the new ones.
    """

    table: int
    query_start: int
    query_end: int
    length: int

    @property
    def is_long(self) -> bool:
        """Whether torch attends, on a CPU."""
        tokens = self.query_end - self.query_start
        return tokens >= LONG_CHUNK or (tokens >= LONG_CHUNK // 4 and self.length >= LONG_PAST)


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
        places: the same for the fused operations on a CPU.
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    rows: list[Row]
    num_decoding: int
    max_query: int
    max_length: int
    places: Places

    def to(self, device: torch.device) -> StepLayout:
        """Return a copy on a device."""
        if device == self.slots.device:
            return self
        names = ("slots", "lengths", "block_tables", "query_starts")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        places = self.places._replace(slots=moved["slots"], tables=moved["block_tables"])
        return replace(self, **moved, places=places)


def query_tiles(rows: list[Row]) -> torch.Tensor:
    """Return the tiles of a step, as in `Places`, without the long rows."""
    tiles = []
    for row in rows:
        seen = row.length - row.query_end + 1  # by the step's first token, if it were of this row
        for first in range(row.query_start, row.query_end if not row.is_long else 0, TILE_QUERIES):
            tiles += [first, min(TILE_QUERIES, row.query_end - first), row.table, seen + first]
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 4)
