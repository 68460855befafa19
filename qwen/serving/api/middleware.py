"""ASGI middlewares that number requests, normalize paths, check origins and credentials, and limit bodies.

Neither buffers bodies or responses, so that streams pass through unchanged.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import logging
import re
import uuid
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..bodies import drop_body
from .errors import ApiError, is_of_messages_api, server_error
from .log_once import LogOnce
from .request_id import HEADER as REQUEST_ID_HEADER
from .request_id import current_request_id

logger = logging.getLogger(__name__)

KEY_HEADER = "X-Api-Key"  # as Anthropic's clients send a key
BLANKS = " \t"  # around the values of headers
MAX_ORIGIN = 100  # characters of an origin in messages

REQUEST_ID = re.compile(r"[ -~]{1,128}")  # printable ASCII: such an id cannot end a header or a line of the log
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[\w.:\[\]-]{1,253}", re.ASCII)  # that can be shown as part of a command


class RequestIdMiddleware:
    """Gives each request an id and its response the header, also if the app fails; logs the id of failed requests.

    It has to be the first middleware. Anthropic's clients read the id from another header.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        names = [REQUEST_ID_HEADER, "request-id"] if is_of_messages_api(scope) else [REQUEST_ID_HEADER]
        headers = [(name.lower().encode(), request_id.encode()) for name in names]
        started = False

        def send_with_id(message: Message) -> Any:  # not async: it is called for every chunk of a stream
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *headers]
            return send(message)

        current_request_id.set(request_id)  # of this task: each request has its own
        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.error("%s %s failed (request %s):", scope["method"], quote(scope["path"]), request_id)
            if not started:
                await server_error().response(scope)(scope, receive, send_with_id)
            raise  # the web server logs the traceback


# First steps of the paths below /v1, which many clients leave out.
V1_STEPS = frozenset(
    ("chat", "completions", "models", "responses", "messages", "tokenize", "detokenize", "apply-template")
)


class PathMiddleware:
    """Accepts what clients make of a base URL and a path: `//v1/models`, `/v1//models`, `/v1/models/`, `/models`.

    Without a redirect, which would lose the body of a POST. HEAD is answered like GET; uvicorn omits the body.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            steps = [step for step in scope["path"].split("/") if step]
            if steps and steps[0] in V1_STEPS:
                steps.insert(0, "v1")
            path = "/" + "/".join(steps)
            scope = {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
        await self.app(scope, receive, send)


class OriginMiddleware:
    """Rejects CORS preflights of web pages that may not send requests, and says in the answer and the log what to do.

    Args:
        origins: allowed origins; "*" for all.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]):
        self.app, self.origins = app, origins
        self.log_once = LogOnce(logger, "origins")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = self._preflight_origin(scope)
        if origin is None or not {"*", origin}.isdisjoint(self.origins):
            await self.app(scope, receive, send)
            return
        if ORIGIN.fullmatch(origin):
            advice = f"To allow it, start the server with --cors-origin {origin}"
        else:  # "null", of pages opened from a file, is also that of any page that chooses to be in a sandbox
            advice = "Serve the page from an origin and allow that with --cors-origin ORIGIN, or all pages with '*'"
        message = f"Web pages of origin {origin[:MAX_ORIGIN]!r} may not send requests to this server. {advice}."
        self.log_once.warning(origin, message)
        error = ApiError(403, message, code="origin_not_allowed")
        await error.response(scope)(scope, receive, send)

    def _preflight_origin(self, scope: Scope) -> str | None:
        """Return the origin of the page that sends a CORS preflight; None for other requests."""
        if scope["type"] != "http" or scope["method"] != "OPTIONS":
            return None
        headers = Headers(scope=scope)
        return headers.get("origin") if "access-control-request-method" in headers else None


class AuthenticationMiddleware:
    """Requires a user and password (HTTP Basic) or a key (Bearer or X-Api-Key); if both are set, either is accepted.

    Args:
        basic: "USER:PASSWORD".
        key: API key, as the clients of OpenAI and of Anthropic send it.
        open_paths: paths that need no credentials.
    """

    def __init__(self, app: ASGIApp, basic: str | None, key: str | None, open_paths: Collection[str] = ()):
        self.app, self.open_paths = app, open_paths
        self.accepted = {
            scheme: _encodings(secret) for scheme, secret in (("basic", basic), ("bearer", key)) if secret is not None
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.open_paths or self._is_authorized(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        schemes = [f'{scheme.capitalize()} realm="qwen"' for scheme in self.accepted]
        wanted = {
            "basic": "user and password (HTTP Basic)",
            "bearer": f"an API key (Authorization: Bearer KEY, or {KEY_HEADER}: KEY)",
        }
        error = ApiError(
            401,
            f"Missing or invalid credentials. Send {' or '.join(wanted[scheme] for scheme in self.accepted)}.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": ", ".join(schemes)},
        )
        await error.response(scope)(scope, receive, send)

    def _is_authorized(self, headers: Headers) -> bool:
        key, given_key = self.accepted.get("bearer"), headers.get(KEY_HEADER)
        if key is not None and given_key is not None and _is_one_of(_header_bytes(given_key), key):
            return True
        scheme, _, given = headers.get("authorization", "").strip(BLANKS).partition(" ")
        secret = self.accepted.get(scheme.lower())
        if secret is None:
            return False
        credentials = _header_bytes(given)
        if scheme.lower() == "basic":
            try:
                credentials = base64.b64decode(credentials, validate=True)
            except binascii.Error:
                return False
        return _is_one_of(credentials, secret)


def _encodings(secret: str) -> list[bytes]:
    """Return the bytes that clients send for a secret: UTF-8, or latin-1, as Python's requests and browsers do."""
    encodings = [secret.encode("utf-8", "surrogateescape")]  # bytes of a command line in another encoding stay the same
    with contextlib.suppress(UnicodeEncodeError):
        encodings.append(secret.encode("latin-1"))
    return encodings


def _header_bytes(value: str) -> bytes:
    """Return the bytes of a header, which Starlette decodes as latin-1, without the blanks around it.

    `str.strip` would remove the bytes A0 and 85 as well, with which the UTF-8 of letters ends.
    """
    return value.strip(BLANKS).encode("latin-1")


def _is_one_of(given: bytes, accepted: Sequence[bytes]) -> bool:
    return any(hmac.compare_digest(given, each) for each in accepted)


class BodyLimitMiddleware:
    """Rejects request bodies over `max_bytes` (413), declared or received, or slower than `seconds` (408)."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float):
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.seconds
        close = {"Connection": "close"}  # the rest of the body is not read
        error = ApiError(
            413,
            f"The request body is larger than the limit of {self.max_bytes} bytes.",
            code="too_large",
            headers=close,
        )

        async def receive_with_timeout() -> Message:
            try:
                async with asyncio.timeout_at(deadline):
                    return await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"The request body did not arrive within {self.seconds:g} seconds.",
                    code="timeout",
                    headers=close,
                ) from None

        async def drop_rest() -> None:
            await drop_body(receive, deadline - asyncio.get_running_loop().time())

        async def receive_limited() -> Message:
            nonlocal received, complete
            if complete:  # the next message is a disconnect
                return await receive()
            message = await receive_with_timeout()
            complete = not message.get("more_body")
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self.max_bytes:
                    if message.get("more_body"):
                        await drop_rest()
                    raise error
            return message

        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            if headers.get("expect", "").lower() != "100-continue":  # such a client sends nothing before an answer
                await drop_rest()
            await error.response(scope)(scope, receive, send)
        else:
            await self.app(scope, receive_limited, send)
