"""Parses and validates generation settings typed by the user: `:conf top_p=0.9 do_sample=true`."""

import ast
import copy
import difflib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # takes seconds to import
    from transformers import GenerationConfig

Constraint = tuple[str, Callable[..., bool]]


def _integer(minimum: int) -> Constraint:
    return f"a whole number of at least {minimum}", lambda v: type(v) is int and v >= minimum


def _number(text: str, is_valid: Callable[[float], bool]) -> Constraint:
    return text, lambda v: type(v) in (int, float) and is_valid(v)


BOOLEAN: Constraint = ("true or false", lambda v: type(v) is bool)
PROBABILITY: Constraint = _number("a number above 0 and up to 1", lambda v: 0 < v <= 1)

# transformers checks these only during generation, or never. Reject wrong values when they are typed.
CONSTRAINTS: dict[str, Constraint] = {
    "do_sample": BOOLEAN,
    "use_cache": BOOLEAN,
    "temperature": _number(
        "a number above 0 (for greedy decoding set do_sample=false)", lambda v: 0 < v < float("inf")
    ),
    "top_k": _integer(0),
    "top_p": PROBABILITY,
    "typical_p": PROBABILITY,
    "min_p": _number("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "repetition_penalty": _number("a number above 0", lambda v: 0 < v < float("inf")),
    "no_repeat_ngram_size": _integer(0),
    "max_new_tokens": _integer(1),
    "min_new_tokens": _integer(0),
    "max_length": _integer(1),
    "min_length": _integer(0),
    "max_time": _number("a number of seconds above 0", lambda v: v > 0),
    "max_window_size": _integer(1),
    "num_beams": ("1: beam search chooses the first word only at its end, so it cannot stream", lambda v: v == 1),
    "num_return_sequences": ("1", lambda v: v == 1),
    "eos_token_id": ("a token id or a list of them", lambda v: _is_token_ids(v) or _is_token_ids([v])),
    "pad_token_id": _integer(0),
    "stop_words_ids": (
        "a list of lists of token ids, for example [[198]]",
        lambda v: isinstance(v, list) and all(_is_token_ids(x) for x in v),
    ),
    "chat_format": ("chatml", lambda v: v == "chatml"),
}
QWEN_KEYS = {"chat_format", "max_window_size", "stop_words_ids"}
# Settings that the engine of qwen.serving has, or does not need: it pads nothing, and ends where the checkpoint says.
ENGINE_KEYS = {
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "max_new_tokens",
    "max_window_size",
    "chat_format",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "transformers_version",
}
# Values of other settings that change nothing.
NEUTRAL: dict[str, object] = {
    "use_cache": True,
    "typical_p": 1,
    "min_p": 0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "stop_words_ids": [],
}
# Fields of GenerationConfig that hold objects or change what generate() returns. They cannot be set by text.
NOT_SETTABLE = {"compile_config", "watermarking_config", "transformers_version", "return_dict_in_generate"}


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int and x >= 0 for x in value)


def parse_settings(text: str) -> dict[str, object]:
    """Parse "top_p=0.9 do_sample=true" into a dict. Values are Python or JSON literals, else strings; no code is run.

    Raises:
        ValueError: part of the text is not KEY=VALUE.
    """
    before, *pairs = re.split(r"(?:^|\s)([A-Za-z_]\w*)\s*=\s*", text.strip())
    if before or not pairs:
        raise ValueError(f"{before or text!r} is not KEY=VALUE. Write it like  :conf top_p=0.9 do_sample=true")
    settings = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not value.strip():
            raise ValueError(f"{key} needs a value after the =; to unset it write {key}=null.")
        settings[key] = _literal(value.strip())
    return settings


def _literal(text: str) -> object:
    named = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def updated_config(config: "GenerationConfig", settings: dict[str, object]) -> "GenerationConfig":
    """Return a copy of a GenerationConfig with some fields changed.

    Raises:
        ValueError: a field is unknown or its value is invalid.
    """
    known = {key for key in config.to_dict() if not key.startswith("_")} | QWEN_KEYS
    known -= NOT_SETTABLE | {key for key in known if key.startswith("output_")}
    config = copy.deepcopy(config)
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"Unknown setting {key!r}. " + (f"Did you mean {near[0]}?" if near else "See :conf."))
        allowed, is_valid = CONSTRAINTS.get(key, ("", lambda v: True))
        if value is not None and not is_valid(value):
            raise ValueError(f"{key} must be {allowed}, not {value!r}.")
        setattr(config, key, value)
    try:
        config.validate()
    except (ValueError, TypeError, AttributeError) as error:  # the last two: comparing a number with a string
        raise ValueError(f"transformers rejects this setting: {error}") from error
    return config


def settings_beyond_engine(config: "GenerationConfig", checkpoint_config: "GenerationConfig") -> list[str]:
    """Return the names of settings that the engine of `qwen.serving` lacks and only `generate` follows.

    Args:
        config: the settings of the next reply.
        checkpoint_config: those that the engine was started with.
    """
    known = type(config)().to_dict().keys() | QWEN_KEYS  # files may have fields that nothing reads
    beyond = [
        name
        for name, value in config.to_diff_dict().items()
        if name in known - ENGINE_KEYS and value is not None and value != NEUTRAL.get(name)
    ]
    return sorted([*beyond, *(["eos_token_id"] if config.eos_token_id != checkpoint_config.eos_token_id else [])])
