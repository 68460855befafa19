"""Quantizes a float checkpoint to 4 or 8 bits with GPTQ, calibrated with conversations.

What is written is laid out as the published -Int4 and -Int8 checkpoints are, and loads as they do.
"""

import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.staging import filled_at_the_end
from ..data.samples import encode_sample
from ..model.tokenization_qwen import QWenTokenizer
from .checks import GROUP_SIZES, as_checkpoint, bytes_before, check, check_numbers, full_memory_explained, gigabytes
from .gptqmodel_runner import PUBLISHED_SETTINGS, Progress, run_gptq
from .writer import save

__all__ = [
    "GROUP_SIZES",
    "PUBLISHED_SETTINGS",
    "Loss",
    "Outcome",
    "calibration_samples",
    "check",
    "gigabytes",
    "quantize",
]


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


def quantize(
    source: Checkpoint | str | os.PathLike | None,
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
        source: a checkpoint, or its folder or hub id; None is the bundled chat model.
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
    source = as_checkpoint(source)
    config = check(source, target, **options, max_shard_size=max_shard_size, overwrite=overwrite)
    if not samples:
        raise ValueError("There are no samples to calibrate with: give at least one.")
    target = Path(target).expanduser().absolute()
    with filled_at_the_end(target) as folder, full_memory_explained():
        model, tokenizer = source.load(cpu_only=True, dtype=torch.float16)
        check_numbers(model, samples[0])
        before = bytes_before(model)
        log = run_gptq(model, samples, options, cpu_only, Progress(config.num_hidden_layers) if progress else None)
        save(model, tokenizer, source, folder, options, max_shard_size)
        after = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Outcome(target, before, after, time.perf_counter() - began, _losses(log))


def _losses(log: list[dict[str, Any]]) -> dict[str, Loss]:
    by_kind = defaultdict(list)
    for entry in sorted(log, key=lambda entry: (entry["layer"], entry["module"])):
        by_kind[entry["module"]].append((float(entry["loss"]), entry["layer"]))
    return {
        kind: Loss(sum(loss for loss, _ in found) / len(found), *max(found)) for kind, found in sorted(by_kind.items())
    }
