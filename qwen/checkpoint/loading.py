"""Shortcuts for `Checkpoint`: `load_model`, and functions of earlier versions."""

import copy
import os
from dataclasses import fields
from typing import Any, Unpack

from ..model.configuration_qwen import QWenConfig
from ..model.modeling_qwen import QWenLMHeadModel
from ..model.tokenization_qwen import QWenTokenizer
from ..quiet import quiet_loading
from .bundled import BUNDLED_BASE, BUNDLED_CHAT, BUNDLED_CHAT_INT4, CHECKPOINTS
from .checkpoint import Checkpoint, resolve
from .files import CheckpointError
from .hub import HUB_ID, PUBLISHED, HubKwargs, HubOptions

# Download options of from_pretrained.
HUB_KWARGS = tuple(field.name for field in fields(HubOptions) if field.name != "hub")

__all__ = [
    "BUNDLED_BASE",
    "BUNDLED_CHAT",
    "BUNDLED_CHAT_INT4",
    "CHECKPOINTS",
    "HUB_ID",
    "HUB_KWARGS",
    "PUBLISHED",
    "CheckpointError",
    "chat_format",
    "check_chat",
    "check_checkpoint",
    "load_config",
    "load_model",
    "load_model_quietly",
    "load_tokenizer",
    "load_with_adapter",
    "resolve",
]


def load_model(
    name_or_path: str | os.PathLike | None = None,
    *,
    cpu_only: bool = False,
    int8_cache: bool = False,
    base: str | os.PathLike | None = None,
    **options: object,
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """Load a first-generation Qwen checkpoint, ready to generate. Shortcut for `Checkpoint.open(…).load(…)`.

    Args:
        name_or_path: a folder, or a hub id, e.g. "Qwen/Qwen-7B-Chat"; None is the bundled chat model.
        cpu_only, int8_cache: see `Checkpoint.load`.
        base: for an adapter, the base model to use instead of the one that it was trained on.
        options: options of `Checkpoint.open`, e.g. hub="modelscope" or revision="v1.0.5"; all others are passed to
            `QWenLMHeadModel.from_pretrained`, e.g. bf16=True, use_cache_quantization=True.

    Returns:
        The model in eval mode, with the checkpoint's generation_config, and the tokenizer.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, of another architecture, or cannot be downloaded.
        ValueError: keyword arguments contradict each other (e.g. bf16=True with fp16=True).
    """
    checkpoint = Checkpoint.open(name_or_path, base=base, **vars(HubOptions.pop_from(options)))
    return checkpoint.load(cpu_only=cpu_only, int8_cache=int8_cache, **options)


def load_with_adapter(
    adapter: str | os.PathLike, base: str | os.PathLike | None = None, **options: Any
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """`load_model` for the folder of a LoRA adapter; `base` replaces the model that it was trained on."""
    return load_model(adapter, base=base, **options)


def load_model_quietly(
    name_or_path: str | os.PathLike | None = None,
    *,
    chat: bool = False,
    base: str | os.PathLike | None = None,
    **options: Any,
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """`load_model` for interactive scripts: without messages of libraries, and with a progress bar on a terminal.

    Args:
        name_or_path: see `load_model`. No progress bar is shown for None, the bundled model.
        chat: reject a base model before its weights are loaded, as settings of generation that are invalid.
        base: see `Checkpoint`.
        options: see `load_model`.
    """
    with quiet_loading(progress=name_or_path is not None):
        checkpoint = Checkpoint.open(name_or_path, base=base, **vars(HubOptions.pop_from(options)))
        checkpoint.check_generation_settings()  # transformers may read the file, and fail when it generates
        if chat:
            checkpoint.require_chat()
        return checkpoint.load(**options)


def check_chat(name_or_path: str | os.PathLike | None, **hub_options: Unpack[HubKwargs]) -> None:
    """Raise CheckpointError unless this is a complete checkpoint of a chat model. Weights are not read."""
    Checkpoint.open(name_or_path, **hub_options).require_chat()


def check_checkpoint(name_or_path: str | os.PathLike, **hub_options: Unpack[HubKwargs]) -> None:
    """Raise CheckpointError unless this is a complete checkpoint. Weights are not read."""
    Checkpoint.open(name_or_path, **hub_options)


def chat_format(name_or_path: str | os.PathLike | None, **hub_options: Unpack[HubKwargs]) -> str | None:
    """Return `Checkpoint.chat_format` without checking the checkpoint."""
    return Checkpoint(name_or_path, **hub_options).chat_format


def load_config(name_or_path: str | os.PathLike | None = None, **options: object) -> QWenConfig:
    """Return `Checkpoint.config`. The checkpoint may be incomplete.

    Args:
        options: options of `Checkpoint`, e.g. hub="modelscope"; all others are passed to `QWenConfig`.
    """
    checkpoint = Checkpoint(name_or_path, **vars(HubOptions.pop_from(options)))
    return QWenConfig.from_dict(copy.deepcopy(checkpoint.config_json), **options)


def load_tokenizer(name_or_path: str | os.PathLike | None = None, **options: object) -> QWenTokenizer:
    """Return `Checkpoint.tokenizer`. The checkpoint may be incomplete.

    Args:
        options: options of `Checkpoint`, e.g. hub="modelscope"; all others are passed to
            `QWenTokenizer.from_pretrained`.
    """
    options.pop("trust_remote_code", None)
    return Checkpoint(name_or_path, **vars(HubOptions.pop_from(options))).tokenizer(**options)
