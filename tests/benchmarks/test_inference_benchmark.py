"""benchmarks/inference.py: engines agree, figures are consistent, and a failing cell does not end the table."""

import contextlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qwen.kernels.cpu import cpu_kernels
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import inference
import random_models
from decoding import decode_greedily, token_times
from inference import Cell
from qwen2 import as_qwen2

sys.path.remove(str(ROOT / "benchmarks"))


def cell(
    model: str = "tiny", precision: str = "fp32", engine: str = "this", context: int = 5, generate: int = 6
) -> Cell:
    return Cell(model, Path(model).is_dir(), precision, engine, context, generate, repeat=1)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(random_models.SHAPES, "tiny", (64, 2, 2, 96, 300))
    return "tiny"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process and returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inference.py", "--cpu-only", *arguments])
        code = inference.main()
        return code, *capfd.readouterr()

    monkeypatch.setattr(inference.signal, "signal", lambda *_: None)
    return run


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the slow bandwidth measurement, and sets 30 GB of free memory."""
    run = inference.run

    def fake_run(task: str, *arguments: object) -> dict:
        return {"name": "CPU", "bandwidth": 1e9} if task == "device" else run(task, *arguments)

    monkeypatch.setattr(inference, "run", fake_run)
    monkeypatch.setattr(inference, "free_memory", lambda: 30 * 10**9)


@pytest.fixture
def replace_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replaces every child process with a shell that runs the given commands."""

    def replace(commands: str) -> None:
        script = tmp_path / "child"
        script.write_text(f"#!/bin/sh\n{commands}\n")
        script.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(script))

    return replace


def test_qwen2_decodes_the_same_tokens(bundled_chat: Path):
    model, _ = inference.load_model_quietly(bundled_chat, cpu_only=True)
    peer = as_qwen2(model)
    assert peer.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    ids = torch.arange(300, 330)[None]
    torch.testing.assert_close(peer(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)
    replies = [decode_greedily(engine, ids[0].tolist(), 40) for engine in (model, peer)]
    assert replies[0] == replies[1]
    assert len(replies[0]) == 40
    assert len(set(replies[0])) > 5


def test_every_token_is_timed_even_after_eos(bundled_chat: Path):
    model, tokenizer = inference.load_model_quietly(bundled_chat, cpu_only=True)
    ids = tokenizer.encode("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n", allowed_special="all")
    assert model.generation_config.eos_token_id is not None
    seen = []
    times = token_times(lambda *arguments: seen.extend(decode_greedily(model, *arguments)), ids, 30, seen.append)
    assert seen[:30] == list(range(1, 31))
    assert times == sorted(times)
    assert len(times) == 31
    assert tokenizer.im_end_id in seen[30:-1]


def test_random_models_are_reproducible_and_have_distinct_rows(tiny: str):
    first, second = (random_models.random_model(tiny, torch.float32, "cpu").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(first["lm_head.weight"].unique(dim=0)) == 300
    assert first["transformer.ln_f.weight"].eq(1).all()


@pytest.mark.parametrize("engine", ["this", "engine", "Qwen2"])
@pytest.mark.parametrize(("precision", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_figures_of_a_cell(engine: str, precision: str, itemsize: int, tiny: str, tmp_path: Path):
    figures = inference.measure(cell(precision=precision, engine=engine), tmp_path)
    layer = 64 * 192 + 192 + 64 * 64 + 3 * 64 * 96 + 2 * 64
    weights = itemsize * (300 * 64 + 2 * layer + 64)
    assert weights <= figures["read"] < weights + 2**20  # includes the rotary embedding tables
    assert figures["speed"] > 0
    assert figures["prompt_speed"] > 0
    assert figures["whole_speed"] > 0
    assert figures["peak"] > figures["read"]
    assert figures["kernel"] == ("Linear" if engine == "Qwen2" or cpu_kernels() is None else "FusedLinear")


def test_engine_decodes_the_same_tokens(bundled_chat: Path, tmp_path: Path):
    """The engine goes on after an end token, like the others."""
    replies: list[list[int]] = []

    def times(decode: Callable, ids: list[int], tokens: int) -> None:
        replies.append(decode(ids, tokens, lambda: None))

    model, tokenizer = inference.load_model_quietly(bundled_chat, cpu_only=True)
    ids = tokenizer.encode("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n", allowed_special="all")
    with contextlib.ExitStack() as stack:
        times_of, _ = inference.load_engine(cell(str(bundled_chat), context=len(ids), generate=30), tmp_path, stack)
        times(times_of.args[0], ids, 30)
    assert replies[0] == decode_greedily(model, ids, 30)
    assert tokenizer.im_end_id in replies[0][:-1]


def test_single_token_has_no_decoding_speed(tiny: str, tmp_path: Path):
    figures = inference.measure(cell(generate=1), tmp_path)
    assert figures["speed"] is None
    assert figures["whole_speed"] > 0


@pytest.mark.parametrize(
    ("which", "cpu_only", "gigabytes"),
    [
        (cell("7B", "bf16", context=1, generate=1023), False, 15.98),  # as in benchmarks/README.md: weights and cache
        (cell("7B", "fp32", context=1, generate=1023), False, 31.96),
        (cell("7B", "int4", context=1, generate=1), False, 2 * 1.245 + 6.476 * (4 + 20 / 128) / 8),
        (cell("7B", "int8", "llama.cpp", context=1, generate=1), True, 0.6 + 2 * 1.245 + 6.476 * (8 + 24 / 128) / 8),
    ],
)
def test_needed_memory(which: Cell, cpu_only: bool, gigabytes: float):
    assert inference.needed_bytes(which, cpu_only) / 1e9 == pytest.approx(gigabytes, rel=2e-3)


@pytest.mark.parametrize(
    ("which", "figures"),
    [
        (cell("7B", "int4", context=1, generate=2048), (50.09, 8.21)),
        (cell("14B", "bf16", context=2048, generate=1), (None, 30.15)),
        (cell("7B", "int8", context=2048, generate=8192), (32.54, None)),
        (cell("7B", "fp32", context=1, generate=2048), (None, None)),
        (cell("7B", "int4", context=1, generate=2047), (None, None)),
        (cell("small", "int4", context=1, generate=2048), (None, None)),
    ],
)
def test_published_figures(which: Cell, figures: tuple[float | None, float | None]):
    assert inference.published_figures(which) == figures


@pytest.mark.process
def test_table_with_measured_and_skipped_cells(main: Callable, device: None):
    """One cell is measured in a separate process; one does not fit into memory."""
    code, out, _ = main("--sizes", "small", "72B", "--precisions", "fp32", "--engines", "this", "--generate", "3")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("CPU, torch")
    assert "1 + 3 tokens" in lines[0]
    header, row, skipped = (line.strip("|").split("|") for line in (lines[2], lines[4], lines[5]))
    assert len(header) == len(row) == len(skipped) == 8
    assert row[:3] == [" small ", " fp32 ", " this, FusedLinear " if cpu_kernels() else " this "]
    speed, _, memory, weights, share = row[3:]
    assert float(share.strip(" %")) / 100 == pytest.approx(float(speed) * 48.8e6 / 1e9, abs=0.02)
    assert float(memory) > float(weights) == 0.05
    assert "needs about 2" in skipped[3]
    assert "30.0 free" in skipped[3]


def test_published_columns_are_shown_if_a_cell_was_published(main: Callable, device: None):
    _, out, _ = main("--sizes", "72B", "--precisions", "int4", "--engines", "this", "--generate", "2048")
    assert "| published |" in out
    assert "| published, GB |" in out


@pytest.mark.parametrize(
    ("commands", "reason"),
    [
        ("kill -9 $$", "out of memory"),
        ("exit 1", "failed: see above"),
        ("""echo '{"failed": "no room"}'""", "no room"),
    ],
)
def test_failing_cell_does_not_end_the_table(
    commands: str, reason: str, replace_child: Callable, main: Callable, device: None
):
    replace_child(commands)
    code, out, _ = main("--sizes", "small", "--precisions", "fp32", "bf16", "--engines", "this")
    assert code == 0
    assert out.count(f"| this | {reason} |") == 2


def test_other_output_of_the_child_is_ignored(replace_child: Callable):
    replace_child("""echo hello; echo '{"progress": "at it"}'; echo '{"result": {"found": 1}}'""")
    assert inference.run("device", None, None, True) == {"found": 1}


def test_ctrl_c_keeps_the_rows_and_kills_the_child(
    replace_child: Callable, main: Callable, device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pid_file = tmp_path / "pid"
    replace_child(
        f"""if [ -e {pid_file} ]; then echo '{{"progress": "stop here"}}'; exec sleep 60; fi; echo $$ > {pid_file}; """
        """echo '{"failed": "first row"}'"""
    )
    shown = []

    def show(text: str) -> None:
        shown.append(text)
        if "stop here" in text:
            raise KeyboardInterrupt

    started = []
    popen = inference.subprocess.Popen
    monkeypatch.setattr(
        inference.subprocess, "Popen", lambda *a, **settings: started.append(popen(*a, **settings)) or started[-1]
    )
    monkeypatch.setattr(inference, "show_status", show)
    code, out, err = main("--sizes", "small", "--precisions", "fp32", "bf16", "--engines", "this")
    assert code == 130
    assert "| first row |" in out
    assert "Stopped" in err
    assert started[-1].returncode == -9


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "out of memory"),
        (OSError("no\nroom"), "no room"),
    ],
)
def test_child_reports_why_it_failed(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def measure(*_: object) -> None:
        raise error

    monkeypatch.setattr(inference, "measure", measure)
    assert inference.run_task("measure", Path(), cell()) == 0
    assert json.loads(capsys.readouterr().out) == {"failed": message}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-c", "checkpoints/qwen-tiny-chat-int4", "--precisions", "bf16"], ("bf16", "int4")),
        (["-c", "checkpoints/qwen-tiny-chat", "--precisions", "int8"], ("int8", "run_gptq.py")),
        (["-c", "checkpoints/qwen-tiny-chat-int4", "--engines", "Qwen2"], ("quantized", "--engines")),
        (["-c", "checkpoints"], ("config.json",)),
        (["-c", "nowhere/at/all"], ("nowhere/at/all",)),
    ],
)
def test_errors_are_actionable(
    arguments: list[str], words: tuple[str, ...], main: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    code, out, err = main(*arguments)
    assert code == 1
    assert not out
    assert "Traceback" not in err
    assert all(word in err for word in words)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(engine, marks=pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not installed"))
        for engine, module in inference.LLAMA_CPP.items()
    ],
)
def test_llama_cpp_reads_weights_and_vocabulary(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(random_models.SHAPES, "tiny", (64, 2, 2, 96, 4096))
    one = cell(precision="int8", engine=engine)
    inference.write_weights(one, tmp_path)
    figures = inference.measure(one, tmp_path)
    # Blocks of 32 weights with a scale; the output matrix in bfloat16; biases and norms in float32.
    layer = (64 * 192 + 64 * 64 + 3 * 64 * 96) * 34 / 32 + 4 * (192 + 2 * 64)
    assert figures["read"] == 2 * 4096 * 64 + 2 * layer + 4 * 64
    assert all(figures[name] > 0 for name in ("speed", "prompt_speed", "whole_speed"))


def test_engines_take_turns(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each turn is measured, the medians are reported, and a cell that fails is not tried again."""
    cells = [cell(engine=engine) for engine in ("this", "engine", "Qwen2")]
    figures = iter([1.0, "no room", 20.0, 3.0, 10.0, 2.0, 90.0])
    order = []

    def measure_in_child(which: Cell, *_: object) -> dict:
        order.append(which.engine)
        figure = next(figures)
        if isinstance(figure, str):
            raise inference.MeasurementError(figure)
        return {"speed": figure, "kernel": "Linear"}

    monkeypatch.setattr(inference, "measure_in_child", measure_in_child)
    this, engine, qwen2 = inference.measure_in_turns(cells, 3, tmp_path, {}, cpu_only=True).values()
    assert order == ["this", "engine", "Qwen2", "this", "Qwen2", "this", "Qwen2"]
    assert (this["speed"], qwen2["speed"], this["kernel"]) == (2.0, 20.0, "Linear")
    assert str(engine) == "no room"


def test_llama_cpp_is_used_if_installed(monkeypatch: pytest.MonkeyPatch):
    options = {"checkpoint_path": None, "hub": None, "sizes": ["7B"], "precisions": ["bf16", "int4"], "cpu_only": True}
    arguments = Namespace(**options, engines=None, context=1, generate=1, repeat=1)
    for found, expected in ((None, 5), (os, 9)):  # Qwen2 reads no quantized weights
        monkeypatch.setattr(inference.importlib.util, "find_spec", lambda name, found=found: found)
        assert len(inference.make_cells(arguments)) == expected
    arguments.cpu_only, arguments.engines = False, ["llama.cpp"]
    with pytest.raises(ValueError, match="--cpu-only"):
        inference.make_cells(arguments)
