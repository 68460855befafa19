"""The fused operations on a CPU: kernels.c, called through ctypes.

A call costs some microseconds, as a torch operator does, of which there would be many more. The library is compiled for
the machine when it is first needed (`compile.py`). Tensors must be contiguous and on the CPU.

Shapes: M rows of activations, K inputs, N outputs, T tokens of a step, R sequences, H heads, D head size.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import nn

from ..model.gptq_linear_qwen import GPTQLinear
from .compile import KernelsUnavailable, load_library

logger = logging.getLogger(__name__)

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # codes of kernels.c
# Rows from which torch is faster with a linear layer: where it has instructions for 16 bits, elsewhere, and where it
# would have to convert weights that do not fit in a core's cache.
NATIVE_ROWS, TORCH_ROWS, CONVERTED_ROWS = 5, 64, 128
CACHED_WEIGHTS = 1 << 22
CONVERTED_OUTPUTS = 8192  # whose weights are converted at once
# As in kernels.c: tokens of a sequence that read keys together, and keys whose softmax is computed together.
TILE_QUERIES, CHUNK_KEYS = 4, 256
PADDING = 64  # floats by which a row of inputs may be extended


# Tensors of a linear layer, in the order of `Matrix`.
PLAIN_TENSORS = "weight", "bias"
PACKED_TENSORS = "qweight", "bias", "scales", "zeros", "order"


class Matrix(ctypes.Structure):
    """A linear layer, as kernels.c has it."""

    _fields_ = [
        *((name, c_int64) for name in ("n", "k", "group")),
        *((name, c_int32) for name in ("type", "stored", "bits")),
        *((name, c_void_p) for name in ("weight", "bias", "scales", "zeros", "order")),
        ("zero", c_float),
    ]


class Pages(ctypes.Structure):
    """The cache of a layer, as kernels.c has it."""

    _fields_ = [
        *((name, c_int64) for name in ("heads", "channels", "rotary", "head_stride", "slot_stride")),
        *((name, c_int64) for name in ("block_size", "window")),
        *((name, c_int32) for name in ("type", "quantized")),
        *((name, c_void_p) for name in ("key", "key_scale", "key_zero", "value", "value_scale", "value_zero")),
        ("scaling", c_float),
    ]


class Block(ctypes.Structure):
    """A layer of the network, as kernels.c has it."""

    _fields_ = [
        *((name, c_void_p) for name in ("ln_1", "ln_2", "c_attn", "c_proj", "w1", "w2", "mlp_c_proj")),
        ("eps", c_float),
    ]


SIGNATURES = {
    "linear": [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int],
    "swiglu_linear": [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int],
    "dequantize": [c_void_p, c_void_p, c_int],
    "rms_norm": [c_void_p, c_void_p, c_float, c_int64, c_int64, c_int, c_void_p, c_int],
    "swiglu": [c_void_p, c_void_p, c_int64, c_int, c_void_p, c_int],
    "rope_append": [*[c_void_p] * 6, c_int64, c_void_p, c_int],
    "attend": [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int],
    "begin_block": [c_void_p, c_void_p, c_void_p, c_int64, *[c_void_p] * 7, c_int],
    "end_block": [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int],
    "decode_block": [
        *(c_void_p, c_void_p, c_void_p, c_int64, *[c_void_p] * 5, c_int64),
        *(c_void_p, c_int64, c_int64, *[c_void_p] * 4, c_int),
    ],
}


class Handle(NamedTuple):
    """A structure of kernels.c, and its address.

    Args:
        sources: addresses of the tensors in it: those of a layer may move.
    """

    structure: ctypes.Structure
    address: int
    sources: tuple[int | None, ...]

    @classmethod
    def of(cls, structure: ctypes.Structure, sources: tuple[int | None, ...]) -> Handle:
        return cls(structure, ctypes.addressof(structure), sources)


class BlockHandle(NamedTuple):
    """A `Block`, its address, and what a call needs.

    Args:
        heads, head_size: of attention.
        values, floats: of the memory for intermediate results, for each token.
    """

    structure: Block
    address: int
    heads: int
    head_size: int
    values: int
    floats: int

    @classmethod
    def of(cls, structure: Block, heads: int, head_size: int) -> BlockHandle:
        channels, inner = Matrix.from_address(structure.c_attn).k, Matrix.from_address(structure.w1).n
        attention = heads * head_size
        floats = 2 * max(channels, attention, inner) + max(3 * attention, 2 * inner, channels) + PADDING
        values = channels + max(3 * attention, inner)
        return cls(structure, ctypes.addressof(structure), heads, head_size, values, floats)

    def scratch(self, rows: int, least: int = 0) -> tuple[int, torch.Tensor]:
        """Return memory for intermediate results: the address of that for values, and floats, which lie before it.

        Args:
            least: smallest number of floats.
        """
        floats = max(rows * self.floats, least)
        memory = torch.empty(floats + rows * self.values)
        return memory.data_ptr() + 4 * floats, memory


class Places(NamedTuple):
    """Where the tokens of a step are in the cache.

    Args:
        slots: (T), int64, where their keys and values go.
        tables: (R, blocks), int32, the blocks of each sequence.
        tiles: (tiles, 4), int32: first token, number of tokens, row of `tables`, tokens that the first one sees.
        longest: most tokens that a token sees.
        are_all: whether the tiles have all tokens; torch attends from the others.
    """

    slots: torch.Tensor
    tables: torch.Tensor
    tiles: torch.Tensor
    longest: int
    are_all: bool = True

    def splits(self, heads: int, threads: int) -> int:
        """Return the number of parts in which the keys of each tile and head are read, for a given number of cores."""
        return -(-self.longest // CHUNK_KEYS) if len(self.tiles) * heads < 4 * threads else 1


Positions = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | None
]  # cosines, sines (…, T, rotated channels), LogN (…, T)


class CPUKernels:
    """The fused operations, as in reference.py.

    Args:
        library: kernels.c, compiled.

    Attributes:
        dtypes: of activations, and of plain weights, that it takes.
    """

    def __init__(self, library: ctypes.CDLL):
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library
        self.dtypes = frozenset(TYPES) - (set() if library.has_float16() else {torch.float16})

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm. x: (…, K)."""
        out, size = torch.empty_like(x), x.shape[-1]
        self._library.rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            eps,
            x.numel() // size,
            size,
            TYPES[x.dtype],
            out.data_ptr(),
            threads_for(x),
        )
        return out

    def linear(self, x: torch.Tensor, layer: nn.Linear, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + bias, + residual (…, N) if it is given: by torch for many rows. x: (…, K) → (…, N)."""
        rows = x.numel() // layer.in_features
        if rows >= first_rows_for_torch(layer, x.dtype):
            out = self._linear_in_torch(x, layer)
            return out if residual is None else out.add_(residual)
        out = x.new_empty((*x.shape[:-1], layer.out_features))
        scratch = torch.empty(rows * (2 * layer.in_features + layer.out_features + PADDING))
        added = None if residual is None else residual.data_ptr()
        self._library.linear(
            matrix(layer, x.dtype), x.data_ptr(), rows, added, out.data_ptr(), scratch.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _linear_in_torch(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """x Wᵀ + bias, in float32 where the processor would convert 16 bits again and again."""
        dtype = torch.float32 if converts(x.dtype) else x.dtype
        if isinstance(layer, GPTQLinear):
            weight = self.dequantize(layer, dtype)
        elif dtype == x.dtype == layer.weight.dtype:
            return nn.functional.linear(x, layer.weight, layer.bias)
        else:
            weight = layer.weight
        bias = None if layer.bias is None else layer.bias.to(dtype)
        x32, parts = x.to(dtype), []
        for start in range(0, len(weight), CONVERTED_OUTPUTS):
            part = slice(start, start + CONVERTED_OUTPUTS)
            product = nn.functional.linear(x32, weight[part].to(dtype), None if bias is None else bias[part])
            parts.append(product.to(x.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def swiglu_linear(self, x: torch.Tensor, value: nn.Linear, gate: nn.Linear) -> torch.Tensor:
        """value(x) · silu(gate(x)). x: (…, K) → (…, N)."""
        rows = x.numel() // value.in_features
        if rows >= first_rows_for_torch(value, x.dtype):
            return self.swiglu(self.linear(x, value), self.linear(x, gate))
        out = x.new_empty((*x.shape[:-1], value.out_features))
        scratch = torch.empty(rows * (2 * value.in_features + 2 * value.out_features + PADDING))
        self._library.swiglu_linear(
            matrix(value, x.dtype), matrix(gate, x.dtype), x.data_ptr(), rows, out.data_ptr(), scratch.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def swiglu(self, value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Value · silu(gate), element by element."""
        out = torch.empty_like(value)
        self._library.swiglu(
            value.data_ptr(), gate.data_ptr(), value.numel(), TYPES[value.dtype], out.data_ptr(), threads_for(value)
        )
        return out

    def dequantize(self, layer: GPTQLinear, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights of a layer: (N, K), a transposed view of (K, N)."""
        out = torch.empty(layer.in_features, layer.out_features, dtype=dtype)
        self._library.dequantize(matrix(layer, dtype), out.data_ptr(), torch.get_num_threads())
        return out.T

    def rope_append(self, qkv: torch.Tensor, positions: Positions, slots: torch.Tensor, pages: int) -> torch.Tensor:
        """Rotate queries and keys, scale queries, and write keys and values to the cache.

        Args:
            qkv: (T, 3, H, D).
            pages: address of `Pages`.

        Returns:
            Queries (T, H, D).
        """
        cos, sin, query_scale = positions
        tokens, _, heads, size = qkv.shape
        query = qkv.new_empty(tokens, heads, size)
        scale = None if query_scale is None else query_scale.data_ptr()
        self._library.rope_append(
            pages, qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), scale, slots.data_ptr(), tokens, query.data_ptr(),
            threads_for(qkv),
        )  # fmt: skip
        return query

    def attend(self, query: torch.Tensor, pages: int, places: Places) -> torch.Tensor:
        """Attend to the cache. query: (T, H, D), returned like that; pages: address of `Pages`."""
        _, heads, size = query.shape
        out, threads = torch.empty_like(query), torch.get_num_threads()
        splits, tiles = places.splits(heads, threads), places.tiles
        parts = torch.empty(_parts_size(len(tiles), heads, size, splits))
        self._library.attend(
            pages, query.data_ptr(), places.tables.data_ptr(), places.tables.shape[1], tiles.data_ptr(), len(tiles),
            splits, parts.data_ptr(), out.data_ptr(), threads,
        )  # fmt: skip
        return out

    def begin_block(
        self, block: BlockHandle, hidden: torch.Tensor, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute a layer up to attention. hidden: (B, 1, C) → queries, keys and values (B, H, 1, D) each."""
        rows, (cos, sin, query_scale) = len(hidden), positions
        query, key, value = hidden.new_empty(3, rows, block.heads, 1, block.head_size).unbind(0)
        pages = Pages(
            heads=block.heads, channels=block.head_size, rotary=cos.shape[-1], head_stride=1, slot_stride=block.heads,
            type=TYPES[hidden.dtype], key=key.data_ptr(), value=value.data_ptr(),
        )  # fmt: skip
        values, scratch = block.scratch(rows)
        self._library.begin_block(
            block.address, ctypes.addressof(pages), hidden.data_ptr(), rows, cos.data_ptr(), sin.data_ptr(),
            None if query_scale is None else query_scale.data_ptr(), None, query.data_ptr(), values, scratch.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return query, key, value

    def end_block(self, block: BlockHandle, attended: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Compute a layer from attention on. attended: (B, 1, H, D), hidden: its input (B, 1, C) → (B, 1, C)."""
        output = hidden.clone()
        values, scratch = block.scratch(len(hidden))
        self._library.end_block(
            block.address, attended.data_ptr(), output.data_ptr(), len(hidden), values, scratch.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return output

    def decode_block(
        self, block: BlockHandle, hidden: torch.Tensor, positions: Positions, pages: int, places: Places
    ) -> torch.Tensor:
        """Compute a layer for a few tokens. hidden: (1, T, C), returned like that."""
        output, rows, (cos, sin, query_scale) = hidden.clone(), hidden.shape[1], positions
        threads, tiles = torch.get_num_threads(), places.tiles
        splits = places.splits(block.heads, threads)
        query, attended = hidden.new_empty(2, rows, block.heads, block.head_size).unbind(0)
        parts = _parts_size(len(tiles), block.heads, block.head_size, splits)
        values, scratch = block.scratch(rows, parts)
        self._library.decode_block(
            block.address, pages, output.data_ptr(), rows, cos.data_ptr(), sin.data_ptr(),
            None if query_scale is None else query_scale.data_ptr(), places.slots.data_ptr(), places.tables.data_ptr(),
            places.tables.shape[1], tiles.data_ptr(), len(tiles), splits, query.data_ptr(), attended.data_ptr(),
            values, scratch.data_ptr(), threads,
        )  # fmt: skip
        return output


@functools.cache
def converts(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of a type by converting them to float32, which takes several times as long."""
    has_instructions = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not has_instructions)


def first_rows_for_torch(layer: nn.Module, dtype: torch.dtype) -> int:
    """Return the number of rows from which torch is faster with a linear layer than the kernels."""
    if isinstance(layer, GPTQLinear) or not isinstance(layer, nn.Linear):  # packed, or of another library
        return TORCH_ROWS
    if converts(dtype) or layer.weight.dtype != dtype:
        return CONVERTED_ROWS if layer.weight.numel() > CACHED_WEIGHTS else TORCH_ROWS
    return TORCH_ROWS if dtype == torch.float32 else NATIVE_ROWS


def _parts_size(tiles: int, heads: int, size: int, splits: int) -> int:
    return tiles * heads * splits * TILE_QUERIES * (size + 2) if splits > 1 else 0


def threads_for(x: torch.Tensor) -> int:
    """Return how many cores to use for an operation on each element: one if waking others would take longer."""
    return torch.get_num_threads() if x.numel() >= 2**15 else 1


def address_of(tensor: torch.Tensor | None) -> int | None:
    """Return where a tensor is in memory."""
    return None if tensor is None else tensor.data_ptr()


def matrix(layer: nn.Linear, dtype: torch.dtype) -> int:
    """Return the address of a layer's `Matrix`, which is made again when one of its tensors has moved.

    Args:
        dtype: of the activations.
    """
    names = PACKED_TENSORS if isinstance(layer, GPTQLinear) else PLAIN_TENSORS
    sources = tuple(address_of(getattr(layer, name)) for name in names)
    handles = layer.__dict__.setdefault("_handles", {})
    handle: Handle | None = handles.get(dtype)
    if handle is None or handle.sources != sources:
        handles[dtype] = handle = _matrix_handle(layer, sources, dtype)
    return handle.address


def _matrix_handle(layer: nn.Linear, sources: tuple[int | None, ...], dtype: torch.dtype) -> Handle:
    if not sources[0]:
        raise RuntimeError(f"The weights of {layer} are not in the memory of the CPU: load them first.")
    stored = dtype if isinstance(layer, GPTQLinear) else layer.weight.dtype
    structure = Matrix(n=layer.out_features, k=layer.in_features, type=TYPES[dtype], stored=TYPES[stored])
    for field, source in zip(Matrix._fields_[6:], sources, strict=False):  # `weight` and those that follow
        setattr(structure, field[0], source)
    if isinstance(layer, GPTQLinear):
        structure.bits, structure.group, structure.zero = layer.bits, layer.group_size, layer.zero
    return Handle.of(structure, sources)


def pages_handle(
    pools: Sequence[torch.Tensor], dtype: torch.dtype, block_size: int, rotary: int, scaling: float, window: int | None
) -> Handle:
    """Return the `Pages` of one layer.

    Args:
        pools: keys and values (H, slots, D); in 8 bits bytes, scales and zero points of each.
        dtype: of the activations.
        rotary: rotated channels.
        window: how many tokens back the layer attends; None for all.
    """
    heads, slots, size = pools[0].shape
    quantized = len(pools) == 6
    names = ["key", "value"]
    if quantized:
        names = [f"{name}{part}" for name in names for part in ("", "_scale", "_zero")]
    structure = Pages(
        heads=heads, channels=size, rotary=rotary, head_stride=slots, slot_stride=1, block_size=block_size,
        window=window or 0, type=TYPES[dtype], quantized=quantized, scaling=scaling,
        **{name: pool.data_ptr() for name, pool in zip(names, pools, strict=True)},
    )  # fmt: skip
    return Handle.of(structure, tuple(pool.data_ptr() for pool in pools))


@functools.cache
def cpu_kernels() -> CPUKernels | None:
    """Return the kernels, compiled at the first call; None where they are not available, which is logged once."""
    try:
        return CPUKernels(load_library())
    except KernelsUnavailable as error:
        logger.warning("torch computes replies, which takes longer on a CPU: %s.", error)
        return None
