"""What a process takes of the memory of its device, and what the machine has left. Of the CPU Linux tells."""

from pathlib import Path

import torch


def peak() -> int:
    """Bytes that this process had at most: reserved on the GPU, else resident."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else resident("VmHWM")


def resident(name: str) -> int:
    """Bytes that are resident now, VmRSS, or were at most, VmHWM. What `resource` tells counts the parent in."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def available() -> int:
    """Bytes of main memory that a new process could have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
