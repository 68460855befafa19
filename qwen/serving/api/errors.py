"""API errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`.

Converts exceptions of the engine, of pydantic and of the web framework to `ApiError`, with their HTTP status.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic_core import ErrorDetails, to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..engine import EngineClosed, EngineError, PromptTooLong, QueueFull

MAX_VALIDATION_ERRORS = 100  # validation errors examined per request; the first one is reported, with its alternatives
API_ENDPOINTS = ("/chat/completions", "/completions", "/models")  # under /v1; clients add them to a base URL
# -1 or 0 stands for "no limit" in other servers.
FIELD_ADVICE = dict.fromkeys(("max_tokens", "max_completion_tokens", "max_length"), " Omit it to set no limit.")
RETRY_AFTER_SECONDS = 1  # a place in the queue becomes free about this often, a place in the batch less often


class ApiError(HTTPException):
    """An error response.

    Args:
        status: HTTP status.
        message: what is wrong and what to do, for people.
        type: OpenAI's error category.
        param: request field at fault, e.g. "messages.0.content".
        code: machine-readable reason.
        headers: response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> Response:
        return Response(to_json(self.body), self.status_code, self.headers, "application/json")


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of an invalid request (400)."""
    return ApiError(400, message, param=param, code=code)


def from_engine_error(error: Exception, param: str | None = None) -> ApiError | None:
    """Convert an exception of the engine to an API error; return None for other exceptions.

    Args:
        param: request field that holds the prompt.
    """
    if isinstance(error, PromptTooLong):
        return invalid_request(str(error), param, "context_length_exceeded")
    if isinstance(error, QueueFull):
        return ApiError(
            429,
            "The request queue is full. Try again in a moment.",
            type="requests",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        )
    if isinstance(error, EngineClosed):
        return shutting_down()
    if isinstance(error, EngineError):
        return server_error()
    if isinstance(error, ValueError):
        return invalid_request(str(error), param)
    return None


def shutting_down() -> ApiError:
    return ApiError(
        503, "The server is shutting down and accepts no more requests.", type="server_error", code="shutting_down"
    )


def interrupted_by_shutdown() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down and did not wait for this reply to finish: the reply is incomplete.",
        type="server_error",
        code="shutting_down",
    )


def engine_failed() -> ApiError:
    return ApiError(
        503,
        "The model failed and cannot recover; see the server log. Requests are rejected until the server is restarted.",
        type="server_error",
        code="engine_failed",
    )


def server_error() -> ApiError:
    # The details go to the log, not to the client.
    return ApiError(500, "The server failed to answer. See its log for the reason.", type="server_error")


def from_validation_errors(errors: Sequence[ErrorDetails], body: object) -> ApiError:
    """Convert the first error that pydantic found.

    Each alternative of a union reports its own errors. Type mismatches are dropped if an alternative of the right type
    failed too.

    Args:
        errors: output of `ValidationError.errors()`.
        body: the validated input.
    """
    located = [(_field_path(error["loc"], body, error["type"]), error) for error in errors[:MAX_VALIDATION_ERRORS]]
    first = located[0][0]
    located = [(path, error) for path, error in located if path[: len(first)] == first]
    of_right_type = [(path, error) for path, error in located if not error["type"].endswith("_type")]
    path = max((path for path, _ in of_right_type or located), key=len)
    reasons = dict.fromkeys(_error_reason(error) for where, error in of_right_type or located if where == path)
    param = ".".join(map(str, path)) or None
    advice = FIELD_ADVICE.get(param or "", "")
    return invalid_request(f"{param or 'The request body'}: {', or '.join(reasons)}.{advice}", param)


def _field_path(location: Sequence[str | int], body: Any, kind: str) -> tuple[str | int, ...]:
    """Remove the names of union alternatives, which pydantic adds, from a location."""
    path: list[str | int] = []
    for step in location[1:]:  # the first one is "body"
        steps = range(len(body)) if isinstance(body, list) else body if isinstance(body, dict) else ()
        if step in steps:
            body = body[step]
            path.append(step)
    if kind == "missing":
        path += location[1:][-1:]
    return tuple(path)


def _error_reason(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] == "missing":
        return "required but missing"
    if error["type"] == "union_tag_invalid":
        return f"{context['tag']!r} is not supported, expected one of {context['expected_tags']}"
    if error["type"] == "union_tag_not_found":
        return f"needs a {context['discriminator']}"
    if error["type"].startswith(("model_", "dict_type", "dataclass_")):
        reason = "should be an object"
    else:
        reason = error["msg"].replace(" after validation", "")
        for subject in ("Value error, ", "Input ", "String ", "List ", "Dictionary "):
            reason = reason.removeprefix(subject)
    given = error.get("input")
    if isinstance(given, str | int | float) and len(str(given)) <= 100:
        reason += f", not {to_json(given).decode()}"
    return reason


def add_exception_handlers(app: FastAPI) -> None:
    """Install handlers that answer all errors of an app in this format."""

    async def handle_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if not isinstance(error, ApiError):
            error = _from_http_exception(request, error)
        return error.response()

    async def handle_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation_errors(error.errors(), error.body).response()

    async def handle_exception(request: Request, error: Exception) -> Response:
        return server_error().response()  # logged by the ASGI server

    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(Exception, handle_exception)


def _from_http_exception(request: Request, error: HTTPException) -> ApiError:
    """Convert an error that the framework raised."""
    what = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        advice = "The API is under /v1; /docs lists all endpoints."
        for endpoint in API_ENDPOINTS:
            if request.url.path.endswith(endpoint):
                advice = f"Did you mean /v1{endpoint}? The base URL of this API is {request.base_url}v1."
                break
        return ApiError(404, f"Not found: {what}. {advice}", code="unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(405, f"{what} is not allowed. Use {allowed}.", code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, str(error.detail), headers=error.headers)
