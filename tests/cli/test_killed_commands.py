"""SIGKILL at random moments, and a full disk, while commands write over an older result (attack log: I1 to I12).

The old result or the new one is whole: a model afterwards, or after the next run has finished the moves; an evaluation
when the same command has been repeated.
"""

import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest

from qwen import QWenLMHeadModel
from qwen.checkpoint.staging import clean_up_leftovers, staged_directory
from tests.support.evaluation_runs import write_jsonl
from tests.support.processes import Child

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL"),
]

COMMANDS = ["merge", "export", "quantize", "finetune", "evaluate"]
MOMENTS = 10


def call(command: str, *words: str) -> int:
    return importlib.import_module(f"qwen_cli.{command}").main([*words])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, bundled_chat: Path) -> Path:
    """A folder with an adapter, conversations and questions."""
    folder = tmp_path_factory.mktemp("inputs")
    model = QWenLMHeadModel.from_pretrained(bundled_chat)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(bundled_chat)}))
    turns = [{"from": "user", "value": "Who are you?"}, {"from": "assistant", "value": "I am Robin."}]
    (folder / "data.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(4)]))
    questions = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(12)]
    write_jsonl(folder / "test.jsonl", questions)
    write_jsonl(folder / "train.jsonl", questions)
    return folder


def words_of(command: str, inputs: Path, model: Path, out: Path) -> list[str]:
    words: dict[str, list[object]] = {
        "merge": [inputs / "adapter", out, "--overwrite"],
        "export": ["-c", model, "-o", out, "--overwrite"],
        "quantize": ["--model_name_or_path", model, "--data_path", inputs / "data.json", "--out_path", out],
        "finetune": ["--model_name_or_path", model, "--data_path", inputs / "data.json", "--output_dir", out],
        "evaluate": ["gsm8k", "-f", inputs / "test.jsonl", "-o", out / "out.jsonl", "--cpu-only", "--limit", "3"],
    }
    words["quantize"] += ["--overwrite", "--cpu-only", "--group-size", "64"]
    words["finetune"] += ["--max_steps", "2", "--save_steps", "1", "--report_to", "none"]
    return [str(word) for word in words[command]]


def digest(out: Path) -> dict[str, str]:
    """Return the hashes of what belongs to the result."""
    files = [*out.glob("*.safetensors*"), *out.glob("*.jsonl"), *out.glob("config.json"), *out.glob("qwen.tiktoken")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_killed(command: str, words: list[str], folder: Path, seconds: float) -> None:
    child = Child(folder, call, command, *words)
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()


def run_to_the_end(command: str, words: list[str], folder: Path) -> float:
    start = time.monotonic()
    child = Child(folder, call, command, *words)
    status = child.result(600)
    assert status == 0, child.output()
    return time.monotonic() - start


def start_over(out: Path, old: Path) -> None:
    """Put an old result in the folder: a model that has another weight file than the new one."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(old, out)


@pytest.mark.parametrize(
    ("command", "moments"),
    [
        ("merge", 1),
        ("evaluate", 1),
        *(pytest.param(command, MOMENTS, marks=pytest.mark.nightly) for command in COMMANDS),
    ],
)
def test_killed_at_random_moments(
    command: str, moments: int, inputs: Path, bundled_chat: Path, bundled_base: Path, tmp_path: Path
) -> None:
    out, old = tmp_path / "out", tmp_path / "old"
    words = words_of(command, inputs, bundled_chat, out)
    if command == "evaluate":
        old.mkdir()
    elif command == "export":
        run_to_the_end(command, words_of(command, inputs, bundled_base, old), tmp_path)
    else:
        shutil.copytree(bundled_base, old)
    before = digest(old)
    start_over(out, old)
    seconds = run_to_the_end(command, words, tmp_path)
    after = digest(out)
    assert after != before
    chance = random.Random(0)
    for _ in range(moments):
        start_over(out, old)
        run_killed(command, words, tmp_path, chance.uniform(0, seconds))
        if command == "evaluate":
            run_to_the_end(command, words, tmp_path)
            assert digest(out) == after
        else:
            if "config.json" in (found := digest(out)):
                assert found in (before, after)
            clean_up_leftovers(out)
            assert digest(out) in (before, after)


@pytest.mark.parametrize(
    ("command", "place"),
    [("merge", "qwen.finetuning.merging.staged_directory"), ("export", "qwen.export.qwen2.staged_directory")],
)
def test_ctrl_c_after_the_moves(
    command: str,
    place: str,
    inputs: Path,
    bundled_chat: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    @contextlib.contextmanager
    def interrupted_late(target: Path, *arguments: object, **keywords: object) -> Iterator[Path]:
        with staged_directory(target, *arguments, **keywords) as staging:
            (staging / "config.json").write_text('{"model_type": "qwen"}')
            yield staging
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted_late)
    assert call(command, *words_of(command, inputs, bundled_chat, tmp_path / "out")) == 130
    assert f"Stopped, but too late: {tmp_path / 'out' / 'config.json'} and what" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").exists()


def test_ctrl_c_after_gguf_is_written(
    bundled_chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "out.gguf"
    words = ["-c", str(bundled_chat), "-o", str(file), "--overwrite"]
    for place, message in (
        ("write_gguf", "Stopped. Nothing was written."),
        ("export_notes", f"Stopped, but too late: {file} and what"),
    ):
        monkeypatch.setattr(f"qwen.export.gguf_file.{place}", interrupt)
        assert call("export", *words) == 130
        assert message in capsys.readouterr().err
        monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [file]


def interrupt(*arguments: object, **keywords: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a new disk of a size in bytes."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.nightly
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("command", COMMANDS)
def test_full_disk(
    command: str, inputs: Path, bundled_chat: Path, bundled_base: Path, tmp_path: Path, small_disk: Callable
) -> None:
    old = tmp_path / "old"
    if command == "export":
        run_to_the_end(command, words_of(command, inputs, bundled_base, old), tmp_path)
    elif command == "evaluate":
        old.mkdir()
    else:
        shutil.copytree(bundled_base, old)
    before, size = digest(old), sum(path.stat().st_size for path in old.rglob("*") if path.is_file())
    reference = tmp_path / "reference"
    shutil.copytree(old, reference)
    run_to_the_end(command, words_of(command, inputs, bundled_chat, reference), tmp_path)
    after = digest(reference)
    needed = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    chance = random.Random(0)
    for _ in range(MOMENTS):
        out = small_disk(size + 200_000 + int(chance.random() * 1.2 * needed)) / "out"
        shutil.copytree(old, out)
        words = words_of(command, inputs, bundled_chat, out)
        child = Child(tmp_path, call, command, *words)
        status = child.result(600)
        assert "Traceback" not in child.output()
        if command != "evaluate":
            assert digest(out) == (before if status else after)
        elif status == 0:
            assert digest(out) == after
