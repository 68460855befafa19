"""The memory that docs/deployment.md calculates for each model."""

import math
import re

import pytest

from benchmarks.random_models import SHAPES
from tests.support import ROOT

GIB = 2**30
LENGTHS = (2048, 8192, 32768)
CONTEXT = {"14B": 8192}  # maximum length as published; 32768 for the others
BITS = {"BF16": 16, "Int8": 8, "Int4": 4}


def weight_bytes(shape: str, bits: int) -> float:
    """Bytes of the weights; with GPTQ in groups of 128, as published."""
    hidden, layers, _, width, rows = SHAPES[shape]
    floats = 2 * rows * hidden + hidden + layers * 5 * hidden  # embedding, output matrix, norms, c_attn's bias
    total = 2.0 * floats
    for outputs, inputs in ((3 * hidden, hidden), (hidden, hidden), (width, hidden), (width, hidden), (hidden, width)):
        groups = math.ceil(inputs / 128)
        packed = (inputs + groups) * outputs * bits / 8 + 2 * groups * outputs + 4 * inputs  # zeros, scales, g_idx
        total += layers * (2 * outputs * inputs if bits == 16 else packed)
    return total


def table() -> dict[str, list[str]]:
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| ([\d.]+B (?:BF16|Int8|Int4)) \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines}


@pytest.mark.parametrize("shape", ["1.8B", "7B", "14B", "72B"])
@pytest.mark.parametrize("precision", BITS)
def test_weights_and_cache(shape: str, precision: str) -> None:
    weights, *cached, gpu = table()[f"{shape} {precision}"]
    exact = weight_bytes(shape, BITS[precision]) / GIB
    hidden, layers, *_ = SHAPES[shape]
    assert float(weights) == pytest.approx(exact, abs=0.06)
    for length, cell in zip(LENGTHS, cached, strict=True):
        if length > CONTEXT.get(shape, 32768):
            assert not cell
        else:
            assert float(cell) == pytest.approx(exact + 4 * layers * hidden * length / GIB, abs=0.06)
    count, _, size = gpu.removesuffix(" GB").rpartition(" × ")
    cards = int(count or 1)
    assert cards * (float(size) - 1.5) >= float(cached[1])
