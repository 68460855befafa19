"""The fused operations in plain torch: what every other implementation must compute.

Results are rounded to the type of the activations where the network rounds them: after a norm, a linear layer, an
activation and an addition.

Shapes: M rows of activations, K inputs, N outputs, T tokens of a step, R sequences, H heads, D head size, C rotated
channels, S slots of the cache.
"""

from __future__ import annotations

import torch
from torch import nn

from ..model.gptq_linear_qwen import GPTQLinear
from ..model.kv_cache_qwen import dequantize_cache_torch, quantize_tokens
from ..model.rope_qwen import apply_rotary_emb

AnyLinear = nn.Linear | GPTQLinear


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight (Zhang and Sennrich 2019, eq. 4). x: (M, K)."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def linear(x: torch.Tensor, layer: AnyLinear, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + bias, and + residual (M, N) if it is given. x: (M, K) → (M, N)."""
    output = nn.functional.linear(x, layer.weight, layer.bias)
    return output if residual is None else residual + output


def swiglu_linear(x: torch.Tensor, value: AnyLinear, gate: AnyLinear) -> torch.Tensor:
    """value(x) · silu(gate(x)) (Shazeer 2020, https://arxiv.org/abs/2002.05202, eq. 6). x: (M, K) → (M, N)."""
    return linear(x, value) * nn.functional.silu(linear(x, gate))


def rope_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_scale: torch.Tensor | None,
    slots: torch.Tensor,
    pools: list[torch.Tensor],
) -> torch.Tensor:
    """Rotate queries and keys, scale queries, and write keys and values to their slots of the cache.

    Args:
        qkv: (T, 3, H, D).
        cos, sin: (T, C), float32, in the halves layout.
        query_scale: (T), float32, the factors of LogN.
        slots: (T).
        pools: keys and values (H, S, D); in 8 bits bytes (H, S, D), scales and zero points (H, S, 1) of each.

    Returns:
        Queries (T, H, D).
    """
    query, key, value = qkv.permute(1, 2, 0, 3).unsqueeze(1)  # (1, H, T, D) each
    query, key = apply_rotary_emb(query, cos, sin), apply_rotary_emb(key, cos, sin).to(qkv.dtype)
    query = query if query_scale is None else query * query_scale[:, None]
    stored = (key, value) if len(pools) == 2 else (*quantize_tokens(key), *quantize_tokens(value))
    for pool, tensor in zip(pools, stored, strict=True):
        pool.index_copy_(1, slots, tensor[0])
    return query[0].to(qkv.dtype).transpose(0, 1)


def attend(
    query: torch.Tensor,
    pools: list[torch.Tensor],
    block_tables: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    block_size: int,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attend from each token to the first tokens of its sequence in the cache.

    Args:
        query: (T, H, D).
        block_tables: (R, blocks), the blocks of each sequence; block b has the slots from b · block_size on.
        rows: (T), the sequence of each token.
        lengths: (T), how many tokens of its sequence each token sees, itself included.
        window: how many of these, counted from the last; None for all.

    Returns:
        (T, H, D).
    """
    outputs = []
    for token, row, length in zip(query, rows.tolist(), lengths.tolist(), strict=True):
        positions = torch.arange(max(0, length - window) if window else 0, length, device=query.device)
        slots = block_tables[row, positions // block_size] * block_size + positions % block_size
        stored = [pool[:, slots] for pool in pools]
        if len(pools) == 6:
            stored = [dequantize_cache_torch(*stored[:3]), dequantize_cache_torch(*stored[3:])]
        key, value = (tensor.float() for tensor in stored)
        weights = (key @ token.float()[:, :, None] * scaling).softmax(1)
        outputs.append((weights * value).sum(1))
    return torch.stack(outputs).to(query.dtype)
