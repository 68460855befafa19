"""Drops the bodies of rejected requests, for both servers."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import Receive

MAX_DROPPED = 64 * 2**20  # bytes
IDLE_SECONDS = 2.0  # a client that sends nothing for so long waits for the response


async def drop_body(receive: Receive, seconds: float) -> None:
    """Read and drop the rest of a rejected body: a client that is still sending would miss the response.

    Args:
        seconds: how long at most.
    """
    dropped, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while more and dropped < MAX_DROPPED:
                async with asyncio.timeout(IDLE_SECONDS):
                    message = await receive()
                dropped += len(message.get("body", b""))
                more = bool(message.get("more_body"))
