"""Window attention: a layer looks back a limited number of tokens, the lower ones fewer than the upper ones.

It is a part of how the models reach beyond their trained length (Bai et al. 2023, https://arxiv.org/abs/2309.16609,
section 2.3): lower layers suffer more from distances that training has not shown them. `window_attention` wraps any of
transformers' attention functions.

Shapes: B batch, H heads, S queries, T keys, D head size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .kv_cache_qwen import QuantizedStates

MIN_BLOCK = 128  # queries; fewer at a time cost more in calls than they save in scores


class Window(NamedTuple):
    """What a layer sees of the keys: each query those of the last `size` tokens, its own among them.

    Args:
        indices: (B, S) or (1, S), where the queries stand among the keys: the index of the key of the same token.
        first: the least of the indices, where it is known without asking the device.
    """

    size: int
    indices: torch.Tensor
    first: int | None


def windows(
    sizes: list[int], past_length: int | torch.Tensor, rows: list[int] | None, queries: int, device: torch.device
) -> list[Window]:
    """The window of each layer, for new tokens behind those in a cache.

    Args:
        sizes: one a layer, in tokens.
        past_length: tokens in the cache; a tensor where the cache is a static one.
        rows: tokens of each row, where they differ and all begin at index 0; then there is one query.
    """
    if rows is not None:
        indices, first = torch.tensor(rows, device=device)[:, None], min(rows)
    else:
        indices = torch.arange(queries, device=device)[None] + past_length
        first = past_length if isinstance(past_length, int) else None
    return [Window(size, indices, first) for size in sizes]


def window_attention(
    attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    window: Window,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | QuantizedStates,
    value: torch.Tensor | QuantizedStates,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention` in which a query at index i sees the keys i − size + 1 … i.

    Goes through the queries in blocks and hands on only the keys that a block can see: the work is S · size instead of
    S · T, and no mask of (S, T) is made. Beside a static or an 8-bit cache all keys are handed on, with a mask. Flash
    attention limits the window itself.

    Args:
        query: (B, H, S, D).
        key, value: (B, H, T, D), or the bytes of an 8-bit cache.
        attention_mask: (B, 1, S, T), true for what is seen or additive, or None for all that is causal.

    Returns:
        (B, S, H, D), and the weights (B, H, S, T) where the implementation gives them.
    """
    if "flash" in module.config._attn_implementation and not isinstance(key, QuantizedStates):
        return attention(module, query, key, value, attention_mask, sliding_window=window.size, **kwargs)

    in_bytes = isinstance(key, QuantizedStates)
    queries, keys = query.shape[2], key.length if in_bytes else key.shape[2]
    size, indices, first = window
    if first is not None and keys <= size:
        return attention(module, query, key, value, attention_mask, **kwargs)
    block = queries if first is None else max(MIN_BLOCK, size // 4)
    outputs, weights = [], []
    for start in range(0, queries, block):
        end = min(start + block, queries)
        low = 0 if first is None or in_bytes else max(0, first + start - size + 1)
        high = keys if first is None or queries == 1 else first + end
        mask = _mask(attention_mask, indices[:, start:end], slice(start, end), slice(low, high), size)
        seen = (key, value) if in_bytes else (key[:, :, low:high], value[:, :, low:high])
        output, weight = attention(module, query[:, :, start:end], *seen, mask, **kwargs)
        outputs.append(output)
        if weight is not None:
            weights.append(nn.functional.pad(weight, (low, keys - high)))
    return torch.cat(outputs, dim=1), torch.cat(weights, dim=2) if weights else None


def _mask(
    attention_mask: torch.Tensor | None, indices: torch.Tensor, queries: slice, keys: slice, size: int
) -> torch.Tensor:
    """The part of a mask for these queries and keys, and in it the window: (B, 1, S, T)."""
    places = torch.arange(keys.start, keys.stop, device=indices.device)
    near = (places > indices[:, None, :, None] - size) & (places <= indices[:, None, :, None])
    if attention_mask is None:
        return near
    if attention_mask.dim() == 2:  # of one new token beside bytes
        return near & attention_mask[:, None, None, keys].bool()
    part = attention_mask[:, :, queries, keys]
    if part.dtype == torch.bool:
        return near & part
    return part.masked_fill(~near, torch.finfo(part.dtype).min)
