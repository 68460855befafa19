"""Hub options, ids of published models, and the `Files` interface that each hub implements."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast

from .._renamed import old_names
from ..library_errors import UNUSABLE_PROXY_ADVICE, is_unusable_proxy
from .files import CheckpointError

HUBS = ("huggingface", "modelscope")
HUB_ENV_VAR = "QWEN_HUB"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

PUBLISHED = tuple(
    f"Qwen/Qwen-{size}{kind}"
    for size in ("1_8B", "7B", "14B", "72B")
    for kind in ("", "-Chat", "-Chat-Int4", "-Chat-Int8")
)
"""Hub ids of the published checkpoints: every size as base, chat, and chat quantized to 4 and 8 bits."""


class DownloadOptions(TypedDict, total=False):
    """Keyword arguments of `from_pretrained` for downloads: the `HubOptions` that are set. An unset one is absent, not
    None."""

    revision: str
    subfolder: str
    cache_dir: str | Path
    token: str | bool
    local_files_only: bool
    force_download: bool


@dataclass(frozen=True)
class HubOptions:
    """Download options. All except `hub` are keyword arguments of `from_pretrained`.

    Args:
        hub: one of HUBS; None is $QWEN_HUB, or the Hugging Face Hub.

    Raises:
        CheckpointError: `hub` is not one of HUBS.
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
        """Remove the options from `kwargs` and return them; other keyword arguments stay."""
        return cls(**{field.name: kwargs.pop(field.name) for field in fields(cls) if field.name in kwargs})

    def download_kwargs(self) -> DownloadOptions:
        """Return the options that differ from the defaults, as keyword arguments of `from_pretrained`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "hub"}
        changed = {name: value for name, value in values.items() if value != getattr(HubOptions, name)}
        return cast(DownloadOptions, changed)


class HubKwargs(TypedDict, total=False):
    """The fields of `HubOptions` as keyword arguments of a function."""

    hub: str | None
    revision: str | None
    subfolder: str | None
    cache_dir: str | os.PathLike | None
    token: str | bool | None
    local_files_only: bool
    force_download: bool


class Files(Protocol):
    """The files of one checkpoint, local or on a hub."""

    def find(self, name: str) -> Path | None:
        """Return the path of a small file, downloading it if needed; None if the checkpoint does not have it."""
        ...

    def config(self) -> Path:
        """Return the path of config.json. It is downloaded alone, so that a wrong name costs no large download.

        Raises:
            CheckpointError: the file is missing or cannot be downloaded.
        """
        ...

    def from_pretrained_args(self, *, weights: bool = False) -> tuple[str, DownloadOptions]:
        """Return the first argument of `from_pretrained` and its keyword arguments.

        Args:
            weights: also download the weights, unless `from_pretrained` does so.
        """
        ...

    def folder(self) -> Path:
        """Return the local folder with the small files and the weights, downloading them if needed."""
        ...


def default_hub() -> str:
    """Return the hub set by $QWEN_HUB; by default, the Hugging Face Hub.

    Raises:
        CheckpointError: the variable is not one of HUBS.
    """
    hub = os.environ.get(HUB_ENV_VAR) or HUBS[0]
    if hub not in HUBS:
        raise CheckpointError(f"{HUB_ENV_VAR} is {hub!r}: it must be {' or '.join(HUBS)}.")
    return hub


def canonical_hub_id(name: str) -> str:
    """Return the canonical spelling of a published id, ignoring case; other names are returned unchanged.

    ModelScope ignores case, and its documentation uses qwen/Qwen-7B-Chat and QWen/qwen-7b-chat.
    """
    return next((known for known in PUBLISHED if known.lower() == name.lower()), name)


def model_not_found_message(name: str, hub: str, advice: str) -> str:
    """Return the error message for a model that the hub does not have."""
    matches = difflib.get_close_matches(canonical_hub_id(name), PUBLISHED, n=1, cutoff=0.75)
    examples = "Published models are, for example, Qwen/Qwen-1_8B-Chat and Qwen/Qwen-7B."
    return f"{name!r} is neither a local folder nor a model on {hub} ({advice}). " + (
        f"Did you mean {matches[0]}?" if matches and matches[0] != name else examples
    )


def hub_unreachable_message(name: str, hub: str, advice: str) -> str:
    """Return the error message for a hub that cannot be reached."""
    return (
        f"There is no local folder {name!r}, and {hub} cannot be reached to find a model with that name. Check the "
        f"connection and proxy ({advice}), or download the model elsewhere and name its folder."
    )


@contextlib.contextmanager
def explain_unusable_proxy(name: str) -> Iterator[None]:
    """Turn errors of HTTP clients about a proxy that they cannot use into a CheckpointError about the model `name`."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if not is_unusable_proxy(error):
            raise
        raise CheckpointError(f"Cannot download {name}. {UNUSABLE_PROXY_ADVICE}") from error


__getattr__ = old_names(__name__, {"VARIABLE": "HUB_ENV_VAR", "published_spelling": "canonical_hub_id"})
