"""Request and response types of Anthropic's Messages API.

Source: https://docs.anthropic.com/en/api/messages. Unknown fields are ignored, and `null` is the same as a missing
field.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag
from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12

from ..request_types import (
    MAX_CACHE_SALT,
    MAX_MESSAGES,
    MAX_STOP,
    MAX_TOOLS,
    MAX_TOP_K,
    Array,
    FunctionName,
    Integer,
    JSONObject,
    RequestModel,
    StopString,
)

# Requests


class TextBlock(RequestModel):
    type: Literal["text"]
    text: str


class ToolUseBlock(RequestModel):
    """A tool call of an earlier reply."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: JSONObject


class ToolResultBlock(RequestModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Array[TextBlock] | None = None
    is_error: bool | None = Field(None, description="the model reads the content as an error")


class ThinkingBlock(RequestModel):
    """The thought of an earlier reply. Before a tool call it becomes part of the prompt; the signature is not used."""

    type: Literal["thinking"]
    thinking: str


class IgnoredBlock(RequestModel):
    """A block that only Anthropic's own server writes. Accepted without effect."""

    type: Literal[
        "redacted_thinking",
        "server_tool_use",
        "web_search_tool_result",
        "web_fetch_tool_result",
        "code_execution_tool_result",
        "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result",
        "tool_search_tool_result",
        "mcp_tool_use",
        "mcp_tool_result",
    ]


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | IgnoredBlock, Field(discriminator="type")]


class UserMessage(RequestModel):
    role: Literal["user"]
    content: str | Array[UserBlock]


class AssistantMessage(RequestModel):
    role: Literal["assistant"]
    content: str | Array[AssistantBlock]


class SystemMessage(RequestModel):
    role: Literal["system"]
    content: str | Array[TextBlock]


class Tool(RequestModel):
    name: FunctionName
    description: str | None = None
    input_schema: JSONObject = Field(description="a JSON schema")
    strict: bool | None = Field(None, description="constrain the input to the schema")


class AnthropicTool(RequestModel):
    """A tool that Anthropic defines, like `web_search_20250305` or `bash_20250124`. The model was not trained on any:
    they are dropped."""

    type: str


def _kind_of_tool(tool: object) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return "custom" if kind in (None, "custom") else "anthropic"


class ToolChoice(RequestModel):
    """How the model may use the tools."""

    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = Field(None, description="accepted; the model calls one tool per turn")


class NamedToolChoice(RequestModel):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = Field(None, description="accepted; the model calls one tool per turn")


class Thinking(RequestModel):
    """Whether the thought before a tool call is returned."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: Annotated[Integer, Field(ge=1)] | None = Field(None, description="accepted without effect")
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(RequestModel):
    type: Literal["json_schema"]
    schema_: JSONObject = Field(alias="schema")


class OutputConfig(RequestModel):
    format: JsonFormat | None = Field(None, description="the answer is JSON that is valid against a schema")


class CountTokensRequest(RequestModel):
    """The fields that determine the prompt. Unknown ones are kept in `model_extra`, for the log to name them."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="any name is accepted; the server has one model")
    messages: Annotated[
        Array[Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]],
        Field(min_length=1, max_length=MAX_MESSAGES),
    ]
    system: str | Array[TextBlock] | None = None
    tools: (
        Annotated[
            Array[
                Annotated[
                    Annotated[Tool, Tag("custom")] | Annotated[AnthropicTool, Tag("anthropic")],
                    Discriminator(_kind_of_tool),
                ]
            ],
            Field(max_length=MAX_TOOLS),
        ]
        | None
    ) = None
    tool_choice: Annotated[ToolChoice | NamedToolChoice, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[Integer, Field(ge=1)] = Field(description="maximum number of new tokens")
    stream: bool | None = Field(None, description="respond with server-sent events")
    stop_sequences: Annotated[Array[StopString], Field(max_length=MAX_STOP)] | None = Field(
        None, description="strings that end a reply; not included in it"
    )
    temperature: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="below 0.01 is greedy")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=0, le=MAX_TOP_K)] | None = Field(None, description="0 disables it")
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT)] | None = Field(
        None, description="reuse the cache only of requests with the same salt, so that timing tells others nothing"
    )

    @property
    def shows_thought(self) -> bool:
        """Whether the thought before a tool call is returned."""
        return self.thinking is not None and self.thinking.type != "disabled" and self.thinking.display != "omitted"


# Responses

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextContent(TypedDict):
    type: Literal["text"]
    text: str


class ThinkingContent(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseContent(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: JSONObject


Content = TextContent | ThinkingContent | ToolUseContent


class MessageUsage(TypedDict):
    """Token counts. The prompt has `input_tokens` that were encoded and `cache_read_input_tokens` from the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Content]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    input_tokens: int


class MessageError(TypedDict):
    type: str
    message: str


class MessageErrorResponse(TypedDict):
    type: Literal["error"]
    error: MessageError
    request_id: str
