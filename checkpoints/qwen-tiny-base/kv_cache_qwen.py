"""The 8-bit key/value cache, and the prompt state that the model attaches to caches of any kind.

Keys and values are stored as unsigned bytes with one scale and one zero point per token and head: (1 + 4/D) bytes per
channel if those are 16-bit. A layer grows by segments, so its contents are never copied. Attention dequantizes the
layer or, with `use_cache_kernel`, reads the bytes.

Shapes: B batch, H heads, T cached tokens, S new tokens, D head size.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils import logging

logger = logging.get_logger(__name__)

TILE_SIZE = 64  # tokens that the kernel reads at once; segments hold whole tiles
# Number of vectors of D channels converted at once: their floats fit in a CPU's cache, and on a GPU take little memory
# (256 MB at D = 128).
CHUNK_SIZE, GPU_CHUNK_SIZE = 2**13, 2**19
PROMPT_STATE = "qwen_prompt_state"  # attribute of a cache
Segment = tuple[torch.Tensor, ...]  # of keys, then of values: bytes (B, H, n, D), scale and zero point (B, H, n, 1)


@dataclass
class PromptState:
    """State of the prompts in a cache besides their keys and values. Copied with the cache.

    Args:
        alpha: (B), the α of dynamic NTK that the keys of each row were rotated with; None for an empty cache.
        prompt_lens: (B), full prompt lengths for a first forward whose input is not the exact prompts, but a chunk of
            them, padded rows, or prompts followed by draft tokens. That forward resets it to None.
    """

    alpha: torch.Tensor | None = None
    prompt_lens: torch.Tensor | None = None


def prompt_state(cache: Cache) -> PromptState:
    """Return the mutable `PromptState` of a cache, and attach one if it has none."""
    if not hasattr(cache, PROMPT_STATE):
        setattr(cache, PROMPT_STATE, PromptState())
    return getattr(cache, PROMPT_STATE)


def quantize_cache_v(
    x: torch.Tensor, bits: int = 8, qmax: int | torch.Tensor = 255, qmin: int | torch.Tensor = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize with one scale per batch row and head, as published.

    scale = (max − min) / (qmax − qmin), zero = qmin − min / scale, q = clamp(x / scale + zero), truncated. Max and min
    are taken over (S, D), and x must not be constant there.

    Args:
        x: (B, H, S, D).
        bits: must be 8; accepted for existing callers.

    Returns:
        q (B, H, S, D) uint8; scale and zero point (B, H, S, 1), of x's dtype.

    Raises:
        ValueError: `bits` is not 8.
    """
    if bits != 8:
        raise ValueError(f"quantize_cache_v supports only 8 bits, not {bits}: pass bits=8.")
    low, high = x.amin(dim=(-2, -1), keepdim=True), x.amax(dim=(-2, -1), keepdim=True)
    scale = (high - low) / (qmax - qmin)
    zero = qmin - low / scale
    # torch's type hints know two numbers and two tensors, but not one of each.
    q = (x / scale + zero).clamp(cast(int, qmin), cast(int, qmax)).to(torch.uint8)
    shape = (*x.shape[:-1], 1)
    return q, scale.expand(shape).contiguous(), zero.expand(shape).contiguous()


def dequantize_cache_torch(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """scale · (q − zero). q: (B, H, S, D) uint8, scale and zero point: (B, H, S, 1) → (B, H, S, D)."""
    return scale * (q - zero)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize with one scale per token and head. x: (B, H, S, D) → q uint8 (B, H, S, D), scale, zero (B, H, S, 1).

    Rounds to nearest using the stored zero point, so a 16-bit one costs no accuracy. Leaves one of the 255 steps
    unused, so a scale that was rounded down clips nothing. The range always includes 0, so the zero point is in
    [0, 255] and a constant row needs no special case.
    """
    x32 = x.float()
    low, high = x32.amin(-1, keepdim=True).clamp(max=0), x32.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 254).clamp(min=torch.finfo(x.dtype).tiny).to(x.dtype)
    zero = (-low / scale.float()).to(x.dtype)
    q = (x32 / scale.float() + zero.float()).round().clamp(0, 255).to(torch.uint8)
    return q, scale, zero


def tokens_per_chunk(x: torch.Tensor) -> int:
    """Return how many tokens of (B, H, T, …) to convert at once."""
    return max(1, (CHUNK_SIZE if x.device.type == "cpu" else GPU_CHUNK_SIZE) // (x.shape[0] * x.shape[1]))


class Kernels(NamedTuple):
    """The functions of kv_cache_triton_qwen.py."""

    append: Callable[..., None]
    decode_attention: Callable[..., torch.Tensor]

    def decode(
        self, query: torch.Tensor, states: QuantizedStates, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """Same as `decode_attention_torch`, for one new token."""
        return self.decode_attention(
            query, states.tile_table, TILE_SIZE, states.length, states.scale_dtype, mask, scaling
        )


class TritonUnavailable(RuntimeError):
    """Triton does not run here."""


def check_triton(device_type: str) -> None:
    """Check that Triton runs: on CUDA and ROCm, where it must find the GPU and a C compiler.

    Raises:
        TritonUnavailable: it does not.
    """
    try:
        from .kv_cache_triton_qwen import check_driver

        if device_type == "cuda":
            check_driver()
    except (ImportError, AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise TritonUnavailable(
            f"Triton does not run here: {error}. It comes with torch on Linux; often a C compiler or Python's headers "
            "are missing (`apt install gcc python3-dev`)."
        ) from error


@functools.cache
def triton_kernels(device_type: str) -> Kernels | None:
    """Return the Triton kernels, or None where they do not run: they need CUDA, ROCm or Triton's interpreter."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        check_triton(device_type)
    except TritonUnavailable as error:
        logger.warning(f"use_cache_kernel=True falls back to torch because {error}")
        return None
    from .kv_cache_triton_qwen import append_tokens, decode_attention

    return Kernels(append_tokens, decode_attention)


class CacheStates:
    """Keys and values of a layer in a form that only its own attention reads. A cache's `update` returns it twice."""

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: CacheStates,
        value: CacheStates,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to these keys and values, with the signature of transformers' attention functions."""
        raise NotImplementedError


class QuantizedStates(CacheStates):
    """Quantized keys and values of a layer, for attention that reads bytes.

    Args:
        segments: their tensors may have unused room after the last token. All but the last hold whole tiles. The
            strides of a scale must be those of its bytes divided by D.
    """

    def __init__(self, segments: Sequence[Segment] = (), length: int = 0):
        self.segments, self.length = segments, length

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_tile_table": None}  # a copy has other tensor addresses

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments in token order. A tuple, so that they only change by assignment, which resets `tile_table`."""
        return self._segments

    @segments.setter
    def segments(self, segments: Sequence[Segment]) -> None:
        self._segments = tuple(segments)
        self._tile_table: torch.Tensor | None = None  # built on first use

    def attention(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return quantized_attention(*args, **kwargs)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of scales and zero points."""
        return self.segments[0][1].dtype

    def chunks(self) -> Iterator[Segment]:
        """Yield all tokens in chunks of `tokens_per_chunk` tokens."""
        remaining = self.length
        for segment in self.segments:
            num_tokens = min(remaining, segment[0].shape[2])
            chunks = (tensor[:, :, :num_tokens].split(tokens_per_chunk(tensor), dim=2) for tensor in segment)
            yield from zip(*chunks, strict=True)
            remaining -= num_tokens
            if remaining == 0:
                return

    def dequantize(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values: (B, H, T, D) each."""
        batch, heads, _, channels = self.segments[0][0].shape
        key, value = (
            torch.empty(batch, heads, self.length, channels, dtype=dtype, device=self.segments[0][0].device)
            for _ in range(2)
        )
        start = 0
        for chunk in self.chunks():
            end = start + chunk[0].shape[2]
            key[:, :, start:end] = dequantize_cache_torch(*chunk[:3])
            value[:, :, start:end] = dequantize_cache_torch(*chunk[3:])
            start = end
        return key, value

    @property
    def tile_table(self) -> torch.Tensor:
        """Tile table of the kernel, (tiles, 9) int64: per tile, six addresses in the order of a segment, then the
        strides of B, H and T in vectors of D channels."""
        if self._tile_table is None:
            rows = []
            for segment in self.segments:
                strides = segment[1].stride()[:3]
                for start in range(0, segment[0].shape[2], TILE_SIZE):
                    addresses = (
                        tensor.data_ptr() + start * tensor.stride(2) * tensor.element_size() for tensor in segment
                    )
                    rows.append([*addresses, *strides])
            self._tile_table = torch.tensor(rows, dtype=torch.int64, device=self.segments[0][0].device)
        return self._tile_table


def quantized_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: QuantizedStates,
    value: QuantizedStates,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token over bytes, with the signature of transformers' attention functions.

    Args:
        query: (B, H, 1, D).
        key, value: the same object.
        attention_mask: (B, T) or (B, 1, 1, T), true for tokens, or additive.

    Returns:
        (B, 1, H, D), and None instead of weights.
    """
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None].bool()
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.length]
    kernels = triton_kernels(query.device.type)
    decode = decode_attention_torch if kernels is None else kernels.decode
    return decode(query, key, attention_mask, scaling).transpose(1, 2), None


def decode_attention_torch(
    query: torch.Tensor, states: QuantizedStates, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention over bytes in torch. Scale and zero point are factored out of the sums, so bytes are only converted:

        q · k_t = scale_t (q · bytes_t − zero_t Σ q),   Σ p_t v_t = Σ (p_t scale_t) bytes_t − Σ p_t scale_t zero_t

    Computed in float32, because the first difference is between large numbers.

    Args:
        query: (B, H, S, D).
        mask: broadcasts to (B, H, S, T); true for tokens, or additive.

    Returns:
        (B, H, S, D) of the query's dtype.
    """
    query32 = query.float() * scaling
    total = query32.sum(-1, keepdim=True)
    chunks = [
        (query32 @ key.float().mT - total * zero.float().mT) * scale.float().mT
        for key, scale, zero, *_ in states.chunks()
    ]
    scores = torch.cat(chunks, dim=-1)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    output, start = torch.zeros_like(query32), 0
    for *_, value, scale, zero in states.chunks():
        end = start + value.shape[2]
        shares = weights[..., start:end] * scale.float().mT
        output += shares @ value.float() - shares @ zero.float()
        start = end
    return output.to(query.dtype)


class QuantizedKVLayer(DynamicLayer):
    """Keys and values of one layer in 8 bits.

    Args:
        fused: let single tokens attend to the bytes: `update` then returns `QuantizedStates` instead of tensors.
    """

    MIN_GROWTH = 128  # minimum number of tokens added when a layer is full; otherwise an eighth of its length

    def __init__(self, fused: bool = False, **kwargs: object):
        super().__init__()
        self.fused = fused
        self.states = QuantizedStates()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(  # type: ignore[override]  # may return bytes, for attention in this package
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[QuantizedStates, QuantizedStates]:
        """Append (B, H, S, D) keys and values; return all of them, (B, H, T, D), dequantized.

        The new ones, too: what a token attends to does not depend on how a prompt is divided into chunks, or on which
        part of it was in the cache before.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append(key_states, value_states)
        if self.fused and key_states.shape[2] == 1:
            return self.states, self.states
        return self.states.dequantize(self.dtype)

    @torch.no_grad()  # rounding has no gradient
    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        kernels = triton_kernels(key_states.device.type) if self.fused else None
        for slot, tokens in self.allocate_slots(key_states):
            new = key_states[:, :, tokens], value_states[:, :, tokens]
            if kernels is not None:
                kernels.append(*new, slot)
                continue
            chunks = zip(*(tensor.split(tokens_per_chunk(tensor), dim=2) for tensor in (*new, *slot)), strict=True)
            for key, value, *stored in chunks:
                for target, tensor in zip(stored, (*quantize_tokens(key), *quantize_tokens(value)), strict=True):
                    target.copy_(tensor)

    def allocate_slots(self, like: torch.Tensor) -> Iterator[tuple[Segment, slice]]:
        """Reserve room for the S tokens of `like` (B, H, S, D), in new segments once the last is full. Yields parts of
        segments, each with the slice of the tokens to write there, and adds their number to the length."""
        batch, heads, tokens, channels = like.shape
        done = 0
        while done < tokens:
            room = sum(segment[0].shape[2] for segment in self.states.segments) - self.states.length
            if room == 0:
                growth = max(self.MIN_GROWTH, self.states.length // 8) if self.states.segments else 0
                room = -(-max(tokens - done, growth) // TILE_SIZE) * TILE_SIZE
                tensor_specs = ((channels, torch.uint8), (1, self.dtype), (1, self.dtype))
                with torch.inference_mode(False):  # the cache may be used outside of inference mode later
                    new = tuple(
                        torch.empty(batch, heads, room, width, dtype=dtype, device=like.device)
                        for width, dtype in (*tensor_specs, *tensor_specs)
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
        states = [torch.cat(tensors, dim=2) for tensors in zip(*self.states.chunks(), strict=True)]
        return tuple(states[:3]), tuple(states[3:])

    def get_seq_length(self) -> int:
        return self.states.length

    def reset(self) -> None:
        self.states = QuantizedStates()
        self.is_initialized = False  # transformers before 5.19 would clear `keys` and `values`, which are unused here
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; `tokens_to_remove` is negative, as in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove (0 or less), not {tokens_to_remove}.")
        states = self.states
        # transformers 5.17 passes a tensor, and a length that is a tensor would mean a static cache.
        states.length = max(0, states.length + int(tokens_to_remove))
        while states.segments and sum(segment[0].shape[2] for segment in states.segments[:-1]) >= states.length:
            states.segments = states.segments[:-1]

    def offload(self) -> None:
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._apply(lambda tensor: tensor[indices])

    def _apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        # One segment at a time, to limit peak memory.
        for index in range(len(self.states.segments)):
            segments = list(self.states.segments)
            segments[index] = tuple(change(tensor) for tensor in segments[index])
            self.states.segments = segments


class QuantizedKVCache(Cache):
    """Cache of `QuantizedKVLayer`s for `use_cache_quantization=True`: half the memory of a 16-bit cache.

    Indexing and iteration return layers in the published layout, which `from_legacy_cache` accepts.

    Args:
        fused: decode from the bytes (`use_cache_kernel=True`), with the Triton kernel where it runs, else in torch.
    """

    def __init__(self, fused: bool = False):
        layer_class = functools.partial(QuantizedKVLayer, fused=fused)
        super().__init__(layer_class_to_replicate=cast(type[QuantizedKVLayer], layer_class))

    def __getitem__(self, layer_idx: int) -> tuple[Segment, Segment]:
        return cast(QuantizedKVLayer, self.layers[layer_idx]).quantized

    def __iter__(self) -> Iterator[tuple[Segment, Segment]]:
        return (layer.quantized for layer in cast(list[QuantizedKVLayer], self.layers))

    @classmethod
    def from_legacy_cache(cls, layers: Sequence[tuple[Segment, Segment]], fused: bool = False) -> QuantizedKVCache:
        """Build a cache from layers in the published layout.

        Args:
            layers: one ((q_key, key_scale, key_zero_point), (q_value, value_scale, value_zero_point)) per layer; bytes
                (B, H, T, D), scales and zero points (B, H, T, 1).
        """
        cache = cls(fused)
        for key, value in layers:
            layer = QuantizedKVLayer(fused)
            layer.lazy_initialization(key[1], value[1])
            for slot, tokens in layer.allocate_slots(key[0]):
                for target, tensor in zip(slot, (*key, *value), strict=True):
                    target.copy_(tensor[:, :, tokens])
            cache.layers.append(layer)
        return cache


def cache_from_legacy(layers: Sequence[tuple], fused: bool = False) -> Cache:
    """Build a cache from the tuples that `past_key_values` was up to transformers 4.35, one per layer.

    Args:
        layers: (key, value) per layer, each (B, H, T, D); or the published layout of the 8-bit cache.
        fused: as for `QuantizedKVCache`.
    """
    if isinstance(layers[0][0], torch.Tensor):
        return DynamicCache(layers)
    return QuantizedKVCache.from_legacy_cache(layers, fused)


# Old names; the next release removes them.
TILE, PIECE, GPU_PIECE = TILE_SIZE, CHUNK_SIZE, GPU_CHUNK_SIZE
cache_of_tuples = cache_from_legacy
decode_in_torch = decode_attention_torch
piece_of = tokens_per_chunk
