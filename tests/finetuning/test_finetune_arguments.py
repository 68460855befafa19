"""The command line of finetune.py: current arguments, those of scripts for transformers 4, and their values."""

import dataclasses
import json
import os
import shlex
from pathlib import Path

import pytest
import transformers
from transformers import HfArgumentParser

from qwen.finetuning import transformers4_arguments
from qwen.finetuning.arguments import ArgumentError, Arguments, TrainingArguments, parse, read_settings
from qwen.finetuning.transformers4_arguments import translate
from tests.support import ROOT

TODAY = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
# transformers 5.17 has the old name only.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in TODAY else "gradient_checkpointing"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start from the environment of a new process, and restore it after the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    monkeypatch.chdir(tmp_path)


def parsed(line: str = "") -> Arguments:
    return parse(["--data_path", "d.json", "--use_cpu", *shlex.split(line)])[0]


def noted(line: str) -> list[str]:
    return parse(["--data_path", "d.json", "--use_cpu", *shlex.split(line)])[1]


def parse_error(line: str) -> str:
    with pytest.raises(ArgumentError) as caught:
        parsed(line)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names


def test_defaults():
    arguments = parse(["--data_path", "d.json"])[0]
    model, data, lora, training = (getattr(arguments, field.name) for field in dataclasses.fields(Arguments))
    assert (model.model_name_or_path, model.cache_dir, model.extra_vocab_file) == (None, None, None)
    assert (data.data_path, data.eval_data_path, data.lazy_preprocess, data.packing) == ("d.json", None, False, False)
    assert data.system_message == "You are a helpful assistant."
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_bias) == (64, 16, 0.05, "none")
    assert lora.lora_target_modules == ["c_attn", "c_proj", "w1", "w2"]
    assert (lora.lora_weight_path, lora.q_lora, lora.modules_to_save) == ("", False, None)
    assert (training.model_max_length, training.use_lora) == (8192, False)


# All arguments that transformers 4.37, the last version that ran the published code, accepts and 5.23 does not.
REMOVED_SINCE_4 = """
    adafactor dispatch_batches evaluation_strategy fp16_backend fp16_opt_level fsdp_min_num_params
    fsdp_transformer_layer_cls_to_wrap group_by_length half_precision_backend include_inputs_for_metrics
    include_tokens_per_second jit_mode_eval logging_dir mp_parameters no_cuda overwrite_output_dir past_index
    per_gpu_eval_batch_size per_gpu_train_batch_size push_to_hub_model_id push_to_hub_organization push_to_hub_token
    ray_scope save_safetensors split_batches torchdynamo tpu_metrics_debug tpu_num_cores use_ipex
    use_legacy_prediction_loop use_mps_device warmup_ratio
"""
HANDLED = (
    set(transformers4_arguments._RENAMED)
    | set(transformers4_arguments._SWITCHES)
    | set(transformers4_arguments._ACCELERATOR_FIELDS)
    | set(transformers4_arguments._IGNORED)
    | {"logging_dir"}
)


def is_accepted_today(name: str) -> bool:
    parser = HfArgumentParser((TrainingArguments,), allow_abbrev=False)
    return any(f"--{name}" in action.option_strings for action in parser._actions)


def test_all_removed_arguments_are_handled():
    assert not set(REMOVED_SINCE_4.split()) - HANDLED - TODAY
    still_taken = {name for name in HANDLED if is_accepted_today(name)}
    # Deprecated: transformers 5.23 still accepts the old name, and warns.
    assert still_taken <= {"gradient_checkpointing", "gradient_checkpointing_kwargs"}


@pytest.mark.parametrize(("old", "new"), transformers4_arguments._RENAMED.items())
def test_renamed_arguments_exist_today(old: str, new: str):
    assert new in TODAY
    assert translate([f"--{old}", "x"]) == ([f"--{new}", "x"], [])
    assert translate([f"--{old.replace('_', '-')}=x"]) == ([f"--{new}", "x"], [])


@pytest.mark.parametrize(
    ("old", "new", "value"), [(old, *new) for old, new in transformers4_arguments._SWITCHES.items()]
)
def test_switches_become_choices(old: str, new: str, value: str):
    assert getattr(parsed(f"--{old}").training, new) == value
    assert getattr(parsed(f"--{old} True").training, new) == value
    assert getattr(parsed(f"--{old} False").training, new) == getattr(parsed().training, new) != value


@pytest.mark.parametrize("old", sorted(transformers4_arguments._IGNORED))
def test_ignored_arguments_are_noted(old: str):
    for line in (f"--{old}", f"--{old} 3", f"--{old}=3"):
        (note,) = noted(f"{line} --seed 7")
        assert note.startswith(f"--{old} is ignored: ")
        assert parsed(f"{line} --seed 7").training.seed == 7  # the other arguments are kept
    named = {word.removeprefix("--").rstrip(".,") for word in note.split()[1:] if word.startswith("--")}
    assert named <= TODAY  # the note only names arguments that exist


def test_accelerator_fields():
    config = parsed("--split_batches True --dispatch_batches False").training.accelerator_config
    assert (config.split_batches, config.dispatch_batches) == (True, False)


# Values


@pytest.mark.parametrize(
    ("line", "steps"),
    [
        ("--warmup_ratio 0.01", 0.01),
        ("--warmup_ratio=0.01", 0.01),
        ("--warmup_ratio 0.1 --warmup_steps 0", 0.1),
        ("--warmup_steps 0 --warmup_ratio 0.1", 0.1),
        ("--warmup_ratio 0.1 --warmup_steps 50", 50),
        ("--warmup_steps 50 --warmup_ratio 0.1", 50),
        ("--warmup_steps 7", 7),
        ("--warmup_ratio 0", 0),
    ],
)
def test_warmup(line: str, steps: float):
    training = parsed(line).training
    assert training.warmup_steps == steps
    assert training.get_warmup_steps(1000) == (steps if steps >= 1 else 1000 * steps)


@pytest.mark.parametrize(
    ("line", "on"),
    [("--bf16", True), ("--bf16 True", True), ("--bf16=true", True), ("--bf16 False", False), ("", False)],
)
def test_switches_may_have_values(line: str, on: bool):
    assert parsed(line).training.bf16 is on


def test_use_lora_and_q_lora():
    assert parsed("--use_lora").training.use_lora
    assert parsed("--use_lora True").training.use_lora
    assert not parsed("--use_lora False").training.use_lora
    assert parsed("--q_lora").training.use_lora  # implied


def test_lists():
    lora = parsed("--use_lora --lora_target_modules c_attn w1 --modules_to_save wte lm_head").lora
    assert (lora.lora_target_modules, lora.modules_to_save) == (["c_attn", "w1"], ["wte", "lm_head"])
    assert parsed("--use_lora --modules_to_save none").lora.modules_to_save == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [("True", True), ("true", True), ("False", False), ("out/checkpoint-5", "out/checkpoint-5")],
)
def test_resume_from_checkpoint_values(value: str, expected: bool | str):
    assert parsed(f"--resume_from_checkpoint {value}").training.resume_from_checkpoint == expected


def test_output_dir_does_not_set_the_logging_dir():
    parsed("--output_dir here")
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ  # else a later run in this process would log into "here"


def test_old_logging_dir():
    parsed("--output_dir here --logging_dir there")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "there"


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("full_shard auto_wrap", {"reshard_after_forward": True}),
        ("'full_shard auto_wrap'", {"reshard_after_forward": True}),
        ("shard_grad_op", {"reshard_after_forward": False}),
        ("full_shard offload", {"reshard_after_forward": True, "cpu_offload": True}),
    ],
)
def test_fsdp_words(words: str, fields: dict):
    new_argv, notes = translate(["--seed", "3", "--fsdp", *shlex.split(words), "--use_lora"])
    assert new_argv[:4] == ["--seed", "3", "--fsdp", "--fsdp_config"]
    assert new_argv[5:] == ["--use_lora"]
    assert json.loads(new_argv[4]) == fields
    assert notes == []


def test_fsdp_words_with_a_configuration(tmp_path: Path):
    file = tmp_path / "fsdp.json"
    file.write_text('{"version": 2, "cpu_offload": false}')
    for config in (str(file), file.read_text()):
        for line in (["--fsdp", "offload", "--fsdp_config", config], ["--fsdp_config", config, "--fsdp", "offload"]):
            new_argv, _ = translate(line)
            assert new_argv[:2] == ["--fsdp", "--fsdp_config"]
            assert len(new_argv) == 3
            assert json.loads(new_argv[2]) == {"version": 2, "cpu_offload": True}
    for value in ([], ["True"]):  # the syntax of FSDP 2
        line = ["--fsdp", *value, "--fsdp_config", str(file)]
        assert translate(line) == (line, [])


# Errors of the command line alone; those of finetune.py as a whole are in test_finetune.py


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--fsdp hybrid_shard", ["--fsdp hybrid_shard", "full_shard"]),
        ("--fsdp full_shard --fsdp_config no.json", ["--fsdp_config", "no.json"]),
        ("--fsdp full_shard --fsdp_config '{not'", ["--fsdp_config {not"]),
        ("--deepspeed '{not'", ["--deepspeed", "not valid JSON"]),
        ("--deepspeed '[]'", ["--deepspeed"]),
        ("--use_lorra", ["--use_lorra", "Did you mean --use_lora"]),
        ("--zzzzzzzz", ["--zzzzzzzz", "--help"]),
        ("--learning_rate fast", ["--learning_rate", "fast"]),
        ("--learning_rate", ["--learning_rate", "expected one argument"]),
        ("--use_lora maybe", ["--use_lora", "maybe"]),
        ("--lr_scheduler_type round", ["--lr_scheduler_type", "round"]),
        ("--lora_r 0", ["--lora_r is 0"]),
        ("--lora_r -8", ["--lora_r is -8"]),
        ("--lora_r 0.5", ["--lora_r", "0.5"]),
        ("--lora_dropout 1.5", ["--lora_dropout", "1.5"]),
        ("--model_max_length -1", ["--model_max_length is -1"]),
        ("--eval_strategy epoch", ["--eval_strategy epoch", "--eval_data_path"]),
        ("--evaluation_strategy epoch", ["--eval_strategy epoch", "--eval_data_path"]),
        ("--fp16", ["--fp16", "--bf16"]),
        ("stray", ["stray"]),
    ],
)
def test_invalid_arguments_are_explained(line: str, says: list[str]):
    if "--deepspeed" in line:
        pytest.importorskip("deepspeed", reason="reads the configuration if installed: pip install deepspeed")
    message = parse_error(line)
    assert [text for text in says if text not in message] == [], message


def test_data_must_be_named():
    with pytest.raises(ArgumentError, match="data_path"):
        parse([])


# Whole command lines


def test_an_old_script():
    """All settings that scripts for these models use, as written for transformers 4.32."""
    line = """
        --model_name_or_path Qwen/Qwen-7B-Chat --data_path data.json --bf16 True --output_dir output_qwen
        --num_train_epochs 5 --per_device_train_batch_size 2 --per_device_eval_batch_size 1
        --gradient_accumulation_steps 8 --evaluation_strategy no --save_strategy steps --save_steps 1000
        --save_total_limit 10 --learning_rate 3e-4 --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01
        --lr_scheduler_type cosine --logging_steps 1 --report_to none --model_max_length 512 --lazy_preprocess True
        --use_lora --gradient_checkpointing
    """
    arguments, notes = parse([*shlex.split(line), "--use_cpu"])
    assert notes == []
    model, data, training = arguments.model, arguments.data, arguments.training
    assert (model.model_name_or_path, data.data_path, data.lazy_preprocess) == ("Qwen/Qwen-7B-Chat", "data.json", True)
    assert (training.num_train_epochs, training.save_steps, training.save_total_limit) == (5, 1000, 10)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 8)
    assert (training.learning_rate, training.weight_decay, training.adam_beta2) == (3e-4, 0.1, 0.95)
    assert (training.eval_strategy, training.save_strategy) == ("no", "steps")
    assert (training.lr_scheduler_type, training.warmup_steps, training.report_to) == ("cosine", 0.01, [])
    assert training.bf16
    assert training.use_lora
    assert training.model_max_length == 512
    assert getattr(training, CHECKPOINTING)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "finetune").glob("finetune_*.sh")))
def test_our_own_scripts(script: str):
    """Their arguments are current: nothing is translated or noted."""
    text = (ROOT / "finetune" / script).read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.startswith("launch "))
    words = shlex.split(line)
    words = words[words.index("--model_name_or_path") : -1]  # between finetune.py and "$@"
    words = [word.replace("activation_checkpointing", CHECKPOINTING) for word in words]
    assert translate(words) == (words, [])
    settings, notes = read_settings([word.replace("$ROOT", str(ROOT)) for word in words] + ["--use_cpu"])
    assert notes == []
    assert settings["warmup_steps"] == 0.01
    assert settings[CHECKPOINTING]
    assert bool(settings["deepspeed"]) == script.endswith("_ds.sh")


def test_one_process_uses_one_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 4))
    arguments, notes = parse(["--data_path", "d.json", "--use_cpu", "--per_device_train_batch_size", "3"])
    assert arguments.training.n_gpu == 1
    assert arguments.training.train_batch_size == 3
    assert any(note.startswith("Using one of 4 GPUs.") for note in notes)


def test_no_gpu_gives_n_gpu_0(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 0))
    arguments, notes = parse(["--data_path", "d.json", "--use_cpu"])
    assert arguments.training.n_gpu == 0
    assert notes == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--no_save_on_each_nod", "--save_on_each_node"), ("--lora_rr", "--lora_r"), ("--hlep", "--help")],
)
def test_misspelt_arguments_get_suggestions(typed: str, meant: str):
    with pytest.raises(ArgumentError, match=f"Did you mean .*{meant}"):
        parse(["--data_path", "d.json", typed])
