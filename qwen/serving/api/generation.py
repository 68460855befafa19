"""Generates the choices of one request and sends them to the client, at once or as server-sent events.

`Generation` reads the streams of all choices concurrently, and a `Writer` converts each to chunks. A response that is
sent at once is merged from the same chunks as a streamed one, so that the two cannot differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypedDict, cast

from pydantic_core import to_json
from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine import Engine, TextStream
from ..engine.detokenizer import Piece
from ..engine.sampling_params import SamplingParams
from ..engine.sequence import Constraint
from .errors import ApiError, engine_failed, from_engine_error, interrupted_by_shutdown, invalid_request, server_error
from .metrics import CLIENT_CLOSED_REQUEST, Metrics
from .request_types import GenerationRequest
from .response_types import ChatChoice, ChatChunkChoice, TextChoice, TextFinishReason, Usage

# Log-probabilities in one response, about 100 bytes of JSON each: enough for a full context with 20 per token.
MAX_LOGPROBS = 2**18

Chunk = ChatChunkChoice | TextChoice


class Writer(Protocol):
    """Converts the text pieces of one choice to chunks."""

    def begin(self) -> Iterable[Chunk]: ...

    def write(self, piece: Piece) -> Iterable[Chunk]: ...

    def end(self, reason: TextFinishReason) -> Iterable[Chunk]:
        """Finish the choice."""


class Choice(NamedTuple):
    """The engine's inputs for one choice, and the writer of its chunks."""

    prompt_ids: list[int]
    params: SamplingParams
    writer: Writer
    stop: Sequence[str] = ()
    lstrip: bool = False
    rstrip: bool = False
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Plan:
    """A parsed request, ready for the engine.

    Args:
        choices: all choices, in the order of their index.
        prompt_tokens: tokens of the prompts, counted once for all choices.
        prompt_param: request field that holds the prompt.
        cache_salt: the prompts share the key/value cache only with requests of the same salt.
    """

    choices: list[Choice]
    prompt_tokens: int
    prompt_param: str
    cache_salt: str | None = None


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


def sampling_params(
    engine: Engine,
    request: GenerationRequest,
    prompt_lengths: Sequence[int],
    *,
    max_tokens: int | None,
    top_logprobs: int | None,
) -> list[list[SamplingParams]]:
    """Build the sampling settings of all choices: a list of `n` for each prompt.

    Args:
        prompt_lengths: tokens of each prompt.
        max_tokens, top_logprobs: fields of SamplingParams, whose names differ between the two endpoints.

    Raises:
        ApiError: settings out of range for this model, or too many log-probabilities.
    """
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    if unknown := [token for token in bias if token >= len(engine.tokenizer)]:
        raise invalid_request(
            f"logit_bias: invalid token id {unknown[0]}, valid ids are 0 to {len(engine.tokenizer) - 1}.",
            "logit_bias",
        )
    greedy = request.top_p == 0  # only the most likely token remains

    def build_params(limit: int | None, seed: int | None) -> SamplingParams:
        return engine.params(
            temperature=0.0 if greedy else request.temperature,
            top_p=None if greedy else request.top_p,
            top_k=None if request.top_k is None else max(request.top_k, 0),
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=bias or None,
            top_logprobs=top_logprobs,
            max_tokens=limit,
            seed=seed,
        )

    seeds = [None if request.seed is None else request.seed + index for index in range(request.num_choices)]
    try:
        params = [
            [build_params(limit, seed) for seed in seeds]
            for limit in (_max_tokens(request, length, max_tokens) for length in prompt_lengths)
        ]
    except ValueError as error:
        raise invalid_request(str(error), str(error).split()[0]) from error
    if top_logprobs is not None:
        tokens = sum(
            min(choice_params.max_tokens, engine.context_length - length)
            for length, prompt_params in zip(prompt_lengths, params, strict=True)
            for choice_params in prompt_params
        )
        if tokens * (1 + top_logprobs) > MAX_LOGPROBS:
            raise invalid_request(
                f"Too many log-probabilities: up to {tokens} tokens with {1 + top_logprobs} each, at most "
                f"{MAX_LOGPROBS} per response. Ask for fewer tokens, choices or log-probabilities.",
                "logprobs",
            )
    return params


def _max_tokens(request: GenerationRequest, prompt_tokens: int, max_tokens: int | None) -> int | None:
    if request.max_length is None:
        return max_tokens
    remaining = request.max_length - prompt_tokens
    if remaining < 1:
        raise invalid_request(
            f"max_length includes the prompt, which has {prompt_tokens} tokens: use a larger value.",
            "max_length",
        )
    return remaining if max_tokens is None else min(remaining, max_tokens)


class Generation:
    """All choices of a request while they are generated.

    Raises:
        ApiError: the engine rejected a choice; the others are cancelled.
    """

    def __init__(self, engine: Engine, plan: Plan, metrics: Metrics | None):
        self.plan, self.metrics = plan, metrics
        self.streams: list[TextStream] = []
        try:
            for choice in plan.choices:
                ids, params, _, stop, lstrip, rstrip, constraint = choice
                self.streams.append(
                    engine.start(
                        ids,
                        params,
                        stop=stop,
                        lstrip=lstrip,
                        rstrip=rstrip,
                        constraint=constraint,
                        group=self,
                        cache_salt=plan.cache_salt,
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

    @property
    def usage(self) -> Usage:
        completion = sum(stream.completion_tokens for stream in self.streams)
        return {
            "prompt_tokens": self.plan.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.plan.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
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
                    raise from_engine_error(item, self.plan.prompt_param) or server_error() from item
                if item is not None:
                    chunks = writers[index].write(item)
                elif (reason := self.streams[index].finish_reason) is None or reason == "cancelled":
                    raise interrupted_by_shutdown()  # only draining cancels a stream that is being read
                else:
                    chunks = writers[index].end(cast("TextFinishReason", reason))
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
            if self.metrics is None:
                return
            seconds = [stream.first_token_seconds for stream in self.streams]
            usage = self.usage
            self.metrics.record_generation(
                usage["prompt_tokens"], self._cached_tokens, usage["completion_tokens"], seconds
            )


class ChunkResponse(EventSourceResponse):
    """Sends a generation as server-sent events and closes it when the connection ends."""

    def __init__(self, generation: Generation, events: AsyncIterator[str], grace_seconds: float):
        super().__init__(events, sep="\n", shutdown_grace_period=grace_seconds)
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.close()  # even if no event was requested


def stream_response(
    generation: Generation, envelope: Envelope, head: Head, include_usage: bool, grace_seconds: float
) -> Response:
    """Return a streamed response.

    Args:
        include_usage: end with a chunk without choices that has the token counts.
        grace_seconds: time to send the rest when the web server shuts down.
    """
    chunk_head = {**head, "object": envelope.chunk_object}
    no_usage = {"usage": None} if include_usage else {}

    async def events() -> AsyncIterator[str]:
        try:
            async with contextlib.aclosing(generation.chunks()) as chunks:
                async for chunk in chunks:
                    yield to_json({**chunk_head, "choices": [chunk], **no_usage}).decode()
        except ApiError as error:  # the status has been sent already
            yield to_json(error.body).decode()
            return
        if include_usage:
            yield to_json({**chunk_head, "choices": [], "usage": generation.usage}).decode()
        yield "[DONE]"

    return ChunkResponse(generation, events(), grace_seconds)


async def full_response(request: Request, generation: Generation, envelope: Envelope, head: Head) -> Response:
    """Return the whole response at once, or an empty one if the client disconnects first.

    Raises:
        ApiError: the model failed, or the server is stopping.
    """

    async def collect() -> list[ChatChoice | TextChoice]:
        parts: list[list[Chunk]] = [[] for _ in generation.streams]
        async with contextlib.aclosing(generation.chunks()) as chunks:
            async for chunk in chunks:
                parts[chunk["index"]].append(chunk)
        return [envelope.merge_chunks(part) for part in parts]

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting = asyncio.create_task(collect())
    tasks = (collecting, asyncio.create_task(wait_for_disconnect()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        answer = {**head, "choices": collecting.result(), "usage": generation.usage}
        return Response(to_json(answer), media_type="application/json")
    finally:
        for task in tasks:
            task.cancel()
        generation.close()
