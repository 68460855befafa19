"""API errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`, or that of the Messages API.

Converts exceptions of the engine, of pydantic and of the web framework to `ApiError`, with their HTTP status.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from ..engine import EngineClosed, EngineError, PromptTooLong, QueueFull
from .request_id import current_request_id

MAX_ECHO = 200  # characters of a client's input in a message
MAX_MESSAGE = 400  # characters of a message in all
INPUT = re.compile(rf"""'[^']{{{MAX_ECHO},}}'|"[^"]{{{MAX_ECHO},}}"|\S{{{MAX_ECHO},}}""")  # quoted, or a long word
MAX_VALIDATION_ERRORS = 100  # validation errors examined per request; the first one is reported, with its alternatives
API_ENDPOINTS = ("/chat/completions", "/completions", "/models", "/responses", "/messages")  # under /v1
# -1 or 0 stands for "no limit" in other servers.
FIELD_ADVICE = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_length"), " Omit it to set no limit."),
    "prompt_logprobs": " Up to 20 tokens are returned at each place of a prompt, not all.",
}
MESSAGES_PATH = re.compile(r"(/+v1)?/+messages(/|$)")
MESSAGES_ERROR_TYPES = {
    **dict.fromkeys((400, 405, 415), "invalid_request_error"),
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that disconnected before the response
RETRY_AFTER_SECONDS = 1  # a place in the queue becomes free about this often, a place in the batch less often


ModelT = TypeVar("ModelT", bound=BaseModel)


def shorten(text: str, length: int = MAX_ECHO) -> str:
    """Cut a text in the middle: of a message, what is wrong is at the start, and what to do at the end."""
    if len(text) <= length:
        return text
    return f"{text[: length * 2 // 3]} … ({len(text)} characters) … {text[len(text) - length // 5 :]}"


def printable(text: str) -> str:
    """Escape the control characters of a text, also those of Unicode."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def short_printable(text: str, length: int = MAX_ECHO) -> str:
    """Escape the control characters of a text, and cut it: before, since it may be long, and after, for the escapes."""
    return shorten(printable(shorten(text, length)), length)


def one_line(message: str) -> str:
    """Make a message one short line, whatever a client put into it and wherever: no error repeats a megabyte."""
    message = shorten(INPUT.sub(lambda found: shorten(found[0]), message), MAX_MESSAGE)
    return short_printable(re.sub(r"\s*\n\s*", " ", message.strip()), MAX_MESSAGE)


class ApiError(HTTPException):
    """An error response. Its message and param are one line each, and cut if a client made them long.

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
        message, param = one_line(message), None if param is None else short_printable(param)
        super().__init__(status, message, headers)
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self, scope: Scope) -> Response:
        """Return the response to a request, in the format of its API."""
        return Response(to_json(self.body_for(scope)), self.status_code, self.headers, "application/json")

    def body_for(self, scope: Scope) -> Mapping[str, object]:
        """Return the error in the format of the API that was requested, `body` or Anthropic's."""
        if not is_of_messages_api(scope):
            return self.body
        message, param = str(self.body["error"]["message"]), self.body["error"]["param"]
        error = {
            "type": MESSAGES_ERROR_TYPES.get(self.status_code, "api_error"),
            "message": message if param is None or message.startswith(f"{param}:") else f"{param}: {message}",
        }
        return {"type": "error", "error": error, "request_id": current_request_id.get()}


def is_of_messages_api(scope: Scope) -> bool:
    """Return whether a request is to the Messages API, whose errors have Anthropic's format."""
    return MESSAGES_PATH.match(scope["path"]) is not None


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of an invalid request (400)."""
    return ApiError(400, message, param=param, code=code)


def prompt_too_long(error: PromptTooLong, param: str | None) -> ApiError:
    """Convert the engine's error.

    Args:
        param: request field that holds the prompt.
    """
    return invalid_request(str(error), param, "context_length_exceeded")


def from_engine_error(error: Exception, param: str | None = None) -> ApiError | None:
    """Convert an exception of the engine to an API error; return None for other exceptions.

    Args:
        param: request field that holds the prompt.
    """
    if isinstance(error, PromptTooLong):
        return prompt_too_long(error, param)
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


def client_closed_request() -> ApiError:
    """Return what the log and the metrics show of a request whose client left before it was answered."""
    return ApiError(CLIENT_CLOSED_REQUEST, "The client has left.")


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


def from_validation_errors(
    errors: Sequence[ErrorDetails], body: object, advice: Mapping[str, str] = FIELD_ADVICE
) -> ApiError:
    """Convert the first error that pydantic found.

    Each alternative of a union reports its own errors. Type mismatches are dropped if an alternative of the right type
    failed too.

    Args:
        errors: output of `ValidationError.errors()`.
        body: the validated input.
        advice: field → sentence to add to its errors.
    """
    located = [(_field_path(error["loc"], body, error["type"]), error) for error in errors[:MAX_VALIDATION_ERRORS]]
    first = located[0][0]
    located = [(path, error) for path, error in located if path[: len(first)] == first]
    of_right_type = [(path, error) for path, error in located if not error["type"].endswith("_type")]
    path = max((path for path, _ in of_right_type or located), key=len)
    reasons = dict.fromkeys(_error_reason(error) for where, error in of_right_type or located if where == path)
    param = ".".join(map(str, path)) or None
    sentence = advice.get(param or "", "")
    return invalid_request(f"{param or 'The request body'}: {', or '.join(reasons)}.{sentence}", param)


def from_request_validation(request: Request, error: RequestValidationError) -> ApiError:
    """Convert the errors that FastAPI found in a request."""
    advice = {} if is_of_messages_api(request.scope) else FIELD_ADVICE  # there max_tokens is required
    return from_validation_errors(error.errors(), error.body, advice)


def validate_converted(model: type[ModelT], fields: Mapping[str, object]) -> ModelT:
    """Validate the fields of a converted request.

    Raises:
        ApiError: a field is invalid; it has the name of the converted request, see `rename_fields`.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        located: list[ErrorDetails] = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise from_validation_errors(located, fields) from error


def rename_field(path: str, names: Mapping[str, str]) -> str:
    """Return the path of a field of the original request; see `rename_fields`."""
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    steps = path.split(".")
    for end in range(len(steps), 0, -1):
        if (name := names.get(".".join(steps[:end]))) is not None:
            return ".".join([name, *steps[end:]])
    return path


def rename_fields(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """Return an error of a converted request that names the fields of the original one, in `param` and message.

    Args:
        names: path in the converted request → path in the original, as in {"messages.1": "input.0"}. It applies to
            the fields inside as well, unless they have a name of their own.
    """
    body = error.body["error"]
    roots = "|".join(sorted({re.escape(name.partition(".")[0]) for name in names}))
    # Without an index or a field inside, a name in the middle of the text may be an ordinary word, like "messages".
    pattern = rf"^(?:{roots})\b(?=:)|(?<![\w.])(?:{roots})(?:\[\d+\]|\.\w+)+"
    message = re.sub(pattern, lambda found: rename_field(found[0], names), str(body["message"]))
    param = None if body["param"] is None else rename_field(str(body["param"]), names)
    return ApiError(
        error.status_code, message, type=str(body["type"]), param=param, code=body["code"], headers=error.headers
    )


def _field_path(location: Sequence[str | int], body: Any, kind: str) -> tuple[str | int, ...]:
    """Remove the names of union alternatives, which pydantic adds, from a location."""
    if location[0] != "body":  # a parameter of the path or the query
        return tuple(location[1:])
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
    """Install handlers that answer the errors of an app in this format; RequestIdMiddleware answers exceptions."""

    async def handle_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if not isinstance(error, ApiError):
            error = _from_http_exception(request, error)
        return error.response(request.scope)

    async def handle_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_request_validation(request, error).response(request.scope)

    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(RequestValidationError, handle_validation_error)


def _from_http_exception(request: Request, error: HTTPException) -> ApiError:
    """Convert an error that the framework raised."""
    what = f"{request.method} {shorten(request.url.path)}"
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
