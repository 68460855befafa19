"""benchmarks/engine.py: its tables without a GPU, and the bytes in them."""

import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import engine, random_models
from benchmarks.engine_steps import EngineSteps
from qwen.serving.engine.paged_kv_cache import bytes_per_token


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    threads = torch.get_num_threads()
    monkeypatch.setitem(random_models.SHAPES, "tiny", (64, 2, 2, 96, 4096))
    yield "tiny"
    torch.set_num_threads(threads)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tiny: str) -> Callable[..., list[list[str]]]:
    """Runs the command in this process and returns the cells of its tables."""

    def run(*arguments: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["engine.py", "--device", "cpu", "--quick", "--shape", tiny, *arguments])
        engine.main()
        lines = capsys.readouterr().out.splitlines()
        return [line.strip("| ").split(" | ") for line in lines if line.startswith("|") and "---" not in line]

    return run


def test_tables(main) -> None:
    head, one, four, conversation, reused, encoded = main("--rows", "1", "4", "--prompts", "40")
    assert [len(row) for row in (one, four)] == [len(head)] * 2
    assert [row[:2] for row in (one, four)] == [["1", "40"], ["4", "40"]]
    assert [len(row) for row in (reused, encoded)] == [len(conversation)] * 2
    assert (reused[0], encoded[0]) == ("yes", "no")
    assert int(reused[-1].rstrip("%")) > 80
    assert encoded[-1] == "0%"


def test_rows_that_do_not_fit_are_left_out(main, monkeypatch) -> None:
    monkeypatch.setattr(engine, "affordable_tokens", lambda model: 2048)
    _, one, many, *_ = main("--rows", "1", "3", "--prompts", "1000")
    assert float(one[2]) > 0
    assert many[2].startswith("not measured: ")


@pytest.mark.parametrize("arguments", [["--prompts", "9000"], ["--rows", "0"]])
def test_wrong_arguments(main, capsys, arguments) -> None:
    with pytest.raises(SystemExit):
        main(*arguments)
    assert f"{arguments[0]}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("quantized", [False, True])
def test_traffic(tiny, quantized) -> None:
    """Rows read their own tokens in place and copy one."""
    model = random_models.random_model(tiny, torch.float32, "cpu")
    model.config.use_cache_quantization = quantized
    steps = EngineSteps(model, rows=2, cache_tokens=4096, max_length=200)
    for length in (100, 60):
        steps.add(range(length, 2 * length), max_tokens=20, temperature=0.0)
    steps.decode_all()
    steps.take()
    read, copied = engine.Traffic.of(steps.runner)
    tokens = [sequence.num_computed for sequence in steps.sequences]
    assert tokens == [101, 61]
    assert read == sum(tokens) * bytes_per_token(model)
    assert copied == 2 * bytes_per_token(model)
