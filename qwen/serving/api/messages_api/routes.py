"""The routes of Anthropic's Messages API."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from typing import Any, cast

from fastapi import APIRouter
from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from ...engine import Engine, PromptTooLong
from .. import chat
from ..errors import ApiError, invalid_request, rename_field, rename_fields
from ..generation import ChunkResponse, Generation, Plan, full_response, named_event
from ..response_types import ChatChunkChoice
from ..routing import GENERATION_ROUTE, NAMED_EVENT_SCHEMA, JsonRoute
from ..service import Service
from .convert import FIELD_NAMES, to_chat_request
from .events import PING, Event, MessageWriter, merge_events
from .types import AnthropicTool, CountTokensRequest, Message, MessageErrorResponse, MessagesRequest, TokenCount

ERRORS: dict[int | str, dict[str, Any]] = {
    **{
        status: response | {"model": MessageErrorResponse}
        for status, response in GENERATION_ROUTE["responses"].items()
        if status != 200
    },
    "default": {"model": MessageErrorResponse, "description": "An error in Anthropic's format"},
}


def create_router(service: Service) -> APIRouter:
    """Create the routes."""
    router = APIRouter(route_class=JsonRoute, tags=["messages"])

    @router.post(
        "/v1/messages",
        response_model=Message,
        response_description="The message, or with `stream` its events",
        responses=ERRORS | {200: {"content": {"text/event-stream": {"itemSchema": NAMED_EVENT_SCHEMA}}}},
    )
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, in Anthropic's format."""
        generation = await service.start(request, body, build_plan, service)
        writer = MessageWriter(service.model["id"], body.stop_sequences or [], body.shows_thought)
        if not body.stream:
            return await full_response(request, generation, _whole_message(generation, writer))
        events = _server_sent_events(request, generation, writer)
        response = ChunkResponse(generation, events, service.settings.drain_seconds)
        response.ping_message_factory = lambda: named_event(PING)
        return response

    @router.post("/v1/messages/count_tokens", response_model=TokenCount, responses=ERRORS)
    async def count_tokens(body: CountTokensRequest, request: Request) -> TokenCount:
        """Count the tokens of the prompt that a message would have."""
        service.check_unknown_fields(request, body)
        plan = await service.run_in_worker(request, body, partial(_build_chat_plan, any_length=True), body, service)
        return {"input_tokens": plan.prompt_tokens}

    return router


def build_plan(request: MessagesRequest, engine: Engine, service: Service) -> Plan:
    """Build the generation plan of a request. Encodes the prompt and builds grammars, which may be slow.

    Raises:
        ApiError: incompatible fields, a malformed conversation, too long a prompt, or a base checkpoint.
    """
    longest = engine.context_length - 1
    try:
        plan = _build_chat_plan(request, service)
        tokens = plan.prompt_tokens
    except PromptTooLong as error:
        tokens = error.tokens
    if tokens > longest:  # the engine would say it in words that clients of this API do not look for
        raise invalid_request(
            f"messages: prompt is too long: {tokens} tokens > {longest} maximum. Shorten the conversation.",
            "messages",
            "context_length_exceeded",
        )
    return plan


def _build_chat_plan(request: CountTokensRequest, service: Service, *, any_length: bool = False) -> Plan:
    for tool in request.tools or []:
        if isinstance(tool, AnthropicTool):
            service.log_left_out("/v1/messages", "tools", tool.type)
    chat_request = to_chat_request(request)
    service.check_messages(chat_request)
    try:
        plan = chat.build_plan(chat_request, service.engine, service.constraints, any_length=any_length)
    except ApiError as error:
        raise rename_fields(error, FIELD_NAMES) from error
    grammar_param = None if plan.grammar_param is None else rename_field(plan.grammar_param, FIELD_NAMES)
    return replace(plan, grammar_param=grammar_param)


async def _events(generation: Generation, writer: MessageWriter) -> AsyncGenerator[Event, None]:
    for event in writer.begin(generation.usage):
        yield event
    async with contextlib.aclosing(generation.chunks()) as chunks:
        async for chunk in chunks:
            for event in writer.write(cast("ChatChunkChoice", chunk)):
                yield event
    for event in writer.end(generation.usage):
        yield event


async def _whole_message(generation: Generation, writer: MessageWriter) -> Message:
    async with contextlib.aclosing(_events(generation, writer)) as events:
        return merge_events([event async for event in events])


async def _server_sent_events(
    request: Request, generation: Generation, writer: MessageWriter
) -> AsyncGenerator[ServerSentEvent, None]:
    try:
        async with contextlib.aclosing(_events(generation, writer)) as events:
            async for event in events:
                yield named_event(event)
    except ApiError as error:  # the status has been sent already
        yield named_event(error.body_for(request.scope))
