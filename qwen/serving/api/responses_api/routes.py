"""The routes of OpenAI's Responses API."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, cast

from anyio import to_thread
from fastapi import APIRouter, Path, Query
from fastapi.routing import APIRoute
from pydantic_core import from_json, to_json
from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from ...engine import Engine
from .. import chat
from ..errors import ApiError, invalid_request, rename_field, rename_fields
from ..generation import ChunkResponse, Generation, Plan, full_response, named_event
from ..request_types import JSONObject
from ..response_types import ChatChunkChoice, ErrorResponse
from ..routing import GENERATION_ROUTE, JSON_ERRORS, NAMED_EVENT_SCHEMA, JsonRoute
from ..service import Service
from .convert import ConversationItems, new_response, stored_input, to_chat_request
from .events import Event, ResponseWriter
from .store import ResponseStore, StoredResponse, Turn
from .types import (
    MAX_ID,
    DeletedResponse,
    InputItem,
    InputItems,
    InputTokens,
    OtherItem,
    OtherTool,
    Response,
    ResponseRequest,
)

PATH = "/v1/responses"
MAX_PAGE = 100  # items in a list
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse, "description": "No such response"}}
ResponseId = Annotated[str, Path(max_length=MAX_ID)]


def create_router(service: Service) -> APIRouter:
    """Create the routes, and the store of their responses."""
    router = APIRouter(route_class=JsonRoute, tags=["responses"])
    store = ResponseStore(service.settings.response_store)

    def find(id: str) -> StoredResponse:
        if (found := store.get(id)) is None:
            raise _not_found(store, f"Response {id!r}", "response_not_found")
        return found

    async def resolve(body: ResponseRequest) -> ResponseRequest:
        """Resolve references in a worker thread: the items may have megabytes."""
        return await to_thread.run_sync(_resolve_references, body, store, service.settings.max_request_bytes)

    @router.post(
        PATH,
        response_model=Response,
        response_description="The response, or with `stream` its events",
        responses=GENERATION_ROUTE["responses"]
        | {200: {"content": {"text/event-stream": {"itemSchema": NAMED_EVENT_SCHEMA}}}},
    )
    async def create_response(body: ResponseRequest, request: Request) -> HttpResponse:
        """Answer a conversation, in the format of OpenAI's Responses API."""
        body = await resolve(body)
        previous = _previous_turn(body, service, store)
        generation = await service.start(request, body, build_plan, service, previous)
        writer = ResponseWriter(new_response(body, service.model["id"], generation.plan.choices[0].params))

        def keep() -> None:
            response = writer.response
            ids = [item["id"] for item in response["output"]]
            turn = Turn(stored_input(body), to_json(response["output"]), ids, previous)
            store.add(response["id"], to_json(response), turn)

        events = _events(generation, writer, keep if store.max_responses and body.store is not False else None)
        if not body.stream:
            return await full_response(request, generation, _last_response(events, writer))
        return ChunkResponse(generation, _server_sent_events(events, writer), service.settings.drain_seconds)

    @router.post(f"{PATH}/input_tokens", response_model=InputTokens, responses=JSON_ERRORS)
    async def count_input_tokens(body: ResponseRequest, request: Request) -> InputTokens:
        """Count the tokens of the prompt that a response would have."""
        service.check_unknown_fields(request, body)
        body = await resolve(body)
        previous = _previous_turn(body, service, store)
        build = partial(build_plan, any_length=True)
        plan = await service.run_in_worker(request, body, build, body, service.engine, service, previous)
        return {"object": "response.input_tokens", "input_tokens": plan.prompt_tokens}

    @router.get(f"{PATH}/{{response_id}}", response_model=Response, responses=NOT_FOUND)
    async def retrieve_response(response_id: ResponseId, stream: bool | None = None) -> HttpResponse:
        """Return a stored response."""
        if stream:
            raise invalid_request("stream: a stored response is returned at once, omit it.", "stream")
        return HttpResponse(find(response_id).response, media_type="application/json")

    @router.delete(f"{PATH}/{{response_id}}", response_model=DeletedResponse, responses=NOT_FOUND)
    async def delete_response(response_id: ResponseId) -> DeletedResponse:
        """Delete a stored response. Later responses of its conversation keep what it said."""
        find(response_id)
        store.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def cancel_response(response_id: ResponseId) -> HttpResponse:
        """Refuse: only background responses could be cancelled, which this server does not have."""
        find(response_id)
        raise invalid_request(
            f"Response {response_id!r} is complete. Only background responses can be cancelled, which this server does "
            "not have: to stop a response, close its connection."
        )

    # Without the check of JsonRoute: the request has no body, and no effect.
    router.add_api_route(
        f"{PATH}/{{response_id}}/cancel",
        cancel_response,
        methods=["POST"],
        responses=JSON_ERRORS | NOT_FOUND,
        route_class_override=APIRoute,
    )

    @router.get(f"{PATH}/{{response_id}}/input_items", response_model=InputItems, responses=NOT_FOUND)
    async def list_input_items(
        response_id: ResponseId,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(max_length=MAX_ID)] = None,
    ) -> HttpResponse:
        """Return the items that a stored response was generated from, with those of earlier responses."""
        page = await to_thread.run_sync(_list_items, find(response_id).turn, limit, order == "desc", after)
        return HttpResponse(to_json(page), media_type="application/json")

    return router


def build_plan(
    request: ResponseRequest, engine: Engine, service: Service, previous: Turn | None, *, any_length: bool = False
) -> Plan:
    """Build the generation plan of a request. Encodes the prompt and builds grammars, which may be slow.

    Args:
        previous: last turn of the conversation that the request continues.
        any_length: also encode a prompt that is much too long to be answered.

    Raises:
        ApiError: incompatible fields, a malformed conversation, or a base checkpoint.
        PromptTooLong: the prompt is much too long.
    """
    _log_dropped(request, service)
    history: list[InputItem] = []
    for turn in previous.conversation() if previous is not None else []:
        history += ConversationItems.validate_json(turn.input)
        history += ConversationItems.validate_json(turn.output)
    chat_request, names = to_chat_request(request, history)
    try:
        service.check_messages(chat_request)
        plan = chat.build_plan(chat_request, engine, service.constraints, any_length=any_length)
    except ApiError as error:
        raise rename_fields(error, names) from error
    grammar_param = None if plan.grammar_param is None else rename_field(plan.grammar_param, names)
    return replace(plan, prompt_param="input", grammar_param=grammar_param)


def _resolve_references(request: ResponseRequest, store: ResponseStore, max_bytes: int) -> ResponseRequest:
    """Return a request with the items of stored responses instead of references to them.

    Raises:
        ApiError: these items have more than `max_bytes`.
    """
    if isinstance(request.input, str):
        return request
    items: list[InputItem] = []
    size = 0
    for index, item in enumerate(request.input):
        turn = None
        if isinstance(item, OtherItem) and item.type == "item_reference" and item.id is not None:
            turn = store.find_turn(item.id)
        if turn is None:
            items.append(item)
            continue
        size += len(turn.output)  # all of it is read to find the item
        if size > max_bytes:
            raise invalid_request(
                f"input.{index}: the responses that the references are to have more than {max_bytes} bytes, which is "
                "the limit on this server. Send the last items themselves.",
                f"input.{index}",
            )
        items += [each for each in ConversationItems.validate_json(turn.output) if each.id == item.id]
    return request.model_copy(update={"input": items})


def _previous_turn(request: ResponseRequest, service: Service, store: ResponseStore) -> Turn | None:
    """Return the last turn of the conversation that a request continues.

    Raises:
        ApiError: it is not stored, or too long.
    """
    if (id := request.previous_response_id) is None:
        return None
    if (found := store.get(id)) is None:
        error = _not_found(store, f"previous_response_id: response {id!r}", "previous_response_not_found")
        error.body["error"]["param"] = "previous_response_id"
        raise error
    size, limit = sum(turn.size for turn in found.turn.conversation()), service.settings.max_request_bytes
    if size > limit:
        raise invalid_request(
            f"previous_response_id: the conversation has {size} bytes, at most {limit} on this server. Begin a new one "
            "with its last messages.",
            "previous_response_id",
        )
    return found.turn


def _not_found(store: ResponseStore, what: str, code: str) -> ApiError:
    if not store.max_responses:
        return ApiError(
            404,
            f"{what} was not found: this server stores no responses (--response-store 0). Send the whole conversation "
            "in input.",
            code=code,
        )
    return ApiError(
        404,
        f"{what} was not found. It was not stored or was deleted, or newer ones have taken its place: this server "
        f"stores the last {store.max_responses}. Send the whole conversation in input.",
        code=code,
    )


def _log_dropped(request: ResponseRequest, service: Service) -> None:
    """Log the kinds of tools and items that have no effect, each once."""
    for tool in request.tools or []:
        if isinstance(tool, OtherTool):
            service.log_left_out(PATH, "tools", tool.type)
    for item in request.input if isinstance(request.input, list) else []:
        if isinstance(item, OtherItem):
            service.log_left_out(PATH, "items", item.type)


async def _events(
    generation: Generation, writer: ResponseWriter, keep: Callable[[], None] | None
) -> AsyncGenerator[Event, None]:
    for event in writer.begin():
        yield event
    async with contextlib.aclosing(generation.chunks()) as chunks:
        async for chunk in chunks:
            for event in writer.write(cast("ChatChunkChoice", chunk)):
                yield event
    last = writer.finish(generation.usage)
    if keep is not None:
        await to_thread.run_sync(keep)  # before the client can ask for it
    yield last


async def _last_response(events: AsyncGenerator[Event, None], writer: ResponseWriter) -> Response:
    async with contextlib.aclosing(events):
        async for _ in events:
            pass
    return writer.response


async def _server_sent_events(
    events: AsyncGenerator[Event, None], writer: ResponseWriter
) -> AsyncGenerator[ServerSentEvent, None]:
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield named_event(event)
    except ApiError as error:  # the status has been sent already
        for event in writer.fail(error):
            yield named_event(event)


def _list_items(turn: Turn, limit: int, newest_first: bool, after: str | None) -> InputItems:
    *earlier, last = turn.conversation()
    items: list[JSONObject] = []
    for each in earlier:
        items += [*from_json(each.input), *from_json(each.output)]
    items += from_json(last.input)
    if newest_first:
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise invalid_request(f"after: there is no item {after!r} in this list.", "after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }
