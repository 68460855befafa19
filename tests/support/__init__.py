"""What tests share. README.md explains each module."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

GOLDEN_FOLDER = ROOT / "tests" / "golden"
"""The reference vectors of the original implementation."""
