"""The words of the generated conversations, a TOML file a topic; the modules beside hold the rules."""

from __future__ import annotations

import tomllib
from pathlib import Path


def phrases(topic: str) -> dict:
    """The tables of `phrases/{topic}.toml`."""
    return tomllib.loads((Path(__file__).parent / f"{topic}.toml").read_text(encoding="utf-8"))
