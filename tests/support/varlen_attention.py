"""Lets `torch.nn.attention.varlen.varlen_attn` run on pretended GPUs: a reference in plain torch as its CPU kernel."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch


def flash_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attention from the last queries of each sequence. query: (tokens, H, D), key and value: (keys, H, D)."""
    if cum_seq_k is None or seqused_k is not None or block_table is not None or window_size_right != 0:
        raise NotImplementedError("only causal attention to keys one behind the other")
    output = torch.empty_like(query)
    rows = zip(itertools.pairwise(cum_seq_q.tolist()), itertools.pairwise(cum_seq_k.tolist()), strict=True)
    for row, ((start, end), (first, last)) in enumerate(rows):
        queries, length = end - start, last - first
        if queries > max_q or length > max_k:
            raise RuntimeError(f"row {row} has {queries} queries and {length} keys: more than {max_q} and {max_k}")
        distance = torch.arange(length - queries, length)[:, None] - torch.arange(length)
        visible = distance >= 0
        if window_size_left is not None and window_size_left >= 0:
            visible &= distance <= window_size_left
        states = (query[start:end], key[first:last], value[first:last])
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(each.transpose(0, 1) for each in states), visible, scale=scale
        )
        output[start:end] = attended.transpose(0, 1)
    unused = torch.empty(0)
    return output, query.new_zeros(query.shape[1], len(query), dtype=torch.float32), unused, unused, unused


@contextlib.contextmanager
def varlen_on_cpu() -> Iterator[None]:
    """Register the reference as the CPU kernel of torch's flash attention."""
    library: Any = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", flash_attention_forward)
    try:
        yield
    finally:
        library._destroy()
