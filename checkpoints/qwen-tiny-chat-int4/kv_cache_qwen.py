"""The 8-bit key/value cache, and what the model remembers of the prompts in a cache of any kind.

Keys and values are stored as unsigned bytes with one scale and one zero point per token and head: (1 + 4/D) bytes a
channel where those are 16-bit. A layer grows by segments, so that nothing held is ever copied, and attention over it
either dequantizes it or, with `use_cache_kernel`, reads the bytes.

Shapes: B batch, H heads, T tokens held, S new tokens, D head size.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils import logging

logger = logging.get_logger(__name__)

TILE = 64  # tokens that the kernel reads at once; segments hold whole tiles
# Vectors of D channels that are converted at once: floats that stay in a CPU's cache, and on a GPU (256 MB of them at
# D = 128) few enough beside the rest.
PIECE, GPU_PIECE = 2**13, 2**19
Segment = tuple[torch.Tensor, ...]  # of keys, then of values: bytes (B, H, n, D), scale and zero point (B, H, n, 1)


@dataclass
class PromptState:
    """What the model remembers of the prompts in a cache, besides their keys and values. Copied with the cache.

    Args:
        alpha: (B), the α of dynamic NTK that the keys of each row were rotated with; None before there are any.
        lengths: (B), tokens of each whole prompt, for a first forward that does not see the prompts as they are: it
            gets a part of them, or padding, or drafted tokens behind them. That forward takes them away.
        rows: tokens of each row, where the rows are of different lengths and all begin at index 0.
    """

    alpha: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    rows: list[int] | None = None


def prompt_state(cache: Cache) -> PromptState:
    """The `PromptState` of a cache, to read and to change. This function alone attaches it."""
    if not hasattr(cache, "qwen_prompt_state"):
        cache.qwen_prompt_state = PromptState()
    return cache.qwen_prompt_state


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


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize with one scale per token and head. x: (B, H, S, D) → q uint8 (B, H, S, D), scale, zero (B, H, S, 1).

    Rounds to nearest with the zero point as it is stored, so that a 16-bit one costs no accuracy, and leaves one of the
    255 steps unused, so that a scale that was rounded down cuts nothing off. The range always holds 0, so the zero
    point lies in [0, 255] and a constant row needs no special case.
    """
    x32 = x.float()
    low, high = x32.amin(-1, keepdim=True).clamp(max=0), x32.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 254).clamp(min=torch.finfo(x.dtype).tiny).to(x.dtype)
    zero = (-low / scale.float()).to(x.dtype)
    q = (x32 / scale.float() + zero.float()).round().clamp(0, 255).to(torch.uint8)
    return q, scale, zero


def piece_of(x: torch.Tensor) -> int:
    """How many tokens of (B, H, T, …) to convert at once."""
    return max(1, (PIECE if x.device.type == "cpu" else GPU_PIECE) // (x.shape[0] * x.shape[1]))


class Kernels(NamedTuple):
    """The functions of kv_cache_triton_qwen.py."""

    append: Callable[..., None]
    decode_tiles: Callable[..., torch.Tensor]

    def decode(
        self, query: torch.Tensor, states: QuantizedStates, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """As `decode_in_torch`, for one new token."""
        return self.decode_tiles(query, states.tiles, TILE, states.length, states.scale_dtype, mask, scaling)


@functools.cache
def triton_kernels(device_type: str) -> Kernels | None:
    """The Triton kernels, where they run: on CUDA and ROCm, and on the CPU under Triton's interpreter."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from .kv_cache_triton_qwen import append_tokens, check_driver, decode_attention

        if device_type == "cuda":
            check_driver()
    except (ImportError, AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            f"use_cache_kernel=True falls back on torch, since Triton does not run here: {error}. It comes with torch "
            "on Linux; what is missing is often a C compiler or Python's headers (`apt install gcc python3-dev`)."
        )
        return None
    return Kernels(append_tokens, decode_attention)


class QuantizedStates:
    """Keys and values of a layer as they are stored, for attention that reads bytes.

    Args:
        segments: their tensors may have room behind the last token. All but the last hold whole tiles, and a scale
            lies as its bytes do: its strides are theirs divided by D.
    """

    def __init__(self, segments: Sequence[Segment] = (), length: int = 0):
        self.segments, self.length = segments, length

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_tiles": None}  # the tensors of a copy lie elsewhere

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The tensors, in the order of their tokens. A tuple, so that they change by assignment alone."""
        return self._segments

    @segments.setter
    def segments(self, segments: Sequence[Segment]) -> None:
        self._segments = tuple(segments)
        self._tiles: torch.Tensor | None = None  # made when it is asked for

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of scales and zero points."""
        return self.segments[0][1].dtype

    def parts(self) -> Iterator[Segment]:
        """All tokens, in pieces of a size that is quickly converted."""
        left = self.length
        for segment in self.segments:
            held = min(left, segment[0].shape[2])
            pieces = (tensor[:, :, :held].split(piece_of(tensor), dim=2) for tensor in segment)
            yield from zip(*pieces, strict=True)
            left -= held
            if left == 0:
                return

    def dequantize(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values: (B, H, T, D) each."""
        batch, heads, _, channels = self.segments[0][0].shape
        key, value = (
            torch.empty(batch, heads, self.length, channels, dtype=dtype, device=self.segments[0][0].device)
            for _ in range(2)
        )
        start = 0
        for part in self.parts():
            end = start + part[0].shape[2]
            key[:, :, start:end] = dequantize_cache_torch(*part[:3])
            value[:, :, start:end] = dequantize_cache_torch(*part[3:])
            start = end
        return key, value

    @property
    def tiles(self) -> torch.Tensor:
        """Where each tile of tokens lies, for the kernel: (tiles, 9) int64. Six addresses, in the order of a segment,
        and the strides of B, H and T in vectors of D channels."""
        if self._tiles is None:
            rows = []
            for segment in self.segments:
                strides = segment[1].stride()[:3]
                for start in range(0, segment[0].shape[2], TILE):
                    places = (
                        tensor.data_ptr() + start * tensor.stride(2) * tensor.element_size() for tensor in segment
                    )
                    rows.append([*places, *strides])
            self._tiles = torch.tensor(rows, dtype=torch.int64, device=self.segments[0][0].device)
        return self._tiles


def quantized_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: QuantizedStates,
    value: QuantizedStates,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token over bytes, as one of transformers' attention functions.

    Args:
        query: (B, H, 1, D).
        key, value: the same object.
        attention_mask: (B, T) or (B, 1, 1, T), true for tokens, or additive.

    Returns:
        (B, 1, H, D), and no weights.
    """
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None].bool()
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.length]
    kernels = triton_kernels(query.device.type)
    decode = decode_in_torch if kernels is None else kernels.decode
    return decode(query, key, attention_mask, scaling).transpose(1, 2), None


def decode_in_torch(
    query: torch.Tensor, states: QuantizedStates, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Scale and zero point are taken out of the sums over channels and over tokens, so that bytes are only converted:

        q · k_t = scale_t (q · bytes_t − zero_t Σ q),   Σ p_t v_t = Σ (p_t scale_t) bytes_t − Σ p_t scale_t zero_t

    In float32, as the first difference is one of large numbers.

    Args:
        query: (B, H, S, D).
        mask: broadcasts to (B, H, S, T); true for tokens, or additive.

    Returns:
        (B, H, S, D) of the query's dtype.
    """
    query32 = query.float() * scaling
    total = query32.sum(-1, keepdim=True)
    scores = [
        (query32 @ key.float().mT - total * zero.float().mT) * scale.float().mT
        for key, scale, zero, *_ in states.parts()
    ]
    scores = torch.cat(scores, dim=-1)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    output, start = torch.zeros_like(query32), 0
    for *_, value, scale, zero in states.parts():
        end = start + value.shape[2]
        shares = weights[..., start:end] * scale.float().mT
        output += shares @ value.float() - shares @ zero.float()
        start = end
    return output.to(query.dtype)


class QuantizedKVLayer(DynamicLayer):
    """Keys and values of one layer in 8 bits.

    Args:
        fused: have single tokens attend to the bytes: `update` then returns `QuantizedStates` in place of tensors.
    """

    GROWTH = 128  # tokens; the least that is added when a layer is full, else an eighth of what it holds

    def __init__(self, fused: bool = False, **kwargs: Any):
        super().__init__()
        self.fused = fused
        self.states = QuantizedStates()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[QuantizedStates, QuantizedStates]:
        """Append (B, H, S, D) keys and values; returns all of them: (B, H, T, D), dequantized where they are past."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        empty = self.states.length == 0
        self._append(key_states, value_states)
        if empty:  # nothing to read back: the prompt attends to itself in full precision
            return key_states, value_states
        if self.fused and key_states.shape[2] == 1:
            return self.states, self.states
        return self.states.dequantize(self.dtype)

    @torch.no_grad()  # rounding has no gradient
    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        kernels = triton_kernels(key_states.device.type) if self.fused else None
        for slot, tokens in self.reserve(key_states):
            new = key_states[:, :, tokens], value_states[:, :, tokens]
            if kernels is not None:
                kernels.append(*new, slot)
                continue
            pieces = zip(*(tensor.split(piece_of(tensor), dim=2) for tensor in (*new, *slot)), strict=True)
            for key, value, *stored in pieces:
                for place, tensor in zip(stored, (*quantize_tokens(key), *quantize_tokens(value)), strict=True):
                    place.copy_(tensor)

    def reserve(self, like: torch.Tensor) -> Iterator[tuple[Segment, slice]]:
        """Room for as many tokens as (B, H, S, D) `like` has: parts of segments, new ones where the last is full, and
        which of the tokens go there. Counts them as held."""
        batch, heads, tokens, channels = like.shape
        done = 0
        while done < tokens:
            room = sum(segment[0].shape[2] for segment in self.states.segments) - self.states.length
            if room == 0:
                growth = max(self.GROWTH, self.states.length // 8) if self.states.segments else 0
                room = -(-max(tokens - done, growth) // TILE) * TILE
                half = ((channels, torch.uint8), (1, self.dtype), (1, self.dtype))
                with torch.inference_mode(False):  # a prompt encoded there may be gone on from elsewhere
                    new = tuple(
                        torch.empty(batch, heads, room, width, dtype=dtype, device=like.device)
                        for width, dtype in (*half, *half)
                    )
                self.states.segments = (*self.states.segments, new)
            last = self.states.segments[-1]
            size = min(room, tokens - done)
            start = last[0].shape[2] - room
            yield tuple(tensor[:, :, start : start + size] for tensor in last), slice(done, done + size)
            done += size
            self.states.length += size

    @property
    def quantized(self) -> tuple[Segment, Segment]:
        """The layer in the published layout: ((q_key, scale, zero point), (q_value, scale, zero point))."""
        held = [torch.cat(tensors, dim=2) for tensors in zip(*self.states.parts(), strict=True)]
        return tuple(held[:3]), tuple(held[3:])

    def get_seq_length(self) -> int:
        return self.states.length

    def reset(self) -> None:
        self.states = QuantizedStates()
        self.is_initialized = False  # transformers before 5.19 would clear `keys` and `values`, of which there are none
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; `tokens_to_remove` is negative, as transformers counts it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}.")
        states = self.states
        # An int, for transformers 5.17 hands over a tensor, and a length that is one is a static cache's.
        states.length = max(0, states.length + int(tokens_to_remove))
        while states.segments and sum(segment[0].shape[2] for segment in states.segments[:-1]) >= states.length:
            states.segments = states.segments[:-1]

    def offload(self) -> None:
        self._replace(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._replace(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._replace(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._replace(lambda tensor: tensor[indices])

    def _replace(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        # One segment after the other, so that little is held twice.
        for index in range(len(self.states.segments)):
            segments = list(self.states.segments)
            segments[index] = tuple(change(tensor) for tensor in segments[index])
            self.states.segments = segments


class QuantizedKVCache(Cache):
    """A cache of `QuantizedKVLayer`s: half the memory of a 16-bit cache, for `use_cache_quantization=True`.

    Indexed and iterated over, it gives layers in the published layout, which `from_legacy_cache` takes back.

    Args:
        fused: decode from the bytes, for `use_cache_kernel=True`: with the Triton kernel where it runs, else in torch.
    """

    def __init__(self, fused: bool = False):
        super().__init__(layer_class_to_replicate=functools.partial(QuantizedKVLayer, fused=fused))

    def __getitem__(self, layer_idx: int) -> tuple[Segment, Segment]:
        return self.layers[layer_idx].quantized

    def __iter__(self) -> Iterator[tuple[Segment, Segment]]:
        return (layer.quantized for layer in self.layers)

    @classmethod
    def from_legacy_cache(cls, layers: Sequence[tuple[Segment, Segment]], fused: bool = False) -> QuantizedKVCache:
        """A cache that goes on from layers in the published layout.

        Args:
            layers: for each ((q_key, key_scale, key_zero_point), (q_value, value_scale, value_zero_point)), bytes
                (B, H, T, D), the others (B, H, T, 1).
        """
        cache = cls(fused)
        for key, value in layers:
            layer = QuantizedKVLayer(fused)
            layer.lazy_initialization(key[1], value[1])
            for slot, tokens in layer.reserve(key[0]):
                for place, tensor in zip(slot, (*key, *value), strict=True):
                    place.copy_(tensor[:, :, tokens])
            cache.layers.append(layer)
        return cache


def cache_of_tuples(layers: Sequence[tuple], fused: bool = False) -> Cache:
    """What was `past_key_values` up to transformers 4.35: a tuple for each layer, as tensors or in 8 bits.

    Args:
        layers: (key, value), each (B, H, T, D); or the published layout of the 8-bit cache.
        fused: as for `QuantizedKVCache`.
    """
    if isinstance(layers[0][0], torch.Tensor):
        return DynamicCache(layers)
    return QuantizedKVCache.from_legacy_cache(layers, fused)
