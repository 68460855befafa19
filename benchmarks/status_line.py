"""A line on the terminal that says what a benchmark is doing."""

import sys


def show_status(text: str) -> None:
    """Show a status line on a terminal, replacing the previous one."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
