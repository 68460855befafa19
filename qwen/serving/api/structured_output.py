"""Structured output: which grammar a request asks for, under the names of OpenAI, vLLM, SGLang and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, cast

from pydantic import ValidationError
from pydantic_core import from_json

from ..engine.grammar import ConstraintFactory, GrammarConstraint, StructuralTag
from .errors import invalid_request
from .request_types import (
    GenerationRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    RequestModel,
    StructuralTagFormat,
)

Kind = Literal["json", "regex", "choice", "grammar", "structural_tag"]
ANY_OBJECT = {"type": "object"}
# Fields of a request beside response_format and structured_outputs, and the field of the latter that they stand for.
FIELDS: dict[str, Kind | Literal["json_object"]] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "regex": "regex",
    "ebnf": "grammar",
    "json_schema": "json",
    "grammar": "grammar",
}
# Fields that may ask for a grammar, in any of the APIs.
GRAMMAR_FIELDS = (
    "response_format",
    "structured_outputs",
    "text",
    "output_config",
    "tool_choice",
    "function_call",
    *FIELDS,
)


def may_need_grammar(request: RequestModel) -> bool:
    """Return whether a reply may have to follow a grammar, which can take seconds to build.

    Args:
        request: of any of the APIs.
    """
    if any(getattr(request, name, None) not in (None, "auto", "none") for name in GRAMMAR_FIELDS):
        return True
    tools = getattr(request, "tools", None) or []
    return any(getattr(getattr(tool, "function", tool), "strict", None) for tool in tools)


class RequestedGrammar(NamedTuple):
    """What a reply must be.

    Args:
        param: request field that says so.
        kind: what `value` is.
        value: argument of the method of ConstraintFactory that creates the constraint.
    """

    param: str
    kind: Kind
    value: Any

    def create(self, constraints: ConstraintFactory) -> GrammarConstraint:
        """Build the constraint of the reply.

        Raises:
            ApiError: the grammar cannot be used.
        """
        methods: dict[Kind, Callable[[Any], GrammarConstraint]] = {
            "json": constraints.json_schema,
            "regex": constraints.regex,
            "choice": constraints.choice,
            "grammar": constraints.grammar,
            "structural_tag": constraints.structural_tags,
        }
        try:
            return methods[self.kind](self.value)
        except ValueError as error:
            raise invalid_request(str(error), self.param) from error


def requested_grammar(request: GenerationRequest) -> RequestedGrammar | None:
    """Return what the reply of a request must be; None for free text.

    Raises:
        ApiError: several fields ask for different things, or a text in them cannot be read.
    """
    first = None
    for found in _read_fields(request):
        if first is not None and found[1:] != first[1:]:
            raise invalid_request(
                f"{first.param} and {found.param} ask for different replies: send only one of them.", found.param
            )
        first = first or found
    return first


def _read_fields(request: GenerationRequest) -> Iterator[RequestedGrammar]:
    reply_format, outputs = request.response_format, request.structured_outputs
    if isinstance(reply_format, JsonObjectFormat):
        has_schema = reply_format.schema_ is not None
        param = "response_format.schema" if has_schema else "response_format"
        yield RequestedGrammar(param, "json", reply_format.schema_ if has_schema else ANY_OBJECT)
    elif isinstance(reply_format, JsonSchemaFormat):
        schema = reply_format.json_schema.schema_ or ANY_OBJECT
        yield RequestedGrammar("response_format.json_schema.schema", "json", schema)
    elif isinstance(reply_format, StructuralTagFormat):
        yield RequestedGrammar("response_format", "structural_tag", _tags(reply_format, "response_format"))
    if outputs is not None:
        values = outputs.model_dump(by_alias=True)
        given = [name for name, value in values.items() if _is_given(value)]
        if len(given) != 1:
            raise invalid_request(
                "structured_outputs: expected one of json, regex, choice, grammar, json_object and structural_tag, "
                f"not {' and '.join(given) or 'none'}.",
                "structured_outputs",
            )
        (name,) = given
        yield _read(f"structured_outputs.{name}", cast("Kind | Literal['json_object']", name), values[name])
    for name, kind in FIELDS.items():
        if _is_given(value := getattr(request, name)):
            yield _read(name, kind, value)


def _is_given(value: object) -> bool:
    """Return whether a field asks for something. Some clients send "" or false if they want nothing."""
    return value is not None and value is not False and value != ""


def _read(param: str, kind: Kind | Literal["json_object"], value: Any) -> RequestedGrammar:
    """Convert a field of StructuredOutputs, or another name of it."""
    if kind == "json_object":
        return RequestedGrammar(param, "json", ANY_OBJECT)
    if kind == "json":
        return RequestedGrammar(param, "json", _parse_object(param, value) if isinstance(value, str) else value)
    if kind == "structural_tag":
        tag = {"type": kind, **_parse_object(param, value)}
        try:
            return RequestedGrammar(param, kind, _tags(StructuralTagFormat.model_validate(tag), param))
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(step) for step in problem["loc"])
            raise invalid_request(f"{param}: {place}: {problem['msg']}.", param) from error
    return RequestedGrammar(param, kind, value)


def _parse_object(param: str, text: str) -> dict[str, Any]:
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise invalid_request(f"{param} is not valid JSON: {error}.", param) from error
    if not isinstance(value, dict):
        raise invalid_request(f"{param}: should be a JSON object.", param)
    return value


def _tags(tag_format: StructuralTagFormat, param: str) -> list[StructuralTag]:
    """Convert either form of structural tags.

    Raises:
        ApiError: both forms, neither, or a tag without a trigger.
    """
    if (tag_format.format is None) == (tag_format.structures is None or tag_format.triggers is None):
        raise invalid_request(f"{param}: expected structures and triggers, or format.", param)
    if tag_format.format is not None:
        triggers, place = tag_format.format.triggers, "format.tags"
        parts = [(tag.begin, tag.content.json_schema, tag.end) for tag in tag_format.format.tags]
    else:
        triggers, place = tag_format.triggers or [], "structures"
        parts = [(tag.begin, tag.schema_ or {}, tag.end) for tag in tag_format.structures or []]
    tags = []
    for index, (begin, schema, end) in enumerate(parts):
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        if trigger is None:
            where = f"{param}.{place}.{index}.begin"
            raise invalid_request(f"{where}: should begin with one of the triggers.", where)
        tags.append(StructuralTag(trigger, begin, schema, end))
    return tags
