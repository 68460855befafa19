import argparse
import sys
from pathlib import Path
from typing import Unpack

from qwen._moved import redirect
from qwen.checkpoint.hub import HUBS, DownloadOptions, HubKwargs, HubOptions, default_hub
from qwen.checkpoint.locate import find

redirect(__name__)


def add_hub_argument(parser: argparse.ArgumentParser) -> None:
    """Add --hub; pass its value on as `hub=` of `load_model` or `Checkpoint.open`."""
    parser.add_argument("--hub", choices=HUBS, help="hub to download from (default: $QWEN_HUB or huggingface)")


def use(hub: str | None) -> None:
    """Accept None only. Earlier versions set the hub of the process here.

    Raises:
        ValueError: `hub` is not None; it is now an argument of other functions.
    """
    if hub is not None:
        raise ValueError(
            f"use({hub!r}) was removed: pass hub={hub!r} to load_model or Checkpoint.open, or set QWEN_HUB."
        )


def config_file(name: str, **hub_kwargs: Unpack[HubKwargs]) -> Path:
    """Download only config.json."""
    return find(name, HubOptions(**hub_kwargs)).config()


def source(name: str, *, weights: bool = False, **hub_kwargs: Unpack[HubKwargs]) -> tuple[str, DownloadOptions]:
    """Return the first argument of from_pretrained and its keyword arguments."""
    return find(name, HubOptions(**hub_kwargs)).from_pretrained_args(weights=weights)


# Names that exist only under the old path.
for _name, _value in {
    "add_hub_argument": add_hub_argument,
    "config_file": config_file,
    "current": default_hub,
    "source": source,
    "use": use,
}.items():
    setattr(sys.modules[__name__], _name, _value)
