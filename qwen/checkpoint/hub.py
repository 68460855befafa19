"""Hubs: the options that say where files come from, names of published models, and what `Files` of a hub can do."""

import difflib
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from .files import CheckpointError

HUBS = ("huggingface", "modelscope")
VARIABLE = "QWEN_HUB"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

PUBLISHED = tuple(
    f"Qwen/Qwen-{size}{kind}"
    for size in ("1_8B", "7B", "14B", "72B")
    for kind in ("", "-Chat", "-Chat-Int4", "-Chat-Int8")
)
"""Hub ids of the published checkpoints: every size as base, chat, and chat quantized to 4 and 8 bits."""


@dataclass(frozen=True)
class HubOptions:
    """Where the files of a hub id come from. The names, but for `hub`, are those of `from_pretrained`.

    Args:
        hub: one of HUBS; None is $QWEN_HUB, or the Hugging Face Hub.

    Raises:
        CheckpointError: there is no such hub.
    """

    hub: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    cache_dir: str | os.PathLike | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False

    def __post_init__(self) -> None:
        if self.hub not in (None, *HUBS):
            raise CheckpointError(f"hub is {self.hub!r}: it must be {' or '.join(HUBS)}.")

    @classmethod
    def pop_from(cls, kwargs: dict[str, Any]) -> "HubOptions":
        """Take the options out of keyword arguments; others stay in `kwargs`."""
        return cls(**{field.name: kwargs.pop(field.name) for field in fields(cls) if field.name in kwargs})

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `from_pretrained`: what differs from its defaults."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "hub"}
        return {name: value for name, value in given.items() if value != getattr(HubOptions, name)}


class Files(Protocol):
    """The files of one checkpoint, wherever they are."""

    def find(self, name: str) -> Path | None:
        """A small file, fetched if need be; None if the checkpoint has none of that name."""
        ...

    def config(self) -> Path:
        """config.json. Fetched alone, so that a wrong name costs no gigabytes.

        Raises:
            CheckpointError: there is none, or it cannot be fetched; says why and what to do.
        """
        ...

    def source(self, *, weights: bool = False) -> tuple[str, dict[str, Any]]:
        """The first argument of `from_pretrained` and its keyword arguments.

        Args:
            weights: fetch them as well, unless `from_pretrained` does.
        """
        ...

    def folder(self) -> Path:
        """The local folder that holds the small files and the weights, which are fetched if need be."""
        ...


def default_hub() -> str:
    """The hub that $QWEN_HUB names, or the Hugging Face Hub.

    Raises:
        CheckpointError: the variable names another.
    """
    hub = os.environ.get(VARIABLE) or HUBS[0]
    if hub not in HUBS:
        raise CheckpointError(f"{VARIABLE} is {hub!r}: it must be {' or '.join(HUBS)}.")
    return hub


def published_spelling(name: str) -> str:
    """A published id as it was published, however its letters are written; any other name as it is.

    ModelScope takes them in capitals or not, and texts about it have qwen/Qwen-7B-Chat and QWen/qwen-7b-chat.
    """
    return next((known for known in PUBLISHED if known.lower() == name.lower()), name)


def no_such_model(name: str, hub: str, advice: str) -> str:
    """The text of an error: the hub has no model of that name."""
    near = difflib.get_close_matches(published_spelling(name), PUBLISHED, n=1, cutoff=0.75)
    examples = "Published are, for example, Qwen/Qwen-1_8B-Chat and Qwen/Qwen-7B."
    return f"{name!r} is neither a folder here nor a model on {hub} ({advice}). " + (
        f"Did you mean {near[0]}?" if near and near[0] != name else examples
    )


def out_of_reach(name: str, hub: str, advice: str) -> str:
    """The text of an error: the hub does not answer."""
    return (
        f"There is no folder {name!r} here, and {hub} cannot be reached to look for a model of that name. Check the "
        f"connection and proxy ({advice}), or download the model elsewhere and name its folder."
    )
