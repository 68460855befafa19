"""Functions for a `Checkpoint` that is opened for one purpose: `load_model`, and what programs have called before."""

import copy
import os
from dataclasses import fields
from typing import Any

from ..model.configuration_qwen import QWenConfig
from ..model.modeling_qwen import QWenLMHeadModel
from ..model.tokenization_qwen import QWenTokenizer
from ..quiet import quiet_loading
from .bundled import BUNDLED_BASE, BUNDLED_CHAT, BUNDLED_CHAT_INT4, CHECKPOINTS
from .checkpoint import Checkpoint, resolve
from .files import CheckpointError
from .hub import HUB_ID, PUBLISHED, HubOptions

# The keyword arguments of from_pretrained that say where files come from.
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
    **options: Any,
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """Load a first-generation Qwen checkpoint, ready to generate: the short way of `Checkpoint.open(…).load(…)`.

    Args:
        name_or_path: a folder, or a hub id such as "Qwen/Qwen-7B-Chat"; None is the bundled chat model.
        cpu_only, int8_cache: see `Checkpoint.load`.
        base: for an adapter, the model to put it on instead of the one that it was trained on.
        options: of `Checkpoint.open`, such as hub="modelscope" or revision="v1.0.5"; all others are for
            `QWenLMHeadModel.from_pretrained`, e.g. bf16=True, use_cache_quantization=True.

    Returns:
        The model in eval mode, its generation_config as the checkpoint sets it, and the tokenizer.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, of another architecture, or out of reach.
        ValueError: the keyword arguments contradict one another (e.g. bf16=True with fp16=True).
    """
    checkpoint = Checkpoint.open(name_or_path, base=base, **vars(HubOptions.pop_from(options)))
    return checkpoint.load(cpu_only=cpu_only, int8_cache=int8_cache, **options)


def load_with_adapter(
    adapter: str | os.PathLike, base: str | os.PathLike | None = None, **options: Any
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """`load_model` for the folder of a LoRA adapter, on its own base model (None) or another."""
    return load_model(adapter, base=base, **options)


def load_model_quietly(
    name_or_path: str | os.PathLike | None = None,
    *,
    chat: bool = False,
    base: str | os.PathLike | None = None,
    **options: Any,
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """`load_model` for a script with a person in front of it: no chatter of the libraries, and a progress bar where it
    is seen and loading takes long.

    Args:
        chat: refuse a base model before its weights are loaded.
        base: see `Checkpoint`.
        options: of `load_model`.
    """
    with quiet_loading(progress=name_or_path is not None):
        checkpoint = Checkpoint.open(name_or_path, base=base, **vars(HubOptions.pop_from(options)))
        if chat:
            checkpoint.require_chat()
        return checkpoint.load(**options)


def check_chat(name_or_path: str | os.PathLike | None, **hub_options: Any) -> None:
    """Raise CheckpointError unless this is a complete checkpoint, as far as can be seen quickly, of a chat model."""
    Checkpoint.open(name_or_path, **hub_options).require_chat()


def check_checkpoint(name_or_path: str | os.PathLike, **hub_options: Any) -> None:
    """Raise CheckpointError unless this is a complete checkpoint, as far as can be seen quickly."""
    Checkpoint.open(name_or_path, **hub_options)


def chat_format(name_or_path: str | os.PathLike | None, **hub_options: Any) -> str | None:
    """`Checkpoint.chat_format`, of a checkpoint that is not checked."""
    return Checkpoint(name_or_path, **hub_options).chat_format


def load_config(name_or_path: str | os.PathLike | None = None, **options: Any) -> QWenConfig:
    """`Checkpoint.config`, of a checkpoint that need not be complete.

    Args:
        options: of `Checkpoint`, such as hub="modelscope"; all others are switches of `QWenConfig`.
    """
    checkpoint = Checkpoint(name_or_path, **vars(HubOptions.pop_from(options)))
    return QWenConfig.from_dict(copy.deepcopy(checkpoint.config_json), **options)


def load_tokenizer(name_or_path: str | os.PathLike | None = None, **options: Any) -> QWenTokenizer:
    """`Checkpoint.tokenizer`, of a checkpoint that need not be complete.

    Args:
        options: of `Checkpoint`, such as hub="modelscope"; all others are for `QWenTokenizer.from_pretrained`.
    """
    options.pop("trust_remote_code", None)
    return Checkpoint(name_or_path, **vars(HubOptions.pop_from(options))).tokenizer(**options)
