"""Steps that only decode, at fixed addresses and for fixed numbers of rows, so that CUDA graphs can hold them.

A step of R rows runs as one of the next larger bucket. The rows beyond R attend to a block that nobody owns. What
differs from step to step comes to the device in one copy; tokens are read where the sampler left them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ...kernels.cpu import Places
from .scheduler import Chunk
from .step_layout import StepLayout

logger = logging.getLogger(__name__)

# Rows: powers of two, and enough steps between the larger ones that few rows are wasted.
BUCKETS = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1025, 32))


def bucket_for(rows: int) -> int:
    """Return the smallest bucket that holds so many rows; beyond the last, the next multiple of it."""
    last = BUCKETS[-1]
    return next((bucket for bucket in BUCKETS if bucket >= rows), -(-rows // last) * last)


def to_pinned(array: np.ndarray) -> torch.Tensor:
    """Return a copy in memory that a GPU can read while the host goes on."""
    source = torch.from_numpy(array)
    return torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source)


class DecodeStep:
    """One decoding step of a fixed number of rows.

    Args:
        rows: number of rows.
        width: blocks of each row's table; even.
        block_size: tokens per block.
        spare_block: block for the rows that are not used.
        spare_slot: row of the sampler's state for them.
        max_length: most tokens of a sequence in the cache, and positions in the tables of rotary angles for each α.
        compute: runs the model: (rope indices (R), sampler slots (R), layout) → logits (R, V).
        device: device of the inputs.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        block_size: int,
        spare_block: int,
        spare_slot: int,
        max_length: int,
        compute: Callable[[torch.Tensor, torch.Tensor, StepLayout], torch.Tensor],
        device: torch.device,
    ):
        self.rows, self.width, self.block_size = rows, width, block_size
        self.spare_block, self.spare_slot, self.max_length = spare_block, spare_slot, max_length
        self._compute = compute
        self._graph: torch.cuda.CUDAGraph | None = None
        size = 3 * rows + (rows * self.width + rows + rows % 2) // 2
        self._inputs = torch.zeros(size, dtype=torch.long, device=device)
        self._host = np.zeros(size, dtype=np.int64)
        self.rope_indices, slots, self.sampler_slots = self._inputs[: 3 * rows].view(3, rows)
        packed = self._inputs[3 * rows :].view(torch.int32)
        tables, lengths = packed[: rows * self.width].view(rows, self.width), packed[rows * self.width :][:rows]
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._layout = StepLayout(
            slots, lengths, tables, starts, [], rows, 1, max_length, Places(slots, tables, tables[:0, :4], max_length)
        )
        self.logits: torch.Tensor

    def load(self, chunks: Sequence[Chunk]) -> None:
        """Copy the inputs of a step to the device."""
        rows, size, host = self.rows, self.block_size, self._host
        numbers, packed = host[: 3 * rows].reshape(3, rows), host[3 * rows :].view(np.int32)
        tables, lengths = packed[: rows * self.width].reshape(rows, self.width), packed[rows * self.width :]
        numbers[:] = np.array([[0], [self.spare_block * size], [self.spare_slot]])
        tables[:], lengths[:] = self.spare_block, 1
        for row, (sequence, start, end, _) in enumerate(chunks):
            numbers[0, row] = sequence.alpha_index * self.max_length + start
            numbers[1, row] = sequence.blocks[start // size] * size + start % size
            numbers[2, row] = sequence.slot
            tables[row, : len(sequence.blocks)] = sequence.blocks
            lengths[row] = end
        self._inputs.copy_(to_pinned(host) if self._inputs.is_cuda else torch.from_numpy(host), non_blocking=True)

    def run(self) -> torch.Tensor:
        """Return the logits (rows, V). They stay until the next run."""
        if self._graph is None:
            return self._compute(self.rope_indices, self.sampler_slots, self._layout)
        self._graph.replay()
        return self.logits

    def capture(self, pool: Any) -> Any:
        """Record the step in a CUDA graph, of which `run` is the replay. Its inputs must be loaded.

        Args:
            pool: memory that the graphs share; None to begin one.

        Returns:
            The pool.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and allocates workspaces, which cannot be captured
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.logits = self.run()
        self._graph = graph
        return graph.pool()


class DecodeSteps:
    """The decoding steps for all numbers of rows, captured when they are first needed, or by `warm_up`.

    Args:
        create: makes a step for numbers of rows and blocks.
        capturable: whether steps can be captured; otherwise they run as they are.
        max_rows: maximum number of rows.
        max_width: blocks of the longest sequence.
        fixed_width: attention does not read unused entries of the tables, so that one width serves all.

    Attributes:
        table_width: the largest width of a table.
    """

    def __init__(
        self,
        create: Callable[[int, int], DecodeStep],
        *,
        capturable: bool,
        max_rows: int,
        max_width: int,
        fixed_width: bool,
    ):
        self._create, self.capturable = create, capturable
        self._max_rows, self._fixed_width = max_rows, fixed_width
        self.table_width = max_width + max_width % 2  # of int32, so that what follows a table is aligned
        self._steps: dict[tuple[int, int], DecodeStep] = {}
        self._pool: Any = None

    def warm_up(self) -> None:
        """Capture the steps of all numbers of rows, the largest first, whose memory serves the others."""
        if self.capturable and self._fixed_width:
            for rows in reversed([bucket for bucket in BUCKETS if bucket <= bucket_for(self._max_rows)]):
                self._load([], rows, self.table_width)

    def load(self, chunks: Sequence[Chunk], width: int) -> DecodeStep:
        """Return the step for some chunks of one token, with its inputs loaded.

        Args:
            width: blocks of the longest sequence.
        """
        width = self.table_width if self._fixed_width else min(1 << max(2, (width - 1).bit_length()), self.table_width)
        return self._load(chunks, bucket_for(len(chunks)), width)

    def _load(self, chunks: Sequence[Chunk], rows: int, width: int) -> DecodeStep:
        key = rows, width
        is_new = key not in self._steps
        if is_new:
            self._steps[key] = self._create(*key)
        step = self._steps[key]
        step.load(chunks)
        if is_new and self.capturable:
            try:
                self._pool = step.capture(self._pool)
            except RuntimeError as error:
                self.capturable = False
                logger.warning("Decoding is not captured in CUDA graphs, and slower: %s", error)
        return step
