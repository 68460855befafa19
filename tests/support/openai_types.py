"""Checks responses against the types that the clients of OpenAI and Anthropic publish."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, TypeAdapter

OLDER = {("ResponseFunctionCallArgumentsDoneEvent", "name")}  # fields that openai 2 requires and openai 3 does not know


def check_type(kind: Any, value: Any) -> Any:
    """Return a value as an object of a published type; all required fields have to be there, and no others but `OLDER`.

    Args:
        kind: a type of the client, or a union of them.
        value: from the JSON of a response.
    """
    parsed = TypeAdapter(kind).validate_python(value, strict=True)
    unknown = {(type(part).__name__, name) for part in _objects(parsed) for name in part.model_extra or ()}
    assert unknown <= OLDER, unknown
    return parsed


def _objects(value: object) -> Iterator[BaseModel]:
    """Yield all objects in a value."""
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from _objects(getattr(value, name))
    elif isinstance(value, list):
        for each in value:
            yield from _objects(each)
