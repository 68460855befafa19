"""Validates LoRA adapters and loads them onto a base model.

peft is imported where it is used, since most checkpoints do not need it.
"""

import importlib.util
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .._renamed import old_names
from ..model.modeling_qwen import QWenLMHeadModel
from .files import (
    CheckpointError,
    JSONObject,
    is_complete,
    is_lfs_pointer,
    join_names,
    lfs_pointer_message,
    read_json,
)

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in peft's order of preference


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and no model of its own."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def check_adapter(folder: Path, config: JSONObject | None = None) -> None:
    """Raise CheckpointError unless the folder holds a complete LoRA adapter. Tensors are not read.

    Args:
        folder: the adapter.
        config: content of adapter_config.json; None reads it.
    """
    peft_type = (read_json(folder / ADAPTER_CONFIG, folder) if config is None else config).get("peft_type")
    if peft_type != "LORA":
        raise CheckpointError(
            f"{folder} holds an adapter of type {peft_type!r}. Only LoRA adapters are supported here; peft itself may "
            "support it: `peft.AutoPeftModelForCausalLM.from_pretrained`."
        )
    weights = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
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
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(f"{folder} holds an adapter (LoRA), which needs another package: `pip install peft`.")


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
    return name, config.get("revision")


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
        model.resize_token_embeddings(tokens, mean_resizing=False)
    adapted = attach_adapter(model, folder, resized=resized)
    if getattr(model.config, "quantization_config", None) is not None:
        return model  # contains the adapter's layers
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

    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        config.base_model_name_or_path = model.name_or_path
        weights = peft.load_peft_weights(str(folder), device="cpu")
        adapted = peft.PeftModelForCausalLM(model, config)
        _check_names(set(weights), adapted, resized)
        peft.set_peft_model_state_dict(adapted, weights)
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"The adapter in {folder} does not fit {model.name_or_path}. Use the model that it was trained on, and "
            f"keep the files of one adapter together. ({' '.join(str(error).split())[:500]})"
        ) from error
    return adapted


def _check_names(found: set[str], adapted: "PeftModel", resized: bool) -> None:
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
