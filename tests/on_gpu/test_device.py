"""The device itself. Without a GPU, its skipped test stands for all of this folder."""

import pytest
import torch

from tests.on_gpu.device import CUDA, DEVICE


@pytest.mark.skipif(DEVICE is None, reason="no GPU: the tests of tests/on_gpu run on a machine that has one")
def test_the_device_computes(record_property) -> None:
    left, right = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.testing.assert_close((left.to(DEVICE) @ right.to(DEVICE)).cpu(), left @ right, rtol=1e-5, atol=1e-4)
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        record_property("figure", f"{properties.name}, {memory}, compute capability {capability}")
