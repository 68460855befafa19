"""A driver for Triton whose launches do nothing, so that its real binder and compiler run without a GPU.

The target is any that the installed Triton compiles for. Kernels are compiled once per specialization, as on a GPU, and
each launch is recorded by `launch_counter.py` and checked: its tensors must be on the current device. Results are not
computed, but zero; tests/model/kernel_cases.py computes them, in Triton's interpreter.

Kernels of Triton's own kind (`triton.jit`) must have been imported without TRITON_INTERPRET.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from tests.support.launch_counter import record

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes that a program may use


@dataclass
class Launches:
    """What a pretended driver saw, by the name of the kernel.

    Args:
        compiled: specializations that were compiled.
        launched: launches.
    """

    compiled: Counter[str] = field(default_factory=Counter)
    launched: Counter[str] = field(default_factory=Counter)


class PretendDriver(DriverBase):
    """Implements what Triton's runtime asks of a driver, and as `utils`, of the library behind it."""

    def __init__(self, target: str, launches: Launches):
        super().__init__()
        self.target, self.launches, self.utils = target, launches, self
        self.launcher_cls = self.launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return torch.cuda.current_device()

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("a pretended GPU has no speed")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("launches do nothing, so no launcher is compiled")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.target], "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Return a module, a function, its registers, its spilled registers and the most threads of a program."""
        assert binary, f"{name} was not compiled"
        self.launches.compiled[name] += 1
        return 1, 1, 32, 0, 1024

    def launcher(self, source: Any, metadata: Any) -> Any:
        """Return the function that launches a compiled kernel."""

        def launch(*arguments: Any) -> None:
            devices = {tensor.device for tensor in arguments if isinstance(tensor, torch.Tensor)}
            if devices != {self.get_active_torch_device()}:
                found = ", ".join(sorted(map(str, devices)))
                raise RuntimeError(
                    f"{metadata.name} was launched on {self.get_active_torch_device()} with tensors on {found}"
                )
            names = source.fn.arg_names
            for name, argument in zip(names, arguments[-len(names) :], strict=True):
                if name == "out_ptr":  # what was in this memory may become NaN
                    argument.value.zero_()
            self.launches.launched[metadata.name] += 1
            record("launches", metadata.name)

        return launch


@contextlib.contextmanager
def pretend_triton(target: str, *kernels: JITFunction) -> Iterator[Launches]:
    """Compile for `target` and launch nothing, inside a `pretend_cuda` block.

    Args:
        target: a key of `TARGETS`.
        kernels: the kernels that will be launched; what was compiled of them before is forgotten meanwhile.
    """
    launches = Launches()
    with contextlib.ExitStack() as stack:
        for kernel in kernels:
            assert isinstance(kernel, JITFunction), "Triton was imported with TRITON_INTERPRET"
            stack.enter_context(
                mock.patch.object(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
            )
        # An empty `_active` would make Triton look for GPUs.
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", PretendDriver(target, launches)))
        yield launches
