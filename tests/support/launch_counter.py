"""Counts what Python code asks of a GPU: kernel launches, waits of the host, copies between devices; each by its line.

A launch costs the host some microseconds, so a decoding step of 1,400 launches takes longer than the GPU needs to read
7B weights. A wait is what `torch.cuda.set_sync_debug_mode` reports, and a copy to unpinned memory: the host stops until
the GPU has finished everything before it, and the GPU idles until the host catches up.

Every operation counts as one launch. On a GPU, some take more (a sort, a matrix product that splits its sum) and some
matrix products launch a kernel of another library; views, metadata and uninitialized memory launch nothing.
"""

import contextlib
import importlib.util
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import ROOT

# Frames of these are not where a user looks for the cause.
_SPECS = (importlib.util.find_spec(name) for name in ("torch", "accelerate", "triton"))
_SKIPPED = (*(f"{Path(spec.origin).parent}/" for spec in _SPECS if spec is not None), f"{Path(__file__).parent}/")
_SKIPPED_FILES = (contextlib.__file__, threading.__file__)
_active: list["DeviceWork"] = []


@dataclass
class DeviceWork:
    """Work of a GPU, counted by (kind, line), such as `("mm", "qwen/model/modeling_qwen.py:157")`.

    Args:
        launches: kernels and copies.
        waits: waits of the host.
        transfers: copies between two GPUs, which are also launches.
    """

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    transfers: Counter[tuple[str, str]] = field(default_factory=Counter)

    def copy(self) -> "DeviceWork":
        """Return the counts so far."""
        return DeviceWork(Counter(self.launches), Counter(self.waits), Counter(self.transfers))

    def since(self, earlier: "DeviceWork") -> "DeviceWork":
        """Return what was added after `earlier`, a copy of this one."""
        return DeviceWork(
            self.launches - earlier.launches, self.waits - earlier.waits, self.transfers - earlier.transfers
        )

    def add(self, other: "DeviceWork") -> None:
        """Add the counts of other work."""
        for kind in ("launches", "waits", "transfers"):
            getattr(self, kind).update(getattr(other, kind))

    def table(self, kind: str, steps: int = 1, limit: int = 40) -> str:
        """Return the lines of "launches", "waits" or "transfers", most frequent first, as counts per step."""
        counts: Counter[tuple[str, str]] = getattr(self, kind)
        rows = [f"{count / steps:8g}  {what:32} {line}" for (what, line), count in counts.most_common(limit)]
        if len(counts) > limit:
            rows.append(f"     ...  and {len(counts) - limit} more lines")
        return "\n".join(rows)


@contextlib.contextmanager
def count_device_work() -> Iterator[DeviceWork]:
    """Count the work of pretended GPUs (`pretend_cuda.py`) and of pretended Triton launches, of all threads."""
    work = DeviceWork()
    _active.append(work)
    try:
        yield work
    finally:
        _active.remove(work)


def record(kind: str, what: str) -> None:
    """Count one of "launches", "waits" or "transfers", caused by the line that called torch."""
    if _active:
        entry = (what, _line())
        for work in _active:
            getattr(work, kind)[entry] += 1


def _line() -> str:
    """Return file and line of the innermost frame outside these libraries and this folder."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_SKIPPED) and name not in _SKIPPED_FILES and not name.startswith("<"):
            break
        frame = frame.f_back
    name = frame.f_code.co_filename
    name = name.removeprefix(f"{ROOT}/") if name.startswith(f"{ROOT}/") else name
    return f"{name.rpartition('site-packages/')[2]}:{frame.f_lineno}"
