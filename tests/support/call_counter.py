"""Counts the calls that inference makes from Python on a CPU: of torch's operators, and of the C kernels.

A call costs some microseconds, also if it only makes a view: many take longer than reading a small layer.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from qwen.kernels.cpu import SIGNATURES, CPUKernels


class Calls(NamedTuple):
    """Names of operators and of C functions → number of calls."""

    torch: Counter[str]
    c: Counter[str]

    def total(self) -> int:
        """Return the number of all calls."""
        return self.torch.total() + self.c.total()

    def since(self, earlier: "Calls") -> "Calls":
        """Return what this has more than `earlier`."""
        return Calls(self.torch - earlier.torch, self.c - earlier.c)


class _Operators(TorchDispatchMode):
    def __init__(self, counter: Counter[str]):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.counter[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def count_calls() -> Iterator[Calls]:
    """Count the calls of this thread to torch's operators, views included, and all calls of `CPUKernels`."""
    calls = Calls(Counter(), Counter())

    def counted(name: str) -> Any:
        method = getattr(CPUKernels, name)

        @functools.wraps(method)
        def call(*args: Any) -> Any:
            calls.c[name] += 1
            return method(*args)

        return call

    with contextlib.ExitStack() as stack:
        for name in SIGNATURES:  # each method of this name makes one call
            stack.enter_context(mock.patch.object(CPUKernels, name, counted(name)))
        stack.enter_context(_Operators(calls.torch))
        yield calls
