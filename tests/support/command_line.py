"""Calls the `main` of a script in this process."""

import signal
import sys
from collections.abc import Callable

import pytest


def call_main(main: Callable[[], int], script: str, *arguments: object) -> int:
    """Call it as `python SCRIPT ARGUMENTS` would, and restore the signal handlers afterwards.

    Returns:
        The exit status.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            return main()
        except SystemExit as leave:
            return leave.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
