"""Resuming from a damaged checkpoint-N folder, a full disk, and an output folder that is the model's (attack log: F18,
F26): one line says what is wrong and what to do, and no run ends with another result in silence."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen.finetuning.arguments import ArgumentError, parse
from qwen.finetuning.resuming import check_training_checkpoint
from qwen.finetuning.run import _check_inputs_are_kept
from tests.support.processes import Child, run_finetune

WRONG_ARGUMENTS = 2


def write_lessons(path: Path) -> Path:
    turns = [{"from": "user", "value": "Who are you?"}, {"from": "assistant", "value": "I am Robin."}]
    path.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(4)]))
    return path


def run(folder: Path, *arguments: object) -> tuple[int, str]:
    """Run finetune.py for two steps in its own process. Returns its exit status and its output."""
    data = write_lessons(folder / "lessons.json")
    options: dict[str, Any] = {"data_path": data, "output_dir": folder / "out", "max_steps": 2, "save_steps": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--report_to", "none", "--per_device_train_batch_size", "2", "--lora_r", "2"]
    child = Child(folder, run_finetune, *words, *map(str, arguments))
    return child.result(), child.output()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with LoRA."""
    folder = tmp_path_factory.mktemp("run")
    status, output = run(folder, "--use_lora")
    assert status == 0, output
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy of its first checkpoint."""
    return Path(shutil.copytree(original / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-1"))


def arguments_of(folder: Path, *words: object) -> Any:
    data = write_lessons(folder / "lessons.json")
    arguments, _ = parse(["--data_path", str(data), "--report_to", "none", *map(str, words)])
    return arguments


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_state(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "trainer_state.json", **changes)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"no {name}": lambda folder, name=name: (folder / name).unlink() for name in ("optimizer.pt", "scheduler.pt")},
    "no rng_state": lambda folder: (folder / "rng_state.pth").unlink(),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "cut weights": cut("adapter_model.safetensors"),
    "cut state": cut("trainer_state.json"),
    "deep state": lambda folder: (folder / "trainer_state.json").write_text("[" * 100_000 + "]" * 100_000),
    "list": lambda folder: (folder / "trainer_state.json").write_text("[]"),
    "other step": edit_state(global_step=2),
    "negative step": edit_state(global_step=-1),
    "many steps": edit_state(global_step=10**9, max_steps=1),
    "text as step": edit_state(global_step="1"),
    "infinite epoch": edit_state(epoch=float("inf")),
    "text as epoch": edit_state(epoch="x"),
    "log of numbers": edit_state(log_history=[1]),
    "log without steps": edit_state(log_history=[{"loss": 1.0}]),
    "text as loss": edit_state(log_history=[{"loss": "x", "step": 1}]),
    "unknown field": edit_state(evil=1),
    "callbacks": edit_state(stateful_callbacks={"TrainerControl": 5}),
    "no control": edit_state(stateful_callbacks={"os.system": {"args": {}, "attributes": {}}}),
    "no interval": edit_state(logging_steps=0),
    "batch size": edit_state(train_batch_size="x"),
    "another best": edit_state(best_model_checkpoint="/"),
    "adapter": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": -1}'),
}


@pytest.mark.training
def test_a_run_is_resumed_only_from_a_whole_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    training = arguments_of(tmp_path, "--use_lora").training
    check_training_checkpoint(checkpoint, training)
    for name, damage in DAMAGES.items():
        folder = Path(shutil.copytree(checkpoint, tmp_path / "damaged" / name / checkpoint.name))
        damage(folder)
        with pytest.raises(ArgumentError, match="--resume_from_checkpoint") as failure:
            check_training_checkpoint(folder, training)
        assert "\n" not in str(failure.value), name
        assert "Resume from an earlier checkpoint-N folder" in str(failure.value), name


def shards_of_deepspeed(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()
    (folder / "latest").write_text("global_step1")
    (folder / "global_step1").mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"state": torch.zeros(1000)}, folder / "global_step1" / name)


def shards_of_fsdp(folder: Path) -> None:
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir()
        (folder / name / ".metadata").write_bytes(b"1")
        (folder / name / "__0_0.distcp").write_bytes(b"1")


def files_of_fsdp(folder: Path) -> None:
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        torch.save({"state": torch.zeros(1000)}, folder / name)


@pytest.mark.training
@pytest.mark.parametrize(
    ("engine", "fill", "lost", "damaged"),
    [
        (
            "deepspeed",
            shards_of_deepspeed,
            ["latest", "rng_state.pth", *(f"global_step1/{name}" for name in ("*model_states.pt", "*optim_states.pt"))],
            ["global_step1/mp_rank_00_model_states.pt", "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        ),
        (
            "fsdp",
            shards_of_fsdp,
            ["scheduler.pt", "rng_state.pth", "pytorch_model_fsdp_0/.metadata", "optimizer_0/*.distcp"],
            [],
        ),
        (
            "fsdp",
            files_of_fsdp,
            ["pytorch_model_fsdp.bin", "optimizer.bin"],
            ["pytorch_model_fsdp.bin", "optimizer.bin"],
        ),
    ],
)
def test_checkpoints_of_deepspeed_and_fsdp_are_whole(
    engine: str, fill: Callable, lost: list[str], damaged: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    training = arguments_of(tmp_path, "--use_lora").training
    setattr(training, engine, "in use")
    fill(checkpoint)
    check_training_checkpoint(checkpoint, training)

    def check_refused(name_or_pattern: str, damage: Callable[[Path], object], expected: str) -> None:
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        folder = Path(shutil.copytree(checkpoint, tmp_path / "damaged" / checkpoint.name))
        [file] = folder.glob(name_or_pattern)
        damage(file)
        with pytest.raises(ArgumentError, match=expected) as failure:
            check_training_checkpoint(folder, training)
        assert "\n" not in str(failure.value)

    for name in lost:
        check_refused(name, Path.unlink, "is incomplete: it has no")
    for name in damaged:
        check_refused(name, lambda file: os.truncate(file, file.stat().st_size // 2), "is cut off")
    if engine == "deepspeed":
        check_refused("latest", lambda file: file.write_text("../../evil"), "does not name a folder beside it")


def edit_optimizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        content = torch.load(folder / "optimizer.pt")
        change(content)
        torch.save(content, folder / "optimizer.pt")

    return edit


def edit_scheduler(**changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        torch.save(torch.load(folder / "scheduler.pt") | changes, folder / "scheduler.pt")

    return edit


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.training
@pytest.mark.parametrize(
    "damage",
    [
        cut("optimizer.pt"),
        cut("rng_state.pth"),
        edit_optimizer(lambda content: content["state"].pop(0)),
        edit_optimizer(lambda content: content["state"][0].update(exp_avg_sq=torch.zeros(1))),
        edit_optimizer(lambda content: content["state"][0].pop("step")),
        edit_optimizer(lambda content: content["param_groups"][0].update(lr="x")),
        edit_optimizer(lambda content: content["param_groups"][0].pop("betas")),
        without_a_tensor,
        edit_scheduler(last_epoch="x"),
        edit_scheduler(base_lrs=[]),
        edit_scheduler(step=5),
    ],
)
def test_damage_that_shows_when_the_files_are_loaded(damage: Callable, checkpoint: Path, tmp_path: Path) -> None:
    damage(checkpoint)
    status, output = run(tmp_path, "--use_lora", "--resume_from_checkpoint", checkpoint)
    assert status == WRONG_ARGUMENTS
    assert f"--resume_from_checkpoint {checkpoint} is damaged" in output
    assert "Traceback" not in output
    assert "weights_only" not in output


# ---- the disk ----


def run_on_a_full_disk(*words: str) -> int:
    """Run finetune.py where torch.save fails as on a full disk."""
    torch.save = fail_like_a_full_disk
    return run_finetune(*words)


def fail_like_a_full_disk(content: object, path: str) -> None:
    torch.serialization.save(content, "/dev/full")


@pytest.mark.training
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full, of Linux")
def test_a_full_disk_in_the_optimizer_is_named(tmp_path: Path) -> None:
    data = write_lessons(tmp_path / "lessons.json")
    words = ["--data_path", data, "--output_dir", tmp_path / "out", "--max_steps", "1", "--save_steps", "1"]
    child = Child(tmp_path, run_on_a_full_disk, *map(str, words), "--report_to", "none", "--use_lora")
    assert child.result() == 1
    text = child.output()
    assert "Traceback" not in text
    assert "disk" in text or "No space left" in text


# ---- the model to train ----


@pytest.mark.training
@pytest.mark.parametrize("method", [(), ("--use_lora",)])
def test_generation_settings_without_an_effect_do_not_lose_the_result(
    method: tuple[str, ...], tiny_chat_checkpoint: Path, tmp_path: Path
) -> None:
    """transformers' `save_pretrained` refuses top_p without do_sample, after the training."""
    model = Path(shutil.copytree(tiny_chat_checkpoint, tmp_path / "model"))
    edit_json(model / "generation_config.json", do_sample=False, top_p=0.7)
    status, output = run(tmp_path, "--model_name_or_path", model, *method)
    assert status == 0, output
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        written = json.loads((folder / "generation_config.json").read_text())
        assert (written["do_sample"], written["top_p"], written["chat_format"]) == (False, 0.7, "chatml")


@pytest.mark.training
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"num_labels": 10**9}),
        ("tokenizer_config.json", {"model_max_length": "x"}),
        ("generation_config.json", {"watermarking_config": 5, "do_sample": False, "top_p": 0.7}),
    ],
)
def test_an_invalid_setting_of_the_model_is_one_line(
    name: str, content: dict[str, object], tiny_chat_checkpoint: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_chat_checkpoint, tmp_path / "model"))
    edit_json(model / name, **content)
    status, output = run(tmp_path, "--model_name_or_path", model)
    assert status == 1
    assert len(output.splitlines()) == 1, output
    assert next(iter(content)) in output


@pytest.mark.training
def test_a_missing_tensor_of_the_model_is_one_line(tiny_chat_checkpoint: Path, tmp_path: Path) -> None:
    """transformers logs a table of missing tensors."""
    model = Path(shutil.copytree(tiny_chat_checkpoint, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    status, output = run(tmp_path, "--model_name_or_path", model)
    assert status == 1
    assert len(output.splitlines()) == 1, output
    assert "transformer.h.1.mlp.c_proj.weight" in output


# ---- folders ----


@pytest.mark.parametrize("relation", ["same", "link", "relative", "child", "parent"])
@pytest.mark.parametrize("option", ["--model_name_or_path", "--lora_weight_path"])
def test_output_is_never_the_input(
    relation: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundled_chat: Path
) -> None:
    model = tmp_path / "parent" / "model"
    (model / "child").mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    outputs = {"same": model, "link": tmp_path / "link", "relative": "child/..", "child": "child", "parent": ".."}
    arguments = arguments_of(tmp_path, "--use_lora", option, model, "--output_dir", outputs[relation])
    with pytest.raises(ArgumentError, match=f"{option} .*which training would change") as failure:
        _check_inputs_are_kept(arguments)
    assert "\n" not in str(failure.value)
    _check_inputs_are_kept(arguments_of(tmp_path, "--use_lora", option, model, "--output_dir", tmp_path / "out"))
    with pytest.raises(ArgumentError, match="which training would change"):  # the default model
        _check_inputs_are_kept(arguments_of(tmp_path, "--output_dir", bundled_chat))


@pytest.mark.training
def test_full_training_onto_its_model_is_refused(bundled_chat: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(bundled_chat, tmp_path / "model"))
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    status, output = run(tmp_path, "--model_name_or_path", model, "--output_dir", model)
    assert (status, "Name another folder" in output) == (WRONG_ARGUMENTS, True), output
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before
