"""What is exported: a folder of weights, and what its small files say.

Knows where a checkpoint lies and whether it is whole; not what it becomes.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import GENERATION_CONFIG_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ..model.configuration_qwen import QWenConfig
from ..model.tokenization_qwen import QWenTokenizer
from . import hub as hubs
from .adapters import is_adapter
from .files import BIN, BIN_INDEX, SAFETENSORS, SAFETENSORS_INDEX, CheckpointError, read_json
from .loading import chat_format, check_checkpoint, load_config, load_tokenizer, resolve


@dataclass(frozen=True)
class Source:
    """A checkpoint of which nothing is loaded but the tokenizer.

    Args:
        name: as the user gave it.
        folder: where its files of weights lie.
        chat_format: "chatml" a chat model, "raw" a base model; None where it says nothing.
    """

    name: str
    folder: Path
    config: QWenConfig
    tokenizer: QWenTokenizer
    generation_config: dict[str, Any]
    chat_format: str | None

    @property
    def is_chat(self) -> bool:
        """Whether it speaks ChatML."""
        return self.chat_format == "chatml"


def open_source(checkpoint: str | os.PathLike | None) -> Source:
    """Find a checkpoint, fetch it if need be, and see that it is whole.

    Raises:
        CheckpointError: it is not, or it is an adapter.
    """
    name = resolve(checkpoint)
    if is_adapter(Path(name)):
        raise CheckpointError(
            f"{name} is an adapter, not a model. Merge it first: `python finetune/merge_lora.py {name} MERGED`."
        )
    check_checkpoint(name)
    place, _ = hubs.source(name, weights=True)
    folder = Path(place) if Path(place).is_dir() else _fetched(name)
    generation = folder / GENERATION_CONFIG_NAME
    config, tokenizer = load_config(name), load_tokenizer(name)
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"The vocabulary of {name} has {len(tokenizer)} tokens, and its matrices have {config.vocab_size} rows: "
            "the two come from different models."
        )
    return Source(
        name=name,
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        generation_config=read_json(generation, name) if generation.is_file() else {},
        chat_format=chat_format(name),
    )


def _fetched(name: str) -> Path:
    """The folder that the hub's files lie in, weights in the form that transformers would take."""
    quiet = {"_raise_exceptions_for_missing_entries": False}
    cached_file(name, GENERATION_CONFIG_NAME, **quiet)
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (BIN, BIN_INDEX)):
        if found := cached_file(name, single, **quiet):
            return Path(found).parent
        if found := cached_file(name, index, **quiet):
            get_checkpoint_shard_files(name, found)
            return Path(found).parent
    raise CheckpointError(
        f"{name} has no weights on the hub, or they are out of reach and not in the cache: neither {SAFETENSORS} nor "
        f"{BIN} nor an index of either."
    )
