"""Linear layers for a few rows of activations, in Triton: plain and packed weights, with what follows them fused in.

With few rows, the time is that of reading the weights. A program keeps the outputs of some columns, and multiplies in
float32 without tensor cores, which would wait for the memory, too. More rows go to the matrix products of torch.

Shapes: M rows of activations, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import nn

from ..model.gptq_linear_qwen import GPTQLinear
from .reference import AnyLinear

MAX_ROWS = 4  # of linear layers; with more, the matrix products of torch are faster
# Tiles of weights of a program: 1 kB of each of 8 outputs, so that even N = 4096 gives every multiprocessor of an H200
# four programs; of packed words 16 columns, the 64 bytes that its memory reads at once.
BLOCK_N, BLOCK_K = 8, 512
PACKED_BLOCK_N, PACKED_BLOCK_WORDS, PACKED_WARPS = 16, 128, 8
NUM_STAGES = 4  # three tiles of 8 kB are on their way while one is multiplied: an H200 needs about 22 kB on each of its
# multiprocessors to hide the latency of its memory
ONE_BITS = 0x3F800000  # of 1.0 in float32


@triton.jit
def swiglu_kernel(value_ptr, stride_value, gate_ptr, stride_gate, out_ptr, N, BLOCK_N: tl.constexpr):
    """value · silu(gate). Grid: (M, blocks of N)."""
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, mask = tl.program_id(0).to(tl.int64), offs_n < N
    value = tl.load(value_ptr + row * stride_value + offs_n, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + offs_n, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    silu = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * N + offs_n, (value * silu).to(dtype), mask=mask)


@triton.jit
def _load_inputs(x_ptr, row: tl.constexpr, num_rows, offs_k, mask_k, K):
    """Inputs of a row, float32; 0 if there is no such row."""
    return tl.load(x_ptr + row * K + offs_k, mask=mask_k & (row < num_rows), other=0.0).to(tl.float32)


@triton.jit
def _join_rows(sum0, sum1, sum2, sum3, BLOCK_N: tl.constexpr):
    """Four times (BLOCK_N) → (BLOCK_N, 4)."""
    return tl.reshape(tl.join(tl.join(sum0, sum2), tl.join(sum1, sum3)), (BLOCK_N, 4))


@triton.jit
def _multiply(
    x_ptr, weight_ptr, stride_weight, offs_n, num_rows, N, K,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """x Wᵀ for up to four rows: (BLOCK_N, 4), float32."""
    offs_k = tl.arange(0, BLOCK_K)
    # Programs beyond N read the last output once more; they need no mask.
    weight_ptrs = weight_ptr + tl.minimum(offs_n, N - 1).to(tl.int64)[:, None] * stride_weight + offs_k[None, :]
    acc0 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        mask_k = start + offs_k < K
        weight = tl.load(weight_ptrs + start, mask=mask_k[None, :], other=0.0).to(tl.float32)
        acc0 += weight * _load_inputs(x_ptr, 0, num_rows, start + offs_k, mask_k, K)[None, :]
        if ROWS > 1:
            acc1 += weight * _load_inputs(x_ptr, 1, num_rows, start + offs_k, mask_k, K)[None, :]
        if ROWS > 2:
            acc2 += weight * _load_inputs(x_ptr, 2, num_rows, start + offs_k, mask_k, K)[None, :]
            acc3 += weight * _load_inputs(x_ptr, 3, num_rows, start + offs_k, mask_k, K)[None, :]
    return _join_rows(tl.sum(acc0, 1), tl.sum(acc1, 1), tl.sum(acc2, 1), tl.sum(acc3, 1), BLOCK_N)


@triton.jit
def _unpack(word, index: tl.constexpr, one_bits, BITS: tl.constexpr):
    """1 + number `index` of each word / 2^BITS, float32: put into the mantissa of 1.0, it needs no conversion.

    `one_bits` is an argument of the kernels because the constant would not stay in a register, where masking and
    inserting are one instruction.
    """
    SHIFT: tl.constexpr = 23 - BITS - index * BITS
    shifted = word << SHIFT if SHIFT >= 0 else word >> -SHIFT
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    return ((shifted & MASK) | one_bits).to(tl.float32, bitcast=True)


@triton.jit
def _multiply_packed(
    x_ptr, qweight_ptr, scales_ptr, zeros_ptr, zero, order_ptr, one_bits, offs_n, num_rows, N, K,
    BITS: tl.constexpr, GROUP_WORDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """`_multiply` for packed weights.

    The sum over a word of (1 + q / 2^BITS) x, for scale (q - zero) x, is 2^BITS times it less (2^BITS + zero) times the
    sum of x, times the scale.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    UNIT: tl.constexpr = 1 << BITS
    num_words = K // PER_WORD
    mask_n = offs_n < N
    acc0 = tl.zeros((BLOCK_WORDS, BLOCK_N), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for start in tl.range(0, num_words, BLOCK_WORDS, num_stages=NUM_STAGES):
        offs_word = start + tl.arange(0, BLOCK_WORDS)
        mask_word = offs_word < num_words
        mask = mask_word[:, None] & mask_n[None, :]
        word = tl.load(qweight_ptr + offs_word[:, None] * N + offs_n[None, :], mask=mask, other=0)
        offs_group = (offs_word // GROUP_WORDS)[:, None] * N + offs_n[None, :]
        scale = tl.load(scales_ptr + offs_group, mask=mask, other=0.0)
        offset = UNIT + zero
        if zeros_ptr is not None:
            offset = UNIT + tl.load(zeros_ptr + offs_group, mask=mask, other=0).to(tl.float32)
        sum0 = tl.zeros((BLOCK_WORDS, BLOCK_N), tl.float32)
        sum1, sum2, sum3 = sum0, sum0, sum0
        x_sum0 = tl.zeros((BLOCK_WORDS,), tl.float32)
        x_sum1, x_sum2, x_sum3 = x_sum0, x_sum0, x_sum0
        for index in tl.static_range(PER_WORD):
            weight = _unpack(word, index, one_bits, BITS)
            offs_k = offs_word * PER_WORD + index
            if order_ptr is not None:
                offs_k = tl.load(order_ptr + offs_k, mask=mask_word, other=0)
            x0 = _load_inputs(x_ptr, 0, num_rows, offs_k, mask_word, K)
            sum0 += weight * x0[:, None]
            x_sum0 += x0
            if ROWS > 1:
                x1 = _load_inputs(x_ptr, 1, num_rows, offs_k, mask_word, K)
                sum1 += weight * x1[:, None]
                x_sum1 += x1
            if ROWS > 2:
                x2 = _load_inputs(x_ptr, 2, num_rows, offs_k, mask_word, K)
                x3 = _load_inputs(x_ptr, 3, num_rows, offs_k, mask_word, K)
                sum2 += weight * x2[:, None]
                sum3 += weight * x3[:, None]
                x_sum2 += x2
                x_sum3 += x3
        acc0 += scale * (UNIT * sum0 - offset * x_sum0[:, None])
        if ROWS > 1:
            acc1 += scale * (UNIT * sum1 - offset * x_sum1[:, None])
        if ROWS > 2:
            acc2 += scale * (UNIT * sum2 - offset * x_sum2[:, None])
            acc3 += scale * (UNIT * sum3 - offset * x_sum3[:, None])
    return _join_rows(tl.sum(acc0, 0), tl.sum(acc1, 0), tl.sum(acc2, 0), tl.sum(acc3, 0), BLOCK_N)


@triton.jit
def _finish(output, bias_ptr, offs_n, N, DTYPE: tl.constexpr):
    """Add the bias and round."""
    if bias_ptr is not None:
        output += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    return output.to(DTYPE).to(tl.float32)


@triton.jit
def _gate(output, gate, DTYPE: tl.constexpr):
    """output · silu(gate), rounded after each operation."""
    return (output * (gate * tl.sigmoid(gate)).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)


@triton.jit
def _store_rows(output, residual_ptr, out_ptr, offs_n, num_rows, N):
    """Store (BLOCK_N, 4), + residual, as (M, N)."""
    offs_m = tl.arange(0, 4)
    offs = offs_m[None, :] * N + offs_n[:, None]
    mask = (offs_m < num_rows)[None, :] & (offs_n < N)[:, None]
    if residual_ptr is not None:
        output += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, output.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, gate_ptr, gate_bias_ptr, residual_ptr, out_ptr, num_rows, stride_weight, stride_gate,
    N, K, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """`linear`, or with a gate `swiglu_linear`, for up to ROWS (1, 2 or 4) rows. Grid: (blocks of N,)."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = out_ptr.dtype.element_ty
    output = _multiply(
        x_ptr, weight_ptr, stride_weight, offs_n, num_rows, N, K, ROWS, BLOCK_N, BLOCK_K, NUM_STAGES
    )  # fmt: skip
    output = _finish(output, bias_ptr, offs_n, N, dtype)
    if gate_ptr is not None:
        gate = _multiply(
            x_ptr, gate_ptr, stride_gate, offs_n, num_rows, N, K, ROWS, BLOCK_N, BLOCK_K, NUM_STAGES
        )  # fmt: skip
        output = _gate(output, _finish(gate, gate_bias_ptr, offs_n, N, dtype), dtype)
    _store_rows(output, residual_ptr, out_ptr, offs_n, num_rows, N)


@triton.jit(do_not_specialize=["num_rows"])
def packed_linear_kernel(
    x_ptr, qweight_ptr, scales_ptr, zeros_ptr, order_ptr, bias_ptr,
    gate_qweight_ptr, gate_scales_ptr, gate_zeros_ptr, gate_order_ptr, gate_bias_ptr,
    residual_ptr, out_ptr, zero, gate_zero, one_bits, num_rows, N, K,
    BITS: tl.constexpr, GROUP_WORDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """`linear_kernel` for packed weights."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = out_ptr.dtype.element_ty
    output = _multiply_packed(
        x_ptr, qweight_ptr, scales_ptr, zeros_ptr, zero, order_ptr, one_bits, offs_n, num_rows, N, K,
        BITS, GROUP_WORDS, ROWS, BLOCK_N, BLOCK_WORDS, NUM_STAGES,
    )  # fmt: skip
    output = _finish(output, bias_ptr, offs_n, N, dtype)
    if gate_qweight_ptr is not None:
        gate = _multiply_packed(
            x_ptr, gate_qweight_ptr, gate_scales_ptr, gate_zeros_ptr, gate_zero, gate_order_ptr, one_bits, offs_n,
            num_rows, N, K, BITS, GROUP_WORDS, ROWS, BLOCK_N, BLOCK_WORDS, NUM_STAGES,
        )  # fmt: skip
        output = _gate(output, _finish(gate, gate_bias_ptr, offs_n, N, dtype), dtype)
    _store_rows(output, residual_ptr, out_ptr, offs_n, num_rows, N)


@triton.jit
def dequantize_kernel(
    qweight_ptr, scales_ptr, zeros_ptr, order_ptr, out_ptr, zero, one_bits, N,
    BITS: tl.constexpr, GROUP_WORDS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weights of a row of words: (K, N). Grid: (words, blocks of N)."""
    PER_WORD: tl.constexpr = 32 // BITS
    UNIT: tl.constexpr = 1 << BITS
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, mask = tl.program_id(0).to(tl.int64), offs_n < N
    word = tl.load(qweight_ptr + row * N + offs_n, mask=mask, other=0)
    offs_group = row // GROUP_WORDS * N + offs_n
    scale = tl.load(scales_ptr + offs_group, mask=mask, other=0.0)
    offset = zero
    if zeros_ptr is not None:
        offset = tl.load(zeros_ptr + offs_group, mask=mask, other=0).to(tl.float32)
    for index in tl.static_range(PER_WORD):
        off_k = row * PER_WORD + index
        if order_ptr is not None:
            off_k = tl.load(order_ptr + off_k).to(tl.int64)
        weight = scale * ((_unpack(word, index, one_bits, BITS) - 1) * UNIT - offset)
        tl.store(out_ptr + off_k * N + offs_n, weight.to(out_ptr.dtype.element_ty), mask=mask)


def linear(x: torch.Tensor, layer: AnyLinear, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + bias, and + residual (…, N) if it is given: one launch for up to MAX_ROWS rows. x: (…, K) → (…, N)."""
    if x.numel() <= MAX_ROWS * x.shape[-1]:
        return _launch_linear(x, layer, None, residual)
    weight = dequantize(layer, x.dtype) if isinstance(layer, GPTQLinear) else layer.weight
    if residual is None:
        return nn.functional.linear(x, weight, layer.bias)
    if layer.bias is not None:
        return residual + nn.functional.linear(x, weight, layer.bias)
    rows = residual.reshape(-1, residual.shape[-1])
    return torch.addmm(rows, x.reshape(-1, x.shape[-1]), weight.t()).view(residual.shape)


def swiglu_linear(x: torch.Tensor, value: AnyLinear, gate: AnyLinear) -> torch.Tensor:
    """value(x) · silu(gate(x)) (Shazeer 2020, https://arxiv.org/abs/2002.05202, eq. 6). x: (…, K) → (…, N)."""
    if x.numel() <= MAX_ROWS * x.shape[-1]:
        return _launch_linear(x, value, gate, None)
    return swiglu(linear(x, value), linear(x, gate))


def swiglu(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """value · silu(gate). (…, N) each; rows may be strided."""
    size, block = value.shape[-1], 1024
    values, gates = value.reshape(-1, size), gate.reshape(-1, size)
    out = value.new_empty(value.shape)
    with torch.cuda.device_of(value):
        swiglu_kernel[(len(values), triton.cdiv(size, block))](
            values, values.stride(0), gates, gates.stride(0), out, size, BLOCK_N=block
        )
    return out


def dequantize(layer: GPTQLinear, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights of a layer: (N, K), a transposed view of (K, N)."""
    num_words, size = layer.qweight.shape
    out, block = layer.scales.new_empty(layer.in_features, size, dtype=dtype), 1024
    qweight, scales, zeros, order, zero = _packed_tensors(layer)
    with torch.cuda.device_of(out):
        dequantize_kernel[(num_words, triton.cdiv(size, block))](
            qweight, scales, zeros, order, out, zero, ONE_BITS, size,
            BITS=layer.bits, GROUP_WORDS=_group_words(layer), BLOCK_N=block,
        )  # fmt: skip
    return out.t()


def _packed_tensors(
    layer: GPTQLinear,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, float]:
    """Words, scales, zero points, order of the inputs, and the zero point of all weights where they have one."""
    return layer.qweight, layer.scales, layer.zeros, layer.order, 0.0 if layer.zeros is not None else float(layer.zero)


def _group_words(layer: GPTQLinear) -> int:
    """Return the number of words of a column with one scale."""
    return layer.group_size * layer.bits // 32


def _launch_linear(
    x: torch.Tensor, layer: AnyLinear, gate: AnyLinear | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """Compute up to MAX_ROWS rows in one launch; the gate must have the format of the layer."""
    inputs, outputs = x.shape[-1], layer.out_features
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    num_rows = x.numel() // inputs
    rows = triton.next_power_of_2(num_rows)
    with torch.cuda.device_of(x):
        if isinstance(layer, GPTQLinear):
            assert gate is None or isinstance(gate, GPTQLinear)
            *packed, zero = _packed_tensors(layer)
            *gate_packed, gate_zero = (None, None, None, None, 0.0) if gate is None else _packed_tensors(gate)
            packed_linear_kernel[(triton.cdiv(outputs, PACKED_BLOCK_N),)](
                x, *packed, layer.bias, *gate_packed, getattr(gate, "bias", None), residual, out, zero, gate_zero,
                ONE_BITS, num_rows, outputs, inputs,
                BITS=layer.bits, GROUP_WORDS=_group_words(layer), ROWS=rows,
                BLOCK_N=PACKED_BLOCK_N, BLOCK_WORDS=PACKED_BLOCK_WORDS, NUM_STAGES=NUM_STAGES,
                num_warps=PACKED_WARPS,
            )  # fmt: skip
        else:
            gate_weight = None if gate is None else gate.weight
            linear_kernel[(triton.cdiv(outputs, BLOCK_N),)](
                x, layer.weight, layer.bias, gate_weight, getattr(gate, "bias", None), residual, out, num_rows,
                layer.weight.stride(0), 0 if gate_weight is None else gate_weight.stride(0), outputs, inputs,
                ROWS=rows, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, NUM_STAGES=NUM_STAGES,
            )  # fmt: skip
    return out
