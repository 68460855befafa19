"""An adapter and its base model → one folder that needs neither.

Revolves around what must not happen to weights: an approximation that nobody was told of, rounding twice, something
written over. How an adapter goes into a model, `qwen.checkpoint.adapters` knows.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..checkpoint.adapters import ADAPTER_CONFIG, check_adapter, is_adapter, recorded_base
from ..checkpoint.files import BIN, BIN_INDEX, SAFETENSORS, SAFETENSORS_INDEX, CheckpointError, let_others_read
from ..checkpoint.loading import load_config, load_with_adapter, resolve


def merge(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "2GB",
    overwrite: bool = False,
) -> None:
    """Write a complete folder: weights, configuration, code, tokenizer, and the generation config of a chat model.

    Products of the adapter's matrices are added to the weights in float32, and the sums rounded once. Works on the CPU;
    the model must fit into its memory.

    Args:
        adapter: the folder of a LoRA adapter.
        out: a folder that is made, or an empty one.
        base: the model to merge into, a folder or a hub id; None is the one that the adapter was trained on.
        dtype: precision of the weights that are written; None for that of the base.
        max_shard_size: most bytes in a file of weights, such as "2GB".
        overwrite: replace what `out` has of the same names, and its weights.

    Raises:
        CheckpointError: the adapter or the base cannot be used, or is quantized; says what can be done.
        OSError: `out` is not empty or cannot be written to.
        ValueError: the generation config contradicts itself.
    """
    adapter, out = Path(adapter).expanduser(), Path(out).expanduser()
    if not is_adapter(adapter):
        raise CheckpointError(
            f"{adapter} is no adapter: it has no adapter_config.json, or a config.json beside it as whole models have. "
            "Name the folder that training with --use_lora wrote."
        )
    check_adapter(adapter)
    into = recorded_base(adapter)[0] if base is None else resolve(base)
    if _is_quantized(into):
        raise CheckpointError(
            f"{into} is quantized, and weights packed into a few bits cannot take an adapter in. Use the adapter as it "
            f"is (`python cli_demo.py -c {adapter}`), or merge it into the same model before quantization, such as "
            "--base Qwen/Qwen-7B-Chat for one trained on Qwen/Qwen-7B-Chat-Int4. That is an approximation: it was "
            "trained to go with rounded weights."
        )
    _check_out(out, (adapter, Path(into)), overwrite)
    model, tokenizer = load_with_adapter(
        adapter, base, device_map="cpu", dtype="auto" if dtype is None else torch.float32
    )
    model.to(dtype or model.dtype)
    for name in (SAFETENSORS, SAFETENSORS_INDEX, BIN, BIN_INDEX):
        (out / name).unlink(missing_ok=True)  # some of these would be loaded instead of what is written now
    tokenizer.save_pretrained(out)  # before the weights: a folder without them is not taken for a model
    try:
        model.save_pretrained(out, max_shard_size=max_shard_size)
        let_others_read(out)
    except SafetensorError as error:  # its name for a full disk
        raise OSError(f"The weights could not be written to {out}, which is incomplete now: {error}") from error


def is_approximate(adapter: str | os.PathLike) -> bool:
    """Whether an adapter goes into no float model exactly, as it was trained on a quantized one (Q-LoRA)."""
    return _is_quantized(recorded_base(Path(adapter).expanduser())[0])


def _is_quantized(name: str) -> bool:
    try:
        return getattr(load_config(name), "quantization_config", None) is not None
    except (OSError, ValueError):  # it is gone or broken; what is published tells by its name
        return name.rstrip("/").lower().endswith(("-int4", "-int8"))


def _check_out(out: Path, inputs: tuple[Path, ...], overwrite: bool) -> None:
    """Make the folder, unless something would be lost."""
    if out.resolve() in [path.resolve() for path in inputs] or (out / ADAPTER_CONFIG).is_file():
        raise FileExistsError(f"{out} holds what is to be merged, or another adapter. Name a folder of its own.")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file. Name a folder.")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(
            f"{out} is not empty. Name another folder, or add --overwrite to replace the model in it."
        )
    out.mkdir(parents=True, exist_ok=True)
