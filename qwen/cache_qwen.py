"""The 8-bit key/value cache.

Keys and values are stored as unsigned bytes with one scale and one zero point per token and head. Knows tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


def quantize_cache_v(
    x: torch.Tensor, bits: int = 8, qmax: int | torch.Tensor = 255, qmin: int | torch.Tensor = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize with one scale per batch row and head, as published.

    scale = (max − min) / (qmax − qmin), zero = qmin − min / scale, q = clamp(x / scale + zero), truncated. Max and min
    are taken over (S, D), and x must not be constant there.

    Args:
        x: (B, H, S, D).
        bits: 8; named for the callers that pass it.

    Returns:
        q (B, H, S, D) uint8; scale and zero point (B, H, S, 1), of x's dtype.

    Raises:
        ValueError: another number of bits.
    """
    if bits != 8:
        raise ValueError(f"quantize_cache_v stores 8 bits, not {bits}: pass bits=8.")
    low, high = x.amin(dim=(-2, -1), keepdim=True), x.amax(dim=(-2, -1), keepdim=True)
    scale = (high - low) / (qmax - qmin)
    zero = qmin - low / scale
    q = (x / scale + zero).clamp(qmin, qmax).to(torch.uint8)
    shape = (*x.shape[:-1], 1)
    return q, scale.expand(shape).contiguous(), zero.expand(shape).contiguous()


def dequantize_cache_torch(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """scale · (q − zero). q: (B, H, S, D) uint8, scale and zero point: (B, H, S, 1) → (B, H, S, D)."""
    return scale * (q - zero)


class QuantizedKVLayer(DynamicLayer):
    """Keys and values of one layer in 8 bits, each token and head with its own scale and zero point.

    Rounds to nearest with the zero point as it is stored, so that a 16-bit zero point costs no accuracy. The tensors
    have room to spare and double when it is used up; a token is written once and not copied at every step.
    """

    GROWTH = 256  # tokens; the first allocation beyond the prompt

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.length = 0
        # Six tensors (B, H, capacity, D or 1): q, scale and zero point of the keys, then of the values.
        self.store: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, H, S, D) keys and values; returns all of them: (B, H, T, D), dequantized where they are past."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        fresh = [*quantize_tokens(key_states), *quantize_tokens(value_states)]
        end = self.length + key_states.shape[-2]
        self._reserve(end, fresh)
        for stored, new in zip(self.store, fresh, strict=True):
            stored[:, :, self.length : end] = new
        first, self.length = self.length == 0, end
        if first:  # nothing to read back: the prompt attends to itself in full precision
            return key_states, value_states
        key, value = self.quantized
        return dequantize_cache_torch(*key).to(self.dtype), dequantize_cache_torch(*value).to(self.dtype)

    @property
    def quantized(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """The layer in the published layout: ((q_key, scale, zero point), (q_value, scale, zero point))."""
        held = [stored[:, :, : self.length] for stored in self.store]
        return tuple(held[:3]), tuple(held[3:])

    def _reserve(self, length: int, like: list[torch.Tensor]) -> None:
        capacity = self.store[0].shape[2] if self.store else 0
        if length <= capacity:
            return
        capacity = max(length + self.GROWTH, 2 * capacity)
        grown = [new.new_empty(*new.shape[:2], capacity, new.shape[3]) for new in like]
        for wider, stored in zip(grown, self.store, strict=False):
            wider[:, :, : self.length] = stored[:, :, : self.length]
        self.store = grown

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.length, self.store = 0, []
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; `tokens_to_remove` is negative, as transformers counts it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}.")
        self.length = max(0, self.length + tokens_to_remove)

    def offload(self) -> None:
        self.store = [stored.to("cpu", non_blocking=True) for stored in self.store]

    def prefetch(self) -> None:
        self.store = [stored.to(self.device, non_blocking=True) for stored in self.store]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.store = [stored.index_select(0, beam_idx.to(stored.device)) for stored in self.store]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store = [stored.repeat_interleave(repeats, dim=0) for stored in self.store]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.store = [stored[indices] for stored in self.store]


class QuantizedKVCache(Cache):
    """A cache of `QuantizedKVLayer`s: half the memory of a 16-bit cache, for `use_cache_quantization=True`."""

    def __init__(self):
        super().__init__(layer_class_to_replicate=QuantizedKVLayer)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize with one scale per token and head. x: (B, H, S, D) → q uint8 (B, H, S, D), scale, zero (B, H, S, 1).

    The range always holds 0, so the zero point lies in [0, 255] and a constant row needs no special case.
    """
    x32 = x.float()
    low, high = x32.amin(-1, keepdim=True).clamp(max=0), x32.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny).to(x.dtype)
    zero = (-low / scale.float()).to(x.dtype)
    q = (x32 / scale.float() + zero.float()).round().clamp(0, 255).to(torch.uint8)
    return q, scale, zero
