"""A uvicorn server that lets replies finish: the first signal drains the app, the second one cuts replies off.

uvicorn itself stops listening at the first signal and re-raises it at the end. This server keeps listening while the
app drains, so that new requests get the app's error response, and then returns. Clients that are slow to send or to
read are dropped at the end, which is not logged as an error.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import LOGGING_CONFIG

from .errors import MAX_ECHO, short_printable, shutting_down
from .request_id import HEADER, current_request_id

logger = logging.getLogger(__name__)

MAX_LOGGED = 1000  # characters of a value or a line of a traceback in the log


class DrainingServer(uvicorn.Server):
    """Serves one app.

    Args:
        config: uvicorn's configuration, with the app itself instead of its name.
        drain: blocks until the app is idle, for at most the given seconds; may be called again meanwhile.
        seconds: time to drain after the first signal; after the second it is 0.
        on_ready: called when requests are accepted.
        on_drain: called at the first signal.

    Attributes:
        signals: number of signals received.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[float], None],
        seconds: float,
        on_ready: Callable[[], None] = lambda: None,
        on_drain: Callable[[], None] = lambda: None,
    ):
        config.app = _answer_when_cancelled(cast("ASGIApp", config.app))  # uvicorn also takes other kinds
        super().__init__(config)
        self.drain, self.seconds, self.on_ready, self.on_drain = drain, seconds, on_ready, on_drain
        self.signals = 0

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._notify(self.on_ready)

    def _notify(self, callback: Callable[[], None]) -> None:
        """Call `on_ready` or `on_drain`, which print: their errors do not decide whether the server starts or ends."""
        try:
            callback()
        except Exception:
            logger.exception("A callback of the server failed")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT."""
        self.signals += 1
        # Draining blocks, and a signal handler must not.
        threading.Thread(target=self._drain, args=[self.signals == 1], name="drain", daemon=True).start()

    def _drain(self, first: bool) -> None:
        try:
            if first:
                self._notify(self.on_drain)
            self.drain(self.seconds if first else 0)
        finally:
            self.should_exit = True  # pending output is still sent


def _answer_when_cancelled(app: ASGIApp) -> ASGIApp:
    """Wrap an app so that requests cancelled by uvicorn get a 503 if they have no response yet."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_observed(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await app(scope, receive, send_observed)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not started:
                response = shutting_down().response(scope)
                response.headers[HEADER] = current_request_id.get()
                await response(scope, receive, send)

    return run


def log_config() -> dict[str, Any]:
    """Return uvicorn's `log_config`, for its loggers and this package's.

    Lines of the access log end with the id of the request. What clients send cannot control a terminal, break a line
    or fill the log: see `short_printable`.
    """
    formatters, handlers = LOGGING_CONFIG["formatters"], LOGGING_CONFIG["handlers"]
    access = formatters["access"] | {"fmt": f"{formatters['access']['fmt']} %(request_id)s"}
    plain = {"class": "logging.StreamHandler", "stream": "ext://sys.stderr"}
    return {
        **LOGGING_CONFIG,
        "filters": {"safe": {"()": lambda: _make_safe}},
        "formatters": formatters | {"access": access},
        "handlers": {name: handler | {"filters": ["safe"]} for name, handler in (handlers | {"plain": plain}).items()},
        "loggers": LOGGING_CONFIG["loggers"] | {"qwen": {"handlers": ["plain"]}},
    }


def _make_safe(record: logging.LogRecord) -> bool:
    """Make the arguments and the traceback of a log record printable, and add the id of the request."""
    record.request_id = current_request_id.get()
    if isinstance(record.args, tuple):
        limit = MAX_ECHO if record.name == "uvicorn.access" else MAX_LOGGED
        record.args = tuple(
            short_printable(str(value), limit) if isinstance(value, str | BaseException) else value
            for value in record.args
        )
    if record.exc_info and not record.exc_text:
        lines = logging.Formatter().formatException(record.exc_info).split("\n")
        record.exc_text = "\n".join(short_printable(line, MAX_LOGGED) for line in lines)
    return True
