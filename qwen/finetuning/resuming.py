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
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..checkpoint.adapters import check_adapter, is_adapter
from ..checkpoint.files import check_weights, first_line, read_json
from ..library_errors import is_memory_full
from .arguments import ArgumentError, TrainingArguments

MAX_STATE_BYTES = 64 << 20
ADVICE = "Resume from an earlier checkpoint-N folder, or start again without --resume_from_checkpoint."


def check_training_checkpoint(folder: Path, training: TrainingArguments) -> None:
    """Check that a checkpoint is complete, and its small files are valid.

    With DeepSpeed and FSDP, whose checkpoints have other files, only the state of the run is checked.

    Raises:
        ArgumentError: it is not.
    """
    with explain_damage(folder):
        _check_state(read_json(folder / TRAINER_STATE_NAME, folder, allow_nan=True, max_bytes=MAX_STATE_BYTES), folder)
        if training.deepspeed or training.fsdp:
            return
        if is_adapter(folder):
            check_adapter(folder)
        else:
            check_weights(folder)
    # A run on another number of processes has other states of random numbers, which cannot be continued.
    random_states = [path.name for path in folder.glob("rng_state*.pth")]
    if missing := [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (folder / name).is_file()]:
        reason = f"it has no {' and no '.join(missing)}"
    elif not random_states:
        reason = "it has no rng_state.pth"
    else:
        return
    raise ArgumentError(
        f"--resume_from_checkpoint {folder} is incomplete: {reason}, so the result would be another (--save_only_model "
        f"writes such folders). {ADVICE}"
    )


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
        # The message of torch for an unsafe pickle advises to execute it.
        reason = type(error).__name__ if isinstance(error, pickle.UnpicklingError) else first_line(error)[:300]
        raise ArgumentError(f"--resume_from_checkpoint {folder} is damaged ({reason}). {ADVICE}") from error


def check_loaded_names(missing: list[str], unexpected: list[str]) -> None:
    """Raise ValueError if the weights of a checkpoint are not those of the model."""
    for kind, names in (("has no", missing), ("has an unknown", unexpected)):
        if names:
            raise ValueError(f"its weight file {kind} {names[0]}")


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise ValueError if the loaded state of Adam lacks a trained parameter, or has another shape."""
    state = optimizer.state
    for name, parameter in model.named_parameters():
        averages = state.get(parameter, {}) if parameter.requires_grad else None
        if averages is not None and getattr(averages.get("exp_avg"), "shape", None) != parameter.shape:
            raise ValueError(f"{OPTIMIZER_NAME} has no averages for {name}")


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
