"""Merges a LoRA adapter into its base model. The result loads without either.

Weights are rounded once. Only a model may be overwritten. A merge that would be an approximation is rejected unless the
base is named. `qwen.checkpoint.adapters` loads adapters into models.
"""

import os
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from ..checkpoint.adapters import check_adapter, is_adapter, recorded_base
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import CheckpointError, first_line
from ..checkpoint.generation_settings import save_generation_config
from ..checkpoint.staging import check_target, staged_directory


def merge(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    hub: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "2GB",
    overwrite: bool = False,
) -> None:
    """Write a complete folder: weights, configuration, code, tokenizer, and the generation config of a chat model.

    The products of the adapter's matrices are added to the weights in float32, and the sums are rounded once. Runs on
    the CPU; the model must fit into main memory.

    Args:
        adapter: folder of a LoRA adapter.
        out: new or empty folder. It is filled at the very end: an exception leaves it as it was. If the files cannot be
            moved into it, the finished model is kept where the error says.
        base: model to merge into, a folder or hub id; None for the one that the adapter was trained on.
        hub: hub to download from, "huggingface" or "modelscope"; None for $QWEN_HUB or huggingface.
        dtype: precision of the written weights; None for that of the base.
        max_shard_size: maximum size of a weight file, for example "2GB".
        overwrite: replace the model in `out`; other files there are kept.

    Raises:
        CheckpointError: the adapter or the base is unusable or quantized; the message says what to do.
        OSError: `out` is not empty, holds something other than a model, or cannot be written to.
    """
    adapter, out = Path(adapter).expanduser(), Path(out).expanduser()
    if not is_adapter(adapter):
        raise CheckpointError(
            f"{adapter} is not an adapter: it has no adapter_config.json, or it has a config.json, as whole models do. "
            "Name the folder written by training with --use_lora."
        )
    check_adapter(adapter)
    base_name = str(recorded_base(adapter)[0] if base is None else base)
    if _is_quantized(base_name, hub):
        raise CheckpointError(
            f"{base_name} is quantized, and an adapter cannot be merged into packed weights. Use the adapter as it is "
            f"(`qwen chat -c {adapter}`), or merge it into the same model before quantization, for example with "
            "--base Qwen/Qwen-7B-Chat if it was trained on Qwen/Qwen-7B-Chat-Int4. That is an approximation: it was "
            "trained on rounded weights."
        )
    checkpoint = Checkpoint(adapter, base=base, hub=hub)
    check_target(out, Path(base_name).expanduser(), overwrite)  # also rejects the adapter's folder
    with staged_directory(out.absolute()) as folder:
        model, tokenizer = checkpoint.load(cpu_only=True, dtype="auto" if dtype is None else torch.float32)
        # The decorator of transformers' own `to` hides its parameters.
        cast(torch.nn.Module, model).to(dtype or model.dtype)
        settings, model.generation_config = model.generation_config, GenerationConfig()
        try:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        except SafetensorError as error:  # raised when the disk is full
            raise OSError(f"The weights could not be written: {first_line(error)}") from error
        save_generation_config(settings, folder)
        tokenizer.save_pretrained(folder)


def is_approximate(adapter: str | os.PathLike, hub: str | None = None) -> bool:
    """Whether merging the adapter is an approximation, since it was trained on a quantized model (Q-LoRA)."""
    return _is_quantized(recorded_base(Path(adapter).expanduser())[0], hub)


def _is_quantized(name: str, hub: str | None) -> bool:
    try:
        return Checkpoint(name, hub=hub).is_quantized
    except (OSError, ValueError):  # missing or broken; published names end like this
        return name.rstrip("/").lower().endswith(("-int4", "-int8"))
