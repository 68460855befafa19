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
    """Attention over block tables. query: (tokens, H, D), key and value: (blocks, block size, H, D)."""
    if seqused_k is None or block_table is None or window_size_right != 0:
        raise NotImplementedError("only causal attention over block tables")
    if key.shape[1] % 256:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")  # as flash-attn 2
    output = torch.empty_like(query)
    starts = cum_seq_q.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        length = int(seqused_k[row])
        if end - start > max_q or length > max_k:
            raise RuntimeError(f"row {row} has {end - start} queries and {length} keys: more than {max_q} and {max_k}")
        blocks = block_table[row, : -(-length // key.shape[1])].long()
        keys, values = (states[blocks].flatten(0, 1)[:length].transpose(0, 1) for states in (key, value))
        distance = torch.arange(length - (end - start), length)[:, None] - torch.arange(length)
        visible = distance >= 0
        if window_size_left is not None and window_size_left >= 0:
            visible &= distance <= window_size_left
        output[start:end] = torch.nn.functional.scaled_dot_product_attention(
            query[start:end].transpose(0, 1), keys, values, visible, scale=scale
        ).transpose(0, 1)
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
