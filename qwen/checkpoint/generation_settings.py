"""Checks the values of generation settings: those of generation_config.json, and those that users type.

transformers checks some of them when it loads the file, some when it generates, and others never. A server would start,
and then refuse its clients for settings that they did not send.
"""

import copy
import sys
from collections.abc import Callable, Mapping

from transformers import GenerationConfig

from .files import CheckpointError, first_line

Constraint = tuple[str, Callable[[object], bool]]
"""What a value must be, in words and as a function."""

MAX_INTEGER = 2**31 - 1  # 32 bits: what the samplers take
MAX_FLOAT = sys.float_info.max  # a whole number of JSON may be larger
MAX_SHOWN = 100  # characters of a value in messages


def _integer(minimum: int) -> Constraint:
    return (
        f"a whole number of at least {minimum}",
        lambda value: type(value) is int and minimum <= value <= MAX_INTEGER,
    )


def number(text: str, is_valid: Callable[[float], bool]) -> Constraint:
    """Return the constraint of a finite number, described by `text`; true and false are none."""
    return text, lambda value: type(value) in (int, float) and abs(value) <= MAX_FLOAT and is_valid(value)


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int and 0 <= x <= MAX_INTEGER for x in value)


BOOLEAN: Constraint = ("true or false", lambda value: type(value) is bool)
PROBABILITY = number("a number above 0 and up to 1", lambda value: 0 < value <= 1)

CONSTRAINTS: dict[str, Constraint] = {
    "do_sample": BOOLEAN,
    "use_cache": BOOLEAN,
    "temperature": number("a number of at least 0", lambda value: value >= 0),
    "top_k": _integer(0),
    "top_p": PROBABILITY,
    "typical_p": PROBABILITY,
    "min_p": number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": number("a number from 0.01 to 10", lambda value: 0.01 <= value <= 10),  # as in requests
    "no_repeat_ngram_size": _integer(0),
    "max_new_tokens": _integer(1),
    "min_new_tokens": _integer(0),
    "max_length": _integer(1),
    "min_length": _integer(0),
    "max_time": number("a number of seconds above 0", lambda value: value > 0),
    "max_window_size": _integer(1),
    "num_beams": _integer(1),
    "num_return_sequences": _integer(1),
    "eos_token_id": ("a token id or a list of them", lambda value: _is_token_ids(value) or _is_token_ids([value])),
    "bos_token_id": _integer(0),
    "pad_token_id": _integer(0),
    "stop_words_ids": (
        "a list of lists of token ids, for example [[198]]",
        lambda value: isinstance(value, list) and all(_is_token_ids(ids) for ids in value),
    ),
    "chat_format": ('a text, "chatml" or "raw"', lambda value: isinstance(value, str)),
}


def check_generation_settings(settings: Mapping[str, object], name: str) -> None:
    """Check the content of generation_config.json. A value of null is a setting that is not there.

    Args:
        settings: the content.
        name: name of the checkpoint in error messages.

    Raises:
        CheckpointError: a value is invalid; the message names the file, the field and the value.
    """
    for field, (allowed, is_valid) in CONSTRAINTS.items():
        if (value := settings.get(field)) is not None and not is_valid(value):
            raise CheckpointError(_refusal(name, field, value, f"must be {allowed}"))
    if (error := _refused_by_transformers(settings)) is None:
        return
    for field, value in settings.items():
        if (reason := _refused_by_transformers({field: value})) is not None:
            raise CheckpointError(_refusal(name, field, value, f"is refused by transformers ({reason})"))
    raise CheckpointError(f"generation_config.json of {name} is refused by transformers ({error}). Correct the file.")


def _refusal(name: str, field: str, value: object, reason: str) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]} …"
    return f"{field} in generation_config.json of {name} {reason}, not {shown}. Correct or remove it."


def _refused_by_transformers(settings: Mapping[str, object]) -> str | None:
    """Return why transformers cannot read these settings; None if it can."""
    try:
        GenerationConfig.from_dict(copy.deepcopy(dict(settings))).validate()
    except Exception as error:  # of any type: TypeError where numbers are compared, AttributeError for a missing method
        return first_line(error)[:MAX_SHOWN]
    return None
