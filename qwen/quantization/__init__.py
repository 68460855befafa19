"""A float checkpoint and conversations → the same model in 4 or 8 bits, as the published -Int4 and -Int8 ones are.

Revolves around hours of work that must not be in vain: what cannot work is refused before anything slow begins.
GPTQModel does the arithmetic (GPTQ: Frantar et al. 2022, https://arxiv.org/abs/2210.17323). How quantized checkpoints
are loaded, it does not know.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file
from transformers.utils.hub import convert_file_size_to_int

from ..checkpoint.adapters import is_adapter
from ..checkpoint.files import (
    CheckpointError,
    first_line,
    let_others_read,
    read_json,
)
from ..checkpoint.loading import check_checkpoint, load_config, load_model, resolve
from ..checkpoint.staging import check_target, filled_at_the_end
from ..data.samples import encode_sample
from ..model.configuration_qwen import QWenConfig
from ..model.loading_options_qwen import PRECISIONS
from ..model.modeling_qwen import QWenLMHeadModel
from ..model.tokenization_qwen import QWenTokenizer
from ..quiet import quiet_gptqmodel

GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
PUBLISHED_SETTINGS = {
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
}
"""What the config.json of every published quantized checkpoint says, beside the bits and the group size."""

_WORD = 32  # bits of the integers that hold packed weights; rows and columns come in multiples of it


@dataclass(frozen=True)
class Loss:
    """What rounding cost the matrices of one kind: half the squared error of their outputs, per token."""

    mean: float
    worst: float
    worst_layer: int


@dataclass(frozen=True)
class Outcome:
    """What a quantization came to.

    Args:
        folder: where the model is.
        bytes_before: of the weights in 16 bits.
        bytes_after: of the files of weights.
        seconds: with loading and saving.
        losses: by kind of matrix, "attn.c_attn" first.
    """

    folder: Path
    bytes_before: int
    bytes_after: int
    seconds: float
    losses: dict[str, Loss]


def calibration_samples(
    samples: Sequence[dict], tokenizer: QWenTokenizer, max_length: int, count: int = 128, seed: int = 1234
) -> list[list[int]]:
    """Token ids of conversations, each cut to `max_length`: those of a random choice where there are more than `count`.

    Args:
        samples: in the form of fine-tuning data: a list, or a ConversationFile of any size, of which only the chosen
            ones are read again.

    Raises:
        MalformedSample: a sample is not as it should be.
        ValueError: `max_length` or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"{count} samples are too few: calibration needs at least 1.")
    chosen = random.Random(seed).sample(range(len(samples)), min(count, len(samples)))
    return [encode_sample(samples[index], tokenizer, max_length, index=index)["input_ids"] for index in sorted(chosen)]


def check(
    source: str | os.PathLike | None,
    target: str | os.PathLike,
    *,
    bits: int = 4,
    group_size: int = 128,
    max_shard_size: str = "2GB",
    overwrite: bool = False,
) -> QWenConfig:
    """Refuse what `quantize` could not do, as far as can be seen in a second; the configuration of `source`.

    Raises:
        CheckpointError: `source` is no float checkpoint of these models, or a package is missing.
        MemoryError: the model is larger than the main memory.
        OSError: `target` is not empty, cannot be written to, or has no room.
        ValueError: the bits, the group size or the shard size do not go with this model.
    """
    name, target = resolve(source), Path(target).expanduser()
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits: these models are quantized to 4 or 8.")
    try:
        convert_file_size_to_int(max_shard_size)
    except ValueError as error:
        raise ValueError(f"{max_shard_size!r} is no size: write a number and MB or GB, such as 2GB.") from error
    config = _check_source(name)
    with torch.device("meta"):
        empty = QWenLMHeadModel(config)
    _check_shapes(empty, group_size)
    check_target(target, Path(name), overwrite)
    if (held := _bytes_before(empty)) > (memory := _main_memory()):
        raise MemoryError(
            f"{name} does not fit into the main memory, where it takes {gigabytes(held)} in 16 bits: this machine has "
            f"{gigabytes(memory)}."
        )
    needed = _bytes_after(empty, bits, group_size)
    place = next(folder for folder in (target, *target.absolute().parents) if folder.is_dir())
    if (free := shutil.disk_usage(place).free) < needed:
        raise OSError(f"There is no room for {target}: it takes {gigabytes(needed)}, and {gigabytes(free)} are free.")
    return config


def quantize(
    source: str | os.PathLike | None,
    target: str | os.PathLike,
    samples: Sequence[list[int]],
    *,
    bits: int = 4,
    group_size: int = 128,
    max_shard_size: str = "2GB",
    overwrite: bool = False,
    cpu_only: bool = False,
    progress: bool = False,
) -> Outcome:
    """Write a complete folder: packed weights, configuration, code, tokenizer, generation config.

    The whole model is in the main memory, in 16 bits. Where there is a GPU, one layer after the other goes there, with
    what the samples look like at that depth.

    Args:
        source: a folder or a hub id; None is the bundled chat model.
        target: a folder that is made, or an empty one. It is filled at the very end: an exception leaves it as it was.
            Where files cannot be moved in it then, the finished model stays where the error says.
        samples: token ids, of `calibration_samples`.
        bits: 4 or 8.
        group_size: how many weights of a row share a scale.
        max_shard_size: most bytes in a file of weights, such as "2GB".
        overwrite: replace the model that `target` holds; other files in it stay.
        cpu_only: stay off the GPU.
        progress: show it on standard error, as a bar on a terminal and else in lines.

    Raises:
        as `check`; ValueError also for no samples, and for a model that leaves the range of float16; MemoryError also
        when the memory, the GPU's or the main one, fills up on the way.
    """
    began = time.perf_counter()
    options = {"bits": bits, "group_size": group_size}
    config = check(source, target, **options, max_shard_size=max_shard_size, overwrite=overwrite)
    if not samples:
        raise ValueError("There are no samples to calibrate with: give at least one.")
    name, target = resolve(source), Path(target).expanduser().absolute()
    if os.path.isdir(name):
        name = os.path.abspath(name)
    with filled_at_the_end(target) as folder, _full_memory_explained():
        model, tokenizer = load_model(name, cpu_only=True, dtype=torch.float16)
        _check_numbers(model, samples[0])
        before = _bytes_before(model)
        log = _run_gptq(model, samples, options, cpu_only, _Progress(config.num_hidden_layers) if progress else None)
        _save(model, tokenizer, name, folder, options, max_shard_size)
        after = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Outcome(target, before, after, time.perf_counter() - began, _losses(log))


def gigabytes(size: float) -> str:
    """A number of bytes for people: "5.81 MB"."""
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}"
    raise AssertionError


# ---- what can be known beforehand ----


def _check_source(name: str) -> QWenConfig:
    """The configuration, unless this is no float checkpoint, as a whole and of these models."""
    if is_adapter(Path(name)):
        adapter, merged = shlex.quote(name), shlex.quote(f"{name.rstrip('/')}-merged")
        raise CheckpointError(
            f"{name} is an adapter (LoRA), and a whole model is quantized. Merge it into its base first, and quantize "
            f"the result: `python finetune/merge_lora.py {adapter} {merged}`. If it was trained on a quantized model "
            "(Q-LoRA), name the float one with --base."
        )
    if missing := [package for package in ("gptqmodel", "optimum") if importlib.util.find_spec(package) is None]:
        raise CheckpointError(
            f"Quantizing needs packages that are missing: `pip install {' '.join(missing)}`. requirements_gptq.txt "
            "names all."
        )
    check_checkpoint(name)
    config = load_config(name)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{name} is quantized already. Name the model that it was made from, such as Qwen/Qwen-7B-Chat for "
            "Qwen/Qwen-7B-Chat-Int4."
        )
    return config


def _linears(model: QWenLMHeadModel) -> dict[str, nn.Linear]:
    """The matrices of a layer that are quantized, by their kind."""
    return {name: module for name, module in model.transformer.h[0].named_modules() if isinstance(module, nn.Linear)}


def _check_shapes(model: QWenLMHeadModel, group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"A group size of {group_size} is not among {', '.join(map(str, GROUP_SIZES))}.")
    for name, linear in _linears(model).items():
        for side, width in (("inputs", linear.in_features), ("outputs", linear.out_features)):
            if width % _WORD:
                raise ValueError(
                    f"{name} has {width} {side}, and weights are packed in multiples of {_WORD}: a model of this shape "
                    "cannot be quantized."
                )
        if linear.in_features % group_size:
            fitting = [str(size) for size in GROUP_SIZES if linear.in_features % size == 0]
            raise ValueError(
                f"A group size of {group_size} does not divide the {linear.in_features} inputs of {name}: take "
                f"{' or '.join(fitting)}."
            )


def _main_memory() -> float:
    """All that the machine has, in bytes; infinite where the system does not say."""
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows has no sysconf, others not these names
        return float("inf")
    return size if size > 0 else float("inf")


def _bytes_before(model: QWenLMHeadModel) -> int:
    """Of the weights in 16 bits."""
    return sum(2 * weight.numel() for weight in model.parameters())


def _bytes_after(model: QWenLMHeadModel, bits: int, group_size: int) -> int:
    """Of the files of weights: packed integers, 16-bit scales and packed zero points per group, the rest in 16 bits."""
    packed = scales = 0
    for linear in _linears(model).values():
        packed += linear.weight.numel()
        scales += linear.weight.numel() // group_size
    layers = len(model.transformer.h)
    others = sum(weight.numel() for weight in model.parameters()) - layers * packed
    return 2 * others + layers * (packed * bits + scales * (16 + bits)) // 8


# ---- the arithmetic ----


class _Progress:
    """A bar on a terminal, a line a layer elsewhere; GPTQModel tells it of each step."""

    def __init__(self, layers: int):
        self.layers = layers
        self.layer = -1
        self.bar: tqdm | None = None

    def subset_event(self, stage: str, layer_idx: int, subset_total: int, **event: Any) -> None:
        """Called by GPTQModel. A subset is matrices with the same input; layers have the same number of them."""
        if stage == "forward_start" and layer_idx != self.layer:
            self.layer = layer_idx
            if not sys.stderr.isatty():
                print(f"Quantizing layer {layer_idx + 1} of {self.layers}", file=sys.stderr, flush=True)
            elif self.bar is None:
                self.bar = tqdm(total=self.layers * subset_total, desc="Quantizing", unit=" steps", dynamic_ncols=True)
        if stage == "quant_complete" and self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _run_gptq(
    model: QWenLMHeadModel,
    samples: Sequence[list[int]],
    options: dict[str, int],
    cpu_only: bool,
    progress: _Progress | None,
) -> list[dict[str, Any]]:
    """Put packed matrices in the place of the model's own; GPTQModel's log, an entry a matrix."""
    # With one or two cores GPTQModel gives itself one worker, and then fails because it wants two.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    root_level = logging.getLogger().level
    quiet_gptqmodel()
    with (
        tempfile.TemporaryDirectory() as work,
        contextlib.chdir(work),  # where GPTQModel leaves its logs
        contextlib.redirect_stdout(io.StringIO()),  # and what it draws
    ):
        from gptqmodel import QuantizeConfig
        from gptqmodel.models._const import DEVICE
        from gptqmodel.models.definitions.qwen import QwenQModel
        from gptqmodel.utils.importer import auto_select_device

        settings = QuantizeConfig(
            **options,
            **PUBLISHED_SETTINGS,
            device=DEVICE.CPU if cpu_only else auto_select_device(None, None),
            offload_to_disk=False,  # the model is in memory
            fallback=None,  # where GPTQ fails, an error is better than plain rounding that nobody was told of
        )
        wrapped = QwenQModel(model, quantized=False, quantize_config=settings)
        wrapped.subset_callback = progress
        try:
            # Batches of one: the length of a prompt decides about its NTK base, and padding costs time.
            return wrapped.quantize([list(ids) for ids in samples], batch_size=1, calibration_data_min_length=1)["gptq"]
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            raise _out_of_range(model, "its hidden states") from error
        finally:
            logging.getLogger().setLevel(root_level)  # GPTQModel lets every library say all that it does
            if progress is not None:
                progress.close()


@torch.no_grad()
def _check_numbers(model: QWenLMHeadModel, ids: list[int]) -> None:
    """Refuse a model that leaves the range of float16, with its weights or on the way through it."""
    logits = model(torch.tensor([ids[:32]]), use_cache=False).logits
    for name, tensor in (*model.named_parameters(), ("its logits", logits)):
        if not tensor.isfinite().all():
            raise _out_of_range(model, name)


def _out_of_range(model: QWenLMHeadModel, what: str) -> ValueError:
    return ValueError(
        f"{model.name_or_path} leaves the range of float16, in which quantized models compute: see {what}."
    )


@contextlib.contextmanager
def _full_memory_explained() -> Iterator[None]:
    """Make a MemoryError with advice of what Python, torch and GPU libraries raise when there is no memory left."""
    less = "Calibrate with fewer conversations (--samples) or shorter ones (--max_len)"
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # torch's has no class of its own
            raise MemoryError(f"The main memory is full. {less}, or take a machine with more.") from error
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            raise MemoryError(f"The memory of the GPU is full. {less}, or stay off it with --cpu-only.") from error
        raise


def _losses(log: list[dict[str, Any]]) -> dict[str, Loss]:
    by_kind = defaultdict(list)
    for entry in sorted(log, key=lambda entry: (entry["layer"], entry["module"])):
        by_kind[entry["module"]].append((float(entry["loss"]), entry["layer"]))
    return {
        kind: Loss(sum(loss for loss, _ in found) / len(found), *max(found)) for kind, found in sorted(by_kind.items())
    }


# ---- the folder ----


def _save(
    model: QWenLMHeadModel,
    tokenizer: QWenTokenizer,
    source: str,
    folder: Path,
    options: dict[str, int],
    max_shard_size: str,
) -> None:
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    try:
        save_torch_state_dict(
            weights, folder, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except SafetensorError as error:  # its name for a full disk
        raise OSError(f"The weights could not be written: {first_line(error)}") from error
    let_others_read(folder)
    tokenizer.save_pretrained(folder)
    custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    _write_config(source, folder, options)
    found = cached_file(source, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    if found is not None:
        shutil.copyfile(found, folder / GENERATION_CONFIG_NAME)


def _write_config(source: str, folder: Path, options: dict[str, int]) -> None:
    """In the place of what transformers wrote: the configuration of `source`, field by field, and what is new."""
    config = read_json(Path(cached_file(source, CONFIG_NAME)), source)
    config["auto_map"] = read_json(folder / CONFIG_NAME, folder)["auto_map"]
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = "float16"
    config |= {flag: False for flag in PRECISIONS if config.get(flag)}  # they would win over that
    config["quantization_config"] = {
        **options,
        **PUBLISHED_SETTINGS,
        "model_file_base_name": "model",
        "quant_method": "gptq",
    }
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
