"""What people may say about a sandbox on a command line."""

import argparse
from contextlib import suppress


def add_sandbox_arguments(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    """Arguments `seconds` and `allow_weaker_sandbox`.

    Args:
        seconds: the default.
    """
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=seconds,
        help="that a run of the code may take (default: %(default)g)",
    )
    parser.add_argument(
        "--allow-weaker-sandbox",
        action="store_true",
        help="run the code also where this machine cannot keep it from your files or the network",
    )


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"a number of seconds above 0 is needed, not {text!r}")
