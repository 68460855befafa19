"""Checks whether a model can be quantized, before the slow part starts, and explains out-of-memory errors.

Quantizing a large model takes hours: everything that can be checked beforehand is checked within a second.
"""

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers.utils.hub import convert_file_size_to_int

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import CheckpointError
from ..checkpoint.staging import check_target
from ..library_errors import is_gpu_memory_full, is_main_memory_full
from ..model.configuration_qwen import QWenConfig
from ..model.gptq_qwen import missing_packages
from ..model.modeling_qwen import QWenLMHeadModel

GROUP_SIZES = (32, 64, 128, 256, 512, 1024)

_PACKED_INT_BITS = 32  # bits of the integers that hold packed weights; rows and columns must be multiples of it


def check(
    source: Checkpoint | str | os.PathLike | None,
    target: str | os.PathLike,
    *,
    bits: int = 4,
    group_size: int = 128,
    max_shard_size: str = "2GB",
    overwrite: bool = False,
) -> QWenConfig:
    """Raise the error that `quantize` would run into, as far as it can be found within a second.

    Args:
        source: see `quantize`, like the others.

    Returns:
        The configuration of `source`.

    Raises:
        CheckpointError: `source` is not a float checkpoint of these models, or a package is missing.
        MemoryError: the model is larger than the main memory.
        OSError: `target` is not empty or cannot be written to, or the disk is too full.
        ValueError: the bits, the group size or the shard size do not fit this model.
    """
    source, target = as_checkpoint(source), Path(target).expanduser()
    name = source.name
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits are not supported: use 4 or 8.")
    try:
        convert_file_size_to_int(max_shard_size)
    except ValueError as error:
        raise ValueError(f"Invalid size {max_shard_size!r}: write a number and MB or GB, for example 2GB.") from error
    config = _check_source(source)
    with torch.device("meta"):
        empty = QWenLMHeadModel(config)
    _check_shapes(empty, group_size)
    check_target(target, Path(name), overwrite)
    if (model_bytes := bytes_before(empty)) > (main_memory := _main_memory()):
        raise MemoryError(
            f"{name} does not fit into the main memory: it takes {format_bytes(model_bytes)} in 16 bits, and this "
            f"machine has {format_bytes(main_memory)}."
        )
    required_bytes = _bytes_after(empty, bits, group_size)
    place = next(folder for folder in (target, *target.absolute().parents) if folder.is_dir())
    if (free_bytes := shutil.disk_usage(place).free) < required_bytes:
        raise OSError(
            f"The disk is too full for {target}: it takes {format_bytes(required_bytes)}, and "
            f"{format_bytes(free_bytes)} are free."
        )
    return config


def as_checkpoint(source: Checkpoint | str | os.PathLike | None) -> Checkpoint:
    """Open a checkpoint by name; a Checkpoint is returned unchanged."""
    return source if isinstance(source, Checkpoint) else Checkpoint(source)


def _check_source(source: Checkpoint) -> QWenConfig:
    """Return the configuration. Raises CheckpointError unless this is a whole float checkpoint of these models."""
    name = source.name
    if source.is_adapter:
        adapter, merged = shlex.quote(name), shlex.quote(f"{name.rstrip('/')}-merged")
        raise CheckpointError(
            f"{name} is an adapter (LoRA), but only whole models can be quantized. Merge it into its base first, and "
            f"quantize the result: `qwen merge {adapter} {merged}`. If it was trained on a quantized model "
            "(Q-LoRA), name the float model with --base."
        )
    if missing := missing_packages():
        raise CheckpointError(f"Quantizing needs packages that are missing: `pip install {' '.join(missing)}`.")
    source.check()
    if source.is_quantized:
        raise CheckpointError(
            f"{name} is quantized already. Name the model that it was made from, for example Qwen/Qwen-7B-Chat for "
            "Qwen/Qwen-7B-Chat-Int4."
        )
    return source.config


def _linears(model: QWenLMHeadModel) -> dict[str, nn.Linear]:
    """Return the matrices of a layer that are quantized, by kind."""
    return {name: module for name, module in model.transformer.h[0].named_modules() if isinstance(module, nn.Linear)}


def _check_shapes(model: QWenLMHeadModel, group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"Invalid group size {group_size}: use one of {', '.join(map(str, GROUP_SIZES))}.")
    for name, linear in _linears(model).items():
        for side, width in (("inputs", linear.in_features), ("outputs", linear.out_features)):
            if width % _PACKED_INT_BITS:
                raise ValueError(
                    f"{name} has {width} {side}, but weights are packed in multiples of {_PACKED_INT_BITS}: a model of "
                    "this shape cannot be quantized."
                )
        if linear.in_features % group_size:
            valid_sizes = [str(size) for size in GROUP_SIZES if linear.in_features % size == 0]
            raise ValueError(
                f"A group size of {group_size} does not divide the {linear.in_features} inputs of {name}: use "
                f"{' or '.join(valid_sizes)}."
            )


def _main_memory() -> float:
    """Return the total main memory in bytes; infinity if the system does not report it."""
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # no sysconf on Windows; elsewhere, these names may be missing
        return float("inf")
    return size if size > 0 else float("inf")


def bytes_before(model: QWenLMHeadModel) -> int:
    """Size of the weights in 16 bits."""
    return sum(2 * weight.numel() for weight in model.parameters())


def _bytes_after(model: QWenLMHeadModel, bits: int, group_size: int) -> int:
    """Size of the weight files: packed integers, 16-bit scales and packed zero points per group, else 16 bits."""
    packed = scales = 0
    for linear in _linears(model).values():
        packed += linear.weight.numel()
        scales += linear.weight.numel() // group_size
    layers = len(model.transformer.h)
    others = sum(weight.numel() for weight in model.parameters()) - layers * packed
    return 2 * others + layers * (packed * bits + scales * (16 + bits)) // 8


@torch.no_grad()
def check_finite(model: QWenLMHeadModel, ids: list[int]) -> None:
    """Raise ValueError if weights or logits leave the range of float16."""
    logits = model(torch.tensor([ids[:32]]), use_cache=False).logits
    for name, tensor in (*model.named_parameters(), ("its logits", logits)):
        if not tensor.isfinite().all():
            raise float16_overflow_error(model, name)


def float16_overflow_error(model: QWenLMHeadModel, what: str) -> ValueError:
    return ValueError(
        f"{model.name_or_path} leaves the range of float16, in which quantized models compute: see {what}."
    )


@contextlib.contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn out-of-memory errors of Python, torch and GPU libraries into a MemoryError with advice."""
    advice = "Calibrate with fewer conversations (--samples) or shorter ones (--max_len)"
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_main_memory_full(error):
            raise MemoryError(f"The main memory is full. {advice}, or use a machine with more.") from error
        if is_gpu_memory_full(error):
            raise MemoryError(f"The memory of the GPU is full. {advice}, or run on the CPU with --cpu-only.") from error
        raise


def format_bytes(size: float) -> str:
    """Format a number of bytes, for example "5.81 MB"."""
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}"
    raise AssertionError
