"""Logs notices about requests once each, although clients send many."""

from __future__ import annotations

import logging

MAX_KEYS = 100


class LogOnce:
    """Logs one warning per key. Clients choose the keys, so that their number is limited.

    Args:
        logger: where to log.
        what: what the keys are, in the plural, for the last message.
    """

    def __init__(self, logger: logging.Logger, what: str):
        self.logger, self.what = logger, what
        self.seen: set[int] = set()  # hashes, since keys may be long

    def warning(self, key: str, message: str) -> None:
        """Log the message, unless one of this key has been logged."""
        if hash(key) in self.seen or len(self.seen) > MAX_KEYS:
            return
        self.seen.add(hash(key))
        if len(self.seen) > MAX_KEYS:
            message = f"More than {MAX_KEYS} {self.what}: further ones are not logged."
        self.logger.warning("%s", message)
