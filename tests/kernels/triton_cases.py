"""The Triton operations compared with reference.py: on the GPU if there is one, else in Triton's interpreter.

test_triton_ops.py runs this file in a separate process, because Triton chooses its mode at import.
"""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from qwen.kernels import reference, triton_ops
from qwen.model.kv_cache_qwen import dequantize_cache_torch, quantize_tokens
from tests.kernels.packed_weights import packed_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value. A GPU approximates exponentials; the interpreter truncates to 16-bit floats where torch rounds.
TOLERANCE = {torch.float32: 1e-5 if DEVICE == "cpu" else 5e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    """Kernels must not read what they did not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `torch.empty` returns
    yield
    torch.use_deterministic_algorithms(False)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def dense_linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, device=DEVICE, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(normal(outputs, inputs, seed=seed) / inputs**0.5)
    if bias:
        layer.bias.copy_(normal(outputs, seed=seed + 1))
    return layer


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 512), (2, 2, 1030)])
def test_rms_norm(dtype, shape):
    x, weight = 30 * normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)
    assert_close(triton_ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_linear(dtype, rows):
    """Widths that are no multiples of anything; with and without bias and residual."""
    for inputs, outputs, bias, added in ((1, 1, False, True), (96, 8, True, False), (523, 13, rows < 3, True)):
        x, layer = normal(rows, inputs, dtype=dtype), dense_linear(inputs, outputs, dtype, bias)
        residual = normal(rows, outputs, dtype=dtype, seed=5) if added else None
        assert_close(triton_ops.linear(x, layer, residual), reference.linear(x, layer, residual))


def test_leading_dimensions_and_strides():
    x, layer = normal(2, 6, 40)[:, ::3], dense_linear(40, 12, torch.float32, bias=False)
    residual = normal(12, 2, 2).permute(2, 1, 0)
    expected = reference.linear(x, layer, residual)
    assert expected.shape == (2, 2, 12)
    assert_close(triton_ops.linear(x, layer, residual), expected)
    many = normal(3, 4, 40)
    assert_close(triton_ops.linear(many, layer, many[..., :12]), reference.linear(many, layer, many[..., :12]))
    weight = layer.weight
    layer.weight = nn.Parameter(normal(12, 64)[:, :40], requires_grad=False)  # rows of 64
    assert layer.weight.stride() != weight.stride()
    assert_close(triton_ops.linear(x, layer), reference.linear(x, layer))


@DTYPES
@pytest.mark.parametrize(("rows", "bias"), [(1, True), (4, False), (5, True)])
def test_swiglu_linear(dtype, rows, bias):
    x = normal(rows, 530, dtype=dtype)
    value, gate = (dense_linear(530, 13, dtype, bias, seed) for seed in (1, 3))
    assert_close(triton_ops.swiglu_linear(x, value, gate), reference.swiglu_linear(x, value, gate))


def test_swiglu_of_strided_rows():
    both = normal(3, 2, 2 * 1100)
    value, gate = both.chunk(2, dim=-1)
    assert_close(triton_ops.swiglu(value, gate), value * nn.functional.silu(gate))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group_size", "symmetric", "act_order", "rows", "dtype"),
    [
        (32, True, False, 1, torch.float32),
        (64, False, False, 2, torch.bfloat16),
        (128, False, True, 3, torch.float32),
        (128, True, True, 1, torch.float16),
        (-1, True, False, 4, torch.float32),
        (64, False, True, 5, torch.float32),  # more than the kernel takes
    ],
)
def test_packed_linear(bits, group_size, symmetric, act_order, rows, dtype):
    # More than a tile of words, or more than one of outputs.
    inputs, outputs = (1280 if bits == 4 else 640, 8) if group_size == 128 else (64 if rows == 5 else 256, 24)
    options = {"symmetric": symmetric, "act_order": act_order, "bias": rows % 2 == 0, "dtype": dtype, "device": DEVICE}
    packed, dense = packed_linear(inputs, outputs, bits, group_size, seed=rows, **options)
    gate, dense_gate = packed_linear(inputs, outputs, bits, group_size, seed=rows + 10, **options)
    x, residual = normal(rows, inputs, dtype=dtype), normal(rows, outputs, dtype=dtype, seed=1)
    # The kernel does not round weights, so neither does what it is compared with.
    expected = residual + reference.linear(x.float(), dense).to(dtype)
    assert_close(triton_ops.linear(x, packed, residual), expected)
    expected = reference.swiglu_linear(x.float(), dense, dense_gate).to(dtype)
    assert_close(triton_ops.swiglu_linear(x, packed, gate), expected)


@pytest.mark.parametrize(("bits", "symmetric", "act_order"), [(4, True, True), (8, False, False)])
def test_dequantize(bits, symmetric, act_order):
    options = {"symmetric": symmetric, "act_order": act_order, "bias": False, "dtype": torch.float32, "device": DEVICE}
    packed, dense = packed_linear(160, 16, bits, 64, seed=0, **options)  # the last group is not full
    assert torch.equal(triton_ops.dequantize(packed, torch.float32), dense.weight)


def random_pools(heads: int, slots: int, size: int, dtype: torch.dtype, quantized: bool) -> list[torch.Tensor]:
    key, value = normal(2, heads, slots, size, dtype=dtype, seed=7)
    key[..., 3] *= 20  # an outlier channel, as in these models
    return [*quantize_tokens(key), *quantize_tokens(value)] if quantized else [key, value]


@DTYPES
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "8 bits"])
@pytest.mark.parametrize(("size", "rotary"), [(16, 16), (20, 8), (128, 128)])
def test_rope_append(dtype, quantized, size, rotary):
    tokens, heads = 3, 5
    qkv = normal(tokens, 2, 3, heads, size, dtype=dtype)[:, 1]
    angles = normal(tokens, rotary // 2).repeat(1, 2)
    scale = None if size == 20 else 1 + normal(tokens).abs()
    pools = random_pools(heads, 40, size, dtype, quantized)
    expected_pools = [pool.clone() for pool in pools]
    arguments = qkv, angles.cos(), angles.sin(), scale, torch.tensor([17, 0, 39], device=DEVICE)
    assert_close(triton_ops.rope_append(*arguments, pools), reference.rope_append(*arguments, expected_pools))
    if not quantized:
        for ours, theirs in zip(pools, expected_pools, strict=True):
            assert_close(ours, theirs)
        return
    for part in (slice(0, 3), slice(3, 6)):
        (q, scales, zeros), (q2, scales2, zeros2) = pools[part], expected_pools[part]
        torch.testing.assert_close(scales, scales2, rtol=0.01, atol=0)
        exact = dtype == torch.float32 and DEVICE == "cpu"
        assert (q.int() - q2.int()).abs().max() <= (0 if exact else 3)
        error = dequantize_cache_torch(q, scales.float(), zeros.float()) - dequantize_cache_torch(
            q2, scales2.float(), zeros2.float()
        )
        # Both differ from the keys by half a step, and in 16 bits from each other by the rounding of zero points.
        assert (error.abs() <= (1e-3 if exact else 2.5) * scales2.float()).all()


class Pages:
    """Sequences in scrambled blocks of a cache in which all other slots are NaN.

    Args:
        lengths: tokens of each sequence.
        width: entries of each sequence in the table; those beyond its blocks are no blocks.
    """

    def __init__(self, pools: list[torch.Tensor], lengths: list[int], block_size: int, width: int):
        num_blocks = pools[0].shape[1] // block_size
        free = random.Random(0).sample(range(num_blocks), num_blocks)
        used = torch.zeros(pools[0].shape[1], dtype=torch.bool)
        self.tables = torch.full((len(lengths), width), 2**30, dtype=torch.int32)
        for row, length in enumerate(lengths):
            for start in range(0, length, block_size):
                block = free.pop()
                self.tables[row, start // block_size] = block
                used[block * block_size :][: min(block_size, length - start)] = True
        for pool in pools:
            if pool.is_floating_point():
                pool[:, ~used] = float("nan")
        self.tables = self.tables.to(DEVICE)


@pytest.mark.parametrize(
    ("size", "block_size", "window", "lengths", "dtype", "quantized"),
    [
        (16, 16, None, [1, 17, 600], torch.float32, False),
        (20, 48, 5, [3, 48, 49], torch.bfloat16, False),
        (128, 32, 270, [600], torch.float16, False),
        (128, 32, 270, [600], torch.float32, True),
        (64, 256, None, [257], torch.bfloat16, True),
        (20, 48, 5, [3, 48, 49], torch.float16, True),
    ],
)
def test_attend(dtype, quantized, size, block_size, window, lengths):
    """Several tokens of a sequence among others of one; more than one split."""
    heads, capacity = 2, 768
    pools = random_pools(heads, 2 * capacity, size, dtype, quantized)
    pages = Pages(pools, lengths, block_size, capacity // block_size)
    last = len(lengths) - 1
    rows = torch.tensor([*range(len(lengths)), last, last], dtype=torch.int32, device=DEVICE)
    seen = torch.tensor([*lengths, lengths[-1] - 1, 1], dtype=torch.int32, device=DEVICE)
    query = normal(len(rows), 2 * heads, size, dtype=dtype, seed=3)[:, :heads]
    arguments = pages.tables, rows, seen, block_size, size**-0.5, window
    ours = triton_ops.attend(query, pools, *arguments)
    # Scales and zero points are used as they are, without rounding of the products to 16 bits.
    exact = [pool if pool.dtype == torch.uint8 else pool.float() for pool in pools]
    assert_close(ours, reference.attend(query.float(), exact, *arguments).to(dtype))
    # A token's result does not depend on the others.
    arguments = pages.tables, rows[last:-1], seen[last:-1], block_size, size**-0.5, window
    assert torch.equal(triton_ops.attend(query[last:-1], pools, *arguments), ours[last:-1])


def test_a_row_that_is_not_used_is_zero():
    """Length 0: nothing is read."""
    pools = [torch.full((2, 32, 16), float("nan"), device=DEVICE)] * 2
    zeros = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    output = triton_ops.attend(normal(1, 2, 16), pools, zeros[:, None] + 2**30, zeros, zeros, 16, 1.0)
    assert not output.any()
