"""Reads torch's profiler: how many kernels a piece of work runs on the GPU, and for how long."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


class DeviceProfile(NamedTuple):
    """What a device did, by kernel name: numbers of launches, and seconds. What the host called, by name."""

    launches: Counter[str]
    seconds: Counter[str]
    calls: Counter[str]

    @property
    def host_launches(self) -> int:
        """Launches of the host, of which one may be that of a CUDA graph with many kernels."""
        return sum(
            count for name, count in self.calls.items() if name.removesuffix("ExC").removesuffix("Ex") in LAUNCHES
        )

    @property
    def waits(self) -> int:
        """Waits of the host for the device."""
        return sum(self.calls[name] for name in WAITS)


def profile_device(work: Callable[[], object]) -> DeviceProfile:
    """Run some work, and return the kernels, copies and fills of all its threads; without a GPU, operators."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize()
    launches, seconds, calls = Counter[str](), Counter[str](), Counter[str]()
    for event in profiler.key_averages():
        if event.device_type is DeviceType.CUDA if cuda else event.key.startswith("aten::"):
            launches[event.key] += event.count
            seconds[event.key] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        elif event.key.startswith("cu"):
            calls[event.key] += event.count
    return DeviceProfile(launches, seconds, calls)
