"""Checks a checkpoint-N folder of an interrupted run before training continues from it.

transformers starts anew where a file is missing: with another optimizer, random order or weights, and thus with another
result.
"""

import contextlib
import dataclasses
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import IntervalStrategy, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..checkpoint.adapters import check_adapter, is_adapter
from ..checkpoint.files import check_weights, first_line, is_complete, read_json
from ..library_errors import is_memory_full
from ..model.json_qwen import read_small_file
from .arguments import ArgumentError, TrainingArguments

MAX_STATE_BYTES = 64 << 20
DEEPSPEED_TAG, DEEPSPEED_STATES = "latest", ("model_states", "optim_states")
FSDP_STATES = ("pytorch_model_fsdp", "optimizer")
ADVICE = "Resume from an earlier checkpoint-N folder, or start again without --resume_from_checkpoint."


def check_training_checkpoint(folder: Path, training: TrainingArguments) -> None:
    """Check that a checkpoint is complete, and its small files are valid.

    Raises:
        ArgumentError: it is not.
    """
    with explain_damage(folder):
        state = read_json(folder / TRAINER_STATE_NAME, folder, allow_nan=True, max_bytes=MAX_STATE_BYTES)
        _check_state(state, folder)
        for name, strategy in (("logging_steps", training.logging_strategy), ("eval_steps", training.eval_strategy)):
            if strategy == IntervalStrategy.STEPS and not state.get(name, 1):
                raise ValueError(f"{name} in {TRAINER_STATE_NAME} is 0")
        if training.deepspeed:
            missing = _check_deepspeed_files(folder)
        elif training.fsdp:
            missing = [name for name in FSDP_STATES if not _has_fsdp_state(folder, name)]
        else:
            if is_adapter(folder):
                check_adapter(folder)
            else:
                check_weights(folder)
            missing = [] if (folder / OPTIMIZER_NAME).is_file() else [OPTIMIZER_NAME]
    if not training.deepspeed and not (folder / SCHEDULER_NAME).is_file():  # DeepSpeed may have its own scheduler
        missing.append(SCHEDULER_NAME)
    # A run on another number of processes has other states of random numbers, which cannot be continued.
    if not missing and not list(folder.glob("rng_state*.pth")):
        missing = ["rng_state.pth"]
    if missing:
        raise ArgumentError(
            f"--resume_from_checkpoint {folder} is incomplete: it has no {' and no '.join(missing)}, so the result "
            f"would be another (--save_only_model writes such folders). {ADVICE}"
        )


def _check_deepspeed_files(folder: Path) -> list[str]:
    """Return what is missing from a checkpoint of DeepSpeed: `latest` names the folder of its states.

    Raises:
        ValueError: the name is none, or a file is cut off.
    """
    if not (folder / DEEPSPEED_TAG).is_file():
        return [DEEPSPEED_TAG]
    tag = read_small_file(folder / DEEPSPEED_TAG).decode().strip()
    if Path(tag).name != tag or not tag.isprintable():
        raise ValueError(f"{DEEPSPEED_TAG} does not name a folder beside it")
    found = {kind: sorted((folder / tag).glob(f"*_{kind}.pt")) for kind in DEEPSPEED_STATES}
    _check_archives([file for files in found.values() for file in files])
    return [f"{tag}/*_{kind}.pt" for kind, files in found.items() if not files]


def _has_fsdp_state(folder: Path, name: str) -> bool:
    """Whether the weights or the optimizer are in the checkpoint of FSDP, in one file or in a folder of shards.

    Raises:
        ValueError: the file is cut off.
    """
    if (folder / f"{name}.bin").is_file():
        _check_archives([folder / f"{name}.bin"])
        return True
    shards = folder / f"{name}_0"
    return (shards / ".metadata").is_file() and any(shards.glob("*.distcp"))


def _check_archives(files: list[Path]) -> None:
    """Raise ValueError if a file of torch.save is cut off."""
    for file in files:
        if not file.is_file() or not is_complete(file):
            raise ValueError(f"{file.name} is cut off")


@contextlib.contextmanager
def explain_damage(folder: str | Path | None) -> Iterator[None]:
    """Turn the errors of reading a damaged checkpoint into an ArgumentError.

    Args:
        folder: the checkpoint.
    """
    try:
        yield
    except (
        *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, TypeError, ValueError, RuntimeError),
        *(pickle.UnpicklingError, SafetensorError),
    ) as error:
        if isinstance(error, ArgumentError) or is_memory_full(error):
            raise
        # The messages of torch for unsafe pickles and old archives advise to execute them.
        is_unsafe = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        reason = "a file does not hold tensors" if is_unsafe else first_line(error)[:300]
        raise ArgumentError(f"--resume_from_checkpoint {folder} is damaged ({reason}). {ADVICE}") from error


def check_loaded_names(missing: list[str], unexpected: list[str]) -> None:
    """Raise ValueError if the weights of a checkpoint are not those of the model."""
    for kind, names in (("has no", missing), ("has an unknown", unexpected)):
        if names:
            raise ValueError(f"its weight file {kind} {names[0]}")


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, before: list[dict[str, Any]]) -> None:
    """Raise ValueError if the loaded state of Adam lacks a trained parameter, or has another shape or settings.

    torch does not compare them: it reads beyond the end of averages that are too small.

    Args:
        before: the parameter groups of the optimizer before it loaded its state.
    """
    for group, example in zip(optimizer.param_groups, before, strict=True):
        for name, value in example.items():
            is_number = type(value) in (int, float, tuple)  # others, e.g. fused, depend on the machine
            if is_number and not _is_alike(group.get(name), value):
                raise ValueError(f"{name} in {OPTIMIZER_NAME} is {str(group.get(name))[:60]!r}")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        averages = optimizer.state.get(parameter, {})
        for kind in ("exp_avg", "exp_avg_sq"):
            if getattr(averages.get(kind), "shape", None) != parameter.shape:
                raise ValueError(f"{OPTIMIZER_NAME} has no {kind} for {name}")
        if getattr(averages.get("step"), "shape", None) != torch.Size():
            raise ValueError(f"{OPTIMIZER_NAME} has no step for {name}")


def check_scheduler(scheduler: Any, before: dict[str, Any]) -> None:
    """Raise ValueError if the loaded state of a learning rate scheduler is not like that of a new one.

    Args:
        scheduler: has loaded its state: torch makes each value an attribute.
        before: its `state_dict()` before.
    """
    for name, value in scheduler.state_dict().items():
        if callable(getattr(type(scheduler), name, None)) or not _is_alike(value, before.get(name, value)):
            raise ValueError(f"{name[:60]} in {SCHEDULER_NAME} is {str(value)[:60]!r}")


def _is_alike(value: object, example: object) -> bool:
    """Whether both are numbers, or sequences of as many values that are alike, or of the same type."""
    if isinstance(value, (list, tuple)) and isinstance(example, (list, tuple)):
        return len(value) == len(example) and all(map(_is_alike, value, example))
    return type(value) is type(example) or (isinstance(value, (int, float)) and isinstance(example, (int, float)))


def _check_state(state: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if the content of trainer_state.json is not what transformers wrote."""
    number, text = "a number", "a text or null"
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "global_step": (_is_count, "a number of steps"),
        "max_steps": (_is_count, "a number of steps"),
        "epoch": (_is_number, number),
        "logging_steps": (_is_number, number),
        "eval_steps": (_is_number, number),
        "save_steps": (_is_number, number),
        "num_train_epochs": (_is_number, number),
        "num_input_tokens_seen": (_is_count, number),
        "total_flos": (_is_number, number),
        "train_batch_size": (lambda value: value is None or _is_count(value), "a number or null"),
        "best_metric": (lambda value: value is None or type(value) in (int, float), "a number or null"),
        "best_global_step": (lambda value: value is None or _is_count(value), "a number or null"),
        "best_model_checkpoint": (lambda value: isinstance(value, (str, NoneType)), text),
        "log_history": (_is_log, "a list of objects with a step"),
        "stateful_callbacks": (_is_callbacks, "an object of objects"),
        "trial_name": (lambda value: isinstance(value, (str, NoneType)), text),
        "trial_params": (lambda value: isinstance(value, (dict, NoneType)), "an object or null"),
    }
    fields = {field.name: field.default for field in dataclasses.fields(TrainerState)}
    for name, value in state.items():
        is_valid, expected = checks.get(name, (lambda value: isinstance(value, bool), "true or false"))
        if name not in fields:
            raise ValueError(f"{TRAINER_STATE_NAME} has an unknown field {name[:60]!r}")
        if not is_valid(value):
            raise ValueError(f"{name} in {TRAINER_STATE_NAME} is {str(value)[:60]!r}, not {expected}")
    if "TrainerControl" not in state.get("stateful_callbacks", {}):  # transformers fails at the next checkpoint
        raise ValueError(f"stateful_callbacks in {TRAINER_STATE_NAME} has no TrainerControl")
    step = state.get("global_step", 0)
    if not 1 <= step <= state.get("max_steps", 0):
        raise ValueError(
            f"global_step in {TRAINER_STATE_NAME} is {step}, but the run has {state.get('max_steps')} steps"
        )
    if (named := folder.name.rpartition("checkpoint-")[2]).isdecimal() and int(named) != step:
        raise ValueError(f"global_step in {TRAINER_STATE_NAME} is {step}, but the folder is of step {named}")
    best = state.get("best_model_checkpoint")
    if best is not None and Path(best).is_dir() and Path(best).resolve().parent != folder.resolve().parent:
        raise ValueError(f"best_model_checkpoint in {TRAINER_STATE_NAME} is {best[:60]}, which is not of this run")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_log(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and _is_count(entry.get("step"))
        and all(type(entry.get(name, 0)) in (int, float) for name in ("loss", "eval_loss", "epoch"))
        for entry in value
    )


def _is_callbacks(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    states = [state for found in value.values() for state in (found if isinstance(found, list) else [found])]
    return all(
        isinstance(state, dict) and all(isinstance(state.get(name, {}), dict) for name in ("args", "attributes"))
        for state in states
    )
