"""Test infrastructure. README.md describes each module."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Root of the repository."""

GOLDEN_FOLDER = ROOT / "tests" / "golden"
"""Folder of reference vectors of the original implementation."""
