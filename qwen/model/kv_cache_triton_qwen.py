"""Triton kernels for the 8-bit key/value cache: quantize new tokens into it, and attend from one token to its bytes.

Triton compiles them on first use, for CUDA and ROCm; it needs a C compiler to build its launcher once. `kv_cache_qwen`
imports this file when a model with `use_cache_kernel=True` decodes its first token, and has the same arithmetic in
torch for machines where Triton does not run. The cache passes its tensors as addresses and strides, so this file needs
none of its classes.

Decoding follows flash-decoding (Dao et al. 2023, https://pytorch.org/blog/flash-decoding/): the tokens of each row and
head are split over programs, each of which keeps a running softmax (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867, algorithm 3), and a second kernel adds up their results.

Shapes: B batch, H heads, T cached tokens, S new tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

try:  # optional; as a plain import, transformers would require it for every checkpoint with this file
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"{error}; on Linux, install it with `pip install triton`") from error

PROGRAMS = 8  # per multiprocessor: enough for their loads to overlap
MOST_SPLITS = 128  # per row and head; the second kernel adds them up at once
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _quantize_rows(
    source, source_b, source_h, source_s, q, scale, zero, slot_b, slot_h, slot_s,
    b, h, s, first, inside, tiny, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`quantize_tokens` of kv_cache_qwen for tokens s (BLOCK_S) of row b and head h, written at offset `first`."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    place = source + b * source_b + h * source_h + s[:, None] * source_s + d[None, :]
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)  # the range includes 0 anyway
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    stored_scale = tl.maximum((high - low) / 254.0, tiny).to(scale.dtype.element_ty)
    step = stored_scale.to(tl.float32)
    stored_zero = (-low / step).to(zero.dtype.element_ty)
    levels = x / step[:, None] + stored_zero.to(tl.float32)[:, None]
    levels = tl.minimum(tl.maximum(tl.floor(levels + 0.5), 0.0), 255.0)
    vectors = b * slot_b + h * slot_h + (first + s) * slot_s
    tl.store(q + vectors[:, None] * D + d[None, :], levels.to(tl.uint8), mask=mask)
    tl.store(scale + vectors, stored_scale, mask=inside)
    tl.store(zero + vectors, stored_zero, mask=inside)


@triton.jit
def append_kernel(
    key, key_b, key_h, key_s, value, value_b, value_h, value_s,
    key_q, key_scale, key_zero, value_q, value_scale, value_zero, slot_b, slot_h, slot_s,
    starts, heads, tokens, tiny,
    RAGGED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Quantize keys and values into a slot. Grid: (B · H, blocks of tokens, 2 for keys and values)."""
    b, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    s = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = s < tokens
    first = b * 0
    if RAGGED:
        first += tl.load(starts + b)
    if tl.program_id(2) == 0:
        _quantize_rows(key, key_b, key_h, key_s, key_q, key_scale, key_zero, slot_b, slot_h, slot_s,
                       b, h, s, first, inside, tiny, D, BLOCK_D)  # fmt: skip
    else:
        _quantize_rows(value, value_b, value_h, value_s, value_q, value_scale, value_zero, slot_b, slot_h, slot_s,
                       b, h, s, first, inside, tiny, D, BLOCK_D)  # fmt: skip


@triton.jit
def _load_scales(tiles, tile, b, h, lane, length, SCALE: tl.constexpr, TILE: tl.constexpr):
    """Scale and zero point of the keys, then of the values, of a tile's tokens: (TILE,) each, float32."""
    at = tiles + tile * 9
    vectors = b * tl.load(at + 6) + h * tl.load(at + 7) + lane * tl.load(at + 8)
    inside = tile * TILE + lane < length
    return (
        tl.load(tl.load(at + 1).to(tl.pointer_type(SCALE)) + vectors, mask=inside, other=0.0).to(tl.float32),
        tl.load(tl.load(at + 2).to(tl.pointer_type(SCALE)) + vectors, mask=inside, other=0.0).to(tl.float32),
        tl.load(tl.load(at + 4).to(tl.pointer_type(SCALE)) + vectors, mask=inside, other=0.0).to(tl.float32),
        tl.load(tl.load(at + 5).to(tl.pointer_type(SCALE)) + vectors, mask=inside, other=0.0).to(tl.float32),
    )


@triton.jit
def decode_kernel(
    query, query_b, query_h, mask, mask_b, mask_h, mask_t, tiles, output, highest, total,
    heads, length, tiles_each, scaling,
    MASK: tl.constexpr, SCALE: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attention of one row and head over `tiles_each` tiles of tokens. Grid: (B · H, splits).

    Writes, for each split, the weighted sum of the values (B · H, splits, D), the highest score (base 2) and the sum of
    the weights (B · H, splits). Each of the TILE lanes keeps its own softmax; they are merged at the end, so that the
    loop needs no communication between warps.
    """
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    lane, d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    q = tl.load(query + b * query_b + h * query_h + d, mask=d < D, other=0.0).to(tl.float32) * scaling
    q_sum = tl.sum(q)
    top = tl.full((TILE,), -1e30, tl.float32)  # finite, so that a lane without tokens gets no NaN from inf - inf
    weight_sum = tl.zeros((TILE,), tl.float32)
    offset_sum = tl.zeros((TILE,), tl.float32)
    value_sum = tl.zeros((TILE, BLOCK_D), tl.float32)
    first = tl.program_id(1) * tiles_each
    last = tl.minimum(first + tiles_each, tl.cdiv(length, TILE))
    scales = _load_scales(tiles, first, b, h, lane, length, SCALE, TILE)
    for tile in tl.range(first, last, num_stages=3):
        at = tiles + tile * 9
        vectors = b * tl.load(at + 6) + h * tl.load(at + 7) + lane * tl.load(at + 8)
        t = tile * TILE + lane
        inside = t < length
        bytes_inside = inside[:, None] & (d < D)[None, :]
        key_at = tl.load(at).to(tl.pointer_type(tl.uint8)) + vectors[:, None] * D + d[None, :]
        value_at = tl.load(at + 3).to(tl.pointer_type(tl.uint8)) + vectors[:, None] * D + d[None, :]
        key = tl.load(tl.multiple_of(key_at, (1, ALIGNED)), mask=bytes_inside, other=0)
        value = tl.load(tl.multiple_of(value_at, (1, ALIGNED)), mask=bytes_inside, other=0)
        key_scale, key_zero, value_scale, value_zero = scales
        # Scales are too narrow for the asynchronous copies of `num_stages`, so they are loaded one tile ahead by hand.
        scales = _load_scales(tiles, tl.minimum(tile + 1, last - 1), b, h, lane, length, SCALE, TILE)

        # Scale and zero point are factored out of the sums, as in decode_in_torch.
        score = tl.sum(key.to(tl.float32) * q[None, :], 1) - key_zero * q_sum
        score = score * key_scale
        if MASK == "boolean":
            inside = inside & (tl.load(mask + b * mask_b + h * mask_h + t * mask_t, mask=inside, other=0) != 0)
        if MASK == "additive":
            bias = tl.load(mask + b * mask_b + h * mask_h + t * mask_t, mask=inside, other=0.0)
            score += bias.to(tl.float32) * LOG2_E
        score = tl.where(inside, score, float("-inf"))
        new_top = tl.maximum(top, score)
        shrink, weight = tl.exp2(top - new_top), tl.exp2(score - new_top)
        share = weight * value_scale
        weight_sum = weight_sum * shrink + weight
        offset_sum = offset_sum * shrink + share * value_zero
        value_sum = value_sum * shrink[:, None] + share[:, None] * value.to(tl.float32)
        top = new_top
    all_top = tl.max(top, 0)
    shrink = tl.exp2(top - all_top)
    result = tl.sum(value_sum * shrink[:, None], 0) - tl.sum(offset_sum * shrink, 0)
    split = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(output + split * D + d, result, mask=d < D)
    tl.store(highest + split, all_top)
    tl.store(total + split, tl.sum(weight_sum * shrink, 0))


@triton.jit
def combine_kernel(
    shares, highest, total, output, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Add up the splits of one row and head: (B · H, splits, D) → (B · H, D). Grid: (B · H,)."""
    split, d = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64)
    at, inside = row * splits + split, split < splits
    top = tl.load(highest + at, mask=inside, other=float("-inf"))
    shrink = tl.exp2(top - tl.max(top, 0))
    weight = tl.sum(tl.load(total + at, mask=inside, other=0.0) * shrink, 0)
    share = tl.load(shares + at[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    result = tl.sum(share * shrink[:, None], 0) / tl.maximum(weight, 1e-30)  # 0 where every token is masked
    tl.store(output + row * D + d, result.to(output.dtype.element_ty), mask=d < D)


def check_driver() -> None:
    """Make Triton find the GPU and build its kernel launcher.

    Raises:
        RuntimeError, AssertionError, OSError, subprocess.SubprocessError: there is no GPU, or no C compiler.
    """
    # Triton creates the driver on first access; Triton 3.3, on access to one of its attributes.
    _ = triton.runtime.driver.active.get_current_target


def append_tokens(
    key: torch.Tensor, value: torch.Tensor, slot: Sequence[torch.Tensor], starts: torch.Tensor | None = None
) -> None:
    """Quantize (B, H, S, D) keys and values into the slot, as `quantize_tokens` does.

    Args:
        slot: bytes, scale and zero point of keys, then of values: six tensors (B, H, n, D or 1), n at least S.
        starts: (B), index in the slot where each row starts; None for 0.
    """
    batch, heads, tokens, channels = key.shape
    block = min(16, triton.next_power_of_2(tokens))
    grid = (batch * heads, triton.cdiv(tokens, block), 2)
    with torch.cuda.device_of(key):
        append_kernel[grid](
            key, *key.stride()[:3], value, *value.stride()[:3], *slot, *slot[1].stride()[:3],
            starts, heads, tokens, torch.finfo(slot[1].dtype).tiny,
            RAGGED=starts is not None, D=channels, BLOCK_D=triton.next_power_of_2(channels), BLOCK_S=block,
        )  # fmt: skip


def decode_attention(
    query: torch.Tensor,
    tiles: torch.Tensor,
    tile: int,
    length: int,
    scale_dtype: torch.dtype,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention of one token over the bytes of the cache.

    Args:
        query: (B, H, 1, D).
        tiles: (tiles, 9) int64, per tile: the addresses of bytes, scale and zero point of its keys, then of its values,
            and the strides of B, H and T in vectors of D channels.
        tile: tokens per tile, a power of two.
        length: T.
        scale_dtype: dtype of scales and zero points.
        mask: broadcasts to (B, H, 1, T); true for tokens, or additive; None for all.

    Returns:
        (B, H, 1, D) of the query's dtype.
    """
    batch, heads, _, channels = query.shape
    held = triton.cdiv(length, tile)
    tiles_each = triton.cdiv(held, splits_for(batch * heads, held, query.device))
    splits = triton.cdiv(held, tiles_each)
    rows = query.new_empty(batch * heads, splits, channels, dtype=torch.float32)
    highest, total = rows.new_empty(2, batch * heads, splits)
    output = query.new_empty(batch, heads, 1, channels)
    kind, strides = None, (0, 0, 0)
    if mask is not None:
        kind = "boolean" if mask.dtype == torch.bool else "additive"
        mask = mask.expand(batch, heads, 1, length)
        strides = (mask.stride(0), mask.stride(1), mask.stride(3))
    block = triton.next_power_of_2(channels)
    scale_type = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    with torch.cuda.device_of(query):
        decode_kernel[(batch * heads, splits)](
            query, query.stride(0), query.stride(1), mask, *strides, tiles, rows, highest, total,
            heads, length, tiles_each, scaling * LOG2_E.value,
            MASK=kind, SCALE=scale_type[scale_dtype], ALIGNED=math.gcd(channels, 16),
            D=channels, BLOCK_D=block, TILE=tile,
        )  # fmt: skip
        combine_kernel[(batch * heads,)](
            rows, highest, total, output, splits,
            D=channels, BLOCK_D=block, BLOCK_SPLITS=triton.next_power_of_2(splits),
        )  # fmt: skip
    return output


def splits_for(rows: int, tiles: int, device: torch.device) -> int:
    """Return how many programs to split the tiles of each of `rows` rows and heads over, so that the GPU is filled."""
    if device.type != "cuda":  # the interpreter; two splits test the second kernel
        return min(2, tiles)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(tiles, MOST_SPLITS, max(1, triton.cdiv(PROGRAMS * processors, rows)))
