"""Supervised samples in ChatML: validation, encoding into ids and labels, and padding or packing into tensors.

Fine-tuning, calibration and the training of the bundled chat checkpoint use it.
"""

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch

from ..model.qwen_generation_utils import DEFAULT_SYSTEM

if TYPE_CHECKING:
    from ..model.tokenization_qwen import QWenTokenizer

IGNORE_INDEX = -100

_ROLES = ("system", "user", "assistant")
_FORMAT = '{"id": …, "conversations": [turn, …]}'


class MalformedSample(ValueError):
    """A sample is invalid. The message names the sample, the field and what to change."""


def check_sample(sample: object, index: int | None = None) -> None:
    """Check that a sample has the format `{"id": …, "system": text, "conversations": […]}`; see `encode_sample`.

    Raises:
        MalformedSample: the message names the sample by its id; without one, by `index`, its position in the data.
    """
    _parse_sample(sample, index)


def unlearned_turns(sample: dict) -> list[str]:
    """Say what training skips in a valid sample, as predicates ("begin with …"); an empty list for nothing."""
    roles = [turn["from"] for turn in sample["conversations"] if turn["from"] != "system"]
    skipped = []
    if roles[0] == "assistant":
        skipped.append("begin with an assistant's turn, which is skipped: put a user's turn before it")
    if "assistant" not in roles[roles[0] == "assistant" :]:
        skipped.append("have no assistant's turn to learn, only control tokens")
    return skipped


def encode_sample(
    sample: dict,
    tokenizer: "QWenTokenizer",
    max_length: int,
    system_message: str = DEFAULT_SYSTEM,
    index: int | None = None,
) -> dict[str, list[int]]:
    """Encode a sample `{"id": …, "system": text, "conversations": […]}` as `encode_conversation` does.

    The system message is the sample's "system" (which may be empty), or that of a first system turn, or else
    `system_message`. "system" and "id" may be missing or None; other keys are ignored.

    Raises:
        MalformedSample: the sample is invalid; see `check_sample`.
        ValueError: `max_length` is below 1.
    """
    system, turns = _parse_sample(sample, index)
    return _encode(system_message if system is None else system, turns, tokenizer, max_length)


def encode_conversation(
    conversations: list[dict],
    tokenizer: "QWenTokenizer",
    max_length: int,
    system_message: str = DEFAULT_SYSTEM,
) -> dict[str, list[int]]:
    """Encode `[{"from": "user" | "assistant", "value": text}, …]` into `input_ids` and `labels`.

    Both are lists of the same length, at most `max_length`: truncated on the right, not padded. Labels are set for the
    assistant's texts, and for the control tokens and their newlines in all turns; others are IGNORE_INDEX. As in the
    published training, a conversation without an assistant turn is valid: its control tokens are learned.

    A first turn from "system" replaces `system_message`. If the first turn after it is not from the user, it is
    skipped. Control tokens written in a text become control tokens.

    Raises:
        MalformedSample: a turn is invalid, or there is no user turn to start from. It is a ValueError.
        ValueError: `max_length` is below 1.
    """
    system, turns = _parse_turns(conversations)
    return _encode(system_message if system is None else system, turns, tokenizer, max_length)


def _encode(
    system: str, turns: list[tuple[str, str]], tokenizer: "QWenTokenizer", max_length: int
) -> dict[str, list[int]]:
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}: it must be at least 1.")
    encode_cached = _cached_encoder(tokenizer)
    start, end = [tokenizer.im_start_id], [tokenizer.im_end_id]
    newline = encode_cached("\n")
    input_ids: list[int] = []
    labels: list[int] = []
    for role, text in [("system", system), *turns]:
        head = encode_cached(role) + newline
        body = encode_cached(text) if role == "system" else tokenizer.encode(text, allowed_special="all")
        ignored = [IGNORE_INDEX] * len(head)
        input_ids += start + head + body + end + newline
        labels += start + ignored + (body if role == "assistant" else [IGNORE_INDEX] * len(body)) + end + newline
        if len(input_ids) >= max_length:  # the rest would be truncated
            break
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}


def pad_samples(samples: list[dict[str, list[int]]], pad_id: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """Stack encoded samples into int64 tensors (samples, length), padded on the right.

    `length` defaults to that of the longest sample. `input_ids` are padded with `pad_id`, `labels` with IGNORE_INDEX.
    `attention_mask` is 1 on a sample, even if it contains `pad_id`, and 0 on padding.

    Raises:
        ValueError: there are no samples, or one is longer than `length`.
    """
    if not samples:
        raise ValueError("There are no samples to pad: give at least one.")
    longest = max(len(sample["input_ids"]) for sample in samples)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"A sample has {longest} tokens, but length is {length}: encode with max_length={length}.")
    input_ids = torch.full((len(samples), length), pad_id)
    labels = torch.full((len(samples), length), IGNORE_INDEX)
    attention_mask = torch.zeros((len(samples), length), dtype=torch.int64)
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        input_ids[row, :size] = torch.tensor(sample["input_ids"])
        labels[row, :size] = torch.tensor(sample["labels"])
        attention_mask[row, :size] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def pack_samples(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Concatenate encoded samples into one row: `input_ids`, `labels` and `position_ids`, int64 (1, T).

    Samples do not attend to each other. The first label of each sample becomes IGNORE_INDEX, so the loss equals that
    of the samples padded in a batch. Call the model with `use_cache=False` (or set it in its config), as Trainer does:
    with a key/value cache, transformers does not detect packed samples.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("There are no samples to pack: give at least one.")
    # Position ids that restart, without an attention mask, separate the samples: transformers.masking_utils
    # (find_packed_sequence_indices) builds a block-diagonal mask from them for sdpa, eager and flex attention, and
    # modeling_flash_attention_utils (_is_packed_sequence) sequence borders for flash attention, for a single row only.
    input_ids: list[int] = []
    labels: list[int] = []
    position_ids: list[int] = []
    for sample in samples:
        input_ids += sample["input_ids"]
        # Unpacked, the first token is not predicted; here, the previous sample would predict it.
        labels += [IGNORE_INDEX, *sample["labels"][1:]]
        position_ids += range(len(sample["input_ids"]))
    return {
        "input_ids": torch.tensor([input_ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([position_ids]),
    }


# Roles, the newline and usually the system message recur in every sample. Weak keys let unused tokenizers be freed.
_encoders: "weakref.WeakKeyDictionary[QWenTokenizer, Callable[[str], list[int]]]" = weakref.WeakKeyDictionary()


def _cached_encoder(tokenizer: "QWenTokenizer") -> Callable[[str], list[int]]:
    """Return an encode function with an LRU cache. Callers must not modify the returned lists."""
    if tokenizer not in _encoders:
        # Not None: the entry of a freed tokenizer is removed.
        tokenizer_ref = cast("Callable[[], QWenTokenizer]", weakref.ref(tokenizer))
        _encoders[tokenizer] = lru_cache(maxsize=16)(lambda text: tokenizer_ref().encode(text, allowed_special="all"))
    return _encoders[tokenizer]


def _parse_sample(sample: object, index: int | None) -> tuple[str | None, list[tuple[str, str]]]:
    """Return the sample's system message, or None, and the turns (role, text) to encode."""
    if not isinstance(sample, dict) or "conversations" not in sample:
        place = "A sample" if index is None else f"Sample {index}"
        raise MalformedSample(f"{place} must be {_FORMAT}, not {_truncated_repr(sample)}.")
    try:
        system, turns = _parse_turns(sample["conversations"])
        sample_system = sample.get("system")
        if sample_system is not None and not isinstance(sample_system, str):
            raise MalformedSample(f'"system" must be a string, not {_truncated_repr(sample_system)}.')
        if sample_system is not None and system is not None:
            raise MalformedSample('it has both "system" and a first turn from "system": keep one of them.')
        return (system if sample_system is None else sample_system), turns
    except MalformedSample as error:
        name = index if sample.get("id") is None else _truncated_repr(sample["id"])
        if name is None:
            raise
        raise MalformedSample(f"Sample {name}: {error}") from None


def _parse_turns(conversations: object) -> tuple[str | None, list[tuple[str, str]]]:
    if not isinstance(conversations, list) or not conversations:
        raise MalformedSample(
            f"conversations must be a list with at least one turn, not {_truncated_repr(conversations)}."
        )
    system = None
    turns: list[tuple[str, str]] = []
    for index, turn in enumerate(conversations):
        field = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise MalformedSample(f'{field} must be {{"from": role, "value": text}}, not {_truncated_repr(turn)}.')
        for key in ("from", "value"):
            if key not in turn:
                raise MalformedSample(f'{field} has no "{key}": a turn is {{"from": role, "value": text}}.')
        role, text = turn["from"], turn["value"]
        if role not in _ROLES:
            raise MalformedSample(f'{field}["from"] must be "user" or "assistant", not {_truncated_repr(role)}.')
        if role == "system" and index > 0:
            raise MalformedSample(f'{field} is from "system": only the first turn can be.')
        if not isinstance(text, str):
            raise MalformedSample(f'{field}["value"] must be a string, not {_truncated_repr(text)}.')
        if role == "system":
            system = text
        else:
            turns.append((role, text))
    if turns and turns[0][0] != "user":
        turns = turns[1:]
    if not turns:
        raise MalformedSample(
            "conversations have no user turn to start from (an assistant's first turn is skipped): add a user's turn."
        )
    return system, turns


def _truncated_repr(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
