"""Memory use of this process and available memory. CPU figures need Linux."""

from pathlib import Path

import torch


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes: reserved on the GPU, else resident."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else resident_bytes("VmHWM")


def resident_bytes(name: str) -> int:
    """Return the resident bytes: VmRSS (current) or VmHWM (peak). The peak of `resource` includes the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def available_bytes() -> int:
    """Return the bytes of main memory available to new processes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
