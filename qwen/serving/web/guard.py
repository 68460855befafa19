"""ASGI middleware around Gradio's app: it passes on what the page needs, and rejects everything else.

Gradio serves uploads, files, proxies, recordings and more to everybody. The page needs a few routes, and sends text
only. `PageGuard` checks requests before Gradio reads them.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from http import HTTPStatus

from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..bodies import drop_body
from .request_types import MAX_BODY, Event, parse_request
from .sessions import Sessions, network_of

MAX_LOGIN_BODY = 2**14  # bytes
DROP_SECONDS = 10  # for the rest of a rejected body
BODY_SECONDS = 30  # for a body to arrive

LOGIN, LOGOUT = "/login", "/logout"
EVENTS = frozenset({"/gradio_api/queue/join", "/gradio_api/run/predict"})
EVENT_STREAM = "/gradio_api/queue/data"
STARTUP = "/gradio_api/startup-events"  # a request of Gradio to itself
CONNECTION_CHECK = "/gradio_api/app_id"  # of a page that has lost its connection
PAGE = frozenset({"/", "/theme.css", "/manifest.json", "/favicon.ico", "/robots.txt"})
ASSETS = ("/assets/", "/static/")


class LoginThrottle:
    """Makes addresses wait after failed logins: no time after the first ones, then twice as long each, up to a limit.

    An attempt counts as failed until it has succeeded, so that attempts at the same time count as well.
    """

    FREE_ATTEMPTS = 5
    MAX_WAIT = 30.0  # seconds
    FORGIVEN_AFTER = 900.0  # seconds without an attempt
    MAX_ADDRESSES = 10_000  # that are remembered

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._attempts: OrderedDict[str, tuple[int, float]] = OrderedDict()  # number and time of the last one

    def begin(self, address: str) -> float:
        """Count an attempt if the address may make one now; return how many seconds it has to wait otherwise."""
        now = self._clock()
        number, last = self._attempts.get(address, (0, now))
        if now - last > self.FORGIVEN_AFTER:
            number = 0
        wait = min(2.0 ** (number - self.FREE_ATTEMPTS), self.MAX_WAIT) if number >= self.FREE_ATTEMPTS else 0.0
        if (remaining := last + wait - now) > 0:
            return remaining
        self._attempts[address] = (min(number + 1, 100), now)
        self._attempts.move_to_end(address)
        if len(self._attempts) > self.MAX_ADDRESSES:
            self._attempts.popitem(last=False)
        return 0.0

    def succeeded(self, address: str) -> None:
        """Forget the attempts of an address."""
        self._attempts.pop(address, None)


class BodyRejected(Exception):
    """A request has a larger body than the page sends, or one that does not arrive.

    Args:
        response: what to answer.
    """

    def __init__(self, response: ASGIApp):
        super().__init__()
        self.response = response


class PageGuard:
    """Answers requests that are not the page's, and those of other origins, itself.

    Args:
        app: Gradio's app.
        user: returns the user who has logged in with a request, or None.
        needs_login: whether the page needs a login.
        has_started: whether Gradio has started, and needs no requests to itself any more.
        sessions: is told which pages have an event stream open.
        events: those of the page, by their index.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        user: Callable[[Request], str | None],
        needs_login: bool,
        has_started: Callable[[], bool],
        sessions: Sessions,
        events: Mapping[int, Event],
    ):
        self.app, self.user, self.needs_login, self.has_started = app, user, needs_login, has_started
        self.sessions, self.events, self.logins = sessions, events, LoginThrottle()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})  # the page has none
            return
        if (response := self._reject(scope)) is not None:
            await drop_body(receive, DROP_SECONDS)
            await response(scope, receive, send)
            return
        # No other origin is allowed, so there is nothing to say about origins: Gradio would allow some.
        scope = {**scope, "headers": [item for item in scope["headers"] if item[0] != b"origin"]}
        path = scope["path"]
        if path == LOGIN:
            await self._log_in(scope, receive, send)
        elif path in EVENTS:
            await self._pass_on_event(scope, receive, send)
        elif path == EVENT_STREAM:
            session = QueryParams(scope["query_string"]).get("session_hash", "")  # as Gradio reads it
            with self.sessions.listening(session):
                await self._pass_on_stream(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _reject(self, scope: Scope) -> ASGIApp | None:
        """Return the response to a request that must not reach Gradio; None if it may."""
        path, method, headers = scope["path"], scope["method"], Headers(scope=scope)
        if not is_same_origin(headers):
            return _error(
                HTTPStatus.FORBIDDEN, "This page takes no requests of other web pages. Open it by its address."
            )
        if path in EVENTS or path == LOGIN:
            if method != "POST":
                return _error(HTTPStatus.METHOD_NOT_ALLOWED, "Send this request with POST.")
        elif not is_route(path):
            return _error(HTTPStatus.NOT_FOUND, "The page has nothing at this address.")
        elif method not in ("GET", "HEAD"):
            return _error(HTTPStatus.METHOD_NOT_ALLOWED, "Send this request with GET.")
        if path in EVENTS and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Send JSON, with Content-Type: application/json.")
        if path == LOGOUT and not is_visit(headers):
            return _error(HTTPStatus.FORBIDDEN, f"To log out, open {LOGOUT} in the browser's address bar.")
        is_startup = path == STARTUP and not self.has_started()
        if (
            self.needs_login
            and path.startswith("/gradio_api/")
            and not is_startup
            and self.user(Request(scope)) is None
        ):
            return _error(HTTPStatus.UNAUTHORIZED, "Log in on the page first.")
        return None

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = network_of(scope["client"][0] if scope["client"] else "")
        if (wait := math.ceil(self.logins.begin(address))) > 0:
            await drop_body(receive, DROP_SECONDS)
            response = _error(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"Too many failed logins. Try again in {wait} s.",
                {"Retry-After": str(wait)},
            )
            await response(scope, receive, send)
            return

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.OK:
                self.logins.succeeded(address)
            await send(message)

        try:
            body = await _read_body(Headers(scope=scope), receive, MAX_LOGIN_BODY)
        except BodyRejected as error:
            await error.response(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), watch)

    async def _pass_on_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request for an event stream. Gradio ends that of a page without events with an exception."""
        try:
            await self.app(scope, receive, send)
        except RuntimeError as error:
            if not isinstance(error.__cause__, HTTPException):
                raise
            await send({"type": "http.response.body"})

    async def _pass_on_event(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what `parse_request` understands of an event."""
        try:
            body = await _read_body(Headers(scope=scope), receive, MAX_BODY)
            body = parse_request(body, self.events).model_dump_json().encode()
        except BodyRejected as error:
            await error.response(scope, receive, send)
            return
        except ValueError as error:
            await _error(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))(scope, receive, send)
            return
        headers = [item for item in scope["headers"] if item[0] not in (b"content-length", b"transfer-encoding")]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.app({**scope, "headers": headers}, _replay(body, receive), send)


def is_route(path: str) -> bool:
    """Return whether the page uses an address with GET."""
    return path in PAGE or path.startswith(ASSETS) or path in (LOGOUT, EVENT_STREAM, STARTUP, CONNECTION_CHECK)


def is_same_origin(headers: Headers) -> bool:
    """Return whether a request is from this page, or from no page. Browsers send the origin with every POST.

    A proxy may have changed the Host header; pages cannot set X-Forwarded-Host without being asked first (CORS).
    """
    origin = headers.get("origin")
    if origin is None or headers.get("sec-fetch-site") == "same-origin":
        return True
    host = origin.partition("://")[2].lower()  # empty for "null"
    return host != "" and host in (headers.get(name, "").lower() for name in ("host", "x-forwarded-host"))


def is_visit(headers: Headers) -> bool:
    """Return whether the user has opened an address, instead of another page, or an image of a reply.

    Browsers send Sec-Fetch-* with HTTPS or to localhost only; the types that they accept differ as well.
    """
    if (destination := headers.get("sec-fetch-dest")) is not None:
        return destination == "document" and headers.get("sec-fetch-site") in ("none", "same-origin")
    return "text/html" in headers.get("accept", "")


def _error(status: HTTPStatus, message: str, headers: dict[str, str] | None = None) -> ASGIApp:
    return JSONResponse({"detail": message}, status, {"Connection": "close"} | (headers or {}))  # as Gradio's errors


def _too_large(limit: int) -> ASGIApp:
    size = f"{limit >> 20} MiB" if limit >= 2**20 else f"{limit >> 10} KiB"
    return _error(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"This is longer than {size}. Shorten the text or clear the conversation."
    )


async def _read_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """Return a body.

    Raises:
        BodyRejected: it is larger than the limit, of which a part was read and dropped; or it took too long.
    """
    declared = headers.get("content-length", "")
    size, chunks = 0, []
    if declared.isdecimal() and int(declared[:20]) > limit:
        await drop_body(receive, DROP_SECONDS)
        raise BodyRejected(_too_large(limit))
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            reason = f"The request did not arrive within {BODY_SECONDS} s. Send it again."
            raise BodyRejected(_error(HTTPStatus.REQUEST_TIMEOUT, reason)) from None
        chunk = message.get("body", b"")
        size += len(chunk)
        chunks.append(chunk)
        if size > limit:
            chunks.clear()
            await drop_body(receive, DROP_SECONDS)
            raise BodyRejected(_too_large(limit))
        if not message.get("more_body"):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that returns a body that was read, and then what `receive` returns."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
