"""Generates the choices of one request and sends them to the client, at once or as server-sent events.

`Generation` reads the streams of all choices concurrently, and a `Writer` converts each to chunks. A response that is
sent at once is merged from the same chunks as a streamed one, so that the two cannot differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypedDict, cast

from pydantic_core import to_json
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine import Engine, TextStream
from ..engine.detokenizer import Piece
from ..engine.sampling_params import SamplingParams
from ..engine.sequence import Constraint
from .errors import (
    CLIENT_CLOSED_REQUEST,
    ApiError,
    engine_failed,
    from_engine_error,
    interrupted_by_shutdown,
    invalid_request,
    server_error,
)
from .metrics import Metrics
from .request_id import current_request_id
from .request_types import StreamOptions
from .response_types import ChatChoice, ChatChunkChoice, StopReason, TextChoice, TextFinishReason, Usage

# Log-probabilities in one response, about 100 bytes of JSON each: enough for a full context with 20 per token.
MAX_LOGPROBS = 2**18

Chunk = ChatChunkChoice | TextChoice


class Writer(Protocol):
    """Converts the text pieces of one choice to chunks.

    Attributes:
        reasoning_tokens: tokens of the reply so far that are neither text nor a call.
    """

    reasoning_tokens: int

    def begin(self) -> Iterable[Chunk]: ...

    def write(self, piece: Piece) -> Iterable[Chunk]: ...

    def end(self, reason: TextFinishReason, stop_reason: StopReason) -> Iterable[Chunk]:
        """Finish the choice."""


class Choice(NamedTuple):
    """The engine's inputs for one choice, and the writer of its chunks."""

    prompt_ids: list[int]
    params: SamplingParams
    writer: Writer
    stop: Sequence[str] = ()
    lstrip: bool = False
    rstrip: bool = False
    end_strings: Sequence[str] = ()
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Plan:
    """A parsed request, ready for the engine.

    Args:
        choices: all choices, in the order of their index.
        prompt_tokens: tokens of the prompts, counted once for all choices.
        prompt_param: request field that holds the prompt.
        grammar_param: that which asks for a grammar, if there is one.
        cache_salt: the prompts share the key/value cache only with requests of the same salt.
        fields: further fields of the response, or of its first chunk.
    """

    choices: list[Choice]
    prompt_tokens: int
    prompt_param: str
    cache_salt: str | None = None
    grammar_param: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)


class Head(TypedDict):
    """The fields of a response or streamed chunk before its choices."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


@dataclass(frozen=True)
class Envelope:
    """The fields of a response around its choices.

    Args:
        object: object type of a response.
        chunk_object: object type of a streamed chunk.
        id_prefix: prefix of response ids.
        merge_chunks: merges the chunks of one choice, all from the writer of the same endpoint.
    """

    object: str
    chunk_object: str
    id_prefix: str
    merge_chunks: Callable[..., ChatChoice | TextChoice]

    def head(self, model: str, fingerprint: str) -> Head:
        return {
            "id": self.id_prefix + uuid.uuid4().hex,
            "object": self.object,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }


def check_num_choices(engine: Engine, choices: int) -> None:
    """Raise ApiError for more choices than the server can hold, before any work is done."""
    capacity = engine.max_batch_size + engine.max_queue
    if choices > capacity:
        raise invalid_request(f"Too many choices: {choices} requested, at most {capacity} per request on this server.")


def _check_plan(engine: Engine, choices: Sequence[Choice]) -> None:
    """Raise ApiError for settings that cannot be combined, or more log-probabilities than a response may have."""
    if any(choice.params.ignore_eos and choice.constraint is not None for choice in choices):
        raise invalid_request(
            "ignore_eos cannot be combined with a grammar (response_format, a required tool and the like), which "
            "decides where the reply ends. Omit one of them.",
            "ignore_eos",
        )
    count = 0
    param = "prompt_logprobs"
    for ids, params, *_ in choices:
        if params.top_logprobs is not None:
            param = "logprobs"
            count += min(params.max_tokens, engine.context_length - len(ids)) * (1 + params.top_logprobs)
        if params.prompt_logprobs is not None:
            count += len(ids) * (1 + params.prompt_logprobs)
    if count > MAX_LOGPROBS:
        raise invalid_request(
            f"Too many log-probabilities: up to {count}, with those of the most likely tokens, at most {MAX_LOGPROBS} "
            "per response. Ask for fewer tokens, choices or log-probabilities.",
            param,
        )


class Generation:
    """All choices of a request while they are generated.

    Raises:
        ApiError: settings that cannot be combined, or the engine rejected a choice; the others are cancelled.
    """

    def __init__(self, engine: Engine, plan: Plan, metrics: Metrics | None):
        _check_plan(engine, plan.choices)
        self.plan, self.metrics = plan, metrics
        self.streams: list[TextStream] = []
        try:
            for choice in plan.choices:
                ids, params, _, stop, lstrip, rstrip, end_strings, constraint = choice
                self.streams.append(
                    engine.start(
                        ids,
                        params,
                        stop=stop,
                        lstrip=lstrip,
                        rstrip=rstrip,
                        end_strings=end_strings,
                        constraint=constraint,
                        group=self,
                        cache_salt=plan.cache_salt,
                        request_id=current_request_id.get(),
                    )
                )
        except Exception as error:
            for stream in self.streams:
                stream.cancel()
            api_error = engine_failed() if engine.failed else from_engine_error(error, plan.prompt_param)
            if api_error is None:
                raise
            raise api_error from error
        self.closed = False
        self._tokens_in_chunks = 0

    @property
    def usage(self) -> Usage:
        """The numbers of tokens."""
        return self._usage(sum(stream.completion_tokens for stream in self.streams))

    @property
    def usage_so_far(self) -> Usage:
        """The same, without tokens that are not in a chunk yet. Needs `return_token_ids` in the sampling settings."""
        return self._usage(self._tokens_in_chunks)

    def _usage(self, completion_tokens: int) -> Usage:
        return {
            "prompt_tokens": self.plan.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.plan.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.writer.reasoning_tokens for choice in self.plan.choices)
            },
        }

    @property
    def _cached_tokens(self) -> int:
        """Tokens of the prompts that were in the cache; of choices with the same prompt, the first one's."""
        first: dict[int, int] = {}
        for choice, stream in zip(self.plan.choices, self.streams, strict=True):
            first.setdefault(id(choice.prompt_ids), stream.cached_tokens)
        return sum(first.values())

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of all choices as they arrive.

        Raises:
            ApiError: the model failed, or the server is stopping.
        """
        queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

        async def read(index: int, stream: TextStream) -> None:
            try:
                async for piece in stream:
                    queue.put_nowait((index, piece))
                queue.put_nowait((index, None))
            except Exception as error:
                queue.put_nowait((index, error))

        writers = [choice.writer for choice in self.plan.choices]
        readers = [asyncio.create_task(read(*pair)) for pair in enumerate(self.streams)]
        try:
            for writer in writers:
                for chunk in writer.begin():
                    yield chunk
            running = len(readers)
            while running:
                index, item = await queue.get()
                if isinstance(item, Exception):
                    raise from_engine_error(item, self.plan.grammar_param) or server_error() from item
                if item is not None:
                    self._tokens_in_chunks += len(item.token_ids)
                    chunks = writers[index].write(item)
                elif (reason := self.streams[index].finish_reason) is None or reason == "cancelled":
                    raise interrupted_by_shutdown()  # only draining cancels a stream that is being read
                else:
                    chunks = writers[index].end(cast("TextFinishReason", reason), self.streams[index].stop_reason)
                    running -= 1
                for chunk in chunks:
                    yield chunk
        finally:
            for reader in readers:
                reader.cancel()
            self.close()

    def close(self) -> None:
        """Cancel running streams and record metrics. May be called again."""
        for stream in self.streams:
            stream.cancel()
        if not self.closed:
            self.closed = True
            if self.metrics is not None:
                self.metrics.record_generation(self.plan.prompt_tokens, self._cached_tokens, self.streams)


class ChunkResponse(EventSourceResponse):
    """Sends a generation as server-sent events and closes it when the connection ends.

    Args:
        events: data of events without a name, or events.
        grace_seconds: time to send the rest when the web server shuts down.
    """

    def __init__(self, generation: Generation, events: AsyncIterator[str | ServerSentEvent], grace_seconds: float):
        super().__init__(events, sep="\n", shutdown_grace_period=grace_seconds)
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.close()  # even if no event was requested


def named_event(event: Mapping[str, Any]) -> ServerSentEvent:
    """Return an event of the APIs whose events have names: that in `type`."""
    return ServerSentEvent(to_json(event).decode(), event=event["type"], sep="\n")


def stream_response(
    generation: Generation, envelope: Envelope, head: Head, options: StreamOptions, grace_seconds: float
) -> Response:
    """Return a streamed response.

    Args:
        options: which chunks have the token counts: the last one, without choices, or also the others.
        grace_seconds: time to send the rest when the web server shuts down.
    """
    chunk_head = {**head, "object": envelope.chunk_object}
    include_usage, continuous = bool(options.include_usage), bool(options.continuous_usage_stats)
    usage: dict[str, object] = {"usage": None} if include_usage else {}

    async def events() -> AsyncIterator[str]:
        fields = {**chunk_head, **generation.plan.fields}
        try:
            async with contextlib.aclosing(generation.chunks()) as chunks:
                async for chunk in chunks:
                    if continuous:
                        usage["usage"] = generation.usage_so_far
                    yield to_json({**fields, "choices": [chunk], **usage}).decode()
                    fields = chunk_head
        except ApiError as error:  # the status has been sent already
            yield to_json(error.body).decode()
            return
        if include_usage:
            yield to_json({**chunk_head, "choices": [], "usage": generation.usage}).decode()
        yield "[DONE]"

    return ChunkResponse(generation, events(), grace_seconds)


async def collect_answer(generation: Generation, envelope: Envelope, head: Head) -> dict[str, object]:
    """Return the whole response: all choices, each merged from its chunks."""
    parts: list[list[Chunk]] = [[] for _ in generation.streams]
    async with contextlib.aclosing(generation.chunks()) as chunks:
        async for chunk in chunks:
            parts[chunk["index"]].append(chunk)
    fields = generation.plan.fields
    return {**head, **fields, "choices": [envelope.merge_chunks(part) for part in parts], "usage": generation.usage}


async def wait_for_disconnect(request: Request) -> None:
    """Wait until the client of a request, whose body has been read, has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def full_response(
    request: Request, generation: Generation, answer: Coroutine[Any, Any, Mapping[str, object]]
) -> Response:
    """Return the JSON object of an answer, or an empty response if the client disconnects first.

    Args:
        answer: reads the generation and returns the object.

    Raises:
        ApiError: the model failed, or the server is stopping.
    """
    answering = asyncio.create_task(answer)
    tasks = (answering, asyncio.create_task(wait_for_disconnect(request)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Response(to_json(answering.result()), media_type="application/json")
    finally:
        for task in tasks:
            task.cancel()
        generation.close()
