"""Attention of new tokens to a cache in blocks, with what torch has. The kernels do most of it where they run.

- `attend_padded` copies the blocks of all sequences side by side. Its shapes do not depend on lengths, so that it can
  be captured in a CUDA graph.
- `attend_chunk` copies the blocks of one sequence, for a chunk of a prompt; also beside the kernels.
- `attend` has these two for all sequences of a step.

Each layer appends its new tokens before it attends. Shapes: N tokens of a step, R sequences, H heads, D head size.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from .step_layout import Row, StepLayout


class LayerCache(Protocol):
    """The cache of one layer, as attention reads it. Keys and values come dequantized.

    Attributes:
        pools: keys and values of all slots, (H, slots, D) each; in 8 bits, six tensors.
        block_size: tokens per block.
        window: how many tokens back the layer attends; None for all.
        is_quantized: whether keys and values are in 8 bits.
    """

    pools: list[torch.Tensor]
    block_size: int
    window: int | None
    is_quantized: bool

    def read(self, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy those in (R, T) slots: (R, H, T, D) each."""


@functools.cache
def uses_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention takes a few queries and more keys: in 16 bits, on NVIDIA's Ampere or later."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention import varlen
    except ImportError:  # before torch 2.10
        return False
    return {"scale", "window_size"} <= varlen.varlen_attn.__annotations__.keys()


def attend(query: torch.Tensor, cache: LayerCache, layout: StepLayout, scaling: float) -> torch.Tensor:
    """Attend from new tokens to the tokens of their sequences, up to their own. query: (1, H, N, D) → (1, N, H, D)."""
    if layout.max_query == 1:
        return attend_padded(query, cache, layout, scaling).transpose(1, 2)
    return attend_rows(query, cache, layout, scaling)


def attend_padded(query: torch.Tensor, cache: LayerCache, layout: StepLayout, scaling: float) -> torch.Tensor:
    """One new token of each of the first R sequences: copy all of their blocks, and mask what is beyond their ends.

    Args:
        query: (1, H, R, D), returned like that.
    """
    tables, lengths = layout.block_tables[: query.shape[2]], layout.lengths[: query.shape[2], None]
    offsets = torch.arange(cache.block_size, device=query.device)
    slots = (tables[:, :, None] * cache.block_size + offsets).flatten(1)
    positions = torch.arange(slots.shape[1], device=query.device)
    visible = positions < lengths
    if cache.window is not None:
        visible &= positions >= lengths - cache.window
    # What is masked is read at the row's own first token: another sequence may have NaN, which no mask removes.
    key, value = cache.read(slots.where(visible, slots[:, :1]), query.dtype)
    output = scaled_dot_product_attention(query.transpose(0, 2), key, value, visible[:, None, None], scale=scaling)
    return output.transpose(0, 2)


def attend_rows(query: torch.Tensor, cache: LayerCache, layout: StepLayout, scaling: float) -> torch.Tensor:
    """Sequences with one new token, which come first, together; then one chunk of a prompt after the other."""
    outputs = []
    if layout.num_decoding:
        outputs.append(attend_padded(query[:, :, : layout.num_decoding], cache, layout, scaling))
    outputs += [
        attend_chunk(query[:, :, row.query_start : row.query_end], cache, layout, row, scaling)
        for row in layout.rows[layout.num_decoding :]
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def attend_chunk(query: torch.Tensor, cache: LayerCache, layout: StepLayout, row: Row, scaling: float) -> torch.Tensor:
    """Consecutive tokens of one sequence. query: (1, H, S, D), returned like that."""
    past = row.length - query.shape[2]
    low = 0 if cache.window is None else max(0, past - cache.window + 1)
    positions = torch.arange(low, row.length, device=query.device)
    blocks = layout.block_tables[row.table, positions // cache.block_size]
    key, value = cache.read((blocks * cache.block_size + positions % cache.block_size)[None], query.dtype)
    if uses_varlen(query.device, query.dtype):
        return _attend_varlen(query, key, value, scaling, cache.window)
    if query.device.type != "cpu" or (cache.window is not None and row.length > cache.window):
        queries = positions[past - low :, None]
        visible = positions <= queries
        if cache.window is not None:
            visible &= positions > queries - cache.window
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    own = _flash(query, key[:, :, past:], value[:, :, past:], scaling, causal=True)
    if past == 0:
        return own[0]
    return _merge(own, _flash(query, key[:, :, :past], value[:, :, :past], scaling))


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Flash attention from the last S of T tokens. query: (1, H, S, D), returned like that; others: (1, H, T, D)."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = query.shape[2], key.shape[2]
    query_starts, key_starts = (
        torch.arange(0, n + 1, n, dtype=torch.int32, device=query.device) for n in (queries, keys)
    )
    window_size = (-1 if window is None else window - 1, 0)
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    output = varlen_attn(
        query, key, value, query_starts, key_starts, queries, keys, scale=scaling, window_size=window_size
    )
    assert isinstance(output, torch.Tensor)  # no log-sum-exp was asked for
    return output.transpose(0, 1)[None]


Part = tuple[torch.Tensor, torch.Tensor]  # attention to some of the keys (1, H, S, D), and the log-sum-exp (1, H, S)


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool = False) -> Part:
    """Attention on a CPU, with the log-sum-exp of the scores. query: (1, H, S, D), key and value: (1, H, T, D)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scaling)


def _merge(first: Part, second: Part) -> torch.Tensor:
    """Combine attention to two sets of keys by their log-sum-exp (Dao et al. 2023,
    https://pytorch.org/blog/flash-decoding/)."""
    lse = torch.logaddexp(first[1], second[1])
    output = (first[1] - lse).exp()[..., None] * first[0] + (second[1] - lse).exp()[..., None] * second[0]
    return output.to(first[0].dtype)
