"""The words of the generated conversations, one TOML file per topic."""

from __future__ import annotations

import tomllib
from pathlib import Path


def phrases(topic: str) -> dict:
    """Returns the tables of `phrases/{topic}.toml`."""
    return tomllib.loads((Path(__file__).parent / f"{topic}.toml").read_text(encoding="utf-8"))
