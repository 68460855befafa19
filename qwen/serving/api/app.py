"""Creates the OpenAI-compatible HTTP app of an engine.

`create_app` sets up routes and middleware; chat.py and completions.py interpret requests, generation.py sends the
responses; responses_api and messages_api translate other formats to chats. All state is in the app, so that one
process can have several.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from anyio import to_thread
from fastapi import APIRouter, FastAPI
from pydantic_core import to_json
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from ..._version import __version__
from ..engine import Engine, grammar
from ..hosts import ANY_HOST, HostMiddleware
from . import chat, completions, errors, request_id, tokens
from .errors import ApiError
from .messages_api import routes as messages_routes
from .metrics import MetricsMiddleware
from .middleware import (
    KEY_HEADER,
    AuthenticationMiddleware,
    BodyLimitMiddleware,
    OriginMiddleware,
    PathMiddleware,
    RequestIdMiddleware,
)
from .request_types import ChatCompletionRequest, CompletionRequest
from .response_types import ChatCompletion, Completion, ErrorResponse, Health, Model, ModelList, Version
from .responses_api import routes as responses_routes
from .routing import GENERATION_ROUTE, JsonRoute
from .service import Service, Settings

__all__ = ["Settings", "create_app"]

logger = logging.getLogger(__name__)

HEALTH_PATH = "/health"


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

    middleware = [Middleware(RequestIdMiddleware), Middleware(PathMiddleware)]
    if service.metrics is not None:
        middleware.append(Middleware(MetricsMiddleware, metrics=service.metrics))
    if ANY_HOST not in settings.allowed_hosts:
        middleware.append(Middleware(HostMiddleware, hosts=settings.allowed_hosts, refuse=_host_not_allowed))
    middleware.append(Middleware(OriginMiddleware, origins=settings.cors_origins))
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=[request_id.HEADER, "Retry-After"],
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
    app.include_router(tokens.create_router(service))
    app.include_router(responses_routes.create_router(service))
    app.include_router(messages_routes.create_router(service))
    errors.add_exception_handlers(app)
    _add_security_schemes(app, settings)
    return app


def _host_not_allowed(scope: Scope, message: str) -> ASGIApp:
    return ApiError(403, message, code="host_not_allowed").response(scope)


def _create_router(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, tags=["generation"], **GENERATION_ROUTE)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.check_messages(body)
        return await service.generate(request, body, chat.ENVELOPE, chat.build_plan, service.constraints)

    @router.post("/v1/completions", response_model=Completion, tags=["generation"], **GENERATION_ROUTE)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        return await service.generate(request, body, completions.ENVELOPE, completions.build_plan, service.constraints)

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

    @router.get("/version", tags=["operation"])
    async def version() -> Version:
        """Return the version of this package."""
        return {"version": __version__}

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
    if settings.api_key is not None:
        schemes["key"] = {"type": "apiKey", "in": "header", "name": KEY_HEADER}
    if schemes:
        document = app.openapi()  # cached by the app
        document.setdefault("components", {})["securitySchemes"] = schemes
        document["security"] = [{name: []} for name in schemes]
