"""What `torch.cuda` and `torch.accelerator` say and do while `pretend_cuda` is active."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.support.launch_counter import record

MEMORY = 80 << 30  # bytes of each GPU
FREE = 70 << 30


class PretendStream:
    """A stream on which everything has finished."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> "PretendStream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_stream(self, stream: "PretendStream") -> None:
        pass

    def wait_event(self, event: "PretendEvent") -> None:
        pass

    def record_event(self, event: "PretendEvent | None" = None) -> "PretendEvent":
        return event or PretendEvent()

    def synchronize(self) -> None:
        record("waits", "synchronize")

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


class PretendEvent(PretendStream):
    """An event that has happened."""

    def record(self, stream: PretendStream | None = None) -> None:
        pass

    def wait(self, stream: PretendStream | None = None) -> None:
        pass


def _index(device: Any, current: int) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current if index is None else index


@contextlib.contextmanager
def patched_runtime(guard: ctypes.CDLL, devices: int, capability: tuple[int, int]) -> Iterator[None]:
    """Replace the functions that this repository and its libraries call."""

    def current_device() -> int:
        return guard.pretend_current_device()

    def set_device(device: Any) -> None:
        guard.pretend_set_device(_index(device, current_device()))

    class device(contextlib.ContextDecorator):  # noqa: N801  named as in torch.cuda
        def __init__(self, device: Any):
            self.index = _index(device, -1)

        def __enter__(self) -> None:
            self.before = current_device()
            if self.index >= 0:
                guard.pretend_set_device(self.index)

        def __exit__(self, *error: object) -> None:
            guard.pretend_set_device(self.before)

    def device_of(tensor: torch.Tensor) -> device:
        return device(tensor.device.index if tensor.device.type == "cuda" else -1)

    def synchronize(device: Any = None) -> None:
        record("waits", "synchronize")

    properties = SimpleNamespace(
        name="pretended GPU",
        major=capability[0],
        minor=capability[1],
        total_memory=MEMORY,
        multi_processor_count=132,
        warp_size=32,
        gcnArchName="",
    )
    both = {
        "is_available": lambda: True,
        "device_count": lambda: devices,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "current_stream": lambda device=None: PretendStream(),
    }
    cuda = both | {
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "current_device": current_device,
        "set_device": set_device,
        "device": device,
        "device_of": device_of,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (FREE, MEMORY),
        "default_stream": lambda device=None: PretendStream(),
        "stream": lambda stream: stream,
        "Stream": PretendStream,
        "Event": PretendEvent,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    accelerator = both | {
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": current_device,
        "set_device_index": set_device,
    }
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.multiple(torch.accelerator, **accelerator),
        mock.patch.multiple(torch, Stream=PretendStream, Event=PretendEvent),
    ):
        yield


def clear_caches() -> None:
    """Let libraries ask again whether there is a GPU, and for packages that need one."""
    for name in ("transformers.utils.import_utils", "accelerate.utils.imports"):
        for function in vars(sys.modules.get(name, object)).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
