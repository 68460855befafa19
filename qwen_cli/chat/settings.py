"""Parses and validates generation settings typed by the user: `:conf top_p=0.9 do_sample=true`."""

import ast
import copy
import difflib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # takes seconds to import
    from transformers import GenerationConfig

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
    from qwen.checkpoint.generation_settings import CONSTRAINTS, Constraint, number

    constraints: dict[str, Constraint] = {
        **CONSTRAINTS,
        "temperature": number("a number above 0 (for greedy decoding set do_sample=false)", lambda v: v > 0),
        "num_beams": ("1: beam search chooses the first word only at its end, so it cannot stream", lambda v: v == 1),
        "num_return_sequences": ("1", lambda v: v == 1),
        "chat_format": ("chatml", lambda v: v == "chatml"),
    }
    known = {key for key in config.to_dict() if not key.startswith("_")} | QWEN_KEYS
    known -= NOT_SETTABLE | {key for key in known if key.startswith("output_")}
    config = copy.deepcopy(config)
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"Unknown setting {key!r}. " + (f"Did you mean {near[0]}?" if near else "See :conf."))
        allowed, is_valid = constraints.get(key, ("", lambda v: True))
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
