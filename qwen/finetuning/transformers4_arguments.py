"""Translates command lines written for transformers 4 to arguments of transformers 5.

Arguments that were renamed, or became a choice or a field of another argument, are translated. Arguments without a
meaning today are dropped with a note.
"""

import dataclasses
import json
import os
from pathlib import Path

from transformers import TrainingArguments

Group = tuple[str, list[str]]

# Renamed arguments.
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1: a fraction of all steps
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
}
# transformers 5.17 has only the old names of these two; scripts may use either.
if "activation_checkpointing" not in {field.name for field in dataclasses.fields(TrainingArguments)}:
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        _RENAMED[_RENAMED.pop(old)] = old
# Switches that became choices.
_SWITCHES = {
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "adafactor": ("optim", "adafactor"),
}
# Switches that became fields of --accelerator_config.
_ACCELERATOR_FIELDS = ("dispatch_batches", "split_batches")
# Ignored arguments, with the reason.
_IGNORED = {
    "overwrite_output_dir": "the output folder is always written to",
    "save_safetensors": "weights are always saved as safetensors",
    "fp16_opt_level": "--fp16 and --bf16 no longer have levels",
    "fp16_backend": "--fp16 and --bf16 have only one implementation now",
    "half_precision_backend": "--fp16 and --bf16 have only one implementation now",
    "use_mps_device": "the device is detected automatically",
    "use_ipex": "PyTorch does the same by default",
    "jit_mode_eval": "it was for prediction only",
    "include_inputs_for_metrics": "loss and perplexity need no inputs",
    "use_legacy_prediction_loop": "there is only one loop now",
    "past_index": "it was for other architectures",
    "ray_scope": "it was for hyperparameter search",
    "sharded_ddp": "use --fsdp or --deepspeed",
    "xpu_backend": "use --ddp_backend",
    "mp_parameters": "it was for SageMaker only",
    "tpu_num_cores": "the launcher sets it",
    "tpu_metrics_debug": "use --debug",
    "torchdynamo": "use --torch_compile",
    "push_to_hub_organization": "use --hub_model_id OWNER/NAME",
    "fsdp_min_num_params": "the blocks of these models are wrapped one by one",
    "fsdp_transformer_layer_cls_to_wrap": "the blocks of these models are wrapped one by one",
}

# FSDP 1 was configured by words after --fsdp; FSDP 2 uses fields of --fsdp_config.
_FSDP_WORDS: dict[str, dict[str, bool]] = {
    "full_shard": {"reshard_after_forward": True},
    "shard_grad_op": {"reshard_after_forward": False},
    "offload": {"cpu_offload": True},
    "auto_wrap": {},
}


def translate(argv: list[str]) -> tuple[list[str], list[str]]:
    """Translate a command line written for transformers 4. Also returns a note for each dropped argument.

    Sets the environment variable that replaced `--logging_dir`.

    Raises:
        ValueError: FSDP 2 has no equivalent of a word after `--fsdp`.
    """
    new_argv: list[str] = []
    notes: list[str] = []
    accelerator: dict[str, bool] = {}
    groups = _groups(argv)
    named = dict(groups)
    shadowed = None
    if "warmup_ratio" in named and "warmup_steps" in named:  # a number of steps has always won
        shadowed = "warmup_ratio" if _at_least_one(named["warmup_steps"]) else "warmup_steps"
    for name, values in groups:
        if name == shadowed:
            continue
        if name in _RENAMED:
            new_argv += [f"--{_RENAMED[name]}", *values]
        elif name in _SWITCHES:
            if _is_true(values):
                new_argv += [f"--{_SWITCHES[name][0]}", _SWITCHES[name][1]]
        elif name in _ACCELERATOR_FIELDS:
            accelerator[name] = _is_true(values)
        elif name == "logging_dir" and values:
            os.environ["TENSORBOARD_LOGGING_DIR"] = values[0]
        elif name in _IGNORED:
            notes.append(f"--{name} is ignored: {_IGNORED[name]}.")
        elif name == "fsdp" and values in (["False"], ["false"], [""]):
            continue  # off, as by default
        elif name == "fsdp" and values and not _is_bool(values):
            new_argv += ["--fsdp", "--fsdp_config", _fsdp_config(values, named.get("fsdp_config"))]
        elif name == "fsdp_config" and named.get("fsdp") and not _is_bool(named["fsdp"]):
            continue  # merged into the --fsdp case
        else:
            new_argv += ([f"--{name}"] if name else []) + values
    if accelerator:
        new_argv += ["--accelerator_config", json.dumps(accelerator)]
    return new_argv, notes


def _groups(argv: list[str]) -> list[Group]:
    """Group the arguments with their values; words before the first argument get the name ""."""
    groups: list[Group] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            groups.append((name.replace("-", "_"), [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append(("", [word]))
    return groups


def _at_least_one(values: list[str]) -> bool:
    try:
        return len(values) == 1 and float(values[0]) >= 1
    except ValueError:
        return False


def _is_bool(values: list[str]) -> bool:
    return len(values) == 1 and values[0].lower() in ("true", "false")


def _is_true(values: list[str]) -> bool:
    return not values or values[0].lower() in ("true", "1", "yes")


def _fsdp_config(words: list[str], file: list[str] | None) -> str:
    config: dict[str, object] = {}
    if file:
        try:
            config = json.loads(file[0] if file[0].startswith("{") else Path(file[0]).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"--fsdp_config {file[0]} cannot be read: {error}") from error
    for word in " ".join(words).split():
        if word not in _FSDP_WORDS:
            raise ValueError(
                f"--fsdp {word} belongs to FSDP 1, which is no longer supported. With FSDP 2, use "
                f"{', '.join(_FSDP_WORDS)}, or --fsdp alone with the rest in --fsdp_config FILE.json."
            )
        config |= _FSDP_WORDS[word]
    return json.dumps(config)
