"""Attention to a cache in blocks compared with plain attention, for random sequences in random places."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qwen.kernels.cpu import Places, cpu_kernels
from qwen.model.kv_cache_qwen import dequantize_cache_torch, quantize_tokens
from qwen.serving.engine import paged_attention
from qwen.serving.engine.block_manager import BlockManager
from qwen.serving.engine.paged_attention import attend_padded, attend_rows
from qwen.serving.engine.paged_kv_cache import LayerPages
from qwen.serving.engine.step_layout import Row, StepLayout, query_tiles

HEADS, SIZE, BLOCK, SCALING = 2, 16, 16, 0.2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Case:
    """Sequences in a cache: some share a beginning, some have gaps between their blocks, some have new tokens.

    Args:
        decoding: all sequences have one new token.
    """

    def __init__(self, seed: int, *, decoding: bool, quantized: bool = False, window=None, dtype=torch.float32):
        draw, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.dtype, self.window, self.quantized = dtype, window, quantized
        blocks = BlockManager(256, BLOCK)
        kinds = [(SIZE, torch.uint8), (1, dtype), (1, dtype)] if quantized else [(SIZE, dtype)]
        pools = [torch.zeros(HEADS, 257 * BLOCK, width, dtype=kind) for width, kind in 2 * kinds]
        self.pages = LayerPages(pools, BLOCK, window, dtype, SIZE, SCALING)
        self.tables: list[list[int]] = []
        self.lengths = [draw.choice([1, 2, 15, 16, 17, 40, 100, 130, 131, 300]) for _ in range(draw.randrange(1, 9))]
        shared = blocks.allocate(draw.randrange(1, 6))
        for length in self.lengths:
            table = shared[: (length - 1) // BLOCK] if draw.random() < 0.5 else []
            while len(table) < blocks.blocks_for(length):
                if draw.random() < 0.2:
                    blocks.allocate(1)  # of somebody else: a gap
                table = table + blocks.allocate(1)
            self.tables.append(table)
        self.new = [
            1 if decoding else draw.randrange(1, 1 + length - (len(set(table) & set(shared)) * BLOCK))
            for length, table in zip(self.lengths, self.tables, strict=True)
        ]
        order = sorted(range(len(self.lengths)), key=lambda index: self.new[index] > 1)
        self.lengths, self.tables, self.new = (
            [part[i] for i in order] for part in (self.lengths, self.tables, self.new)
        )
        self.keys, self.values = self._fill(shared)
        self.layout = self._layout()
        self.pages.layout = self.layout

    def slots(self, index: int) -> torch.Tensor:
        """The slots of a sequence's tokens."""
        table, length = self.tables[index], self.lengths[index]
        return (torch.tensor(table)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:length]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def _fill(self, shared: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Give all tokens but the new ones keys and values; shared blocks the same ones. (H, T, D) each."""
        common = self.random(2, HEADS, len(shared) * BLOCK, SIZE)
        keys, values = [], []
        for index, length in enumerate(self.lengths):
            states = self.random(2, HEADS, length, SIZE)
            same = sum(block in shared for block in self.tables[index]) * BLOCK
            states[:, :, :same] = common[:, :, :same]
            keys.append(states[0])
            values.append(states[1])
            self._write(
                self.slots(index)[: length - self.new[index]], *(part[:, : length - self.new[index]] for part in states)
            )
        return keys, values

    def _write(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        stored = (
            (*quantize_tokens(key[None]), *quantize_tokens(value[None])) if self.quantized else (key[None], value[None])
        )
        for pool, tensor in zip(self.pages.pools, stored, strict=True):
            pool[:, slots] = tensor[0]

    def _layout(self) -> StepLayout:
        rows, slots, start = [], [], 0
        for index, (length, new) in enumerate(zip(self.lengths, self.new, strict=True)):
            rows.append(Row(index, start, start + new, length))
            slots.append(self.slots(index)[length - new :])
            start += new
        tables = torch.zeros(len(rows), max(map(len, self.tables)), dtype=torch.int32)
        for index, table in enumerate(self.tables):
            tables[index, : len(table)] = torch.tensor(table)
        places = Places(torch.cat(slots), tables, query_tiles(rows), max(self.lengths))
        return StepLayout(
            torch.cat(slots),
            torch.tensor(self.lengths, dtype=torch.int32),
            tables,
            torch.tensor([0, *(row.query_end for row in rows)], dtype=torch.int32),
            rows,
            sum(new == 1 for new in self.new),
            max(self.new),
            max(self.lengths),
            places,
        )

    def append(self) -> torch.Tensor:
        """Write the new tokens; return random queries for them, (1, H, N, D)."""
        new_keys, new_values = (
            torch.cat([part[:, part.shape[1] - new :] for part, new in zip(parts, self.new, strict=True)], dim=1)[None]
            for parts in (self.keys, self.values)
        )
        self.pages.append(new_keys, new_values)
        return self.random(1, HEADS, new_keys.shape[2], SIZE)

    def expected(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Plain attention in float32, (1, N, H, D)."""
        outputs = []
        for row, key, value in zip(self.layout.rows, self.keys, self.values, strict=True):
            if self.quantized:
                key, value = (dequantize_cache_torch(*quantize_tokens(part[None]))[0] for part in (key, value))
            positions = torch.arange(row.length)
            distance = positions[row.length - (row.query_end - row.query_start) :, None] - positions
            visible = (distance >= 0) & (distance < (self.window or row.length))
            part = query[0, :, row.query_start : row.query_end].float()
            outputs.append(scaled_dot_product_attention(part, key.float(), value.float(), visible, scale=scaling))
        return torch.cat(outputs, dim=1)[None].transpose(1, 2)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def attend_on_cpu(query: torch.Tensor, pages: LayerPages) -> torch.Tensor:
    """(1, H, N, D) → (1, N, H, D), by the kernels and for long chunks by torch."""
    kernels = cpu_kernels()
    assert kernels is not None
    return pages.attend(kernels, query[0].transpose(0, 1).contiguous())[None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["floats", "8 bits"])
@pytest.mark.parametrize("window", [None, 1, 20, 120])
@pytest.mark.parametrize("decoding", [True, False], ids=["decoding", "mixed"])
def test_both_ways_equal_plain_attention(dtype, quantized, window, decoding):
    """With the kernels, and without, as where there is no compiler."""
    for seed in range(12):
        case = Case(seed, decoding=decoding, quantized=quantized, window=window, dtype=dtype)
        query = case.append()
        close(attend_on_cpu(query, case.pages), case.expected(query, SCALING), dtype)
        close(attend_rows(query, case.pages, case.layout, SCALING), case.expected(query, SCALING), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["floats", "8 bits"])
@pytest.mark.parametrize("window", [None, 20])
def test_padded_equals_plain_attention(dtype, quantized, window):
    """The one for GPUs, on a CPU."""
    for seed in range(12):
        case = Case(seed, decoding=True, quantized=quantized, window=window, dtype=dtype)
        query = case.append()
        found = attend_padded(query, case.pages, case.layout, SCALING).transpose(1, 2)
        close(found, case.expected(query, SCALING), dtype)


@pytest.mark.parametrize("decoding", [True, False], ids=["decoding", "mixed"])
def test_what_nobody_wrote_is_not_read(decoding):
    case = Case(3, decoding=decoding)
    query = case.append()
    written = torch.cat([case.slots(index) for index in range(len(case.lengths))])
    unwritten = torch.ones(case.pages.pools[0].shape[1], dtype=torch.bool)
    unwritten[written] = False
    for pool in case.pages.pools:
        pool[:, unwritten] = float("nan")
    for found in (
        attend_on_cpu(query, case.pages),
        attend_rows(query, case.pages, case.layout, SCALING),
    ):
        close(found, case.expected(query, SCALING), torch.float32)


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_combined(seed):
    """Attention to two sets of keys equals that to all."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, HEADS, 40, SIZE, generator=generator)
    parts = [
        paged_attention._flash(query, key[:, :, each], value[:, :, each], 0.3) for each in (slice(30), slice(30, 40))
    ]
    whole = paged_attention._flash(query, key, value, 0.3)[0]
    torch.testing.assert_close(paged_attention._merge(*parts), whole, rtol=1e-5, atol=1e-5)
