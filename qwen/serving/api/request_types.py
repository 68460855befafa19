"""Request models of the OpenAI API: the fields, their types and ranges.

Each field is checked by itself; combinations are checked in chat.py and completions.py. Unknown fields are ignored, and
`null` is the same as a missing field. So are values that mean "nothing" in other libraries: `stop` may be "" or false.

Source: https://platform.openai.com/docs/api-reference, plus the reference server's `top_k`, `max_length`,
`repetition_penalty` and functions with `name_for_model`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from ..engine.sampling_params import LEAST_REPETITION_PENALTY

MAX_CHOICES = 16
MAX_STOP = 16
MAX_TOOLS = 128
MAX_PROMPTS = 128
MAX_LOGIT_BIASES = 1024
MAX_MESSAGES = 16384  # bounds validation; the server's own limit is lower and checked later
MAX_TOP_K = 2**31 - 1
MAX_CACHE_SALT = 256
MAX_STOP_TOKENS = 128
MAX_ALLOWED_TOKENS = 2**15
MAX_BAD_WORDS, MAX_BAD_WORD = 128, 200  # words, and characters of each
MAX_PROMPT_LOGPROBS = 20
MAX_TOKEN_IDS = 2**17  # to decode, or to return with their texts: a token may have a hundred bytes
MAX_PART_TYPE = 50  # characters of an unsupported type in the error message

MAX_GRAMMAR = 65_536  # characters of a grammar, a regular expression, or a schema as text
MAX_CHOICE_TEXTS = 1024
MAX_CHOICE_TEXT = 1000
MAX_TAGS = 128
MAX_TAG_TEXT = 1000

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
VocabularyId = Annotated[Integer, Field(ge=0)]


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


# Structured output


class TextFormat(RequestModel):
    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]
    schema_: JSONObject | None = Field(None, alias="schema")


class JsonSchema(RequestModel):
    name: str | None = None
    description: str | None = None
    schema_: JSONObject | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: JsonSchema


TagText = Annotated[str, Field(max_length=MAX_TAG_TEXT)]
NonEmptyTagText = Annotated[str, Field(min_length=1, max_length=MAX_TAG_TEXT)]


class TagStructure(RequestModel):
    begin: NonEmptyTagText
    schema_: JSONObject | None = Field(None, alias="schema")
    end: TagText = ""


class TagContent(RequestModel):
    type: Literal["json_schema"]
    json_schema: JSONObject


class TriggeredTag(RequestModel):
    type: Literal["tag"] = "tag"
    begin: NonEmptyTagText
    content: TagContent
    end: TagText = ""


class TriggeredTags(RequestModel):
    type: Literal["triggered_tags"]
    triggers: Annotated[Array[NonEmptyTagText], Field(min_length=1, max_length=MAX_TAGS)]
    tags: Annotated[Array[TriggeredTag], Field(min_length=1, max_length=MAX_TAGS)]
    at_least_one: Literal[False] | None = None
    stop_after_first: Literal[False] | None = None


class StructuralTagFormat(RequestModel):
    """Free text in which triggers begin parts of a given form: `structures` with `triggers`, or `format`."""

    type: Literal["structural_tag"]
    structures: Annotated[Array[TagStructure], Field(min_length=1, max_length=MAX_TAGS)] | None = None
    triggers: Annotated[Array[NonEmptyTagText], Field(min_length=1, max_length=MAX_TAGS)] | None = None
    format: TriggeredTags | None = None


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat, Field(discriminator="type")
]
GrammarText = Annotated[str, Field(max_length=MAX_GRAMMAR)]
ChoiceTexts = Annotated[
    Array[Annotated[str, Field(max_length=MAX_CHOICE_TEXT)]], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)
]


class StructuredOutputs(RequestModel):
    """What a reply must be; one of the fields. `whitespace_pattern` is refused, because JSON has a fixed style here."""

    json_: JSONObject | GrammarText | None = Field(None, alias="json", description="a JSON schema, or its text")
    regex: GrammarText | None = None
    choice: ChoiceTexts | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None
    structural_tag: GrammarText | None = Field(None, description="the text of a response_format structural_tag")
    whitespace_pattern: None = None


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


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
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="least probability of a token, relative to the most likely one"
    )
    repetition_penalty: Annotated[float, Field(ge=LEAST_REPETITION_PENALTY, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = Field(None, description="token id → value added to its logit")
    stop_token_ids: Annotated[Array[VocabularyId], Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="tokens that end a reply; not included in it"
    )
    include_stop_str_in_output: bool | None = Field(None, description="include what ends a reply by stop in it")
    no_stop_trim: bool | None = Field(None, description="another name of include_stop_str_in_output")
    ignore_eos: bool | None = Field(None, description="do not end at the checkpoint's own end tokens")
    skip_special_tokens: bool | None = Field(None, description="if false, show end tokens that ignore_eos passes over")
    min_tokens: Annotated[Integer, Field(ge=0)] | None = Field(None, description="minimum number of new tokens")
    bad_words: (
        Annotated[Array[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD)]], Field(max_length=MAX_BAD_WORDS)]
        | None
    ) = Field(None, description="texts whose tokens must not come in a reply")
    allowed_token_ids: Annotated[Array[VocabularyId], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None = (
        Field(None, description="the only tokens that may come in a reply")
    )
    truncate_prompt_tokens: Annotated[Integer, Field(ge=1)] | Literal[-1] | None = Field(
        None, description="keep the last tokens of the prompt, so many; -1: as many as leave room for max_tokens"
    )
    prompt_logprobs: Annotated[Integer, Field(ge=0, le=MAX_PROMPT_LOGPROBS)] | None = Field(
        None, description="return the log-probabilities of the prompt's tokens, and of this many likely ones at each"
    )
    seed: Integer | None = Field(None, description="the same seed and request give the same reply")
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT)] | None = Field(
        None, description="reuse the cache only of requests with the same salt, so that timing tells others nothing"
    )

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="the form of the reply, as vLLM has it")
    guided_json: JSONObject | GrammarText | None = Field(None, description="old name of structured_outputs.json")
    guided_regex: GrammarText | None = Field(None, description="old name of structured_outputs.regex")
    guided_choice: ChoiceTexts | None = Field(None, description="old name of structured_outputs.choice")
    guided_grammar: GrammarText | None = Field(None, description="old name of structured_outputs.grammar")
    guided_json_object: bool | None = Field(None, description="old name of structured_outputs.json_object")
    guided_whitespace_pattern: None = None
    regex: GrammarText | None = Field(None, description="regular expression of the whole reply, as SGLang has it")
    ebnf: GrammarText | None = Field(None, description="grammar of the reply, as SGLang has it")
    json_schema: JSONObject | GrammarText | None = Field(
        None, description="JSON schema of the reply, as llama.cpp and SGLang have it"
    )
    grammar: GrammarText | None = Field(None, description="grammar of the reply, as llama.cpp has it")

    return_token_ids: bool | None = Field(None, description="return the token ids of prompt and reply")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="write tokens as token_id:ID in the log-probabilities"
    )

    @property
    def counts_tokens(self) -> bool:
        """Whether the ids of the tokens of each chunk are needed."""
        options = self.stream_options
        return bool(self.return_token_ids or (options is not None and options.continuous_usage_stats))

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_stop(self) -> bool:
        """Whether what ends a reply by `stop` or `stop_token_ids` is part of it."""
        return bool(self.include_stop_str_in_output or self.no_stop_trim)

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
    reasoning_content: str | None = Field(None, description="the thought that led to the calls of an earlier reply")
    reasoning: str | None = Field(None, description="another name of reasoning_content")


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


class AllowedTools(RequestModel):
    mode: Literal["auto", "required"]
    tools: Annotated[Array[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(RequestModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[Array[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[Integer, Field(ge=1)] | None = Field(None, description="overrides max_tokens")
    tools: Annotated[Array[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = Field(None, description="accepted; the model calls one tool per turn")
    functions: Annotated[Array[LegacyFunction], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = Field(None, description="requires logprobs")
    continue_final_message: bool | None = Field(
        None, description="whether the reply continues a last message of the assistant; true by default"
    )
    add_generation_prompt: bool | None = Field(
        None, description="whether the prompt ends in the beginning of a new message of the assistant"
    )
    echo: bool | None = Field(None, description="put the message that is continued before the reply")
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
    max_tokens: Annotated[Integer, Field(ge=0)] | None = Field(
        None, description="maximum number of new tokens; 0 to have only the prompt, or its log-probabilities"
    )
    echo: bool | None = Field(None, description="put the prompt before the reply")
    best_of: Annotated[Integer, Field(ge=1)] | None = Field(None, description="must equal n")
    suffix: Literal[""] | None = Field(None, description="not supported: these models only continue text")
    logprobs: Annotated[Integer, Field(ge=0, le=5)] | None = None


# Tokens


class TokenizeTextRequest(RequestModel):
    """A text to encode, in vLLM's form."""

    model_config = ConfigDict(extra="allow")  # for the log to name the ignored fields

    model: str | None = None
    prompt: str = Field(description="control tokens in it are encoded as such, as in a completion's prompt")
    add_special_tokens: bool | None = Field(None, description="no effect: these models have no token before a text")
    return_token_strs: bool | None = Field(None, description="return the tokens' texts as well")


class TokenizeContentRequest(RequestModel):
    """A text to encode, in llama.cpp's form."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    content: str
    add_special: bool | None = Field(None, description="no effect: these models have no token before a text")
    parse_special: bool | None = Field(None, description="encode control tokens as such; true by default")
    with_pieces: bool | None = Field(None, description="return an id and a text for each token")


class TokenizeChatRequest(ChatCompletionRequest):
    """A chat completion to encode."""

    add_special_tokens: bool | None = Field(None, description="no effect: these models have no token before a text")
    return_token_strs: bool | None = Field(None, description="return the tokens' texts as well")


def _tokenize_form(request: object) -> str:
    fields = request if isinstance(request, dict) else {}
    return next((f"with {field}" for field in ("messages", "content") if fields.get(field) is not None), "with prompt")


TokenizeRequest = Annotated[  # the tags are no names of fields, which are what is left of an error's path
    Annotated[TokenizeTextRequest, Tag("with prompt")]
    | Annotated[TokenizeContentRequest, Tag("with content")]
    | Annotated[TokenizeChatRequest, Tag("with messages")],
    Discriminator(_tokenize_form),
]


class DetokenizeRequest(RequestModel):
    model_config = ConfigDict(extra="allow")

    model: str | None = None
    tokens: Annotated[Array[Annotated[Integer, Field(ge=0)]], Field(max_length=MAX_TOKEN_IDS)]
