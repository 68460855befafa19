import argparse
import sys
from pathlib import Path
from typing import Any

from qwen._moved import redirect
from qwen.checkpoint.hub import HUBS, HubOptions, default_hub
from qwen.checkpoint.locate import find

redirect(__name__)


def add_hub_argument(parser: argparse.ArgumentParser) -> None:
    """Add --hub; pass its value on as `hub=` of `load_model` or `Checkpoint.open`."""
    parser.add_argument("--hub", choices=HUBS, help="hub to download from (default: $QWEN_HUB, or huggingface)")


def use(hub: str | None) -> None:
    """Once set the hub of the whole process.

    Raises:
        ValueError: a hub is named; it is an argument now.
    """
    if hub is not None:
        raise ValueError(f"use({hub!r}) is gone: pass hub={hub!r} to load_model or Checkpoint.open, or set QWEN_HUB.")


def config_file(name: str, **where: Any) -> Path:
    """Fetch config.json alone."""
    return find(name, HubOptions(**where)).config()


def source(name: str, *, weights: bool = False, **where: Any) -> tuple[str, dict[str, Any]]:
    """The first argument of from_pretrained and its keyword arguments."""
    return find(name, HubOptions(**where)).source(weights=weights)


# Names that went with the move; the module itself does not have them.
for _name, _value in {
    "add_hub_argument": add_hub_argument,
    "config_file": config_file,
    "current": default_hub,
    "source": source,
    "use": use,
}.items():
    setattr(sys.modules[__name__], _name, _value)
