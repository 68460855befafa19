"""Who may ask, how much at once and how slowly: credentials, the size of a request and the time it takes to come.

Revolves around two ASGI middlewares that stand in front of everything else. Neither looks into a body or an answer,
so that streams pass through as they are.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

# A client that is still sending would not see an answer that comes before it is through. So much is read to no end.
LINGER_BYTES = 64 * 2**20


class Authentication:
    """Lets those in who know the user and password (HTTP Basic) or the key (Bearer); either will do where both are set.

    Args:
        basic: "USER:PASSWORD".
        key: as OpenAI's clients send it.
        open_paths: need neither.
    """

    def __init__(self, app: ASGIApp, basic: str | None, key: str | None, open_paths: Collection[str] = ()):
        self.app, self.open_paths = app, open_paths
        self.accepted = {
            scheme: secret.encode() for scheme, secret in (("basic", basic), ("bearer", key)) if secret is not None
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.open_paths or self._knows(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        schemes = [f'{scheme.capitalize()} realm="qwen"' for scheme in self.accepted]
        wanted = {"basic": "user and password (HTTP Basic)", "bearer": "an API key (Authorization: Bearer KEY)"}
        error = ApiError(
            401,
            f"This server needs {' or '.join(wanted[scheme] for scheme in self.accepted)}, and the right one.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": ", ".join(schemes)},
        )
        await error.response()(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").strip().partition(" ")
        secret = self.accepted.get(scheme.lower())
        if secret is None:
            return False
        # Header bytes reach us as latin-1 characters.
        credentials = given.strip().encode("latin-1")
        if scheme.lower() == "basic":
            try:
                credentials = base64.b64decode(credentials, validate=True)
            except binascii.Error:
                return False
        return hmac.compare_digest(credentials, secret)


class BodyLimit:
    """Refuses bodies of more than so many bytes, whether their length is declared or found out, and such as take longer
    to arrive than so many seconds."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float):
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.seconds
        close = {"Connection": "close"}  # what is left of the body is not read
        error = ApiError(
            413,
            f"The request is larger than the {self.max_bytes} bytes that this server takes.",
            code="too_large",
            headers=close,
        )

        async def arriving() -> Message:
            try:
                async with asyncio.timeout_at(deadline):
                    return await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"The body of the request did not arrive within {self.seconds:g} seconds.",
                    code="timeout",
                    headers=close,
                ) from None

        async def linger() -> None:
            dropped, more = 0, True
            with contextlib.suppress(ApiError):
                while more and dropped < LINGER_BYTES:
                    message = await arriving()
                    dropped += len(message.get("body", b""))
                    more = bool(message.get("more_body"))

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is that the client leaves
                return await receive()
            message = await arriving()
            complete = not message.get("more_body")
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self.max_bytes:
                    if message.get("more_body"):
                        await linger()
                    raise error
            return message

        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            await linger()
            await error.response()(scope, receive, send)
        else:
            await self.app(scope, limited, send)
