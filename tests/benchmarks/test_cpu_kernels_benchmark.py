"""benchmarks/cpu_kernels.py: its tables, and what they are computed from."""

import sys

import pytest
import torch

from benchmarks import cpu_kernels as benchmark
from benchmarks.random_models import config
from qwen import QWenLMHeadModel
from qwen.kernels.cpu import cpu_kernels


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of the tables of a text, without their heads."""
    parts = [part.splitlines()[2:] for part in text.split("\n\n") if part.startswith("|")]
    return [[row.strip("| ").split(" | ") for row in rows] for rows in parts]


@pytest.mark.process
def test_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cpu_kernels.py", "--quick"])
    benchmark.main()
    linear, calls, loading = tables(capsys.readouterr().out)
    assert [row[1:4:2] for row in linear[:4]] == [
        ["c_attn", "1"],
        ["c_attn", "4"],
        ["attn.c_proj", "1"],
        ["attn.c_proj", "4"],
    ]
    assert linear[0][4].endswith("(100%)")
    assert all(float(cell.split()[0]) >= 0 for row in linear[:8] for cell in row[4:])
    assert [row[:2] for row in calls[:3]] == [["engine", "float32"], ["engine", "bf16"], ["engine", "int4"]]
    assert all(float(row[2]) == float(row[3]) + float(row[4]) for row in calls)
    assert [row[1] for row in loading] == ["int8", "int4"]
    assert all(float(row[2]) > 0 for row in loading)


def test_matrices_are_those_of_the_model():
    with torch.device("meta"):
        model = QWenLMHeadModel(config("7B"))
    shapes = {tuple(weight.shape) for weight in model.state_dict().values() if weight.dim() == 2}
    assert set(benchmark.matrices(config("7B")).values()) == shapes


def test_copies_compute_the_same_and_fill_the_memory():
    least = 2**20
    found = benchmark.operations(cpu_kernels(), 96, 128, True, least)
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    for name, speed in found.items():
        size = sum(map(benchmark.weight_bytes, speed.copies))
        assert least <= size < least + benchmark.weight_bytes(speed.copies[0])
        first, last = (speed.run(layer, x.to(speed.dtype)) for layer in (speed.copies[0], speed.copies[-1]))
        weights = [layer.qweight if name.startswith("int") else layer.weight for layer in speed.copies]
        assert len({weight.data_ptr() for weight in weights}) == len(weights)
        expected = torch.nn.functional.linear(x.to(speed.dtype).float(), speed.copies[0].weight.float())
        torch.testing.assert_close(first.float(), expected, atol=0.02 * expected.abs().max().item(), rtol=0.02)
        if name.startswith("int"):
            assert torch.equal(first, last)


def test_rates_are_medians_of_turns_that_count(monkeypatch):
    """The first turn does not count; operations take turns."""
    clock, order = [0.0], []

    def run(name: str, seconds: list[float]):
        def operation(layer, x):
            order.append((name, len(x)))
            clock[0] += seconds.pop(0)

        return operation

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    copies = benchmark.dense_copies(4, 8, torch.float32, 1)
    found = {
        "a": benchmark.Speed(copies, run("a", [9.0, 1.0, 2.0, 8.0]), torch.float32),
        "b": benchmark.Speed(copies, run("b", [0.1, 4.0, 4.0, 4.0]), torch.float32),
    }
    rates = benchmark.read_rates(found, 8, [1], turns=3)
    assert rates == pytest.approx({("a", 1): 128 / 2, ("b", 1): 128 / 4})
    assert order == [("a", 1), ("b", 1)] * 4
