"""Routes that take JSON only, and what the OpenAPI document says of routes that generate."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from anyio import CapacityLimiter
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from .errors import ApiError, client_closed_request, from_request_validation, invalid_request
from .response_types import ErrorResponse

LARGE_BYTES = 2**18  # of a body that takes much time and memory to read
MAX_CONTAINERS = 2**17  # lists and objects in a body

SERVER_SENT_EVENT_SCHEMA = {  # as in OpenAPI 3.2, section 4.14.4
    "type": "object",
    "properties": {"data": {"type": "string", "description": "a chunk or an error as JSON, or [DONE]"}},
    "required": ["data"],
}
NAMED_EVENT_SCHEMA = {
    "type": "object",
    "properties": {
        "event": {"type": "string", "description": "the type of the event"},
        "data": {"type": "string", "description": "the event as JSON"},
    },
    "required": ["event", "data"],
}
JSON_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "Invalid field",
        408: "The request body did not arrive in time",
        413: "The request body is too large",
        415: "Not JSON, or compressed",
    }.items()
}
GENERATION_ROUTE: dict[str, Any] = {
    "response_description": "The response, or with `stream` its chunks and then [DONE] as server-sent events",
    "responses": {
        200: {"content": {"text/event-stream": {"itemSchema": SERVER_SENT_EVENT_SCHEMA}}},
        **JSON_ERRORS,
        429: {"model": ErrorResponse, "description": "The queue is full"},
        503: {
            "model": ErrorResponse,
            "description": "The server is shutting down, or its model has failed and cannot recover",
        },
    },
}


class StrictJsonRequest(Request):
    """A request whose body must be JSON: valid Unicode, no NaN, limited nesting.

    A large one is parsed when it is its turn, which lasts until `end_turn`: parsed, it takes many times its size.
    """

    _turns: CapacityLimiter | None = None
    _content: object = None

    async def json(self) -> object:
        body = await self.body()
        if len(body) > LARGE_BYTES:
            await self._begin_turn()
            _check_size(body)
        try:
            self._content = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise invalid_request(f"The request body is not valid JSON: {error}.", code="invalid_json") from error
        return self._content

    @property
    def has_turn(self) -> bool:
        """Whether this is a large request that has not been released."""
        return self._turns is not None

    async def _begin_turn(self) -> None:
        turns: CapacityLimiter = self.app.state.service.large_requests
        await turns.acquire_on_behalf_of(self)
        self._turns = turns
        if await self.is_disconnected():
            raise client_closed_request()

    def end_turn(self) -> None:
        """Let other large requests be parsed, and release the content of this one. May be called again."""
        if self._turns is not None:
            self._turns.release_on_behalf_of(self)
            self._turns = None
            self.app.state.service.memory.schedule()
            if isinstance(self._content, dict):
                self._content.clear()  # FastAPI holds it until the reply has been sent


def _release_frames(error: BaseException | None) -> None:
    """Clear the frames that an error came through.

    Frames, futures and errors hold each other, and with them the whole request, until the garbage collector looks at
    old objects.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _check_size(body: bytes) -> None:
    """Raise ApiError for more lists and objects than a request needs. Each takes about twenty times its size."""
    if body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS:
        return
    outside_strings = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    count = outside_strings.count(b"[") + outside_strings.count(b"{")
    if count > MAX_CONTAINERS:
        raise invalid_request(
            f"The request body has {count} lists and objects, at most {MAX_CONTAINERS} are read. Send less at once."
        )


class JsonRoute(APIRoute):
    """Requires the JSON content type, which web pages cannot send to another origin without a CORS preflight.

    A missing type is rejected as well: pages can send a body without one.
    """

    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def check(request: Request) -> Response:
            content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            if request.method == "POST" and content_type != "application/json":
                problem = f"Invalid Content-Type {content_type!r}." if content_type else "The Content-Type is missing."
                raise ApiError(415, f"{problem} Send JSON with Content-Type: application/json.")
            if request.method == "POST" and encoding not in ("", "identity"):
                raise ApiError(415, f"Content-Encoding {encoding!r} is not supported. Send the body uncompressed.")
            json_request = StrictJsonRequest(request.scope, request.receive)
            try:
                return await handle(json_request)
            except Exception as error:
                if not json_request.has_turn:
                    raise
                answer = error
                if isinstance(error, RequestValidationError):  # its handler would look up fields that end_turn clears
                    answer = from_request_validation(request, error)
                _release_frames(error)
                raise answer from None
            finally:
                json_request.end_turn()

        return check
