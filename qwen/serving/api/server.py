"""uvicorn that lets replies finish: the first signal drains, the second one cuts short what is still being written.

uvicorn by itself stops listening at the first signal, so that nobody can be told why, and dies of that signal in the
end. This one goes on listening while the app drains, refuses by the app's own words, and returns. Clients that are slow
to send or to read are given up in the end; that is no failure of the app, and is not logged as one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import shutting_down


class DrainingServer(uvicorn.Server):
    """A server of one app.

    Args:
        config: of uvicorn, with the app itself and not its name.
        drain: blocks until the app has nothing left to do, or for so many seconds; callable again meanwhile.
        seconds: for the first signal; the second one gives none.
        on_ready: called when requests are taken.
        on_drain: called at the first signal.

    Attributes:
        signals: how many came.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[float], None],
        seconds: float,
        on_ready: Callable[[], None] = lambda: None,
        on_drain: Callable[[], None] = lambda: None,
    ):
        app: Any = config.app  # uvicorn takes other kinds too, and ours is ASGI 3
        config.app = _may_be_given_up(app)
        super().__init__(config)
        self.drain, self.seconds, self.on_ready, self.on_drain = drain, seconds, on_ready, on_drain
        self.signals = 0

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM and SIGINT."""
        self.signals += 1
        # Draining blocks, and a handler must not.
        threading.Thread(target=self._drain, args=[self.signals == 1], name="drain", daemon=True).start()

    def _drain(self, first: bool) -> None:
        if first:
            self.on_drain()
        try:
            self.drain(self.seconds if first else 0)
        finally:
            self.should_exit = True  # what was written last is still sent


def _may_be_given_up(app: ASGIApp) -> ASGIApp:
    """An app whose requests uvicorn may cancel: those that have no answer yet get one."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def observed(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await app(scope, receive, observed)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not started:
                await shutting_down().response()(scope, receive, send)

    return run
