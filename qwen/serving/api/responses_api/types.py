"""Request and response types of OpenAI's Responses API.

Source: https://platform.openai.com/docs/api-reference/responses. As in chat completions, unknown fields are ignored and
`null` is the same as a missing field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12

from ..request_types import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Array,
    FunctionName,
    GenerationRequest,
    Integer,
    JSONObject,
    JsonObjectFormat,
    RequestModel,
    TextFormat,
)
from ..response_types import ContentLogprob

MAX_ID = 128  # characters; those of this server have 37
MAX_LABEL = 1024  # characters of a field that is returned or ignored, like `user`
MAX_METADATA = 16
MAX_INCLUDE = 32

# Input


class TextPart(RequestModel):
    type: Literal["input_text", "output_text", "text"]
    text: str


class RefusalPart(RequestModel):
    """What OpenAI's models say instead of an answer. Read like text."""

    type: Literal["refusal"]
    refusal: str


Content = str | Array[Annotated[TextPart | RefusalPart, Field(discriminator="type")]]
ItemId = Annotated[str, Field(max_length=MAX_ID)]


class Item(RequestModel):
    """An item of a conversation. Those of earlier responses have fields that are not needed here, and are kept."""

    model_config = ConfigDict(extra="allow")

    id: ItemId | None = None


class Message(Item):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content | None = None
    status: Annotated[str, Field(max_length=MAX_ID)] | None = None


class FunctionCall(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutput(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningText(RequestModel):
    type: Literal["reasoning_text", "text"]
    text: str


class Reasoning(Item):
    """What a model thought before the item that follows. Only the thought before a function call is used."""

    type: Literal["reasoning"]
    content: Array[ReasoningText] | None = None


class OtherItem(Item):
    """An item that only OpenAI's models can use, like the call of a tool that is not a function. Has no effect.

    Except references to output items of stored responses, which stand for those.
    """

    type: Literal[
        "additional_tools",
        "apply_patch_call",
        "apply_patch_call_output",
        "code_interpreter_call",
        "compaction",
        "compaction_trigger",
        "computer_call",
        "computer_call_output",
        "configuration_update",
        "custom_tool_call",
        "custom_tool_call_output",
        "file_search_call",
        "image_generation_call",
        "item_reference",
        "local_shell_call",
        "local_shell_call_output",
        "mcp_approval_request",
        "mcp_approval_response",
        "mcp_call",
        "mcp_list_tools",
        "program",
        "program_output",
        "shell_call",
        "shell_call_output",
        "tool_search_call",
        "tool_search_output",
        "web_search_call",
    ] = "item_reference"
    call_id: str | None = None


ITEM_KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _type(value: object) -> object:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _item_kind(item: object) -> str:
    kind = _type(item)
    if kind is None:  # this may be missing in a reference as well
        return "other" if isinstance(item, dict) and "role" not in item and "id" in item else "message"
    return kind if isinstance(kind, str) and kind in ITEM_KINDS else "other"


InputItem = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_item_kind),
]

# Tools and the format of the answer


def _tool_kind(tool: object) -> str:
    return "function" if _type(tool) == "function" else "other"


class FunctionTool(RequestModel):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: JSONObject | None = Field(None, description="a JSON schema")
    strict: bool | None = Field(None, description="constrain the arguments to the schema")


class OtherTool(RequestModel):
    """A tool that is not a function, like `web_search` or `custom`. The model cannot use it: it is dropped."""

    type: str


class FunctionChoice(RequestModel):
    type: Literal["function"]
    name: str


class AllowedTools(RequestModel):
    """The model may call these tools only. Those that are not functions are dropped."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        Array[
            Annotated[
                Annotated[FunctionChoice, Tag("function")] | Annotated[OtherTool, Tag("other")],
                Discriminator(_tool_kind),
            ]
        ],
        Field(min_length=1, max_length=MAX_TOOLS),
    ]


class OtherChoice(RequestModel):
    """The choice of a tool that is not a function."""

    type: str


def _choice_kind(choice: object) -> str:
    return "allowed_tools" if _type(choice) == "allowed_tools" else _tool_kind(choice)


ToolDefinition = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[OtherTool, Tag("other")], Discriminator(_tool_kind)
]
ToolChoice = Annotated[
    Annotated[FunctionChoice, Tag("function")]
    | Annotated[AllowedTools, Tag("allowed_tools")]
    | Annotated[OtherChoice, Tag("other")],
    Discriminator(_choice_kind),
]


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: JSONObject = Field(alias="schema")
    strict: bool | None = None


class TextConfig(RequestModel):
    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="accepted without effect")


class ReasoningConfig(RequestModel):
    """Accepted without effect: these models only think before they call a tool."""

    effort: Annotated[str, Field(max_length=MAX_ID)] | None = None
    summary: Annotated[str, Field(max_length=MAX_ID)] | None = None


# The request


def _limit_metadata(metadata: object) -> object:
    """Limit the size before validating entries: pydantic reports every wrong one."""
    if isinstance(metadata, dict) and len(metadata) > MAX_METADATA:
        raise ValueError(f"should have at most {MAX_METADATA} entries, not {len(metadata)}")
    return metadata


def _refuse(advice: str) -> BeforeValidator:
    """Return a validator of a field that is not supported. False is the same as a missing field."""

    def check(value: object) -> None:
        if value is not None and value is not False:
            raise PydanticCustomError("unsupported", "is not supported by this server: {advice}", {"advice": advice})

    return BeforeValidator(check)


Label = Annotated[str, Field(max_length=MAX_LABEL)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(json_schema_extra={"maxProperties": MAX_METADATA}),
    BeforeValidator(_limit_metadata),
]
Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponseRequest(GenerationRequest):
    """The sampling fields are those of chat completions."""

    input: str | Annotated[Array[InputItem], Field(max_length=MAX_MESSAGES)] = Field(
        description="text, or items: messages, function calls and their outputs"
    )
    instructions: str | None = Field(None, description="a system message before the conversation")
    previous_response_id: Annotated[str, Field(max_length=MAX_ID)] | None = Field(
        None, description="continue the conversation of a stored response"
    )
    store: bool | None = Field(None, description="keep the response, so that it can be continued; default true")
    max_output_tokens: Annotated[Integer, Field(ge=1)] | None = Field(None, description="maximum number of new tokens")
    max_tool_calls: Annotated[Integer, Field(ge=1)] | None = Field(None, description="accepted without effect")
    tools: Annotated[Array[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="accepted; the model calls one tool per turn")
    text: TextConfig | None = Field(None, description="format of the answer")
    reasoning: ReasoningConfig | None = None
    include: Annotated[Array[Includable], Field(max_length=MAX_INCLUDE)] | None = Field(
        None, description="message.output_text.logprobs adds log-probabilities; the others have no effect"
    )
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = Field(None, description="accepted without effect")
    metadata: Metadata | None = Field(None, description="returned with the response")
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    service_tier: Label | None = None
    n: Annotated[Integer, Field(ge=1, le=1)] | None = Field(None, description="a request has one response")
    return_token_ids: Annotated[None, _refuse("only chat and text completions have them")] = None
    prompt_logprobs: Annotated[None, _refuse("only chat and text completions have them")] = None
    background: Annotated[None, _refuse("omit it and wait for the response, or use stream")] = None
    conversation: Annotated[None, _refuse("continue a conversation with previous_response_id")] = None
    prompt: Annotated[None, _refuse("it has no prompt templates. Send the text in instructions and input")] = None


# The response


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ContentLogprob]


class ReasoningContent(TypedDict):
    type: Literal["reasoning_text"]
    text: str


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputFunctionCall(TypedDict):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class OutputReasoning(TypedDict):
    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningContent]


OutputItem = OutputMessage | OutputFunctionCall | OutputReasoning


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    code: Literal["server_error"]
    message: str


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class Response(TypedDict):
    """The response to a request, whose fields it repeats."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: JSONObject
    safety_identifier: str | None
    service_tier: Literal["default"]
    temperature: float
    text: JSONObject
    tool_choice: str | JSONObject
    tools: list[JSONObject]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None


class InputItems(TypedDict):
    """A page of the items that a response was generated from."""

    object: Literal["list"]
    data: list[JSONObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int
