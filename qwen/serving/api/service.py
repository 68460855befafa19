"""The state of one server: its engine, settings and counters; starts the generation of requests."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import Response

from ..engine import Engine, PromptTooLong
from ..engine.grammar import ConstraintFactory
from ..engine.grammar_trials import client_left
from . import metrics
from .errors import client_closed_request, invalid_request, prompt_too_long, shutting_down
from .generation import Envelope, Generation, Plan, collect_answer, full_response, stream_response, wait_for_disconnect
from .log_once import LogOnce
from .memory import MemoryTrimmer
from .metrics import Metrics
from .peer_fields import NEUTRAL_VALUES, refuse_unsupported
from .request_types import ChatCompletionRequest, GenerationRequest, RequestModel, StreamOptions
from .response_types import Model
from .routing import StrictJsonRequest
from .structured_output import may_need_grammar

logger = logging.getLogger(__name__)

MAX_FIELD_NAME = 50  # characters of an unknown field in the log
MAX_LARGE_REQUESTS = 2  # that are parsed and encoded at once: each may take a hundred megabytes
PROMPT_FIELDS = ("messages", "prompt", "input")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server.

    Args:
        model_name: id of the model; None for the name of its checkpoint.
        basic_auth: required credentials, "USER:PASSWORD".
        api_key: required key.
        cors_origins: origins whose web pages may send requests; "*" for all.
        allowed_hosts: names in the Host header that are answered, beside those of the machine itself (localhost): see
            `HostMiddleware`. "*" for all.
        max_request_bytes: maximum size of a request body.
        body_seconds: maximum time for a request body to arrive.
        max_messages: maximum length of a conversation.
        drain_seconds: time for running replies to finish when the server stops.
        response_store: maximum number of responses of the Responses API in memory; 0 stores none.

    Raises:
        ValueError: malformed credentials, which would admit everyone or no one.
    """

    model_name: str | None = None
    basic_auth: str | None = None
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ("*",)
    max_request_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    max_messages: int = 1024
    drain_seconds: float = 30.0
    response_store: int = 256

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
        self.large_requests = CapacityLimiter(MAX_LARGE_REQUESTS)
        self.memory = MemoryTrimmer()
        # Grammars wait for each other, not the other requests for them; and they leave the model a part of the cores.
        self.slow_work = CapacityLimiter(max(2, (os.cpu_count() or 1) // 2))
        self.draining = False
        config, name = engine.model.config, engine.model.name_or_path or ""
        checkpoint = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
        self.model: Model = {
            "id": settings.model_name or checkpoint or "qwen",
            "object": "model",
            "created": int(time.time()),
            "owned_by": "qwen",
            "max_model_len": engine.context_length,
            "meta": {
                "n_vocab": config.vocab_size,
                "n_ctx": engine.context_length,
                "n_ctx_train": config.seq_length,
                "n_embd": config.hidden_size,
            },
        }
        identity = f"{config.to_json_string()} {engine.model.dtype} {torch.__version__}"
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
        """Answer a request for a chat or text completion.

        Raises:
            ApiError: the request is invalid or cannot be served now.
        """
        generation = await self.start(request, body, build_plan, *args)
        head = envelope.head(self.model["id"], self.fingerprint)
        if not body.stream:
            return await full_response(request, generation, collect_answer(generation, envelope, head))
        options = body.stream_options or StreamOptions()
        return stream_response(generation, envelope, head, options, self.settings.drain_seconds)

    async def start(
        self, request: Request, body: RequestModel, build_plan: Callable[..., Plan], *args: object
    ) -> Generation:
        """Plan a request in a worker thread and start it on the engine.

        Args:
            body: the request; the log names its unknown fields.
            build_plan: called with `body`, the engine and `args`.

        Raises:
            ApiError: the request is invalid or cannot be served now.
        """
        if self.draining:
            raise shutting_down()
        self.check_unknown_fields(request, body)
        if isinstance(body, GenerationRequest) and body.stream_options is not None and not body.stream:
            raise invalid_request("stream_options requires stream to be true.", "stream_options")
        try:
            plan = await self.run_in_worker(request, body, build_plan, body, self.engine, *args)
        except PromptTooLong as error:
            param = next(name for name in PROMPT_FIELDS if hasattr(body, name))
            raise prompt_too_long(error, param) from error
        if await request.is_disconnected():
            raise client_closed_request()
        generation = Generation(self.engine, plan, self.metrics)
        if isinstance(request, StrictJsonRequest):
            request.end_turn()
        return generation

    async def run_in_worker(self, request: Request, body: RequestModel, work: Callable[..., T], *args: object) -> T:
        """Do work for a request in a worker thread. If it may need a grammar, it first waits for others that do.

        Args:
            body: the request, parsed.
            work: called with `args`.

        Raises:
            ApiError: the request needs a grammar, and its client left before that was built.
        """
        if not may_need_grammar(body):
            return await to_thread.run_sync(work, *args)
        left, begun = threading.Event(), threading.Event()

        def run() -> T:
            begun.set()
            return work(*args)

        client_left.set(left)
        working = asyncio.create_task(to_thread.run_sync(run, limiter=self.slow_work))
        leaving = asyncio.create_task(wait_for_disconnect(request))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise client_closed_request()
            return working.result()
        finally:
            leaving.cancel()
            left.set()  # the thread ends its trial of a grammar
            working.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody else asks for it
            if not begun.is_set():
                working.cancel()

    def check_messages(self, body: ChatCompletionRequest) -> None:
        """Raise ApiError for a conversation that is too long for this server."""
        if len(body.messages) > self.settings.max_messages:
            raise invalid_request(
                f"Too many messages: {len(body.messages)}, at most {self.settings.max_messages} on this server.",
                "messages",
            )

    def check_unknown_fields(self, request: Request, body: RequestModel) -> None:
        """Log the unknown fields of a request, each name once. Raise ApiError for those that other servers act on."""
        fields, path = body.model_extra or {}, request.url.path
        refuse_unsupported(fields)
        for name, value in fields.items():
            if value is not None and name not in NEUTRAL_VALUES:
                advice = " Send earlier turns in messages." if name == "history" else ""
                self.ignored_fields.warning(
                    name, f"POST {path}: the field {name[:MAX_FIELD_NAME]!r} is not supported and ignored.{advice}"
                )

    def log_left_out(self, path: str, what: str, kind: str) -> None:
        """Log that parts of a request have no effect, those of each type once.

        Args:
            path: path of the endpoint.
            what: what the parts are, in the plural.
            kind: their type.
        """
        self.ignored_fields.warning(
            f"{what} {kind}", f"POST {path}: {what} of type {kind[:MAX_FIELD_NAME]!r} are not supported and left out."
        )

    def drain(self, seconds: float) -> None:
        """Reject new requests, and wait up to `seconds` for running ones to finish."""
        self.draining = True
        self.engine.close(seconds)
