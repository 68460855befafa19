"""Perplexity by length and needle in a haystack, with the bundled models."""

import json
import math
from pathlib import Path

import pytest
import torch

from qwen.checkpoint.loading import load_model
from qwen.evaluation.benchmarks import long_context, needle
from tests.support.evaluation_runs import evaluate


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def step_{n}(value):\n    return value + {n * n}\n\n" for n in range(150)))
    return path


@pytest.mark.slow
def test_perplexity_equals_that_of_the_configured_model(text, tmp_path, capsys, bundled_base):
    out = tmp_path / "out.jsonl"
    arguments = ["--text", str(text), "--lengths", "512", "256", "--tokens", "1024", "--alone", "--cpu-only"]
    assert evaluate(long_context.LongContext, [*arguments, "-o", str(out)]) == 0
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert table[0] == "| qwen-tiny-base | 256 | 512 |"
    rows = {line.split(" | ")[0].strip("| "): line for line in table[2:]}
    together = ["plain", "dynamic_ntk", "dynamic_ntk + logn", "dynamic_ntk + logn + window_attn"]
    assert list(rows) == [*together, "logn", "window_attn"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    scores = json.loads(out.with_suffix(".json").read_text())["scores"]
    for row in ("plain", "dynamic_ntk + logn + window_attn"):
        switches = {switch: name in row for name, switch in long_context.SWITCHES.items()}
        model, tokenizer = load_model(bundled_base, cpu_only=True, **switches)
        ids = torch.tensor(tokenizer.encode(text.read_text())[:1024]).view(2, 512)
        with torch.no_grad():
            losses = [model(window[None], labels=window[None]).loss.item() for window in ids]
        expected = math.exp(sum(losses) / 2)
        assert scores[f"{row} 512"] == {"value": pytest.approx(expected, rel=1e-4), "count": 2}
        assert f"{expected:.2f}" in rows[row]
    assert scores["plain 256"]["value"] == pytest.approx(scores["logn 256"]["value"])  # within the trained length
    assert scores["plain 512"]["value"] != pytest.approx(scores["dynamic_ntk 512"]["value"], rel=1e-3)


@pytest.mark.parametrize(
    ("trained", "offered", "lengths"),
    [
        (256, 2048, [256, 512, 1024, 2048]),
        (8192, 32768, [1024, 2048, 4096, 8192, 16384, 32768]),
        (2048, 2048, [1024, 2048]),
    ],
)
def test_default_lengths(trained, offered, lengths):
    assert long_context.default_lengths(trained, offered) == lengths


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "100000"], "100000 are needed"),
        (["--lengths", "1"], "use lengths of at least 2"),
        (["--text", "nowhere.txt"], "nowhere.txt does not exist"),
        (["-c", "no-such-model"], "There is no folder 'no-such-model'"),
    ],
)
def test_invalid_arguments_of_long_context(text, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert evaluate(long_context.LongContext, ["--text", str(text), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_missing_bundled_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(long_context, "HELD_OUT", tmp_path / "held_out.txt")
    assert evaluate(long_context.LongContext, ["--lengths", "64"]) == 1
    assert "give files or folders with --text" in capsys.readouterr().err


@pytest.mark.slow
def test_toy_finds_the_needle_in_short_texts(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    arguments = ["--lengths", "80", "1024", "--depths", "0", "50", "100", "--cpu-only", "-o", str(out)]
    assert evaluate(needle.Needle, arguments) == 0
    table = capsys.readouterr().out
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(record["length"], record["depth"]) for record in found] == [
        (length, depth) for length in (80, 1024) for depth in (0, 50, 100)
    ]
    short = sum(record["correct"] for record in found[:3])
    assert short == 3
    assert all(record["correct"] == ("7351" in record["reply"]) for record in found)
    assert "| 80 tokens | 100.0% | 3 |" in table
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_depths_and_lengths_of_prompts(bundled_chat):
    import argparse

    from qwen.checkpoint.loading import load_tokenizer
    from qwen.model.qwen_generation_utils import DEFAULT_SYSTEM, make_context

    parser = argparse.ArgumentParser()
    needle.Needle.add_arguments(parser)
    options = parser.parse_args(["--lengths", "200", "400", "--depths", "0", "25", "100"])
    options.checkpoint_path, options.hub, options.seed = None, None, 1234
    tokenizer = load_tokenizer(bundled_chat)
    for case in needle.Needle(options).cases():
        context, question = case.prompt.rsplit("\n\n", 1)
        assert question == "What is door?"
        assert context.count("door: 7351;") == 1
        depth = context.index("door: 7351;") / (len(context) - len("door: 7351;"))
        assert depth == pytest.approx(case.data["depth"] / 100, abs=0.1)
        tokens = len(make_context(tokenizer, case.prompt, system=DEFAULT_SYSTEM)[1])
        assert 0.85 * case.data["length"] < tokens <= case.data["length"] + 2


def test_boundaries_are_between_sentences():
    assert needle._nearest_boundary("One. Two. Three. Four.", 0.5) == len("One. Two. ")
    assert needle._nearest_boundary("One. Two. Three. Four.", 0.0) == 0
    assert needle._nearest_boundary("x" * 100, 0.6) == needle._nearest_boundary("One. " + "x" * 95, 0.6) == 60


@pytest.mark.parametrize("module", [long_context, needle], ids=["long_context", "needle"])
def test_adapters_can_be_measured(module, tmp_path, bundled_base, bundled_chat):
    from peft import LoraConfig, get_peft_model

    chat = module is needle
    model, _ = load_model(bundled_chat if chat else bundled_base, cpu_only=True)
    get_peft_model(model, LoraConfig(r=1, target_modules=["c_attn"])).save_pretrained(tmp_path)
    task, arguments = (module.Needle, ["--depths", "50"]) if chat else (module.LongContext, ["--tokens", "64"])
    out = ["-o", str(tmp_path / "out.jsonl")]
    assert evaluate(task, ["-c", str(tmp_path), "--lengths", "64", "--cpu-only", *arguments, *out]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "100000"], "takes prompts of up to"),
        (["--lengths", "10"], "has no room for the needle"),
        (["--haystack", "TEXT", "--answer", "return"], "already contains 'return'"),
        (["--haystack", "TEXT", "--needle", "The door is red."], "give --needle, --question and --answer"),
        (["--haystack", "TEXT", "--lengths", "8000"], "give more text with --haystack"),
    ],
)
def test_invalid_arguments_of_needle(text, capsys, arguments, message):
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    assert evaluate(needle.Needle, arguments) == 1
    assert message in capsys.readouterr().err


def test_invalid_depth(capsys):
    with pytest.raises(SystemExit):
        evaluate(needle.Needle, ["--depths", "110"])
    assert "must be a number from 0 to 100" in capsys.readouterr().err
