"""Validates LoRA adapters and puts them on a loaded model.

An adapter's folder names its base model and holds tensors; both are compared with the model that it is put on. peft
does the work, and is imported where it is used, since most checkpoints need none.
"""

import importlib.util
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..model.modeling_qwen import QWenLMHeadModel
from .files import CheckpointError, is_complete, is_lfs_pointer, listing, pointer_text, read_json

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in peft's order of preference


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and no model of its own."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def check_adapter(folder: Path, config: dict[str, Any] | None = None) -> None:
    """Raise CheckpointError unless the folder holds a complete LoRA adapter, as far as can be seen quickly.

    Args:
        config: the content of adapter_config.json; None reads it.
    """
    kind = (read_json(folder / ADAPTER_CONFIG, folder) if config is None else config).get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{folder} holds an adapter of the kind {kind!r}. Only LoRA adapters are put on a model here; peft itself "
            "may know what to do with it: `peft.AutoPeftModelForCausalLM.from_pretrained`."
        )
    weights = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(
            f"{folder} has an {ADAPTER_CONFIG} but no {' or '.join(ADAPTER_WEIGHTS)}: the training did not get to the "
            "end, or the folder was not copied as a whole. A checkpoint-N folder inside it may be complete."
        )
    if is_lfs_pointer(weights):
        raise CheckpointError(pointer_text(folder, [weights.name]))
    if not is_complete(weights):
        raise CheckpointError(
            f"{weights} is cut off or damaged. Copy it again from where it was trained, or use a checkpoint-N folder "
            "of that training."
        )
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(f"{folder} holds an adapter (LoRA), which needs one more package: `pip install peft`.")


def recorded_base(folder: Path, config: dict[str, Any] | None = None) -> tuple[str, str | None]:
    """The name of the model that the adapter was trained on, and its revision on the hub, None for the newest.

    Args:
        config: the content of adapter_config.json; None reads it.

    Raises:
        CheckpointError: adapter_config.json is damaged or names none.
    """
    config = read_json(folder / ADAPTER_CONFIG, folder) if config is None else config
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} does not say which model the adapter was trained on. Write its folder or hub "
            "id there, as base_model_name_or_path."
        )
    return name, config.get("revision")


def with_adapter(model: QWenLMHeadModel, folder: Path, tokens: int) -> QWenLMHeadModel:
    """The model as the adapter makes it: merged into its weights, in float32 sums that are rounded once; or beside
    them where they are packed integers.

    Args:
        model: what the adapter was trained on, in any precision; it is changed and should not be used any more.
        folder: one that `check_adapter` passes.
        tokens: the length of the adapter's tokenizer. Where the model has fewer rows, its embedding and its output
            matrix grow to it.

    Raises:
        CheckpointError: the adapter's tensors are not those that belong on this model, or parts of the model lie
            outside the devices that compute.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "disk" in places or (len(places) > 1 and "cpu" in places):
        raise CheckpointError(
            f"{model.name_or_path} is larger than the memory that it may fill, and an adapter cannot be put on what "
            f"was left outside. Merge it once, `qwen merge {folder} OUT`, and load OUT."
        )
    grown = tokens > model.config.vocab_size
    if grown:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    adapted = put_on(model, folder, grown=grown)
    if getattr(model.config, "quantization_config", None) is not None:
        return model  # which has the adapter's layers in it by now
    return adapted.merge_and_unload().requires_grad_(True)


def put_on(model: QWenLMHeadModel, folder: Path, *, trainable: bool = False, grown: bool = False) -> "PeftModel":
    """The model with the adapter's layers in it.

    Args:
        folder: one that `check_adapter` passes.
        trainable: to go on training the adapter; else everything is frozen.
        grown: the embedding and the output matrix have new rows, which must be among the adapter's tensors.

    Raises:
        CheckpointError: the adapter's tensors are not those that belong on this model.
    """
    import peft

    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        config.base_model_name_or_path = model.name_or_path
        weights = peft.load_peft_weights(str(folder), device="cpu")
        adapted = peft.PeftModelForCausalLM(model, config)
        _check_names(set(weights), adapted, grown)
        peft.set_peft_model_state_dict(adapted, weights)
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"The adapter in {folder} does not fit {model.name_or_path}. It belongs on the model that it was trained "
            f"on, and its files belong together. ({' '.join(str(error).split())[:500]})"
        ) from error
    return adapted


def _check_names(found: set[str], adapted: Any, grown: bool) -> None:
    """Raise ValueError unless the tensors of the file are those of the adapter, which peft would leave as they began.

    The embedding and the output matrix may be among them, and must be where they have grown: their new rows are random.
    """
    from peft import get_peft_model_state_dict

    embeddings_too = set(get_peft_model_state_dict(adapted, save_embedding_layers=True))
    needed = embeddings_too if grown else set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if missing := sorted(needed - found):
        raise ValueError(f"Missing from its file: {listing(missing, 3)}.")
    if unknown := sorted(found - embeddings_too):
        raise ValueError(f"In its file, but not in the model: {listing(unknown, 3)}.")
