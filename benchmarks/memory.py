"""What a process takes of the memory of its device."""

from pathlib import Path

import torch


def peak() -> int:
    """Bytes that this process had at most: reserved on the GPU, else resident."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else resident("VmHWM")


def resident(name: str) -> int:
    """Bytes that are resident now, VmRSS, or were at most, VmHWM. What `resource` tells counts the parent in."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
