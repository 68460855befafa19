"""Writes the folder of a quantized model, in the layout of the published -Int4 and -Int8 checkpoints."""

import copy
import json
import shutil
from pathlib import Path
from typing import cast

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import apply_umask, first_line, read_json
from ..model.loading_options_qwen import PRECISIONS
from ..model.modeling_qwen import QWenLMHeadModel
from ..model.tokenization_qwen import QWenTokenizer
from .gptqmodel_runner import PUBLISHED_SETTINGS


def save(
    model: QWenLMHeadModel,
    tokenizer: QWenTokenizer,
    source: Checkpoint,
    folder: Path,
    options: dict[str, int],
    max_shard_size: str,
) -> None:
    """Write packed weights, tokenizer, code, configuration and generation config.

    Raises:
        OSError: the disk is full.
    """
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    try:
        save_torch_state_dict(
            weights, folder, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except SafetensorError as error:  # raised when the disk is full
        raise OSError(f"The weights could not be written: {first_line(error)}") from error
    apply_umask(folder)
    tokenizer.save_pretrained(folder)
    for part in (model, model.base_model):
        custom_object_save(part, folder, config=cast(dict, model.config))  # takes both, see its docstring
    model.config.save_pretrained(folder)
    _write_config(source, folder, options)
    found = source.find(GENERATION_CONFIG_NAME)
    if found is not None:
        shutil.copyfile(found, folder / GENERATION_CONFIG_NAME)


def _write_config(source: Checkpoint, folder: Path, options: dict[str, int]) -> None:
    """Replace the config.json of transformers by that of `source` with the changed fields."""
    config = copy.deepcopy(source.config_json)
    config["auto_map"] = read_json(folder / CONFIG_NAME, folder)["auto_map"]
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = "float16"
    config |= {flag: False for flag in PRECISIONS if config.get(flag)}  # they would override the dtype
    config["quantization_config"] = {
        **options,
        **PUBLISHED_SETTINGS,
        "model_file_base_name": "model",
        "quant_method": "gptq",
    }
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
