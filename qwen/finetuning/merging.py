"""Merges a LoRA adapter into its base model: a folder that needs neither.

Weights are rounded once; nothing but a model is written over; a merge that would be an approximation is refused, unless
the base is named. How an adapter is loaded into a model is in `qwen.checkpoint.adapters`.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..checkpoint.adapters import check_adapter, is_adapter, recorded_base
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import CheckpointError, first_line, let_others_read
from ..checkpoint.staging import check_target, filled_at_the_end


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

    Products of the adapter's matrices are added to the weights in float32, and the sums rounded once. Works on the CPU;
    the model must fit into its memory.

    Args:
        adapter: the folder of a LoRA adapter.
        out: a folder that is made, or an empty one. It is filled at the very end: an exception leaves it as it was.
            Where files cannot be moved in it then, the finished model stays where the error says.
        base: the model to merge into, a folder or a hub id; None is the one that the adapter was trained on.
        hub: where an id is fetched from, "huggingface" or "modelscope"; None is $QWEN_HUB, or the former.
        dtype: precision of the weights that are written; None for that of the base.
        max_shard_size: most bytes in a file of weights, such as "2GB".
        overwrite: replace the model that `out` holds; other files in it stay.

    Raises:
        CheckpointError: the adapter or the base cannot be used, or is quantized; says what can be done.
        OSError: `out` is not empty, holds something else than a model, or cannot be written to.
        ValueError: the generation config contradicts itself.
    """
    adapter, out = Path(adapter).expanduser(), Path(out).expanduser()
    if not is_adapter(adapter):
        raise CheckpointError(
            f"{adapter} is no adapter: it has no adapter_config.json, or a config.json beside it as whole models have. "
            "Name the folder that training with --use_lora wrote."
        )
    check_adapter(adapter)
    into = str(recorded_base(adapter)[0] if base is None else base)
    if _is_quantized(into, hub):
        raise CheckpointError(
            f"{into} is quantized, and weights packed into a few bits cannot take an adapter in. Use the adapter as it "
            f"is (`qwen chat -c {adapter}`), or merge it into the same model before quantization, such as "
            "--base Qwen/Qwen-7B-Chat for one trained on Qwen/Qwen-7B-Chat-Int4. That is an approximation: it was "
            "trained to go with rounded weights."
        )
    checkpoint = Checkpoint(adapter, base=base, hub=hub)
    check_target(out, Path(into).expanduser(), overwrite)  # which refuses the adapter's folder too
    with filled_at_the_end(out.absolute()) as folder:
        model, tokenizer = checkpoint.load(cpu_only=True, dtype="auto" if dtype is None else torch.float32)
        model.to(dtype or model.dtype)
        try:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        except SafetensorError as error:  # its name for a full disk
            raise OSError(f"The weights could not be written: {first_line(error)}") from error
        let_others_read(folder)
        tokenizer.save_pretrained(folder)


def is_approximate(adapter: str | os.PathLike, hub: str | None = None) -> bool:
    """Whether an adapter goes into no float model exactly, as it was trained on a quantized one (Q-LoRA)."""
    return _is_quantized(recorded_base(Path(adapter).expanduser())[0], hub)


def _is_quantized(name: str, hub: str | None) -> bool:
    try:
        return Checkpoint(name, hub=hub).is_quantized
    except (OSError, ValueError):  # it is gone or broken; what is published tells by its name
        return name.rstrip("/").lower().endswith(("-int4", "-int8"))
