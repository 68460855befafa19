"""Rewrites JSON schemas without what llguidance does not support: unique items, and formats that it does not know."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

# Written out for `uniqueItems`, in characters.
_MAX_UNIQUE_ITEMS = 32_768
_MAX_UNIQUE_VALUES = 64
# Keywords that hold a schema, a list of schemas, or schemas by name.
_HOLDS_ONE = {"items", "additionalProperties"}
_HOLDS_LIST = {"prefixItems", "anyOf", "oneOf", "allOf"}
_DEFINITIONS = {"$defs", "definitions"}
_HOLDS_NAMED = {"properties", "patternProperties", *_DEFINITIONS}
# Other keywords that may determine the properties of an object.
_MORE_PROPERTIES = {"additionalProperties", "patternProperties", "minProperties", "$ref", "anyOf", "oneOf"}
_REFERS = {"$ref", "anyOf", "oneOf"}  # to further conditions on the same value
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated"}
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


def combined_patterns(schema: Any) -> list[str]:
    """Return the patterns of a schema if a text may have to match several of them, else nothing."""
    parts = list(_parts(schema))
    combines = any("allOf" in part or ("pattern" in part and part.keys() & _REFERS) for part in parts)
    return [str(part["pattern"]) for part in parts if "pattern" in part] if combines else []


def _parts(value: Any) -> Iterator[dict]:
    """Yield all objects in a value."""
    if isinstance(value, list):
        for part in value:
            yield from _parts(part)
    elif isinstance(value, dict):
        yield value
        yield from _parts(list(value.values()))


def normalize_schema(schema: Any, close: bool, root: dict) -> Any:
    """Copy a schema without what llguidance does not support: some formats, and `uniqueItems`.

    Args:
        close: objects allow only their listed properties.
        root: the whole schema, whose definitions `$ref` names.
    """
    if not isinstance(schema, dict):
        return schema
    if "uniqueItems" in schema:
        schema = _without_unique_items(schema, root)
    prepared = {}
    for key, value in schema.items():
        # Alternatives next to properties describe the same object.
        inner = close and not (key in _HOLDS_LIST and "properties" in schema)
        if key in _HOLDS_NAMED and isinstance(value, dict):
            value = {name: normalize_schema(part, close, root) for name, part in value.items()}
        elif key in _HOLDS_LIST and isinstance(value, list):
            value = [normalize_schema(part, inner, root) for part in value]
        elif key in _HOLDS_ONE:
            value = normalize_schema(value, close, root)
        elif key == "format" and not _known_format(value):
            continue
        prepared[key] = value
    if close and "properties" in schema and not _MORE_PROPERTIES & schema.keys():
        prepared["additionalProperties"] = False
    return prepared


def _without_unique_items(schema: dict, root: dict) -> dict:
    """Return the schema of an array without `uniqueItems`, if possible.

    If the values of the items are few, all arrays are listed: in all orders, or if those are too many, with the items
    in the order of the schema, like the properties of objects.
    """
    least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)
    if schema["uniqueItems"] is False or most in (0, 1):
        return {key: value for key, value in schema.items() if key != "uniqueItems"}
    values = _values(schema.get("items"), root)
    others = schema.keys() - {"type", "items", "minItems", "maxItems", "uniqueItems", *_DEFINITIONS} - _ANNOTATIONS
    numbers = isinstance(least, int) and isinstance(most, int | float)
    if schema.get("type") != "array" or values is None or others or not numbers:
        return schema
    sizes = range(max(least, 0), int(min(most, len(values))) + 1)
    length = sum(len(json.dumps(value)) + 2 for value in values) / max(len(values), 1)
    for count, arrange in ((math.perm, itertools.permutations), (math.comb, itertools.combinations)):
        if length * sum(count(len(values), size) * size for size in sizes) <= _MAX_UNIQUE_ITEMS:
            return {"enum": [list(array) for size in sizes for array in arrange(values, size)]}
    return schema


def _values(schema: Any, root: dict) -> list | None:
    """Return the values that a schema allows if it is an enum, a constant or boolean, or refers to one; else None."""
    if not isinstance(schema, dict):
        return None
    if isinstance(reference := schema.get("$ref"), str) and not schema.keys() - {"$ref"} - _ANNOTATIONS:
        _, _, place = reference.partition("#/")
        group, _, name = place.partition("/")
        definitions = root.get(group) if group in _DEFINITIONS else None
        schema = definitions.get(name) if isinstance(definitions, dict) else None
        if not isinstance(schema, dict):
            return None
    kind = schema.get("type")
    if kind == "boolean" and not schema.keys() - {"type"} - _ANNOTATIONS:
        return [False, True]
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    others = schema.keys() - {"type", "const" if "const" in schema else "enum"} - _ANNOTATIONS
    if not isinstance(values, list) or others:
        return None
    if kind is not None and not all(_is_of_type(value, kind) for value in values):
        return None
    different = {json.dumps(value, sort_keys=True): value for value in map(_as_integer, values)}
    return list(different.values()) if len(different) <= _MAX_UNIQUE_VALUES else None


def _is_of_type(value: object, kind: object) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(kind, str) and isinstance(value, _TYPES.get(kind, ()))


def _as_integer(value: object) -> object:
    """Return 1 for 1.0, which are the same value in JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _known_format(name: object) -> bool:
    from llguidance import LLMatcher  # not installed everywhere; without it there are no grammars

    schema = json.dumps({"type": "string", "format": name})
    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
