"""The fused operations on a GPU: those of `triton_ops.py` with the arguments that the layers of the network have.

Shapes: M rows of activations, K inputs, N outputs, T tokens of a step, R sequences, H heads, D head size.
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn

from ..model.gptq_linear_qwen import GPTQLinear
from ..model.kv_cache_qwen import TritonUnavailable, check_triton
from .cpu import Positions

logger = logging.getLogger(__name__)


class GPUPages(NamedTuple):
    """The cache of a layer.

    Args:
        pools: keys and values (H, slots, D); in 8 bits bytes, scales and zero points of each.
        block_size: tokens per block.
        scaling: factor of the scores.
        window: how many tokens back the layer attends; None for all.
    """

    pools: list[torch.Tensor]
    block_size: int
    scaling: float
    window: int | None


class GPUKernels:
    """The fused operations, as in reference.py. `rms_norm`, `linear` and `swiglu` are those of `triton_ops`.

    Args:
        ops: the module `triton_ops`, which can be imported only where Triton is installed.

    Attributes:
        dtypes: of activations, and of plain weights, that it takes.
    """

    dtypes = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def __init__(self, ops: ModuleType):
        self.rms_norm, self.linear, self.swiglu = ops.rms_norm, ops.linear, ops.swiglu
        self.warm_up = ops.warm_up
        self._ops = ops

    def swiglu_linear(self, x: torch.Tensor, value: nn.Linear, gate: nn.Linear) -> torch.Tensor:
        """value(x) · silu(gate(x)). With many rows, one matrix product for both if `join_weights` did. x: (…, K)."""
        if x.numel() > self._ops.MAX_ROWS * x.shape[-1] and are_joined(value, gate):
            bias = None if value.bias is None else _whole(value.bias)
            both = nn.functional.linear(x, _whole(value.weight), bias)
            return self.swiglu(*both.chunk(2, dim=-1))
        return self._ops.swiglu_linear(x, value, gate)

    def rope_append(
        self, qkv: torch.Tensor, positions: Positions, slots: torch.Tensor, pages: GPUPages
    ) -> torch.Tensor:
        """Rotate queries and keys, scale queries, and write keys and values to the cache.

        Args:
            qkv: (T, 3, H, D).

        Returns:
            Queries (T, H, D).
        """
        cos, sin, scale = positions
        cos, sin = cos.view(-1, cos.shape[-1]), sin.view(-1, sin.shape[-1])
        return self._ops.rope_append(qkv, cos, sin, None if scale is None else scale.view(-1), slots, pages.pools)

    def attend(
        self, query: torch.Tensor, pages: GPUPages, tables: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Attend to the cache. All but the cache as in reference.py. query: (T, H, D), returned like that."""
        cache = pages.block_size, pages.scaling, pages.window
        return self._ops.attend(query, pages.pools, tables, rows, lengths, *cache)


@functools.cache
def gpu_kernels(device: torch.device) -> GPUKernels | None:
    """Return the kernels for a device of torch's "cuda"; None where Triton does not run, which is logged once."""
    try:
        if os.environ.get("QWEN_KERNELS") == "torch":
            raise TritonUnavailable("QWEN_KERNELS=torch")
        check_triton(device.type)
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            raise TritonUnavailable("Triton needs a GPU of compute capability 8.0 (A100, RTX 30) or later")
    except TritonUnavailable as error:
        logger.warning("torch computes replies, which takes longer on a GPU: %s", error)
        return None
    from . import triton_ops

    return GPUKernels(triton_ops)


def join_weights(value: nn.Linear, gate: nn.Linear) -> None:
    """Move the weights of two plain layers of one size into one matrix, of which they become views."""
    with torch.inference_mode(False), torch.no_grad():  # weights must stay usable outside inference
        for first, second in ((value.weight, gate.weight), (value.bias, gate.bias)):
            if first is not None and second is not None:
                first.data, second.data = torch.cat([first, second]).split(len(first))


def are_joined(value: nn.Linear, gate: nn.Linear) -> bool:
    """Return whether `join_weights` was called, and the weights have not been replaced since."""
    if isinstance(value, GPTQLinear) or isinstance(gate, GPTQLinear) or (value.bias is None) != (gate.bias is None):
        return False
    return _is_followed_by(value.weight, gate.weight) and (value.bias is None or _is_followed_by(value.bias, gate.bias))


def _is_followed_by(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie one behind the other. Those that are no views have the offset 0."""
    elements = first.numel()
    return (
        second.storage_offset() - first.storage_offset() == elements
        and second.data_ptr() - first.data_ptr() == elements * first.itemsize
        and first.shape == second.shape
        and first.dtype == second.dtype
        and first.is_contiguous()
        and second.is_contiguous()
    )


def _whole(first: torch.Tensor) -> torch.Tensor:
    """Return a tensor and the one behind it as one."""
    return first.as_strided((2 * len(first), *first.shape[1:]), first.stride())
