"""Returns memory of large requests to the system."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import Callable
from typing import Any

TRIM_AFTER_SECONDS = 0.5  # so that several large requests are followed by one call


class MemoryTrimmer:
    """Has the C library return freed memory, some time after it was asked to.

    glibc has a heap for each of several threads, and keeps what was freed there: hundreds of megabytes after a few
    prompts of megabytes were encoded in worker threads. Other C libraries return it themselves, or have no such call.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._trim: Callable[[int], Any] | None = getattr(library, "malloc_trim", None)
        self._scheduled = False

    def schedule(self) -> None:
        """Trim soon, in a worker thread. Called in the event loop."""
        if self._trim is not None and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_later(TRIM_AFTER_SECONDS, self._begin)

    def _begin(self) -> None:
        self._scheduled = False
        assert self._trim is not None
        asyncio.get_running_loop().run_in_executor(None, self._trim, 0)
