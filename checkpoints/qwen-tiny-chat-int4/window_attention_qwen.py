"""Window attention: each layer attends to a limited number of past tokens, fewer in lower layers.

It helps the models beyond their trained length (Bai et al. 2023, https://arxiv.org/abs/2309.16609, section 2.3): lower
layers are more sensitive to distances not seen in training. `window_attention` wraps any of transformers' attention
functions.

Shapes: B batch, H heads, S queries, T keys, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedConfig

from .kv_cache_qwen import QuantizedStates

MIN_BLOCK = 128  # queries; smaller blocks cost more in calls than they save in scores

AttentionFunction: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class AttentionModule(Protocol):
    """The layer that an attention function computes for."""

    @property
    def config(self) -> PreTrainedConfig: ...


@dataclass
class Window:
    """Window of a layer: each query sees the keys of the last `size` tokens, including its own.

    Args:
        positions: (B, S) or (1, S), for each query the index of the key of the same token.
        min_position: the smallest position, or None if it is not known without a device synchronization.
    """

    size: int
    positions: torch.Tensor
    min_position: int | None

    # Not a NamedTuple: GPTQModel and accelerate each build their own kind of tuples from their items.
    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Window":
        """Return the window with its positions on a device. accelerate calls it, too."""
        return Window(self.size, self.positions.to(device, non_blocking=non_blocking), self.min_position)


def create_windows(
    sizes: list[int],
    past_length: int | torch.Tensor,
    num_queries: int,
    device: torch.device,
) -> list[Window]:
    """Return the window of each layer, for new tokens after those in a cache.

    Args:
        sizes: one per layer, in tokens.
        past_length: tokens in the cache; a tensor for a static cache.
    """
    positions = torch.arange(num_queries, device=device)[None] + past_length
    min_position = past_length if isinstance(past_length, int) else None
    return [Window(size, positions, min_position) for size in sizes]


def move_windows(windows: Sequence[Window | None], device: torch.device) -> Sequence[Window | None]:
    """Copy the windows of `create_windows` to a device. They share their positions, which are copied once."""
    if not windows or windows[0] is None:
        return windows
    positions = windows[0].positions.to(device)
    return [window and Window(window.size, positions, window.min_position) for window in windows]


def window_attention(
    attention: AttentionFunction,
    window: Window,
    module: AttentionModule,
    query: torch.Tensor,
    key: torch.Tensor | QuantizedStates,
    value: torch.Tensor | QuantizedStates,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run `attention` with a window: a query at position i sees the keys i − size + 1 … i.

    Flash attention limits the window itself. Otherwise blocks of queries get only the keys that they can see, or, with
    a static or an 8-bit cache, all keys and a mask.

    Args:
        query: (B, H, S, D).
        key, value: (B, H, T, D), or the bytes of an 8-bit cache.
        attention_mask: (B, 1, S, T), true for visible keys or additive; None for a causal mask.

    Returns:
        (B, S, H, D), and the weights (B, H, S, T) if the implementation returns them.
    """
    is_quantized = isinstance(key, QuantizedStates)
    if "flash" in module.config._attn_implementation and not is_quantized:
        return attention(module, query, key, value, attention_mask, sliding_window=window.size, **kwargs)
    if window.min_position is not None and _length(key) <= window.size:
        return attention(module, query, key, value, attention_mask, **kwargs)
    if isinstance(key, QuantizedStates) or isinstance(value, QuantizedStates) or window.min_position is None:
        return _attend_with_mask(attention, window, module, query, key, value, attention_mask, **kwargs)
    return _attend_in_blocks(attention, window, module, query, key, value, attention_mask, **kwargs)


def _attend_with_mask(
    attention: AttentionFunction,
    window: Window,
    module: AttentionModule,
    query: torch.Tensor,
    key: torch.Tensor | QuantizedStates,
    value: torch.Tensor | QuantizedStates,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pass all keys, and a mask with the window: the shapes do not depend on the position."""
    mask = _mask(attention_mask, window, slice(None), slice(0, _length(key)))
    return attention(module, query, key, value, mask, **kwargs)


def _attend_in_blocks(
    attention: AttentionFunction,
    window: Window,
    module: AttentionModule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pass blocks of queries with the keys that they can see: the work is S · size instead of S · T, and no (S, T) mask
    is built."""
    assert window.min_position is not None
    queries, keys = query.shape[2], key.shape[2]
    block_size = max(MIN_BLOCK, window.size // 4)
    outputs, weights = [], []
    for start in range(0, queries, block_size):
        end = min(start + block_size, queries)
        low, high = max(0, window.min_position + start - window.size + 1), keys - (queries - end)
        mask = _mask(attention_mask, window, slice(start, end), slice(low, high))
        output, weight = attention(
            module, query[:, :, start:end], key[:, :, low:high], value[:, :, low:high], mask, **kwargs
        )
        outputs.append(output)
        if weight is not None:
            weights.append(nn.functional.pad(weight, (low, keys - high)))
    return torch.cat(outputs, dim=1), torch.cat(weights, dim=2) if weights else None


def _length(key: torch.Tensor | QuantizedStates) -> int:
    return key.length if isinstance(key, QuantizedStates) else key.shape[2]


def _mask(attention_mask: torch.Tensor | None, window: Window, queries: slice, keys: slice) -> torch.Tensor:
    """Return the mask for these queries and keys, limited to the window: (B, 1, S, T)."""
    query_positions = window.positions[:, None, queries, None]
    key_positions = torch.arange(keys.start, keys.stop, device=query_positions.device)
    is_visible = (key_positions > query_positions - window.size) & (key_positions <= query_positions)
    if attention_mask is None:
        return is_visible
    if attention_mask.dim() == 2:  # one new token with an 8-bit cache
        return is_visible & attention_mask[:, None, None, keys].bool()
    part = attention_mask[:, :, queries, keys]
    if part.dtype == torch.bool:
        return is_visible & part
    return part.masked_fill(~is_visible, torch.finfo(part.dtype).min)


windows = create_windows  # the old name; the next release removes it
