"""Tokens of texts and conversations, and the prompt of a request, without generating anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import APIRouter, Body
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from ...model.tokenization_qwen import QWenTokenizer
from ..engine import Engine
from ..engine.grammar import ConstraintFactory
from . import chat, completions
from .errors import invalid_request
from .generation import Plan
from .logprobs import token_bytes, token_text
from .request_types import (
    MAX_TOKEN_IDS,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestModel,
    TokenizeChatRequest,
    TokenizeContentRequest,
    TokenizeRequest,
)
from .response_types import Detokenization, RenderedPrompt, Tokenization, TokenPiece
from .routing import JSON_ERRORS, JsonRoute
from .sampling import check_token_ids
from .service import Service


def create_router(service: Service) -> APIRouter:
    """Create the routes of this module."""
    router = APIRouter(route_class=JsonRoute, tags=["tokens"], responses=JSON_ERRORS)

    async def answer(request: Request, body: RequestModel, build: Callable[..., object], *args: object) -> Response:
        """Answer in a worker thread: texts of megabytes take a second to encode."""
        service.check_unknown_fields(request, body)
        if isinstance(body, ChatCompletionRequest):
            service.check_messages(body)
        content = await service.run_in_worker(request, body, lambda: to_json(build(body, service.engine, *args)))
        return Response(content, media_type="application/json")

    @router.post("/v1/tokenize", response_model=Tokenization)
    async def create_tokenization(body: Annotated[TokenizeRequest, Body()], request: Request) -> Response:
        """Encode a text or a conversation."""
        return await answer(request, body, tokenize, service.constraints)

    @router.post("/v1/detokenize", response_model=Detokenization)
    async def create_detokenization(body: DetokenizeRequest, request: Request) -> Response:
        """Decode token ids."""
        return await answer(request, body, detokenize)

    @router.post("/v1/apply-template", response_model=RenderedPrompt)
    @router.post("/v1/chat/completions/render", response_model=RenderedPrompt)
    async def render_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Return the prompt of a chat completion."""
        return await answer(request, body, render_chat, service.constraints)

    @router.post("/v1/completions/render", response_model=list[RenderedPrompt])
    async def render_text_completion(body: CompletionRequest, request: Request) -> Response:
        """Return the prompts of a text completion."""
        return await answer(request, body, render_completion, service.constraints)

    return router


def tokenize(request: TokenizeRequest, engine: Engine, constraints: ConstraintFactory) -> Tokenization:
    """Encode a text, or the prompt of a chat completion.

    Raises:
        ApiError: too many tokens to return their texts, or an invalid chat completion.
    """
    tokenizer = engine.tokenizer
    if isinstance(request, TokenizeChatRequest):
        ids = chat.build_plan(request, engine, constraints, any_length=True).choices[0].prompt_ids
    elif isinstance(request, TokenizeContentRequest):
        ids = tokenizer.encode(request.content, allowed_special=set() if request.parse_special is False else "all")
    else:
        ids = tokenizer.encode(request.prompt)
    answer: Tokenization = {
        "count": len(ids),
        "max_model_len": engine.context_length,
        "tokens": ids,
        "token_strs": None,
    }
    if isinstance(request, TokenizeContentRequest):
        if request.with_pieces:
            _limit_texts(ids, "with_pieces")
            answer["tokens"] = [_token_piece(tokenizer, token) for token in ids]
    elif request.return_token_strs:
        _limit_texts(ids, "return_token_strs")
        answer["token_strs"] = [token_text(token_bytes(tokenizer, token)) for token in ids]
    return answer


def _limit_texts(ids: Sequence[int], param: str) -> None:
    if len(ids) > MAX_TOKEN_IDS:
        raise invalid_request(
            f"{param}: the text has {len(ids)} tokens, and the texts of at most {MAX_TOKEN_IDS} are returned. "
            "Send the text in parts.",
            param,
        )


def _token_piece(tokenizer: QWenTokenizer, token_id: int) -> TokenPiece:
    content = token_bytes(tokenizer, token_id)
    try:
        return {"id": token_id, "piece": content.decode()}
    except UnicodeDecodeError:
        return {"id": token_id, "piece": list(content)}


def detokenize(request: DetokenizeRequest, engine: Engine) -> Detokenization:
    """Decode token ids.

    Raises:
        ApiError: an id out of range.
    """
    check_token_ids(engine.tokenizer, "tokens", request.tokens)
    text = engine.tokenizer.decode(request.tokens)
    return {"prompt": text, "content": text, "text": text}


def render_chat(request: ChatCompletionRequest, engine: Engine, constraints: ConstraintFactory) -> RenderedPrompt:
    """Return the prompt of a chat completion.

    Raises:
        ApiError: the request is invalid.
    """
    (prompt,) = _rendered_prompts(chat.build_plan(request, engine, constraints, any_length=True), engine)
    return prompt


def render_completion(
    request: CompletionRequest, engine: Engine, constraints: ConstraintFactory
) -> list[RenderedPrompt]:
    """Return the prompts of a text completion.

    Raises:
        ApiError: the request is invalid.
    """
    return _rendered_prompts(completions.build_plan(request, engine, constraints, any_length=True), engine)


def _rendered_prompts(plan: Plan, engine: Engine) -> list[RenderedPrompt]:
    prompts = {id(choice.prompt_ids): choice.prompt_ids for choice in plan.choices}  # several choices may share one
    return [{"prompt": engine.tokenizer.decode(ids), "token_ids": ids} for ids in prompts.values()]
