"""Without a GPU, only test_device.py is collected: one skipped test stands for all. Fixtures for the others."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwen import QWenLMHeadModel
from tests.on_gpu.device import DEVICE
from tests.on_gpu.models import load_golden

if DEVICE is None:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_device.py"]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Compute float32 products in float32. The default today, but not where the environment or a library changes it."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def model() -> QWenLMHeadModel:
    """The golden model in float32, on the device."""
    return load_golden()


@pytest.fixture(scope="module")
def reference() -> QWenLMHeadModel:
    """The golden model in float32, on the CPU."""
    return load_golden("cpu")
