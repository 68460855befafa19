"""The fused operations in Triton, for CUDA and ROCm: the functions of `reference.py` under the same names.

Nothing waits for the device, and no launch depends on lengths or positions: they are read on the device, so that a
captured step serves every length. Triton compiles a kernel when it is first launched; `warm_up` launches them all. The
functions are no custom operators, because calling one costs the host more than the launch.

Results differ from `reference.py` only in rounding: sums and the rotation are in float32, in another order. Packed
weights and the bytes of the cache are not rounded to the type of the activations before they are multiplied. With more
than `MAX_ROWS` rows, `linear` without a bias adds the residual before it rounds.

Shapes: M rows of activations, K inputs, N outputs, T tokens of a step, R sequences, H heads, D head size, C rotated
channels, S slots of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from ..model.kv_cache_triton_qwen import LOG2_E, combine_kernel, num_splits_heuristic
from .triton_linear import MAX_ROWS as MAX_ROWS
from .triton_linear import dequantize as dequantize
from .triton_linear import linear as linear
from .triton_linear import swiglu as swiglu
from .triton_linear import swiglu_linear as swiglu_linear

if TYPE_CHECKING:
    from ..model.modeling_qwen import QWenLMHeadModel

TILE_BYTES = 8192  # of keys, and of values, that attention reads at once; three of each fit in a program's memory
SPLIT_TOKENS = (
    256  # of a sequence, at least, in a program of attention; with fewer, starting it takes as long as reading
)
FLOAT_1_5_2_23 = tl.constexpr(12582912.0)  # added and subtracted, it rounds to an integer, ties to even


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, K, BLOCK_K: tl.constexpr):
    """RMSNorm of a row. Grid: (M,)."""
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    start = tl.program_id(0).to(tl.int64) * K
    x = tl.load(x_ptr + start + offs_k, mask=mask, other=0.0)
    x32 = x.to(tl.float32)
    normed = (x32 * tl.rsqrt(tl.sum(x32 * x32, 0) / K + eps)).to(x.dtype)
    weight = tl.load(weight_ptr + offs_k, mask=mask, other=0.0)
    tl.store(out_ptr + start + offs_k, (normed.to(tl.float32) * weight.to(tl.float32)).to(x.dtype), mask=mask)


@triton.jit
def _rotate(x_ptrs, offs_d, cos, sin, mask, C: tl.constexpr):
    """`apply_rotary_emb` of heads (BLOCK_H, BLOCK_D), float32. Beyond C, cos is 1 and sin 0."""
    x = tl.load(x_ptrs + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.where(offs_d < C // 2, offs_d + C // 2, offs_d - C // 2)
    other = tl.load(x_ptrs + other[None, :], mask=mask & (offs_d < C)[None, :], other=0.0).to(tl.float32)
    return x * cos[None, :] + tl.where(offs_d < C // 2, -1.0, 1.0)[None, :] * other * sin[None, :]


@triton.jit
def _store_states(
    x, pool_ptr, scale_ptr, zero_ptr, stride_pool_h, stride_pool_s, stride_scale_h, stride_scale_s,
    offs_h, slot, offs_d, mask_h, mask, tiny,
):  # fmt: skip
    """Write keys or values (BLOCK_H, BLOCK_D) to a slot; in 8 bits as `quantize_tokens` does."""
    pool_ptrs = pool_ptr + offs_h[:, None] * stride_pool_h + slot * stride_pool_s + offs_d[None, :]
    if scale_ptr is None:
        tl.store(pool_ptrs, x.to(pool_ptr.dtype.element_ty), mask=mask)
    else:
        x = x.to(scale_ptr.dtype.element_ty).to(tl.float32)
        low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
        scale = tl.maximum((high - low) / 254.0, tiny).to(scale_ptr.dtype.element_ty)
        step = scale.to(tl.float32)
        zero = (-low / step).to(scale_ptr.dtype.element_ty)
        q = x / step[:, None] + zero.to(tl.float32)[:, None]
        q = tl.minimum(tl.maximum((q + FLOAT_1_5_2_23) - FLOAT_1_5_2_23, 0.0), 255.0)
        offs = offs_h * stride_scale_h + slot * stride_scale_s
        tl.store(pool_ptrs, q.to(tl.uint8), mask=mask)
        tl.store(scale_ptr + offs, scale, mask=mask_h)
        tl.store(zero_ptr + offs, zero, mask=mask_h)


@triton.jit(do_not_specialize_on_alignment=["cos_ptr", "sin_ptr", "query_scale_ptr", "slots_ptr"])
def rope_append_kernel(
    qkv_ptr, stride_t, stride_part, stride_h, cos_ptr, sin_ptr, stride_cos, query_scale_ptr, slots_ptr, query_ptr,
    key_ptr, key_scale_ptr, key_zero_ptr, value_ptr, value_scale_ptr, value_zero_ptr,
    stride_pool_h, stride_pool_s, stride_scale_h, stride_scale_s, H, tiny,
    C: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some heads of a token. Grid: (T, blocks of H)."""
    token = tl.program_id(0).to(tl.int64)
    offs_h, offs_d = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask_h = offs_h < H
    mask = mask_h[:, None] & (offs_d < D)[None, :]
    cos = tl.load(cos_ptr + token * stride_cos + offs_d, mask=offs_d < C, other=1.0)
    sin = tl.load(sin_ptr + token * stride_cos + offs_d, mask=offs_d < C, other=0.0)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    qkv_ptrs = qkv_ptr + token * stride_t + offs_h[:, None] * stride_h
    query = _rotate(qkv_ptrs, offs_d, cos, sin, mask, C)
    if query_scale_ptr is not None:
        query *= tl.load(query_scale_ptr + token)
    query_ptrs = query_ptr + (token * H + offs_h)[:, None] * D + offs_d[None, :]
    tl.store(query_ptrs, query.to(query_ptr.dtype.element_ty), mask=mask)
    key = _rotate(qkv_ptrs + stride_part, offs_d, cos, sin, mask, C)
    _store_states(
        key, key_ptr, key_scale_ptr, key_zero_ptr, stride_pool_h, stride_pool_s, stride_scale_h, stride_scale_s,
        offs_h, slot, offs_d, mask_h, mask, tiny,
    )  # fmt: skip
    value = tl.load(qkv_ptrs + 2 * stride_part + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    _store_states(
        value, value_ptr, value_scale_ptr, value_zero_ptr, stride_pool_h, stride_pool_s, stride_scale_h,
        stride_scale_s, offs_h, slot, offs_d, mask_h, mask, tiny,
    )  # fmt: skip


@triton.jit
def _load_slots(table_ptr, offs_t, end, BLOCK_SIZE: tl.constexpr):
    """Slots of tokens; 0 from the end on, where the table may hold anything."""
    block = tl.load(table_ptr + offs_t // BLOCK_SIZE, mask=offs_t < end, other=0)
    return block.to(tl.int64) * BLOCK_SIZE + offs_t % BLOCK_SIZE


@triton.jit
def _load_scales(scale_ptr, zero_ptr, offs, mask):
    """Scales and zero points, float32; zeros where there are none, which is optimized away."""
    scale = tl.zeros(offs.shape, tl.float32)
    zero = scale
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return scale, zero


@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=["tables_ptr", "rows_ptr", "lengths_ptr"])
def attend_kernel(
    query_ptr, stride_qt, stride_qh, key_ptr, key_scale_ptr, key_zero_ptr, value_ptr, value_scale_ptr, value_zero_ptr,
    stride_pool_h, stride_pool_s, stride_scale_h, stride_scale_s, tables_ptr, stride_table, rows_ptr, lengths_ptr,
    partial_ptr, max_ptr, sum_ptr, window, sm_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_SIZE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of a token's head to a part of its sequence. Grid: (T, H, splits).

    Writes the weighted sum of the values (T · H, splits, D), the highest score (base 2) and the sum of the weights
    (T · H, splits), for `combine_kernel`. Each of TILE_SIZE lanes has its own softmax, so that the loop needs no
    communication between warps. The parts depend only on the length, not on the other rows.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    table_ptr = tables_ptr + tl.load(rows_ptr + token).to(tl.int64) * stride_table
    length = tl.load(lengths_ptr + token).to(tl.int32)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    tokens_each = tl.cdiv(tl.cdiv(length - first, num_splits), TILE_SIZE) * TILE_SIZE
    tokens_each = tl.maximum(tokens_each, SPLIT_TOKENS)
    begin = first + split * tokens_each
    end = tl.minimum(begin + tokens_each, length)

    offs_lane, offs_d = tl.arange(0, TILE_SIZE), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    query = tl.load(query_ptr + token * stride_qt + head * stride_qh + offs_d, mask=mask_d, other=0.0)
    query = query.to(tl.float32) * sm_scale
    q_sum = tl.sum(query, 0)
    m_i = tl.full((TILE_SIZE,), -1e30, tl.float32)  # finite, so that a lane without tokens gets no NaN from inf - inf
    l_i = tl.zeros((TILE_SIZE,), tl.float32)
    acc_zero = tl.zeros((TILE_SIZE,), tl.float32)
    acc = tl.zeros((TILE_SIZE, BLOCK_D), tl.float32)
    key_ptr += head * stride_pool_h
    value_ptr += head * stride_pool_h
    # What is too narrow for the asynchronous copies of `num_stages` is loaded one tile ahead by hand.
    slots = _load_slots(table_ptr, begin + offs_lane, end, BLOCK_SIZE)
    offs_scale = head * stride_scale_h + slots * stride_scale_s
    k_scale, k_zero = _load_scales(key_scale_ptr, key_zero_ptr, offs_scale, begin + offs_lane < end)
    v_scale, v_zero = _load_scales(value_scale_ptr, value_zero_ptr, offs_scale, begin + offs_lane < end)
    for start in tl.range(begin, end, TILE_SIZE, num_stages=NUM_STAGES):
        mask_t = start + offs_lane < end
        mask = mask_t[:, None] & mask_d[None, :]
        offs = slots[:, None] * stride_pool_s + offs_d[None, :]
        key = tl.load(key_ptr + offs, mask=mask, other=0).to(tl.float32)
        value = tl.load(value_ptr + offs, mask=mask, other=0).to(tl.float32)
        offs_next = start + TILE_SIZE + offs_lane
        slots = _load_slots(table_ptr, offs_next, end, BLOCK_SIZE)
        scores = tl.sum(key * query[None, :], 1)
        if key_scale_ptr is not None:  # scale and zero point are factored out of the sums
            scores = (scores - k_zero * q_sum) * k_scale
        scores = tl.where(mask_t, scores, float("-inf"))
        m_new = tl.maximum(m_i, scores)
        alpha, p = tl.exp2(m_i - m_new), tl.exp2(scores - m_new)
        l_i = l_i * alpha + p
        if value_scale_ptr is not None:
            p *= v_scale
            acc_zero = acc_zero * alpha + p * v_zero
        acc = acc * alpha[:, None] + p[:, None] * value
        m_i = m_new
        offs_scale = head * stride_scale_h + slots * stride_scale_s
        k_scale, k_zero = _load_scales(key_scale_ptr, key_zero_ptr, offs_scale, offs_next < end)
        v_scale, v_zero = _load_scales(value_scale_ptr, value_zero_ptr, offs_scale, offs_next < end)
    m = tl.max(m_i, 0)
    alpha = tl.exp2(m_i - m)
    output = tl.sum(acc * alpha[:, None], 0) - tl.sum(acc_zero * alpha, 0)
    place = (token * tl.num_programs(1) + head) * num_splits + split
    tl.store(partial_ptr + place * D + offs_d, output, mask=mask_d & (begin < end))
    tl.store(max_ptr + place, m)
    tl.store(sum_ptr + place, tl.sum(l_i * alpha, 0))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight (Zhang and Sennrich 2019, eq. 4). x: (…, K)."""
    x = x.contiguous()
    size = x.shape[-1]
    out, block = torch.empty_like(x), triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(x.numel() // size,)](
            x, weight, out, eps, size, BLOCK_K=block, num_warps=min(16, max(1, block // 512))
        )
    return out


Arguments = tuple[torch.Tensor | int | None, ...]


def _pool_arguments(pools: Sequence[torch.Tensor]) -> tuple[Arguments, Arguments]:
    """Tensors and strides of a cache as the kernels take them: those in floating point have no scales."""
    if len(pools) == 2:
        return (pools[0], None, None, pools[1], None, None), (*pools[0].stride()[:2], 0, 0)
    return tuple(pools), (*pools[0].stride()[:2], *pools[1].stride()[:2])


def rope_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_scale: torch.Tensor | None,
    slots: torch.Tensor,
    pools: list[torch.Tensor],
) -> torch.Tensor:
    """Rotate queries and keys (Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34), and append to the cache.

    Args and returns as in `reference.py`, in one launch; keys and values have the same strides, and so have cos and
    sin.
    """
    tokens, _, heads, size = qkv.shape
    tensors, strides = _pool_arguments(pools)
    query, block = qkv.new_empty(tokens, heads, size), 4
    with torch.cuda.device_of(qkv):
        rope_append_kernel[(tokens, triton.cdiv(heads, block))](
            qkv, *qkv.stride()[:3], cos, sin, cos.stride(0), query_scale, slots, query, *tensors, *strides, heads,
            torch.finfo(qkv.dtype).tiny,
            C=cos.shape[-1], D=size, BLOCK_H=block, BLOCK_D=triton.next_power_of_2(size),
        )  # fmt: skip
    return query


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
    """Attend from a few tokens of each sequence, split over keys (Dao et al. 2023, flash-decoding), in two launches.

    Args and returns as in `reference.py`. The number of splits follows from the shapes of the tables and the heads: a
    token's result depends neither on the other tokens nor on their number. Slots that a token does not see are not
    read.
    """
    tokens, heads, size = query.shape
    tensors, strides = _pool_arguments(pools)
    capacity = block_tables.shape[1] * block_size
    num_splits = num_splits_heuristic(heads, triton.cdiv(capacity, SPLIT_TOKENS), query.device)
    partial = query.new_empty(tokens * heads, num_splits, size, dtype=torch.float32)
    split_max, split_sum = partial.new_empty(2, tokens * heads, num_splits)
    output = query.new_empty(tokens, heads, size)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(query):
        attend_kernel[(tokens, heads, num_splits)](
            query, *query.stride()[:2], *tensors, *strides, block_tables, block_tables.stride(0), rows, lengths,
            partial, split_max, split_sum, window or 0, scaling * LOG2_E.value,
            D=size, BLOCK_D=block, BLOCK_SIZE=block_size, TILE_SIZE=max(16, TILE_BYTES // (block * pools[0].itemsize)),
            SPLIT_TOKENS=SPLIT_TOKENS, NUM_STAGES=3,
        )  # fmt: skip
        combine_kernel[(tokens * heads,)](
            partial, split_max, split_sum, output, num_splits,
            D=size, BLOCK_D=block, BLOCK_SPLITS=triton.next_power_of_2(num_splits),
        )  # fmt: skip
    return output


@torch.no_grad()
def warm_up(
    model: QWenLMHeadModel,
    pools: list[torch.Tensor],
    block_size: int,
    table_width: int,
    rows: Sequence[int] = (1, 2, 4, 8),
) -> None:
    """Compile the kernels of a model's steps by running one layer, so that no request waits for a compiler.

    Args:
        pools: of one layer; slot 0 is overwritten.
        table_width: blocks of the longest sequence, as in `attend`'s block tables.
        rows: numbers of rows that steps will have, up to MAX_ROWS, and one beyond.
    """
    block: Any = model.transformer.h[0]
    attn, mlp, config, device = block.attn, block.mlp, model.config, pools[0].device
    for count in rows:
        x = torch.zeros(count, config.hidden_size, dtype=model.dtype, device=device)
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        cos = sin = torch.ones(count, config.rotary_dim, device=device)
        normed = rms_norm(x, block.ln_1.weight, block.ln_1.eps)
        qkv = linear(normed, attn.c_attn).view(count, 3, -1, attn.head_dim)
        query = rope_append(
            qkv, cos, sin, cos[:, 0].contiguous() if config.use_logn_attn else None, zeros.long(), pools
        )
        tables = zeros[:, None].expand(count, table_width).contiguous()
        output = attend(query, pools, tables, zeros, zeros + 1, block_size, attn.scaling)
        x = linear(output.view(count, -1), attn.c_proj, x)
        linear(swiglu_linear(normed, mlp.w1, mlp.w2), mlp.c_proj, x)
        linear(x, model.lm_head)
