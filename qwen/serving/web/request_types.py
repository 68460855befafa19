"""The requests of the page: what Gradio's page sends when it has only text, and nothing else.

Gradio's own parser would build any of its components from a message, with arguments that the sender chooses, and copy
the files that it names.
"""

from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

MAX_TEXT = 1_000_000  # characters that the text box takes: far beyond the context of these models
MAX_BODY = 4 * 2**20  # bytes of a request: its question and its conversation
MAX_MESSAGES, MAX_PARTS, MAX_VALUES = 2000, 16, 32  # of a conversation, a message, an event
MAX_ERROR = 300  # characters


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class TextMessage(_Strict):
    """A message."""

    role: Literal["user", "assistant"]
    content: Annotated[list[TextPart], Field(max_length=MAX_PARTS)]


Index = Annotated[int, Field(ge=0, lt=2**31)]
Setting = str | Annotated[int, Field(ge=-(2**63), lt=2**64)] | float | None  # value of a control
Messages = Annotated[list[TextMessage], Field(max_length=MAX_MESSAGES)]


def _none_if_invalid(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError:
        return None


SavedSetting = Annotated[Setting, WrapValidator(_none_if_invalid)]


class Saved(_Strict):
    """What the browser has saved. The page ignores invalid values, for example those of an older version."""

    messages: Annotated[Messages | None, WrapValidator(_none_if_invalid)] = None
    system: SavedSetting = None
    temperature: SavedSetting = None
    top_p: SavedSetting = None
    top_k: SavedSetting = None
    repetition_penalty: SavedSetting = None
    max_tokens: SavedSetting = None
    seed: SavedSetting = None


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "messages"
    return "saved" if isinstance(value, dict | Saved) else "setting"


Value = Annotated[
    Annotated[Setting, Tag("setting")] | Annotated[Messages, Tag("messages")] | Annotated[Saved, Tag("saved")],
    Discriminator(_kind),
]


# Python types of the values of an event. A field that is empty has no value.
TYPES: dict[str, tuple[type, ...]] = {
    "text": (str, NoneType),
    "number": (int, float, NoneType),
    "slider": (int, float),
    "messages": (list,),
    "saved": (Saved, NoneType),
}


class EventData(_Strict):
    """What happened to a message of the conversation."""

    index: Index | None = None
    value: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None
    previous_value: str | None = None


class PageRequest(_Strict):
    """An event of the page."""

    fn_index: Index
    session_hash: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,64}$")]
    trigger_id: Index | None = None
    data: Annotated[list[Value], Field(max_length=MAX_VALUES)]
    event_data: EventData | None = None


class Event(NamedTuple):
    """An event that the page has.

    Args:
        takes: what its values are, in their order: "text", "number", "slider", "messages" or "saved".
        name: Gradio's name of it.
        limits: smallest and largest value of each slider, by its position.
    """

    takes: tuple[str, ...]
    name: str
    limits: Mapping[int, tuple[float, float]] = {}


def parse_request(body: bytes, events: Mapping[int, Event]) -> PageRequest:
    """Return the request without any field that the classes above do not have.

    Args:
        events: those of the page by their index.

    Raises:
        ValueError: it is not a request of the page; the message is one line.
    """
    try:
        request = PageRequest.model_validate_json(body)
        problem = _find_problem(request, events)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        problem = f"{where[:MAX_ERROR]}: {first['msg'][:MAX_ERROR]}"
    if problem:
        raise ValueError(f"This is not a request of the page: {problem}. Reload the page.")
    return request


def _find_problem(request: PageRequest, events: Mapping[int, Event]) -> str:
    """Return why an event would fail, or ""."""
    event = events.get(request.fn_index)
    if event is None:
        return "fn_index: the page has no such event"
    if len(request.data) != len(event.takes):
        return f"data: {len(event.takes)} values are needed, not {len(request.data)}"
    for index, (kind, value) in enumerate(zip(event.takes, request.data, strict=True)):
        if not isinstance(value, TYPES[kind]):
            return f"data.{index}: this should be {kind}"
        if index in event.limits and not event.limits[index][0] <= cast("float", value) <= event.limits[index][1]:
            return f"data.{index}: this should be from {event.limits[index][0]} to {event.limits[index][1]}"
    if event.name in ("edit", "undo"):
        change, messages = request.event_data or EventData(), request.data[0]
        if change.index is None or not isinstance(messages, list) or change.index >= len(messages):
            return "event_data.index: this should be the index of a message"
        if event.name == "edit" and not (isinstance(change.value, str) and isinstance(change.previous_value, str)):
            return "event_data: value and previous_value should be text"
    return ""
