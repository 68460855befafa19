"""Attention of new tokens to a cache in blocks, with what torch has.

`attend` chooses among three:

- `attend_rows` goes through the sequences. On a CPU it reads the cache in place, run by run of adjacent blocks, and
  combines the parts by their log-sum-exp (Dao et al. 2023, https://pytorch.org/blog/flash-decoding/).
- `attend_padded` copies the blocks of all sequences side by side. Its shapes do not depend on lengths, so that it can
  be captured in a CUDA graph.
- `attend_varlen` is flash attention over block tables, for 16 bits on GPUs.

Each layer appends its new tokens before it attends. Shapes: N tokens of a step, R sequences, H heads, D head size.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from .step_layout import Row, RunGroup, StepLayout, take_slots

FLASH_BLOCK_SIZE = 256  # the smallest that flash-attn 2 takes


class Pages(Protocol):
    """The cache of one layer, as attention reads it. Keys and values come dequantized.

    Attributes:
        pools: keys and values of all slots, (H, slots, D) each; in 8 bits, six tensors.
        block_size: tokens per block.
        window: how many tokens back the layer attends; None for all.
        is_quantized: whether keys and values are in 8 bits.
        new: keys and values of the step's tokens, (1, H, N, D) each.
    """

    pools: list[torch.Tensor]
    block_size: int
    window: int | None
    is_quantized: bool
    new: tuple[torch.Tensor, torch.Tensor]

    def read(self, slots: slice | torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those in some slots: (1, H, T, D) each."""

    def read_group(self, group: RunGroup, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those of some runs: (runs, H, T, D) each."""

    def read_tables(self, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those in (R, T) slots: (R, H, T, D) each."""


@functools.cache
def uses_varlen(device: torch.device, dtype: torch.dtype, quantized: bool) -> bool:
    """Whether torch's flash attention takes the block tables of a cache: in 16 bits, on NVIDIA's Ampere or later."""
    if device.type != "cuda" or quantized or dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention import varlen
    except ImportError:  # before torch 2.10
        return False
    return "block_table" in varlen.varlen_attn.__annotations__  # from 2.13 on


def attend(query: torch.Tensor, pages: Pages, layout: StepLayout, scaling: float) -> torch.Tensor:
    """Attend from new tokens to the tokens of their sequences, up to their own. query: (1, H, N, D) → (1, N, H, D)."""
    if uses_varlen(query.device, query.dtype, pages.is_quantized):
        return attend_varlen(query, pages, layout, scaling)
    if query.device.type != "cpu" and layout.max_query == 1:
        return attend_padded(query, pages, layout, scaling).transpose(1, 2)
    return attend_rows(query, pages, layout, scaling)


def attend_varlen(query: torch.Tensor, pages: Pages, layout: StepLayout, scaling: float) -> torch.Tensor:
    """Flash attention over block tables. Without splits over keys, so that a row does not depend on the others."""
    from torch.nn.attention.varlen import varlen_attn

    key, value = (pool.unflatten(1, (-1, pages.block_size)).permute(1, 2, 0, 3) for pool in pages.pools)
    window = (-1 if pages.window is None else pages.window - 1, 0)
    output = varlen_attn(
        query[0].transpose(0, 1), key, value, layout.query_starts, None, layout.max_query, layout.max_length,
        scale=scaling, window_size=window, seqused_k=layout.lengths, block_table=layout.block_tables, num_splits=1,
    )  # fmt: skip
    assert isinstance(output, torch.Tensor)  # no log-sum-exp was asked for
    return output[None]


def attend_padded(query: torch.Tensor, pages: Pages, layout: StepLayout, scaling: float) -> torch.Tensor:
    """One new token of each of the first R sequences: copy all of their blocks, and mask what is beyond their ends.

    Args:
        query: (1, H, R, D), returned like that.
    """
    tables, lengths = layout.block_tables[: query.shape[2]], layout.lengths[: query.shape[2], None]
    offsets = torch.arange(pages.block_size, device=query.device)
    slots = (tables[:, :, None] * pages.block_size + offsets).flatten(1)
    positions = torch.arange(slots.shape[1], device=query.device)
    visible = positions < lengths
    if pages.window is not None:
        visible &= positions >= lengths - pages.window
    # What is masked is read at the row's own first token: another sequence may have NaN, which no mask removes.
    key, value = pages.read_tables(slots.where(visible, slots[:, :1]), query.dtype)
    output = scaled_dot_product_attention(query.transpose(0, 2), key, value, visible[:, None, None], scale=scaling)
    return output.transpose(0, 2)


def attend_rows(query: torch.Tensor, pages: Pages, layout: StepLayout, scaling: float) -> torch.Tensor:
    """One sequence after the other: those with one new token, which come first, then chunks of prompts."""
    outputs = []
    if layout.num_decoding:
        attend_single = _attend_in_place if query.device.type == "cpu" else attend_padded
        outputs.append(attend_single(query[:, :, : layout.num_decoding], pages, layout, scaling))
    for row in layout.rows[layout.num_decoding :]:
        chunk = query[:, :, row.query_start : row.query_end]
        past = row.length - chunk.shape[2]
        if pages.window is not None and row.length > pages.window:
            outputs.append(_attend_window(chunk, pages, row, scaling))
            continue
        own = _flash(chunk, *_own(pages, layout, row, query.dtype), scaling, causal=True)
        for first, last in take_slots(row.runs, 0, past):
            own = _merge(own, _flash(chunk, *pages.read(slice(first, last), query.dtype), scaling))
        outputs.append(own[0])
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2)


Part = tuple[torch.Tensor, torch.Tensor]  # attention to some of the keys (1, H, S, D), and the log-sum-exp (1, H, S)


def _attend_in_place(query: torch.Tensor, pages: Pages, layout: StepLayout, scaling: float) -> torch.Tensor:
    """One new token of each of R sequences. query: (1, H, R, D), returned like that."""
    plan = layout.decode_plan(pages.window)
    if len(plan.groups) == 1 and plan.is_ordered:
        return _attend_group(query, plan.groups[0], pages, scaling)[0]
    queries = query.index_select(2, plan.rows).split([group.count for group in plan.groups], dim=2)
    found = [_attend_group(*pair, pages, scaling) for pair in zip(queries, plan.groups, strict=True)]
    output, lse = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    if plan.places is not None:
        return output.index_select(2, plan.places)
    index = plan.rows.expand_as(lse)
    highest = lse.new_full(query.shape[:3], -float("inf")).scatter_reduce(2, index, lse, "amax")
    shares = (lse - highest.gather(2, index)).exp()
    total = torch.zeros_like(highest).scatter_add(2, index, shares)
    shares /= total.gather(2, index)
    return torch.zeros_like(query).index_add_(2, plan.rows, (output * shares[..., None]).to(query.dtype))


def _attend_group(query: torch.Tensor, group: RunGroup, pages: Pages, scaling: float) -> Part:
    """Attend from one token of each of some sequences to a run of each. query: (1, H, count, D)."""
    key, value = pages.read_group(group, query.dtype)
    if group.stride == 0:
        return _flash(query, key, value, scaling)
    output, lse = _flash(query.transpose(0, 2), key, value, scaling, mask=group.mask)
    return output.transpose(0, 2), lse.transpose(0, 2)


def _own(pages: Pages, layout: StepLayout, row: Row, dtype: torch.dtype) -> Part:
    """Keys and values of the new tokens: in 8 bits as they are stored."""
    if pages.is_quantized:
        return pages.read(layout.slots[row.query_start : row.query_end], dtype)
    key, value = pages.new
    return key[:, :, row.query_start : row.query_end], value[:, :, row.query_start : row.query_end]


def _attend_window(query: torch.Tensor, pages: Pages, row: Row, scaling: float) -> torch.Tensor:
    """Attend to the last tokens up to each query's own. query: (1, H, S, D), returned like that."""
    assert pages.window is not None
    first_query = row.length - query.shape[2]
    low = max(0, first_query - pages.window + 1)
    slots = torch.cat([torch.arange(*run) for run in take_slots(row.runs, low, row.length)])
    key, value = pages.read(slots.to(query.device), query.dtype)
    queries = torch.arange(first_query, row.length, device=query.device)[:, None]
    keys = torch.arange(low, row.length, device=query.device)
    visible = (keys <= queries) & (keys > queries - pages.window)
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> Part:
    """Attention, with the log-sum-exp of the scores. query: (B, H, S, D), key and value: (B, H, T, D)."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scaling
        )
    assert mask is None  # for sequences that are read in place, on a CPU
    scores = (query @ key.mT).float() * scaling
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -float("inf"))
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def _merge(first: Part, second: Part) -> Part:
    """Combine attention to two sets of keys."""
    lse = torch.logaddexp(first[1], second[1])
    output = (first[1] - lse).exp()[..., None] * first[0] + (second[1] - lse).exp()[..., None] * second[0]
    return output.to(first[0].dtype), lse
