"""Request models of the OpenAI API: the fields, their types and ranges.

Each field is checked by itself; combinations are checked in chat.py and completions.py. Unknown fields are ignored, and
`null` is the same as a missing field. So are values that mean "nothing" in other libraries: `stop` may be "" or false.

Source: https://platform.openai.com/docs/api-reference, plus the reference server's `top_k`, `max_length`,
`repetition_penalty` and functions with `name_for_model`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16
MAX_STOP = 16
MAX_TOOLS = 128
MAX_PROMPTS = 128
MAX_LOGIT_BIASES = 1024
MAX_MESSAGES = 16384  # bounds validation; the server's own limit is lower and checked later
MAX_TOP_K = 2**31 - 1
MAX_CACHE_SALT = 256
MAX_PART_TYPE = 50  # characters of an unsupported type in the error message

JSONObject = dict[str, Any]
"""An object that the API passes on: a JSON schema, or a function as the client described it."""

T = TypeVar("T")
# Report one error per list: each takes several kilobytes, and a list may have 500,000 wrong elements.
Array = Annotated[list[T], Field(fail_fast=True)]


class RequestModel(BaseModel):
    """Base class: strict JSON types ("1" is not 1), no NaN."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def _as_integer(value: object) -> object:
    """Return 20 for 20.0, which is an integer in JSON; some languages write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_as_integer)]
StopString = Annotated[str, Field(max_length=1000)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]


def _limit_logit_bias(bias: object) -> object:
    """Limit the size before validating entries: pydantic reports every wrong one."""
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIASES:
        raise ValueError(f"should have at most {MAX_LOGIT_BIASES} entries, not {len(bias)}")
    return bias


LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100, le=100)]],
    Field(json_schema_extra={"maxProperties": MAX_LOGIT_BIASES}),
    BeforeValidator(_limit_logit_bias),
]
FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^\S([^\r\n]*\S)?$")]


class StreamOptions(RequestModel):
    include_usage: bool | None = None


class GenerationRequest(RequestModel):
    """Fields of both endpoints. Defaults are those of the checkpoint's generation_config.json.

    Unknown fields are kept in `model_extra`, for the log to name them.
    """

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="any name is accepted; the server has one model")
    stream: bool | None = Field(None, description="respond with server-sent events")
    stream_options: StreamOptions | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = Field(None, description="number of choices")
    max_tokens: Annotated[Integer, Field(ge=1)] | None = Field(None, description="maximum number of new tokens")
    max_length: Annotated[Integer, Field(ge=1)] | None = Field(None, description="maximum tokens of prompt plus reply")
    stop: Annotated[
        StopString | Annotated[Array[StopString | None], Field(max_length=MAX_STOP)] | None,
        BeforeValidator(lambda stop: None if stop is False else stop),
    ] = Field(None, description="strings that end a reply; not included in it; empty ones are ignored")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="below 0.01 is greedy")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1, le=MAX_TOP_K)] | None = Field(None, description="0 and -1 disable it")
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = Field(None, description="token id → value added to its logit")
    seed: Integer | None = Field(None, description="the same seed and request give the same reply")
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT)] | None = Field(
        None, description="reuse the cache only of requests with the same salt, so that timing tells others nothing"
    )

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> list[str]:
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [string for string in strings if string]


# Chat


class TextPart(RequestModel):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, part: object) -> object:
        """Reject the other types as a whole, instead of the fields in which they differ from text."""
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "unsupported_part",
                "parts of type {kind} are not supported, the model takes text only: send "
                '{"type": "text", "text": …} or a string',
                {"kind": repr(kind[:MAX_PART_TYPE])},
            )
        return part


class FunctionCall(RequestModel):
    name: str
    arguments: str


class ToolCall(RequestModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Array[TextPart] | None = None
    name: str | None = None
    tool_calls: Annotated[Array[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None


class FunctionDefinition(RequestModel):
    name: FunctionName
    description: str | None = None
    parameters: JSONObject | None = Field(None, description="a JSON schema")
    strict: bool | None = None


class Tool(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition


class LegacyFunction(RequestModel):
    """An entry of `functions`: OpenAI's, or in the style of the first-generation Qwen models (`name_for_model`)."""

    name: FunctionName | None = None
    description: str | None = None
    name_for_model: FunctionName | None = None
    name_for_human: str | None = None
    description_for_model: str | None = None
    parameters: JSONObject | list[object] | None = None

    @model_validator(mode="after")
    def _check_name(self) -> LegacyFunction:
        if not (self.name_for_model or self.name):
            raise ValueError("needs a name")
        return self


class NamedFunction(RequestModel):
    name: str


class NamedTool(RequestModel):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(RequestModel):
    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]


class JsonSchema(RequestModel):
    name: str | None = None
    description: str | None = None
    schema_: JSONObject | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[Array[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[Integer, Field(ge=1)] | None = Field(None, description="overrides max_tokens")
    tools: Annotated[Array[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="accepted; the model calls one tool per turn")
    functions: Annotated[Array[LegacyFunction], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = Field(None, description="requires logprobs")
    modalities: Array[Literal["text"]] | None = None


# Text


PromptIds = Annotated[Array[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | Annotated[Array[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | PromptIds
        | Annotated[Array[PromptIds], Field(min_length=1, max_length=MAX_PROMPTS)]
        | None
    ) = Field(None, description="text, token ids, or a list of either; if empty, the start of a document")
    echo: bool | None = Field(None, description="put the prompt before the reply")
    best_of: Annotated[Integer, Field(ge=1)] | None = Field(None, description="must equal n")
    suffix: Literal[""] | None = Field(None, description="not supported: these models only continue text")
    logprobs: Annotated[Integer, Field(ge=0, le=5)] | None = None
