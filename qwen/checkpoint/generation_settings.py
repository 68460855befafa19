"""Checks the values of generation settings: those of generation_config.json, and those that users type.

transformers checks some of them when it loads the file, some when it generates, and others never. A server would start,
and then refuse its clients for settings that they did not send.
"""

import copy
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from .files import CheckpointError, first_line

Constraint = tuple[str, Callable[[object], bool]]
"""What a value must be, in words and as a function."""

MAX_INTEGER = 2**31 - 1  # 32 bits: what the samplers take
MAX_FLOAT = sys.float_info.max  # a whole number of JSON may be larger
MAX_SEQUENCES = 256  # beside each other
MAX_SHOWN = 100  # characters of a value in messages


def _integer(minimum: int, maximum: int = MAX_INTEGER) -> Constraint:
    return (
        f"a whole number of at least {minimum}" + (f" and up to {maximum}" if maximum < MAX_INTEGER else ""),
        lambda value: type(value) is int and minimum <= value <= maximum,
    )


def number(text: str, is_valid: Callable[[float], bool]) -> Constraint:
    """Return the constraint of a finite number, described by `text`; true and false are none."""
    return text, lambda value: type(value) in (int, float) and abs(value) <= MAX_FLOAT and is_valid(value)


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int and 0 <= x <= MAX_INTEGER for x in value)


def _is_bias(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and _is_token_ids(pair[0]) and NUMBER[1](pair[1])


COUNT = _integer(0)
NUMBER = number("a number", lambda value: True)
POSITIVE = number("a number above 0", lambda value: value > 0)
FRACTION = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
TOKENS: Constraint = ("a token id or a list of them", lambda value: _is_token_ids(value) or _is_token_ids([value]))
TOKEN_LIST: Constraint = ("a list of token ids", _is_token_ids)
TOKEN_LISTS: Constraint = (
    "a list of lists of token ids, for example [[198]]",
    lambda value: isinstance(value, list) and all(_is_token_ids(ids) for ids in value),
)
BOOLEAN: Constraint = ("true or false", lambda value: type(value) is bool)
PROBABILITY = number("a number above 0 and up to 1", lambda value: 0 < value <= 1)

CONSTRAINTS: dict[str, Constraint] = {
    "do_sample": BOOLEAN,
    "use_cache": BOOLEAN,
    "temperature": number("a number of at least 0", lambda value: value >= 0),
    "top_k": _integer(0),
    "top_p": PROBABILITY,
    "typical_p": PROBABILITY,
    "min_p": FRACTION,
    "repetition_penalty": number("a number from 0.01 to 10", lambda value: 0.01 <= value <= 10),  # as in requests
    "no_repeat_ngram_size": COUNT,
    "max_new_tokens": _integer(1),
    "min_new_tokens": _integer(0),
    "max_length": _integer(1),
    "min_length": _integer(0),
    "max_time": number("a number of seconds above 0", lambda value: value > 0),
    "max_window_size": _integer(1),
    "num_beams": _integer(1, MAX_SEQUENCES),
    "num_return_sequences": _integer(1, MAX_SEQUENCES),
    "eos_token_id": TOKENS,
    "forced_eos_token_id": TOKENS,
    "decoder_start_token_id": TOKENS,
    "forced_bos_token_id": _integer(0),
    "suppress_tokens": TOKEN_LIST,
    "begin_suppress_tokens": TOKEN_LIST,
    "bad_words_ids": TOKEN_LISTS,
    "sequence_bias": (
        "a list of pairs of token ids and a number, for example [[[198], -1.0]]",
        lambda value: isinstance(value, list) and all(_is_bias(pair) for pair in value),
    ),
    "exponential_decay_length_penalty": (
        "a whole number and a number above 0, for example [100, 1.01]",
        lambda value: isinstance(value, list) and len(value) == 2 and COUNT[1](value[0]) and POSITIVE[1](value[1]),
    ),
    "epsilon_cutoff": FRACTION,
    "eta_cutoff": FRACTION,
    "top_h": PROBABILITY,
    "guidance_scale": POSITIVE,
    "encoder_repetition_penalty": POSITIVE,
    "length_penalty": NUMBER,
    "diversity_penalty": NUMBER,
    "encoder_no_repeat_ngram_size": COUNT,
    "prompt_lookup_num_tokens": _integer(1),
    "max_matching_ngram_size": _integer(1),
    "prefill_chunk_size": _integer(1),
    "early_stopping": ('true, false or "never"', lambda value: type(value) is bool or value == "never"),
    "stop_strings": (
        "a text or a list of texts",
        lambda value: all(isinstance(text, str) and text for text in (value if isinstance(value, list) else [value])),
    ),
    "cache_implementation": ("a text", lambda value: isinstance(value, str)),
    "return_dict_in_generate": ("false", lambda value: value is False),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), BOOLEAN),
    **dict.fromkeys(("remove_invalid_values", "renormalize_logits", "disable_compile", "low_memory"), BOOLEAN),
    "bos_token_id": _integer(0),
    "pad_token_id": _integer(0),
    "stop_words_ids": TOKEN_LISTS,
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


def save_generation_config(config: GenerationConfig, folder: Path) -> None:
    """Write generation_config.json as it is.

    transformers' `save_pretrained` refuses changed settings of which one has no effect, for example top_p without
    do_sample, and a model that was trained for hours would not be saved.
    """
    config.to_json_file(folder / GENERATION_CONFIG_NAME)


def _refusal(name: str, field: str, value: object, reason: str) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]} …"
    return f"{field} in generation_config.json of {name} {reason}, not {shown}. Correct or remove it."


def _refused_by_transformers(settings: Mapping[str, object]) -> str | None:
    """Return why transformers cannot read these settings; None if it can."""
    logger = logging.getLogger(GenerationConfig.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of settings without an effect
    try:
        GenerationConfig.from_dict(copy.deepcopy(dict(settings))).validate()
    except Exception as error:  # of any type: TypeError where numbers are compared, AttributeError for a missing method
        return first_line(error)[:MAX_SHOWN]
    finally:
        logger.setLevel(level)
    return None
