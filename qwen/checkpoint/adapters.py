"""Validates LoRA adapters and loads them onto a base model.

peft is imported where it is used, since most checkpoints do not need it.
"""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from .._renamed import old_names
from ..model.modeling_qwen import QWenLMHeadModel
from ..model.weight_files_qwen import open_bin, tensor_shapes
from .files import (
    CheckpointError,
    JSONObject,
    first_line,
    is_complete,
    is_lfs_pointer,
    join_names,
    lfs_pointer_message,
    read_json,
)

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in peft's order of preference
MAX_RANK, MAX_ALPHA = 65536, 1_000_000
USUAL_RANK = 1024  # up to here, the rank in the config may be one that no matrix has
MAX_PATTERN, MAX_ALTERNATIVES = 1000, 16  # of a regular expression


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and no model of its own."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def check_adapter(folder: Path, config: JSONObject | None = None) -> None:
    """Raise CheckpointError unless the folder holds a complete LoRA adapter. Tensors are not read.

    Args:
        folder: the adapter.
        config: content of adapter_config.json; None reads it.
    """
    config = read_json(folder / ADAPTER_CONFIG, folder) if config is None else config
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise CheckpointError(
            f"{folder} holds an adapter of type {peft_type!r}. Only LoRA adapters are supported here; peft itself may "
            "support it: `peft.AutoPeftModelForCausalLM.from_pretrained`."
        )
    check_settings(config, folder / ADAPTER_CONFIG)
    weights = adapter_file(folder)
    if weights is None:
        raise CheckpointError(
            f"{folder} has an {ADAPTER_CONFIG} but no {' or '.join(ADAPTER_WEIGHTS)}: the training did not finish, or "
            "the folder was not copied completely. A checkpoint-N folder inside it may be complete."
        )
    if is_lfs_pointer(weights):
        raise CheckpointError(lfs_pointer_message(folder, [weights.name]))
    if not is_complete(weights):
        raise CheckpointError(
            f"{weights} is cut off or damaged. Copy it again from the training machine, or use a checkpoint-N folder "
            "of that training."
        )
    if weights.suffix == ".bin":
        try:
            open_bin(weights)
        except OSError as error:
            raise CheckpointError(str(error)) from error
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(f"{folder} holds an adapter (LoRA), which needs another package: `pip install peft`.")


def check_settings(config: JSONObject, path: Path) -> None:
    """Check the settings of an adapter that peft takes as they are: patterns that could match for hours, and numbers.

    Args:
        config: content of adapter_config.json.
        path: of the file, for error messages.

    Raises:
        CheckpointError: one is invalid; the message names it.
    """
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(f"{path}: {name} must be an object. Correct the file.")
    _check_numbers(config, path)
    _check_module_names(config, path)
    for name in ("layer_replication", "alora_invocation_tokens"):
        if config.get(name) is not None:
            raise CheckpointError(f"{path}: {name} is not supported. Use an adapter without it.")
    iterations = re.search(r"_niter_(\d+)$", str(config.get("init_lora_weights")))
    if iterations is not None and len(iterations[1]) > 3:
        raise CheckpointError(f"{path}: init_lora_weights has too many iterations. Set it to true: weights are loaded.")


def _check_numbers(config: JSONObject, path: Path) -> None:
    """Raise CheckpointError unless ranks, scales and dropout are within their limits."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name, value in (("r", config.get("r", 8)), *(("rank_pattern", rank) for rank in ranks.values())):
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise CheckpointError(f"{path}: a rank in {name} is {str(value)[:40]!r}, not 1 to {MAX_RANK}. Correct it.")
    for name, value in (("lora_alpha", config.get("lora_alpha", 8)), *(("alpha_pattern", x) for x in alphas.values())):
        if type(value) not in (int, float) or not abs(value) <= MAX_ALPHA:
            raise CheckpointError(f"{path}: {name} has {str(value)[:40]!r}, not a number up to {MAX_ALPHA}. Fix it.")
    dropout = config.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout <= 1:
        raise CheckpointError(f"{path}: lora_dropout is {str(dropout)[:40]!r}, not a number from 0 to 1. Fix it.")


def _check_module_names(config: JSONObject, path: Path) -> None:
    """Raise CheckpointError unless all settings that choose modules have names or quick patterns."""
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters"):
        value = config.get(name) or []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise CheckpointError(f"{path}: {name} must be a list of names of modules. Fix it.")
        for pattern in names:
            # peft matches these two from end to end, and puts the others into patterns of its own.
            check_pattern(pattern, f"{path}: {name}", 2 if name in ("target_modules", "exclude_modules") else 1)
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(name) or {}:
            check_pattern(pattern, f"{path}: {name}", 1)


def check_pattern(pattern: str, where: str, max_choices: int) -> None:
    """Check that a regular expression matches names within milliseconds.

    Names and a few choices are accepted: a repetition of a character, or a group with alternatives. The time grows with
    the power of their number, and exponentially if a group is repeated, e.g. in `(.+)+`.

    Args:
        where: what has the pattern, for the error message.

    Raises:
        CheckpointError: it is refused, or no regular expression.
    """
    shown = f"{where} has the pattern {pattern[:60]!r}"
    advice = "List the names of the modules instead, e.g. c_attn."
    try:
        re.compile(pattern[: MAX_PATTERN + 1])
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{shown}, which is no regular expression ({error}). {advice}") from error
    without_escapes = re.sub(r"\\[^0-9]", "x", pattern, flags=re.DOTALL)  # but with references to groups
    characters = re.sub(r"\[\^?\]?[^]]*\]", "x", without_escapes).replace("(?:", "(")
    repetitions, groups, alternatives = (len(re.findall(kind, characters)) for kind in (r"[*+?{]", r"\(", r"\|"))
    repeats_group = re.search(r"\)[*+{]|\(\?|\\", characters) is not None  # or has a special group, or a reference
    if (
        repeats_group
        or max(repetitions, groups) > max_choices
        or alternatives > MAX_ALTERNATIVES
        or len(pattern) > MAX_PATTERN
    ):
        raise CheckpointError(f"{shown}, which could take hours to match. {advice}")


def recorded_base(folder: Path, config: JSONObject | None = None) -> tuple[str, str | None]:
    """Return the name of the model that the adapter was trained on, and its hub revision (None: the latest).

    Args:
        folder: the adapter.
        config: content of adapter_config.json; None reads it.

    Raises:
        CheckpointError: adapter_config.json is damaged or does not name a model.
    """
    config = read_json(folder / ADAPTER_CONFIG, folder) if config is None else config
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} does not name the model that the adapter was trained on. Set "
            "base_model_name_or_path there to its folder or hub id."
        )
    if not isinstance(revision := config.get("revision"), (str, NoneType)):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: revision must be a text or null. Correct it.")
    return name, revision


def load_adapter(model: QWenLMHeadModel, folder: Path, tokens: int) -> QWenLMHeadModel:
    """Load an adapter for inference. It is merged into float weights in float32 and rounded once; for quantized
    weights, its layers are kept separate.

    Args:
        model: the adapter's base model, in any precision. It is modified in place and must not be used afterwards.
        folder: an adapter that passes `check_adapter`.
        tokens: length of the adapter's tokenizer. If the model has fewer rows, its embedding and output matrix are
            resized to it.

    Raises:
        CheckpointError: the adapter's tensors do not match the model, or parts of the model are offloaded.
    """
    devices = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "disk" in devices or (len(devices) > 1 and "cpu" in devices):
        raise CheckpointError(
            f"{model.name_or_path} does not fit into the memory it may use, and an adapter cannot be loaded onto "
            f"offloaded layers. Merge it once, `qwen merge {folder} OUT`, and load OUT."
        )
    resized = tokens > model.config.vocab_size
    if resized:
        rows = _embedding_rows(folder)
        if tokens > rows:
            raise CheckpointError(
                f"The adapter in {folder} does not fit {model.name_or_path}: its vocabulary has {tokens} tokens. Use "
                f"that of its training. (Missing from its file: a wte.weight of so many rows, not of {rows}.)"
            )
        model.resize_token_embeddings(tokens, mean_resizing=False)
    adapted = attach_adapter(model, folder, resized=resized)
    if getattr(model.config, "quantization_config", None) is not None:
        return model  # contains the adapter's layers
    with _explain_misfit(model, folder):  # some kinds of layers cannot be merged
        return adapted.merge_and_unload().requires_grad_(True)


def attach_adapter(
    model: QWenLMHeadModel, folder: Path, *, trainable: bool = False, resized: bool = False
) -> "PeftModel":
    """Add the adapter's layers to the model.

    Args:
        model: the adapter's base model; modified in place.
        folder: an adapter that passes `check_adapter`.
        trainable: make the adapter trainable; otherwise all parameters are frozen.
        resized: the embedding and output matrix have new rows, so the adapter must contain both.

    Raises:
        CheckpointError: the adapter's tensors do not match the model.
    """
    import peft

    with _explain_misfit(model, folder):
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        config.base_model_name_or_path = model.name_or_path
        weights = peft.load_peft_weights(str(folder), device="cpu")
        _check_rank(config, weights)
        adapted = peft.PeftModelForCausalLM(model, config)
        check_tensor_names(set(weights), adapted, resized)
        peft.set_peft_model_state_dict(adapted, weights)
    return adapted


@contextlib.contextmanager
def _explain_misfit(model: QWenLMHeadModel, folder: Path) -> Iterator[None]:
    """Turn the errors of peft into a CheckpointError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        *(ArithmeticError, AttributeError, ImportError, LookupError, TypeError, ValueError, RuntimeError),
        SafetensorError,
    ) as error:
        raise CheckpointError(
            f"The adapter in {folder} does not fit {model.name_or_path}. Use the model that it was trained on, and "
            f"keep the files of one adapter together. ({first_line(' '.join(str(error).split()))[:500]})"
        ) from error


def _check_rank(config: "LoraConfig", weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError before peft builds matrices of a rank that those in the file do not have."""
    largest = max((len(tensor) for name, tensor in weights.items() if "lora_" in name and "_A" in name), default=0)
    if (rank := max([config.r, *(config.rank_pattern or {}).values()])) > max(largest, USUAL_RANK):
        raise ValueError(f"Its rank is {rank}, but {largest} in its file.")


def _embedding_rows(folder: Path) -> int:
    """Return the number of rows of the embedding in the file of an adapter; 0 without one."""
    path = adapter_file(folder)
    if path is None:
        return 0
    return max((shape[0] for name, shape in tensor_shapes(path).items() if ".wte." in name and shape), default=0)


def adapter_file(folder: Path) -> Path | None:
    """Return the path of the weight file of an adapter; None if it is missing."""
    return next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)


def check_tensor_names(found: set[str], adapted: "PeftModel", resized: bool = False) -> None:
    """Raise ValueError unless `found` are the adapter's tensor names. peft would leave missing ones at initial values.

    The embedding and the output matrix may be among them. If `resized`, they must be: their new rows are random.
    """
    from peft import get_peft_model_state_dict

    with_embeddings = set(get_peft_model_state_dict(adapted, save_embedding_layers=True))
    needed = with_embeddings if resized else set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if missing := sorted(needed - found):
        raise ValueError(f"Missing from its file: {join_names(missing, 3)}.")
    if unknown := sorted(found - with_embeddings):
        raise ValueError(f"In its file, but not in the model: {join_names(unknown, 3)}.")


__getattr__ = old_names(__name__, {"put_on": "attach_adapter", "with_adapter": "load_adapter"})
