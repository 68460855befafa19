"""kernels.c compared with reference.py: random shapes, for three sizes of vectors.

Tolerances are relative to the largest value: float32 sums in another order, 16 bits are off by two roundings at most.
"""

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from qwen.kernels import compile as compilation
from qwen.kernels import reference
from qwen.kernels.cpu import CPUKernels, Places, pages_handle
from qwen.kernels.reference import AnyLinear
from qwen.model.kv_cache_qwen import quantize_tokens
from tests.kernels.packed_weights import loaded_linear, packed_linear
from tests.support import ROOT

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SEEDS = pytest.mark.parametrize("seed", range(8))
QUANTIZED = pytest.mark.parametrize("quantized", [False, True], ids=["float", "8 bits"])
# Options beside the usual ones: without instructions that only some processors have, and with vectors of 16 floats, as
# on processors with AVX-512.
TARGETS = {"native": None, "portable": ["-fopenmp"], "16 floats": ["-fopenmp", "-D__AVX512F__"]}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if flags else []) for name, flags in TARGETS.items()],
)
def kernels(request) -> Iterator[CPUKernels]:
    with pytest.MonkeyPatch.context() as patch:
        if flags := TARGETS[request.param]:
            patch.setattr(compilation, "target_flags", lambda: flags)
        yield CPUKernels(compilation.load_library())


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense_linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(normal(outputs, inputs, seed=seed) / inputs**0.5)
    if bias:
        layer.bias.copy_(normal(outputs, seed=seed + 1))
    return layer


# -- Norm and activation --


@DTYPES
@SEEDS
def test_rms_norm(kernels, dtype, seed):
    rng = random.Random(seed)
    shape = rng.randint(1, 5), rng.choice([1, 7, 8, 31, 64, 129, 2048])
    x, weight = 30 * normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)
    assert_close(kernels.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@DTYPES
def test_swiglu(kernels, dtype):
    """Over the whole range: 0 · -∞ would be NaN. In more elements than one thread takes."""
    gate = torch.cat([torch.linspace(-200, 200, 2001), normal(2**15 + 3)]).to(dtype)
    value = normal(len(gate), dtype=dtype, seed=1)
    assert_close(kernels.swiglu(value, gate), value * nn.functional.silu(gate))


# -- Linear layers --


@DTYPES
@SEEDS
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 11, 70])
def test_linear(kernels, dtype, seed, rows):
    """Widths that are no multiples of a vector; with and without bias and residual; leading dimensions."""
    rng = random.Random(seed)
    inputs, outputs = rng.choice([1, 5, 15, 16, 33, 96, 257, 1030]), rng.choice([1, 3, 15, 16, 17, 40, 131])
    layer = dense_linear(inputs, outputs, dtype, bias=rng.random() < 0.5, seed=seed)
    shape = (1, rows) if rng.random() < 0.5 else (rows, 1)
    x = normal(*shape, inputs, dtype=dtype)
    residual = normal(*shape, outputs, dtype=dtype, seed=5) if rng.random() < 0.5 else None
    assert_close(kernels.linear(x, layer, residual), reference.linear(x, layer, residual))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 11, 70])
def test_weights_in_16_bits_in_a_model_in_float32(kernels, stored, rows):
    """In float32, also beside a gate whose weights are stored in another type."""
    for seed, inputs in enumerate([3, 16, 257, 1030]):
        layer = dense_linear(inputs, 21, torch.float32, bias=seed < 2, seed=seed)
        gate = dense_linear(inputs, 21, torch.float32, bias=False, seed=seed + 5)
        layer.weight.data = layer.weight.to(stored).float()
        narrow = dense_linear(inputs, 21, torch.float32, bias=seed < 2, seed=seed)
        narrow.weight.data = layer.weight.to(stored)
        x, residual = normal(rows, inputs), normal(rows, 21, seed=3)
        assert_close(kernels.linear(x, narrow, residual), reference.linear(x, layer, residual))
        assert_close(kernels.swiglu_linear(x, narrow, gate), reference.swiglu_linear(x, layer, gate))
        assert_close(kernels.swiglu_linear(x, gate, narrow), reference.swiglu_linear(x, gate, layer))


@DTYPES
@SEEDS
def test_swiglu_linear(kernels, dtype, seed):
    rng = random.Random(seed)
    inputs, outputs = rng.choice([3, 32, 530]), rng.choice([1, 21, 64])
    biases = rng.random() < 0.5, rng.random() < 0.5
    value, gate = (dense_linear(inputs, outputs, dtype, bias, seed=2 * i) for i, bias in enumerate(biases))
    x = normal(rng.randint(1, 4), inputs, dtype=dtype)
    assert_close(kernels.swiglu_linear(x, value, gate), reference.swiglu_linear(x, value, gate))


@DTYPES
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_packed_linear(kernels, dtype, bits, group_size):
    """One zero point or many, in order and not; with and without bias and residual; 1 to 7 rows."""
    for seed in range(4):
        symmetric, act_order, rows = seed % 2 == 0, seed // 2 == 0, (1, 2, 3, 4, 7)[seed + bits // 8]
        inputs, outputs = [(256, 24), (640, 40)][seed % 2]
        options = {"symmetric": symmetric, "act_order": act_order, "dtype": dtype, "device": "cpu"}
        packed, dense = packed_linear(inputs, outputs, bits, group_size, bias=seed < 2, seed=seed, **options)
        gate, dense_gate = packed_linear(inputs, outputs, bits, group_size, bias=seed < 2, seed=seed + 10, **options)
        x, residual = normal(rows, inputs, dtype=dtype), normal(rows, outputs, dtype=dtype, seed=1)
        # The kernel does not round weights to 16 bits, so neither does what it is compared with.
        product = reference.linear(x.float(), dense).to(dtype)
        assert_close(kernels.linear(x, packed), product)
        assert_close(kernels.linear(x, packed, residual), residual + product)
        gated = product * nn.functional.silu(reference.linear(x.float(), dense_gate).to(dtype))
        assert_close(kernels.swiglu_linear(x, packed, gate), gated)
        assert torch.equal(kernels.dequantize(packed, dtype), dense.weight.to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "group_size"), [(320, 128), (64, 128), (96, 64)])
def test_a_group_that_is_not_full(kernels, bits, inputs, group_size):
    layer, x = loaded_linear(inputs, 16, bits, group_size), normal(2, inputs)
    assert torch.equal(kernels.dequantize(layer, torch.float32), layer.weight)
    assert_close(kernels.linear(x, layer), layer(x))


@DTYPES
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_of_any_size_with_packed_weights(kernels, dtype, bits):
    """The integers that stand for activations have a scale of their own for each part of a group: a large value, or one
    that is not finite, costs no other part its precision, and no row its result."""
    packed, dense = packed_linear(
        640, 24, bits, -1, symmetric=False, act_order=False, bias=False, dtype=dtype, device="cpu", seed=0
    )
    x = normal(4, 640, dtype=dtype) * torch.logspace(-3, 3, 5).repeat_interleave(128).to(dtype)
    x[1], x[2, 5], x[3, 639] = 0, float("inf"), float("nan")
    ours, theirs = kernels.linear(x, packed), reference.linear(x.float(), dense).to(dtype)
    assert_close(ours[:2], theirs[:2])
    assert not ours[2:].isfinite().any()
    for part in range(5):
        alone = torch.zeros(1, 640, dtype=dtype)
        alone[:, part * 128 : part * 128 + 128] = x[0, part * 128 : part * 128 + 128]
        assert_close(kernels.linear(alone, packed), reference.linear(alone.float(), dense).to(dtype))


@DTYPES
def test_rows_and_threads_do_not_change_a_result(kernels, dtype):
    """The product of a row is the same alone, among others, and with any number of threads."""
    packed = packed_linear(
        640, 40, 4, 128, symmetric=False, act_order=True, bias=True, dtype=dtype, device="cpu", seed=0
    )[0]
    layers: list[AnyLinear] = [dense_linear(521, 77, dtype, bias=True), packed]
    if dtype == torch.float32:
        layers.append(dense_linear(521, 77, dtype, bias=True))
        layers[-1].weight.data = layers[-1].weight.to(torch.bfloat16)
    for layer in layers:
        x = normal(11 if dtype == torch.float32 else 4, layer.in_features, dtype=dtype)
        with threads(1):
            whole = kernels.linear(x, layer)
            alone = torch.cat([kernels.linear(row[None], layer) for row in x])
        assert torch.equal(alone, whole)
        for number in (2, 3):
            with threads(number):
                assert torch.equal(kernels.linear(x, layer), whole)
                assert torch.equal(kernels.swiglu_linear(x, layer, layer), kernels.swiglu_linear(x, layer, layer))


def test_weights_and_biases_that_move(kernels):
    """The addresses that were given to the library are those of the layer's present tensors."""
    layer, x = dense_linear(64, 32, torch.float32, bias=True), normal(1, 64)
    kernels.linear(x, layer)
    layer.bias = nn.Parameter(normal(32, seed=9), requires_grad=False)
    assert_close(kernels.linear(x, layer), reference.linear(x, layer))
    layer.weight.data = normal(32, 64, seed=8)
    assert_close(kernels.linear(x, layer), reference.linear(x, layer))
    layer.bias = None
    assert_close(kernels.linear(x, layer), reference.linear(x, layer))


# -- Attention --


class Cache:
    """Random keys and values in scattered blocks, with NaN in all slots that do not belong to the sequences.

    Args:
        lengths: of the sequences.
    """

    def __init__(
        self, lengths: list[int], heads: int, size: int, block_size: int, dtype: torch.dtype, quantized: bool, seed: int
    ):
        self.lengths, self.block_size, self.dtype = lengths, block_size, dtype
        rng = random.Random(seed)
        num_blocks = [-(-length // block_size) for length in lengths]
        blocks = rng.sample(range(sum(num_blocks) + 3), sum(num_blocks))
        self.slots = (sum(num_blocks) + 3) * block_size
        # Beyond the end of a sequence a table may hold anything.
        self.tables = torch.full((len(lengths), max(num_blocks) + 1), 2**30, dtype=torch.int32)
        for table, number in zip(self.tables, num_blocks, strict=True):
            table[:number] = torch.tensor([blocks.pop() for _ in range(number)])
        key, value = normal(2, heads, self.slots, size, dtype=dtype, seed=seed)
        key[..., size // 3] *= 20  # an outlier channel, as in these models
        pools = [*quantize_tokens(key), *quantize_tokens(value)] if quantized else [key, value]
        foreign = torch.ones(self.slots, dtype=torch.bool)
        for row in range(len(lengths)):
            foreign[self.places(row)] = False
        for pool in pools:
            if pool.is_floating_point():
                pool[:, foreign] = float("nan")
        self.pools = pools

    def places(self, row: int) -> torch.Tensor:
        """Return the slots of the tokens of a sequence."""
        positions = torch.arange(self.lengths[row])
        return self.tables[row, positions // self.block_size] * self.block_size + positions % self.block_size


def tiles_of(parts: list[tuple[int, int, int]], size: int = 4) -> torch.Tensor:
    """Return tiles of up to `size` tokens: parts of sequences are (row, new tokens, tokens after them)."""
    tiles, first = [], 0
    for row, new, length in parts:
        starts = range(0, new, size)
        tiles += [[first + start, min(size, new - start), row, length - new + start + 1] for start in starts]
        first += new
    return torch.tensor(tiles, dtype=torch.int32)


def attend_both(
    kernels: CPUKernels, cache: Cache, parts: list[tuple[int, int, int]], window: int | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of kernels.c and of reference.py."""
    heads, _, size = cache.pools[0].shape
    rows = torch.tensor([row for row, new, _ in parts for _ in range(new)])
    lengths = torch.tensor([length - new + i + 1 for _, new, length in parts for i in range(new)])
    query = normal(len(rows), heads, size, dtype=cache.dtype, seed=seed + 1)
    pages = pages_handle(cache.pools, cache.dtype, cache.block_size, 2, size**-0.5, window)
    places = Places(torch.empty(0), cache.tables, tiles_of(parts), int(lengths.max()))
    ours = kernels.attend(query, pages.address, places)
    # Scales and zero points are used as they are, without rounding of the products to 16 bits.
    exact = [pool if pool.dtype == torch.uint8 else pool.float() for pool in cache.pools]
    theirs = reference.attend(
        query.float(), exact, cache.tables, rows, lengths, cache.block_size, size**-0.5, window
    ).to(cache.dtype)
    return ours, theirs


@DTYPES
@QUANTIZED
@pytest.mark.parametrize("size", [16, 20, 64, 80, 128])
@pytest.mark.parametrize("window", [None, 1, 5, 255, 300])
def test_attend(kernels, dtype, quantized, size, window):
    """Sequences that decode and parts of prompts, with lengths around those of chunks, tiles and blocks."""
    rng = random.Random(size)
    lengths = [1, 4, rng.randint(5, 250), 255, 256, 257, rng.randint(500, 600)]
    cache = Cache(lengths, 2, size, rng.choice([16, 48]), dtype, quantized, seed=size)
    parts = [
        (row, min(length, new), length)
        for row, (length, new) in enumerate(zip(lengths, [1, 4, 9, 1, 6, 3, 1], strict=True))
    ]
    ours, theirs = attend_both(kernels, cache, parts, window, seed=size)
    assert_close(ours, theirs)


@DTYPES
@QUANTIZED
def test_attention_of_a_token_depends_on_nothing_else(kernels, dtype, quantized):
    """Alone or among others, in any tile, in parts or at once, with any number of threads."""
    heads, size = 3, 32
    lengths = [700, 256, 3]
    cache = Cache(lengths, heads, size, 16, dtype, quantized, seed=0)
    parts = [(0, 6, 700), (1, 1, 256), (2, 3, 3)]
    query = normal(10, heads, size, dtype=dtype, seed=1)
    for window in (None, 270):
        pages = pages_handle(cache.pools, dtype, 16, 2, size**-0.5, window)
        places = Places(torch.empty(0), cache.tables, tiles_of(parts), 700)
        with threads(1):
            expected = kernels.attend(query, pages.address, places)
            assert places.splits(heads, 1) == 1
            for number in (2, 8):
                with threads(number):
                    assert (places.splits(heads, number) > 1) == (number == 8)
                    assert torch.equal(kernels.attend(query, pages.address, places), expected)
            for first, count, row, length in tiles_of(parts, size=1).tolist():
                tile = torch.tensor([[0, count, row, length]], dtype=torch.int32)
                alone = Places(torch.empty(0), cache.tables, tile, length)
                assert torch.equal(kernels.attend(query[first, None], pages.address, alone)[0], expected[first])


@DTYPES
@QUANTIZED
def test_nan_stays_where_it_is_seen(kernels, dtype, quantized):
    """A sequence with a NaN gives NaN to those who see it, and to no others."""
    cache = Cache([300, 300], 2, 16, 16, dtype, quantized, seed=0)
    pool = cache.pools[-1]  # values or their zero points
    pool[1, cache.places(0)[100]] = float("nan")
    for parts, window, seen in [
        ([(0, 1, 300), (1, 1, 300)], None, True),
        ([(0, 1, 300), (1, 1, 300)], 199, False),  # it lies one token before the window
        ([(0, 1, 300), (1, 1, 300)], 200, True),  # ... and in it
        ([(0, 1, 100), (1, 1, 300)], None, False),  # ... and behind the end
    ]:
        ours, theirs = attend_both(kernels, cache, parts, window, seed=0)
        assert bool(theirs[0, 1].isnan().any()) == seen
        assert torch.equal(ours.isnan(), theirs.isnan())


@DTYPES
@QUANTIZED
@SEEDS
def test_rope_append(kernels, dtype, quantized, seed):
    rng = random.Random(seed)
    tokens, heads, size = rng.choice([1, 3, 40]), rng.choice([1, 5]), rng.choice([8, 20, 64, 128])
    rotary = size if rng.random() < 0.5 else size // 4 * 2
    qkv, angles = normal(tokens, 3, heads, size, dtype=dtype, seed=seed), normal(tokens, rotary // 2).repeat(1, 2)
    cos, sin = (angles.cos(), angles.sin()) if rng.random() < 0.8 else (angles * 0 + 1, angles * 0)
    scale = 1 + normal(tokens).abs() if rng.random() < 0.5 else None
    slots = torch.tensor(rng.sample(range(64), tokens))
    key, value = normal(2, heads, 64, size, dtype=dtype, seed=seed + 1)
    pools = [*quantize_tokens(key), *quantize_tokens(value)] if quantized else [key, value]
    expected_pools = [pool.clone() for pool in pools]
    expected = reference.rope_append(qkv, cos, sin, scale, slots, expected_pools)
    pages = pages_handle(pools, dtype, 16, rotary, size**-0.5, None)
    assert_close(kernels.rope_append(qkv, (cos, sin, scale), slots, pages.address), expected)
    half = len(pools) // 2
    for ours, theirs in zip(pools[half:], expected_pools[half:], strict=True):  # values are not rotated
        assert torch.equal(ours, theirs)
    # The rotation of keys may round the other way, which changes bytes by one (in 16 bits by the error of the scale).
    for ours, theirs in zip(pools[:half], expected_pools[:half], strict=True):
        if ours.dtype == torch.uint8:
            steps = (ours.int() - theirs.int()).abs()
            assert steps.max() <= (1 if dtype == torch.float32 else 3)
            assert (steps > 0).float().mean() < (1e-3 if dtype == torch.float32 else 0.2)
        else:
            assert_close(ours, theirs)
    if not angles.sin().equal(sin):
        assert all(map(torch.equal, pools, expected_pools))


@DTYPES
def test_nan_is_kept_in_8_bits(kernels, dtype):
    qkv = normal(1, 3, 3, 16, dtype=dtype)
    qkv[0, 1:, 0, 0] = qkv[0, 1:, 1, 7] = float("nan")
    pools = [*quantize_tokens(torch.zeros(3, 4, 16, dtype=dtype)), *quantize_tokens(torch.zeros(3, 4, 16, dtype=dtype))]
    pages = pages_handle(pools, dtype, 16, 16, 1.0, None)
    kernels.rope_append(qkv, (torch.ones(1, 16), torch.zeros(1, 16), None), torch.tensor([2]), pages.address)
    for scale, zero in (pools[1:3], pools[4:6]):
        assert (scale * zero)[:, 2, 0].isnan().tolist() == [True, True, False]


def test_threads_are_those_of_torch(kernels):
    """With an OpenMP of its own, the library would have threads that compete with torch's for the cores."""
    for number in (1, 3):
        with threads(number):
            assert kernels._library.omp_get_max_threads() == number


FEWER_THREADS = """
import torch
from qwen.kernels.cpu import cpu_kernels
torch.set_num_threads(3)
layer, x = torch.nn.Linear(64, 100).requires_grad_(False), torch.randn(2, 64)
torch.testing.assert_close(cpu_kernels().linear(x, layer), layer(x))
"""


@pytest.mark.process
def test_fewer_threads_than_asked_for():
    """OpenMP may have a limit: all outputs are computed nevertheless."""
    command, limit = [sys.executable, "-c", FEWER_THREADS], {"OMP_THREAD_LIMIT": "2"}
    subprocess.run(command, cwd=ROOT, env=os.environ | limit, check=True)


@pytest.mark.slow
def test_a_compiler_without_16_bit_floats(monkeypatch):
    """Like GCC 11: such activations are not taken."""
    monkeypatch.setattr(compilation, "target_flags", lambda: ["-fopenmp", "-U__FLT16_MAX__", "-O0"])  # compiles sooner
    kernels = CPUKernels(compilation.load_library())
    assert kernels.dtypes == {torch.float32, torch.bfloat16}
    layer, x = dense_linear(33, 20, torch.bfloat16, bias=True), normal(2, 33, dtype=torch.bfloat16)
    assert_close(kernels.linear(x, layer), reference.linear(x, layer))
