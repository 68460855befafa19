"""Creates the OpenAI-compatible HTTP app of an engine.

`create_app` sets up routes and middleware; chat.py and completions.py interpret requests, generation.py sends the
responses. All state is in the app, so that one process can have several.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from anyio import to_thread
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from pydantic_core import from_json, to_json
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from ..engine import Engine, grammar
from ..engine.grammar import ConstraintFactory
from . import chat, completions, errors, metrics
from .errors import ApiError, invalid_request, shutting_down
from .generation import Envelope, Generation, Plan, full_response, stream_response
from .log_once import LogOnce
from .metrics import Metrics, MetricsMiddleware
from .middleware import AuthenticationMiddleware, BodyLimitMiddleware, OriginMiddleware, PathMiddleware
from .request_types import ChatCompletionRequest, CompletionRequest, GenerationRequest
from .response_types import ChatCompletion, Completion, ErrorResponse, Health, Model, ModelList

logger = logging.getLogger(__name__)

HEALTH_PATH = "/health"
MAX_FIELD_NAME = 50  # characters of an unknown field in the log
SERVER_SENT_EVENT_SCHEMA = {  # as in OpenAPI 3.2, section 4.14.4
    "type": "object",
    "properties": {"data": {"type": "string", "description": "a chunk or an error as JSON, or [DONE]"}},
    "required": ["data"],
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server.

    Args:
        model_name: id of the model; None for the name of its checkpoint.
        basic_auth: required credentials, "USER:PASSWORD".
        api_key: required key.
        cors_origins: origins whose web pages may send requests; "*" for all.
        max_request_bytes: maximum size of a request body.
        body_seconds: maximum time for a request body to arrive.
        max_messages: maximum length of a conversation.
        drain_seconds: time for running replies to finish when the server stops.

    Raises:
        ValueError: malformed credentials, which would admit everyone or no one.
    """

    model_name: str | None = None
    basic_auth: str | None = None
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_request_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    max_messages: int = 1024
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.basic_auth is not None and not all(self.basic_auth.partition(":")):
            raise ValueError("basic_auth must be USER:PASSWORD: a user and a password, separated by a colon.")
        if self.api_key is not None and not (self.api_key and self.api_key == self.api_key.strip()):
            raise ValueError("api_key must be a non-empty string without surrounding whitespace.")


class Service:
    """The engine, settings and state of one app."""

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine) if metrics.is_available() else None
        self.constraints = ConstraintFactory(engine.tokenizer, engine.model.config.vocab_size)
        self.ignored_fields = LogOnce(logger, "ignored fields")
        self.draining = False
        name = engine.model.name_or_path or ""
        checkpoint = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
        self.model: Model = {
            "id": settings.model_name or checkpoint or "qwen",
            "object": "model",
            "created": int(time.time()),
            "owned_by": "qwen",
        }
        identity = f"{engine.model.config.to_json_string()} {engine.model.dtype} {torch.__version__}"
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]

    @property
    def status(self) -> Literal["ready", "draining", "failed"]:
        if self.engine.failed:
            return "failed"
        return "draining" if self.draining else "ready"

    async def generate(
        self,
        request: Request,
        body: GenerationRequest,
        envelope: Envelope,
        build_plan: Callable[..., Plan],
        *args: object,
    ) -> Response:
        """Plan a request in a worker thread and run it on the engine.

        Raises:
            ApiError: the request is invalid or cannot be served now.
        """
        if self.draining:
            raise shutting_down()
        self._log_ignored_fields(request.url.path, body.model_extra or {})
        if body.stream_options is not None and not body.stream:
            raise invalid_request("stream_options requires stream to be true.", "stream_options")
        plan = await to_thread.run_sync(build_plan, body, self.engine, *args)
        generation = Generation(self.engine, plan, self.metrics)
        head = envelope.head(self.model["id"], self.fingerprint)
        if not body.stream:
            return await full_response(request, generation, envelope, head)
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return stream_response(generation, envelope, head, include_usage, self.settings.drain_seconds)

    def _log_ignored_fields(self, path: str, fields: Mapping[str, object]) -> None:
        for name, value in fields.items():
            if value is not None:
                advice = " Send earlier turns in messages." if name == "history" else ""
                self.ignored_fields.warning(
                    name, f"POST {path}: the field {name[:MAX_FIELD_NAME]!r} is not supported and ignored.{advice}"
                )

    def drain(self, seconds: float) -> None:
        """Reject new requests, and wait up to `seconds` for running ones to finish."""
        self.draining = True
        self.engine.close(seconds)


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


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """Create an app that serves an engine and closes it at shutdown.

    `app.state.service` is the Service; its `drain` may be called before shutdown. Features that are disabled because
    a package is missing are logged.
    """
    settings = settings or Settings()
    service = Service(engine, settings)
    if service.metrics is None:
        logger.warning("/metrics is disabled: prometheus-client is not installed (`pip install prometheus-client`).")
    if not grammar.is_available():
        logger.warning(
            "Constrained replies (response_format, tool_choice, strict) are disabled: llguidance is not installed "
            "(`pip install llguidance`)."
        )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await to_thread.run_sync(service.drain, settings.drain_seconds)

    middleware = [Middleware(PathMiddleware)]
    if service.metrics is not None:
        middleware.append(Middleware(MetricsMiddleware, metrics=service.metrics))
    middleware.append(Middleware(OriginMiddleware, origins=settings.cors_origins))
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
        )
    if settings.basic_auth is not None or settings.api_key is not None:
        credentials = {"basic": settings.basic_auth, "key": settings.api_key}
        middleware.append(Middleware(AuthenticationMiddleware, open_paths=[HEALTH_PATH], **credentials))
    middleware.append(
        Middleware(BodyLimitMiddleware, max_bytes=settings.max_request_bytes, seconds=settings.body_seconds)
    )
    app = FastAPI(
        title="Qwen",
        description="OpenAI-compatible server of a first-generation Qwen model.",
        middleware=middleware,
        lifespan=lifespan,
        redirect_slashes=False,  # PathMiddleware removes them
        redoc_url=None,
        responses={"default": {"model": ErrorResponse, "description": "An error in OpenAI's format"}},
    )
    app.state.service = service
    app.include_router(_create_router(service))
    errors.add_exception_handlers(app)
    _add_security_schemes(app, settings)
    return app


def _create_router(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)
    generation_route: dict[str, Any] = {
        "response_description": "The response, or with `stream` its chunks and then [DONE] as server-sent events",
        "responses": {
            200: {"content": {"text/event-stream": {"itemSchema": SERVER_SENT_EVENT_SCHEMA}}},
            **{
                status: {"model": ErrorResponse, "description": description}
                for status, description in {
                    400: "Invalid field",
                    408: "The request body did not arrive in time",
                    413: "The request body is too large",
                    415: "Not JSON, or compressed",
                    429: "The queue is full",
                    503: "The server is shutting down, or its model has failed and cannot recover",
                }.items()
            },
        },
    }

    @router.post("/v1/chat/completions", response_model=ChatCompletion, tags=["generation"], **generation_route)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        limit = service.settings.max_messages
        if len(body.messages) > limit:
            raise invalid_request(
                f"Too many messages: {len(body.messages)}, at most {limit} on this server.", "messages"
            )
        return await service.generate(request, body, chat.ENVELOPE, chat.build_plan, service.constraints)

    @router.post("/v1/completions", response_model=Completion, tags=["generation"], **generation_route)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        return await service.generate(request, body, completions.ENVELOPE, completions.build_plan)

    @router.get("/v1/models", tags=["models"])
    async def list_models() -> ModelList:
        """List the model of this server."""
        return {"object": "list", "data": [service.model]}

    @router.get("/v1/models/{model_id:path}", tags=["models"])
    async def retrieve_model(model_id: str) -> Model:
        """Return the model by its id."""
        if model_id != service.model["id"]:
            raise ApiError(
                404,
                f"Unknown model {model_id!r}. This server has {service.model['id']!r}.",
                param="model",
                code="model_not_found",
            )
        return service.model

    @router.get(HEALTH_PATH, tags=["operation"], response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Report whether requests are accepted. Needs no credentials."""
        status = service.status
        return Response(to_json({"status": status}), 200 if status == "ready" else 503, media_type="application/json")

    if (app_metrics := service.metrics) is not None:

        @router.get(
            "/metrics", tags=["operation"], response_class=Response, responses={200: {"content": {"text/plain": {}}}}
        )
        async def prometheus() -> Response:
            """Metrics for Prometheus."""
            text, media_type = app_metrics.render()
            return Response(text, headers={"Content-Type": media_type})

    return router


def _add_security_schemes(app: FastAPI, settings: Settings) -> None:
    """Add the required credentials to the OpenAPI document, so that /docs asks for them."""
    schemes = {
        name: {"type": "http", "scheme": name}
        for name, secret in (("basic", settings.basic_auth), ("bearer", settings.api_key))
        if secret is not None
    }
    if schemes:
        document = app.openapi()  # cached by the app
        document.setdefault("components", {})["securitySchemes"] = schemes
        document["security"] = [{name: []} for name in schemes]
