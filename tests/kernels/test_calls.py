"""What Python calls for one token and layer on a CPU, where a call takes as long as reading a small matrix."""

import pytest

from benchmarks.cpu_kernels import COUNTED, MODELS, PATHS, calls_a_layer
from qwen.kernels.cpu import cpu_kernels

MOST = 15  # of torch's operators, views included, and of C functions


@pytest.mark.parametrize("weights", MODELS)
@pytest.mark.parametrize("path", PATHS)
def test_calls_of_a_layer(path: str, weights: str):
    assert cpu_kernels() is not None
    calls = calls_a_layer(MODELS[weights](), path)
    assert calls.c
    lines = "\n".join(f"{count / COUNTED:4g}  {name}" for name, count in (calls.torch + calls.c).most_common())
    assert calls.total() <= MOST * COUNTED, f"{calls.total() / COUNTED:g} calls a layer:\n{lines}"
