"""Quantizes a float checkpoint to 4 or 8 bits with GPTQ, calibrated with conversations.

The result has the layout of the published -Int4 and -Int8 checkpoints, and loads like them.
"""

import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .._renamed import old_names
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.staging import staged_directory
from ..data.samples import encode_sample
from ..model.tokenization_qwen import QWenTokenizer
from .checks import GROUP_SIZES, as_checkpoint, bytes_before, check, check_finite, explain_out_of_memory, format_bytes
from .gptqmodel_runner import PUBLISHED_SETTINGS, LogEntry, Progress, run_gptq
from .writer import save

__all__ = [
    "GROUP_SIZES",
    "PUBLISHED_SETTINGS",
    "LayerError",
    "QuantizeResult",
    "calibration_samples",
    "check",
    "format_bytes",
    "quantize",
]


@dataclass(frozen=True)
class LayerError:
    """Quantization error of the matrices of one kind: half the squared error of their outputs, per token."""

    mean: float
    worst: float
    worst_layer: int


@dataclass(frozen=True)
class QuantizeResult:
    """Result of a quantization.

    Args:
        folder: folder of the model.
        bytes_before: size of the weights in 16 bits.
        bytes_after: size of the weight files.
        seconds: duration, including loading and saving.
        losses: by kind of matrix, "attn.c_attn" first.
    """

    folder: Path
    bytes_before: int
    bytes_after: int
    seconds: float
    losses: dict[str, LayerError]


def calibration_samples(
    samples: Sequence[dict], tokenizer: QWenTokenizer, max_length: int, count: int = 128, seed: int = 1234
) -> list[list[int]]:
    """Return the token ids of at most `count` conversations, chosen at random and each truncated to `max_length`.

    Args:
        samples: in the format of fine-tuning data: a list, or a ConversationFile of any size, of which only the chosen
            samples are read again.

    Raises:
        MalformedSample: a sample is malformed.
        ValueError: `max_length` or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"{count} samples are too few: calibration needs at least 1.")
    indices = random.Random(seed).sample(range(len(samples)), min(count, len(samples)))
    return [encode_sample(samples[index], tokenizer, max_length, index=index)["input_ids"] for index in sorted(indices)]


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
) -> QuantizeResult:
    """Write a complete folder: packed weights, configuration, code, tokenizer, generation config.

    The whole model is in main memory, in 16 bits. If there is a GPU, one layer at a time is moved there, with the
    hidden states of the samples at that depth.

    Args:
        source: a checkpoint, or its folder or hub id; None for the bundled chat model.
        target: new or empty folder. It is filled at the very end: an exception leaves it as it was. If the files cannot
            be moved into it, the finished model is kept where the error says.
        samples: token ids from `calibration_samples`.
        bits: 4 or 8.
        group_size: number of weights of a row that share a scale.
        max_shard_size: maximum size of a weight file, for example "2GB".
        overwrite: replace the model in `target`; other files there are kept.
        cpu_only: do not use the GPU.
        progress: show progress on standard error, as a bar on a terminal and in lines elsewhere.

    Raises:
        CheckpointError, OSError: see `check`.
        ValueError: see `check`; also if there are no samples, or the model leaves the range of float16.
        MemoryError: see `check`; also if the memory of the GPU or the main memory fills up.
    """
    start_time = time.perf_counter()
    options = {"bits": bits, "group_size": group_size}
    source = as_checkpoint(source)
    config = check(source, target, **options, max_shard_size=max_shard_size, overwrite=overwrite)
    if not samples:
        raise ValueError("There are no samples to calibrate with: give at least one.")
    target = Path(target).expanduser().absolute()
    with staged_directory(target) as folder, explain_out_of_memory():
        model, tokenizer = source.load(cpu_only=True, dtype=torch.float16)
        check_finite(model, samples[0])
        before = bytes_before(model)
        log = run_gptq(model, samples, options, cpu_only, Progress(config.num_hidden_layers) if progress else None)
        save(model, tokenizer, source, folder, options, max_shard_size)
        after = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return QuantizeResult(target, before, after, time.perf_counter() - start_time, _losses(log))


def _losses(log: list[LogEntry]) -> dict[str, LayerError]:
    by_kind = defaultdict(list)
    for entry in sorted(log, key=lambda entry: (entry["layer"], entry["module"])):
        by_kind[entry["module"]].append((float(entry["loss"]), entry["layer"]))
    return {
        kind: LayerError(sum(loss for loss, _ in found) / len(found), *max(found))
        for kind, found in sorted(by_kind.items())
    }


__getattr__ = old_names(__name__, {"Loss": "LayerError", "Outcome": "QuantizeResult", "gigabytes": "format_bytes"})
