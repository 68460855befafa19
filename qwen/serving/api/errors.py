"""What goes wrong, in the shape that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`.

Revolves around one exception, `ApiError`. Knows what the engine and the validation raise, and which status that is; it
knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..engine import EngineError, PromptTooLong, QueueFull, SchedulerClosed

MAX_ERRORS = 100  # of one request that are looked at: the first one is reported, with its alternatives
RETRY_SECONDS = 1  # a place in the queue becomes free about every so often, a slot more seldom


class ApiError(HTTPException):
    """An answer other than the one that was asked for.

    Args:
        status: of HTTP.
        message: for people: what is wrong, and what to do.
        type: OpenAI's coarse kind.
        param: the field that is to blame, such as "messages.0.content".
        code: for programs.
        headers: of the response.
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


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that cannot be answered as it is (400)."""
    return ApiError(400, message, param=param, code=code)


def from_engine(error: Exception, param: str | None = None) -> ApiError | None:
    """What an error of the engine means to the client; None where it is no error of the engine.

    Args:
        param: the field that the prompt comes from.
    """
    if isinstance(error, PromptTooLong):
        return invalid(str(error), param, "context_length_exceeded")
    if isinstance(error, QueueFull):
        return ApiError(
            429,
            "The server has as many requests as it can take. Try again in a moment.",
            type="requests",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(RETRY_SECONDS)},
        )
    if isinstance(error, SchedulerClosed):
        return shutting_down()
    if isinstance(error, EngineError):
        return server_error()
    if isinstance(error, ValueError):
        return invalid(str(error), param)
    return None


def shutting_down() -> ApiError:
    return ApiError(
        503, "The server is shutting down and takes no more requests.", type="server_error", code="shutting_down"
    )


def cut_off() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down and did not wait for the end of this reply: what there is of it breaks off.",
        type="server_error",
        code="shutting_down",
    )


def engine_failed() -> ApiError:
    return ApiError(
        503,
        "The model of this server has failed for good; its log says why. It takes no requests until it is restarted.",
        type="server_error",
        code="engine_failed",
    )


def server_error() -> ApiError:
    # What exactly failed is for the log, not for whoever asks.
    return ApiError(500, "The server failed to answer. Its log says why.", type="server_error")


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The first thing that pydantic found.

    Of the alternatives of a union each reports its own errors; those of a wrong type are left out where one of the
    right type came farther.

    Args:
        errors: as `ValidationError.errors()` has them.
        body: what was validated.
    """
    located = [(_path(error["loc"], body, error["type"]), error) for error in errors[:MAX_ERRORS]]
    first = located[0][0]
    located = [(path, error) for path, error in located if path[: len(first)] == first]
    of_right_type = [(path, error) for path, error in located if not error["type"].endswith("_type")]
    path = max((path for path, _ in of_right_type or located), key=len)
    reasons = dict.fromkeys(_reason(error) for where, error in of_right_type or located if where == path)
    param = ".".join(map(str, path)) or None
    return invalid(f"{param or 'The request body'}: {', or '.join(reasons)}.", param)


def _path(location: Sequence[str | int], body: Any, kind: str) -> tuple[str | int, ...]:
    """A location without the names of the alternatives that pydantic tried."""
    path: list[str | int] = []
    for step in location[1:]:  # the first one is "body"
        steps = range(len(body)) if isinstance(body, list) else body if isinstance(body, dict) else ()
        if step in steps:
            body = body[step]
            path.append(step)
    if kind == "missing":
        path += location[1:][-1:]
    return tuple(path)


def _reason(error: Mapping[str, Any]) -> str:
    context = error.get("ctx", {})
    if error["type"] == "missing":
        return "required, and missing"
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


def install(app: FastAPI) -> None:
    """Have every error of an app answered in this shape."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if not isinstance(error, ApiError):
            error = _of_http(request, error)
        return error.response()

    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors(), error.body).response()

    async def unexpected_error(request: Request, error: Exception) -> Response:
        return server_error().response()  # it is logged by whoever runs the app

    app.add_exception_handler(HTTPException, api_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(Exception, unexpected_error)


def _of_http(request: Request, error: HTTPException) -> ApiError:
    """The errors that the framework finds itself."""
    what = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(
            404, f"There is nothing at {what}. The API is below /v1, and /docs lists what there is.", code="unknown_url"
        )
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(
            405, f"{what} is not allowed, only {allowed}.", code="method_not_allowed", headers=error.headers
        )
    return ApiError(error.status_code, str(error.detail), headers=error.headers)
