"""Routes that take JSON only, and what the OpenAPI document says of routes that generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from .errors import ApiError, invalid_request
from .response_types import ErrorResponse

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
    """A request whose body must be JSON: valid Unicode, no NaN, limited nesting."""

    async def json(self) -> object:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise invalid_request(f"The request body is not valid JSON: {error}.", code="invalid_json") from error


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
            return await handle(StrictJsonRequest(request.scope, request.receive))

        return check
