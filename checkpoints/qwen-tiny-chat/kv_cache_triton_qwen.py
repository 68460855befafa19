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

PROGRAMS_PER_SM = 8  # per multiprocessor: enough for their loads to overlap
MAX_SPLITS = 128  # per row and head; the second kernel adds them up at once
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _quantize_rows(
    x_ptr, stride_xb, stride_xh, stride_xs, q_ptr, scale_ptr, zero_ptr, stride_slot_b, stride_slot_h, stride_slot_s,
    off_b, off_h, offs_s, mask_s, tiny, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`quantize_tokens` of kv_cache_qwen for tokens s (BLOCK_S) of row b and head h."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_s[:, None] & (offs_d < D)[None, :]
    x_ptrs = x_ptr + off_b * stride_xb + off_h * stride_xh + offs_s[:, None] * stride_xs + offs_d[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # the range includes 0 anyway
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    scale = tl.maximum((high - low) / 254.0, tiny).to(scale_ptr.dtype.element_ty)
    step = scale.to(tl.float32)
    zero = (-low / step).to(zero_ptr.dtype.element_ty)
    q = x / step[:, None] + zero.to(tl.float32)[:, None]
    q = tl.minimum(tl.maximum(tl.floor(q + 0.5), 0.0), 255.0)
    offs_vector = off_b * stride_slot_b + off_h * stride_slot_h + offs_s * stride_slot_s
    tl.store(q_ptr + offs_vector[:, None] * D + offs_d[None, :], q.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + offs_vector, scale, mask=mask_s)
    tl.store(zero_ptr + offs_vector, zero, mask=mask_s)


@triton.jit
def append_kernel(
    key_ptr, stride_kb, stride_kh, stride_ks, value_ptr, stride_vb, stride_vh, stride_vs,
    key_q_ptr, key_scale_ptr, key_zero_ptr, value_q_ptr, value_scale_ptr, value_zero_ptr,
    stride_slot_b, stride_slot_h, stride_slot_s, num_heads, num_tokens, tiny,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Quantize keys and values into a slot. Grid: (B · H, blocks of tokens, 2 for keys and values)."""
    off_b, off_h = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
    offs_s = tl.program_id(1).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < num_tokens
    if tl.program_id(2) == 0:
        _quantize_rows(key_ptr, stride_kb, stride_kh, stride_ks, key_q_ptr, key_scale_ptr, key_zero_ptr,
                       stride_slot_b, stride_slot_h, stride_slot_s,
                       off_b, off_h, offs_s, mask_s, tiny, D, BLOCK_D)  # fmt: skip
    else:
        _quantize_rows(value_ptr, stride_vb, stride_vh, stride_vs, value_q_ptr, value_scale_ptr, value_zero_ptr,
                       stride_slot_b, stride_slot_h, stride_slot_s,
                       off_b, off_h, offs_s, mask_s, tiny, D, BLOCK_D)  # fmt: skip


@triton.jit
def _load_scales(
    table_ptr, tile, off_b, off_h, offs_lane, seq_len, DTYPE: tl.constexpr, TILE_SIZE: tl.constexpr
):  # fmt: skip
    """Scale and zero point of the keys, then of the values, of a tile's tokens: (TILE_SIZE,) each, float32."""
    entry_ptr = table_ptr + tile * 9
    stride_b, stride_h, stride_t = tl.load(entry_ptr + 6), tl.load(entry_ptr + 7), tl.load(entry_ptr + 8)
    offs_vector = off_b * stride_b + off_h * stride_h + offs_lane * stride_t
    mask_t = tile * TILE_SIZE + offs_lane < seq_len
    return (
        tl.load(tl.load(entry_ptr + 1).to(tl.pointer_type(DTYPE)) + offs_vector, mask=mask_t, other=0.0).to(tl.float32),
        tl.load(tl.load(entry_ptr + 2).to(tl.pointer_type(DTYPE)) + offs_vector, mask=mask_t, other=0.0).to(tl.float32),
        tl.load(tl.load(entry_ptr + 4).to(tl.pointer_type(DTYPE)) + offs_vector, mask=mask_t, other=0.0).to(tl.float32),
        tl.load(tl.load(entry_ptr + 5).to(tl.pointer_type(DTYPE)) + offs_vector, mask=mask_t, other=0.0).to(tl.float32),
    )


@triton.jit
def decode_kernel(
    q_ptr, stride_qb, stride_qh, mask_ptr, stride_mb, stride_mh, stride_mt, table_ptr, out_ptr, max_ptr, sum_ptr,
    num_heads, seq_len, tiles_per_split, sm_scale,
    MASK: tl.constexpr, SCALE_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE_SIZE: tl.constexpr,
):  # fmt: skip
    """Attention of one row and head over `tiles_per_split` tiles of tokens. Grid: (B · H, splits).

    Writes, for each split, the weighted sum of the values (B · H, splits, D), the highest score (base 2) and the sum of
    the weights (B · H, splits). Each of the TILE_SIZE lanes keeps its own softmax; they are merged at the end, so
    that the loop needs no communication between warps.
    """
    off_b, off_h = (tl.program_id(0) // num_heads).to(tl.int64), (tl.program_id(0) % num_heads).to(tl.int64)
    offs_lane, offs_d = tl.arange(0, TILE_SIZE), tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + off_b * stride_qb + off_h * stride_qh + offs_d, mask=offs_d < D, other=0.0)
    q = q.to(tl.float32) * sm_scale
    q_sum = tl.sum(q)
    m_i = tl.full((TILE_SIZE,), -1e30, tl.float32)  # finite, so that a lane without tokens gets no NaN from inf - inf
    l_i = tl.zeros((TILE_SIZE,), tl.float32)
    acc_zero = tl.zeros((TILE_SIZE,), tl.float32)
    acc = tl.zeros((TILE_SIZE, BLOCK_D), tl.float32)
    first_tile = tl.program_id(1) * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(seq_len, TILE_SIZE))
    scales = _load_scales(table_ptr, first_tile, off_b, off_h, offs_lane, seq_len, SCALE_DTYPE, TILE_SIZE)
    for tile in tl.range(first_tile, end_tile, num_stages=3):
        entry_ptr = table_ptr + tile * 9
        stride_b, stride_h, stride_t = tl.load(entry_ptr + 6), tl.load(entry_ptr + 7), tl.load(entry_ptr + 8)
        offs_vector = off_b * stride_b + off_h * stride_h + offs_lane * stride_t
        offs_t = tile * TILE_SIZE + offs_lane
        mask_t = offs_t < seq_len
        mask_td = mask_t[:, None] & (offs_d < D)[None, :]
        k_ptrs = tl.load(entry_ptr).to(tl.pointer_type(tl.uint8)) + offs_vector[:, None] * D + offs_d[None, :]
        v_ptrs = tl.load(entry_ptr + 3).to(tl.pointer_type(tl.uint8)) + offs_vector[:, None] * D + offs_d[None, :]
        k = tl.load(tl.multiple_of(k_ptrs, (1, ALIGNED)), mask=mask_td, other=0)
        v = tl.load(tl.multiple_of(v_ptrs, (1, ALIGNED)), mask=mask_td, other=0)
        k_scale, k_zero, v_scale, v_zero = scales
        # Scales are too narrow for the asynchronous copies of `num_stages`, so they are loaded one tile ahead by hand.
        next_tile = tl.minimum(tile + 1, end_tile - 1)
        scales = _load_scales(table_ptr, next_tile, off_b, off_h, offs_lane, seq_len, SCALE_DTYPE, TILE_SIZE)

        # Scale and zero point are factored out of the sums, as in decode_attention_torch.
        qk = tl.sum(k.to(tl.float32) * q[None, :], 1) - k_zero * q_sum
        qk = qk * k_scale
        if MASK == "boolean":
            mask_ptrs = mask_ptr + off_b * stride_mb + off_h * stride_mh + offs_t * stride_mt
            mask_t = mask_t & (tl.load(mask_ptrs, mask=mask_t, other=0) != 0)
        if MASK == "additive":
            mask_ptrs = mask_ptr + off_b * stride_mb + off_h * stride_mh + offs_t * stride_mt
            bias = tl.load(mask_ptrs, mask=mask_t, other=0.0)
            qk += bias.to(tl.float32) * LOG2_E
        qk = tl.where(mask_t, qk, float("-inf"))
        m_new = tl.maximum(m_i, qk)
        alpha, p = tl.exp2(m_i - m_new), tl.exp2(qk - m_new)
        p_scaled = p * v_scale
        l_i = l_i * alpha + p
        acc_zero = acc_zero * alpha + p_scaled * v_zero
        acc = acc * alpha[:, None] + p_scaled[:, None] * v.to(tl.float32)
        m_i = m_new
    m = tl.max(m_i, 0)
    alpha = tl.exp2(m_i - m)
    out = tl.sum(acc * alpha[:, None], 0) - tl.sum(acc_zero * alpha, 0)
    split = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out_ptr + split * D + offs_d, out, mask=offs_d < D)
    tl.store(max_ptr + split, m)
    tl.store(sum_ptr + split, tl.sum(l_i * alpha, 0))


@triton.jit
def combine_kernel(
    partial_ptr, max_ptr, sum_ptr, out_ptr, num_splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Add up the splits of one row and head: (B · H, splits, D) → (B · H, D). Grid: (B · H,)."""
    offs_split, offs_d = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64)
    offs, mask_split = row * num_splits + offs_split, offs_split < num_splits
    m_i = tl.load(max_ptr + offs, mask=mask_split, other=float("-inf"))
    alpha = tl.exp2(m_i - tl.max(m_i, 0))
    split_sum = tl.load(sum_ptr + offs, mask=mask_split, other=0.0)
    l_i = tl.sum(split_sum * alpha, 0)
    mask = (split_sum > 0)[:, None] & (offs_d < D)[None, :]  # a split without tokens may have stored nothing
    partial = tl.load(partial_ptr + offs[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    out = tl.sum(partial * alpha[:, None], 0) / tl.maximum(l_i, 1e-30)  # 0 where every token is masked
    tl.store(out_ptr + row * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)


def check_driver() -> None:
    """Make Triton find the GPU and build its kernel launcher.

    Raises:
        RuntimeError, AssertionError, OSError, subprocess.SubprocessError: there is no GPU, or no C compiler.
    """
    # Triton creates the driver on first access; Triton 3.3, on access to one of its attributes.
    _ = triton.runtime.driver.active.get_current_target


def append_tokens(key: torch.Tensor, value: torch.Tensor, slot: Sequence[torch.Tensor]) -> None:
    """Quantize (B, H, S, D) keys and values into the slot, as `quantize_tokens` does.

    Args:
        slot: bytes, scale and zero point of keys, then of values: six tensors (B, H, n, D or 1), n at least S.
    """
    batch, heads, num_tokens, channels = key.shape
    block = min(16, triton.next_power_of_2(num_tokens))
    grid = (batch * heads, triton.cdiv(num_tokens, block), 2)
    with torch.cuda.device_of(key):
        append_kernel[grid](
            key, *key.stride()[:3], value, *value.stride()[:3], *slot, *slot[1].stride()[:3],
            heads, num_tokens, torch.finfo(slot[1].dtype).tiny,
            D=channels, BLOCK_D=triton.next_power_of_2(channels), BLOCK_S=block,
        )  # fmt: skip


def decode_attention(
    query: torch.Tensor,
    tile_table: torch.Tensor,
    tile_size: int,
    length: int,
    scale_dtype: torch.dtype,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention of one token over the bytes of the cache.

    Args:
        query: (B, H, 1, D).
        tile_table: (tiles, 9) int64, per tile: the addresses of bytes, scale and zero point of its keys, then of its
            values, and the strides of B, H and T in vectors of D channels.
        tile_size: tokens per tile, a power of two.
        length: T.
        scale_dtype: dtype of scales and zero points.
        mask: broadcasts to (B, H, 1, T); true for tokens, or additive; None for all.

    Returns:
        (B, H, 1, D) of the query's dtype.
    """
    batch, heads, _, channels = query.shape
    num_tiles = triton.cdiv(length, tile_size)
    tiles_per_split = triton.cdiv(num_tiles, num_splits_heuristic(batch * heads, num_tiles, query.device))
    num_splits = triton.cdiv(num_tiles, tiles_per_split)
    partial = query.new_empty(batch * heads, num_splits, channels, dtype=torch.float32)
    split_max, split_sum = partial.new_empty(2, batch * heads, num_splits)
    output = query.new_empty(batch, heads, 1, channels)
    mask_kind, strides = None, (0, 0, 0)
    if mask is not None:
        mask_kind = "boolean" if mask.dtype == torch.bool else "additive"
        mask = mask.expand(batch, heads, 1, length)
        strides = (mask.stride(0), mask.stride(1), mask.stride(3))
    block = triton.next_power_of_2(channels)
    scale_type = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    with torch.cuda.device_of(query):
        decode_kernel[(batch * heads, num_splits)](
            query, query.stride(0), query.stride(1), mask, *strides, tile_table, partial, split_max, split_sum,
            heads, length, tiles_per_split, scaling * LOG2_E.value,
            MASK=mask_kind, SCALE_DTYPE=scale_type[scale_dtype], ALIGNED=math.gcd(channels, 16),
            D=channels, BLOCK_D=block, TILE_SIZE=tile_size,
        )  # fmt: skip
        combine_kernel[(batch * heads,)](
            partial, split_max, split_sum, output, num_splits,
            D=channels, BLOCK_D=block, BLOCK_SPLITS=triton.next_power_of_2(num_splits),
        )  # fmt: skip
    return output


def num_splits_heuristic(rows: int, num_tiles: int, device: torch.device) -> int:
    """Return how many programs to split the tiles of each of `rows` rows and heads over, so that the GPU is filled."""
    if device.type != "cuda":  # the interpreter; two splits test the second kernel
        return min(2, num_tiles)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return min(num_tiles, MAX_SPLITS, max(1, triton.cdiv(PROGRAMS_PER_SM * num_sms, rows)))


# Old names; the next release removes them.
MOST_SPLITS, PROGRAMS = MAX_SPLITS, PROGRAMS_PER_SM
splits_for = num_splits_heuristic
