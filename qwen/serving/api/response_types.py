"""Response types of the OpenAI API, for the documentation at /docs and for tests.

chat.py, completions.py and logprobs.py build their values.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12

TextFinishReason = Literal["stop", "length"]
StopReason = str | int | None  # the string of `stop`, or the token of `stop_token_ids`, that ended a reply
ChatFinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class Error(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    error: Error


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    """`reasoning_tokens` are those of the thought before a tool call, counted by encoding its text."""

    reasoning_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TokenProbability(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenProbability):
    top_logprobs: list[TokenProbability]


class ChatLogprobs(TypedDict):
    content: list[ContentLogprob]
    refusal: None


class CalledFunction(TypedDict):
    name: str
    arguments: str


class CalledTool(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[CalledTool]]
    function_call: NotRequired[CalledFunction]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: StopReason
    token_ids: NotRequired[list[int]]


class RankedLogprob(TypedDict):
    """The log-probability of a token, and its place among all tokens, from 1."""

    logprob: float
    rank: int
    decoded_token: str


PromptTokenLogprobs = dict[str, RankedLogprob]
"""By token id: of a token of the prompt, and of the most likely tokens there."""


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[PromptTokenLogprobs | None]]


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolDelta(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class MessageDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolDelta]]
    function_call: NotRequired[FunctionDelta]


class ChatChunkChoice(TypedDict):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: NotRequired[StopReason]
    token_ids: NotRequired[list[int]]


class ChatCompletionChunk(TypedDict):
    """One event of a streamed response.

    `usage` needs stream_options.include_usage and is null until the last event, or continuous_usage_stats.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]


class TextLogprobs(TypedDict):
    """The first token of a prompt, which `echo` returns, has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: TextFinishReason | None
    stop_reason: NotRequired[StopReason]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[PromptTokenLogprobs | None]]


class Completion(TypedDict):
    """A response, or one event of a streamed one, with `usage` as in ChatCompletionChunk."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class ModelMeta(TypedDict):
    """What llama.cpp's server says of a model, as far as it holds for these."""

    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    n_embd: int


class Model(TypedDict):
    """A model. `max_model_len` is the maximum number of tokens of prompt and reply together."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    meta: ModelMeta


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    status: Literal["ready", "draining", "failed"]


class Version(TypedDict):
    version: str


class TokenPiece(TypedDict):
    """A token with its text, or with its bytes if they are not valid UTF-8."""

    id: int
    piece: str | list[int]


class Tokenization(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int] | list[TokenPiece]
    token_strs: list[str] | None


class Detokenization(TypedDict):
    """A text, under the names that vLLM, llama.cpp and SGLang have for it."""

    prompt: str
    content: str
    text: str


class RenderedPrompt(TypedDict):
    """A prompt as the model gets it. `prompt` shows control tokens in their written form."""

    prompt: str
    token_ids: list[int]
