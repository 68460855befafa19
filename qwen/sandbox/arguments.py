"""Command-line arguments of the sandbox."""

import argparse
from contextlib import suppress


def add_sandbox_arguments(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    """Add --seconds and --allow-weaker-sandbox.

    Args:
        seconds: default of --seconds.
    """
    parser.add_argument(
        "--seconds",
        type=_duration,
        default=seconds,
        help="time limit for each run of the code (default: %(default)g)",
    )
    parser.add_argument(
        "--allow-weaker-sandbox",
        action="store_true",
        help="run the code even if this machine cannot block access to your files",
    )


def _duration(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"invalid number of seconds {text!r}: must be greater than 0")
