"""Lets the engine compute with the Triton operations on pretended GPUs.

With TRITON_INTERPRET=1, which counts when Triton is imported, the interpreter runs them; otherwise they are compiled,
launched by `triton_driver.py`, and compute nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.interpreter import GridExecutor

from qwen.kernels import fused_block, triton_linear, triton_ops
from qwen.kernels.gpu import gpu_kernels
from tests.support.launch_counter import record
from tests.support.pretend_cuda import PretendTensor
from tests.support.triton_driver import Launches, pretend_triton

KERNELS = (
    triton_linear.linear_kernel, triton_linear.packed_linear_kernel, triton_linear.dequantize_kernel,
    triton_linear.swiglu_kernel, triton_ops.rms_norm_kernel, triton_ops.rope_append_kernel, triton_ops.attend_kernel,
    triton_ops.combine_kernel,
)  # fmt: skip


def _contents(argument: Any) -> Any:
    return argument.value if isinstance(argument, PretendTensor) else argument


def _interpret(original: Callable[..., None], executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
    record("launches", executor.fn.__name__)
    original(executor, *map(_contents, args), **{name: _contents(value) for name, value in kwargs.items()})


@contextlib.contextmanager
def pretend_kernels(target: str = "sm_90") -> Iterator[Launches]:
    """Give the engine the kernels, inside a `pretend_cuda` block.

    Args:
        target: what they are compiled for, a key of `TARGETS`.
    """
    interpreted = triton.knobs.runtime.interpret
    original, is_plain = GridExecutor.__call__, fused_block._is_plain

    def call(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        _interpret(original, executor, *args, **kwargs)

    def is_plain_value(weight: torch.Tensor) -> bool:
        return is_plain(_contents(weight))

    gpu_kernels.cache_clear()
    try:
        with (
            pretend_triton(target, *(() if interpreted else KERNELS)) as launches,
            mock.patch.object(GridExecutor, "__call__", call),
            mock.patch.object(fused_block, "_is_plain", is_plain_value),  # a pretended tensor has a class of its own
        ):
            yield launches
    finally:
        gpu_kernels.cache_clear()
