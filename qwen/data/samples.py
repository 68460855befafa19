"""Conversations to ids and labels, and those to tensors.

Revolves around the supervised sample in ChatML: what its form is, what its tokens are, which of them are learned, and
how several share a tensor, padded or packed. Fine-tuning, calibration and the bundled checkpoint's chat stage share it.
It knows a tokenizer, but no files (those are in `conversation_file`), data sets (`datasets`) or trainers.
"""

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ..model.qwen_generation_utils import DEFAULT_SYSTEM

IGNORE_INDEX = -100

_ROLES = ("system", "user", "assistant")
_FORM = '{"id": …, "conversations": [turn, …]}'


class MalformedSample(ValueError):
    """A sample that cannot be trained on; the text says which sample, which field and what to change."""


def check_sample(sample: Any, index: int | None = None) -> None:
    """Looks at the form of `{"id": …, "system": text, "conversations": […]}`; see `encode_sample`.

    Raises MalformedSample, whose text names the sample by its id, or by `index`, its place in the data, where it has
    none.
    """
    _parse_sample(sample, index)


def encode_sample(
    sample: dict,
    tokenizer,
    max_length: int,
    system_message: str = DEFAULT_SYSTEM,
    index: int | None = None,
) -> dict[str, list[int]]:
    """A sample `{"id": …, "system": text, "conversations": […]}` to ids and labels, as `encode_conversation` does.

    The system message is the sample's own "system" (which may be empty), or that of a first system turn, or else
    `system_message`; "system" and "id" may be missing or None, other keys are not looked at.

    Raises MalformedSample as `check_sample` does; ValueError for a `max_length` below 1.
    """
    system, turns = _parse_sample(sample, index)
    return _encode(system_message if system is None else system, turns, tokenizer, max_length)


def encode_conversation(
    conversations: list[dict],
    tokenizer,
    max_length: int,
    system_message: str = DEFAULT_SYSTEM,
) -> dict[str, list[int]]:
    """Turns `[{"from": "user" | "assistant", "value": text}, …]` into `input_ids` and `labels`.

    Both are lists of the same length, at most `max_length`: not padded, cut on the right. Learned are the control
    tokens with their newlines everywhere, and the assistant's texts; all else is IGNORE_INDEX. A conversation in which
    the assistant says nothing is no mistake, as it was none in the published training: its control tokens are learned.

    A first turn from "system" takes the place of `system_message`. The first turn after it is skipped where it is not
    the user's. Control tokens written in a text become control tokens.

    Raises MalformedSample (a ValueError) for turns of another form and for a conversation without a user's turn to
    start from; ValueError for a `max_length` below 1.
    """
    system, turns = _parse_turns(conversations)
    return _encode(system_message if system is None else system, turns, tokenizer, max_length)


def _encode(system: str, turns: list[tuple[str, str]], tokenizer, max_length: int) -> dict[str, list[int]]:
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}: it must be at least 1.")
    encode_once = _remembering_encoder(tokenizer)
    start, end = [tokenizer.im_start_id], [tokenizer.im_end_id]
    newline = encode_once("\n")
    input_ids: list[int] = []
    labels: list[int] = []
    for role, text in [("system", system), *turns]:
        head = encode_once(role) + newline
        body = encode_once(text) if role == "system" else tokenizer.encode(text, allowed_special="all")
        ignored = [IGNORE_INDEX] * len(head)
        input_ids += start + head + body + end + newline
        labels += start + ignored + (body if role == "assistant" else [IGNORE_INDEX] * len(body)) + end + newline
        if len(input_ids) >= max_length:  # what follows would be cut off anyway
            break
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}


def pad_samples(samples: list[dict[str, list[int]]], pad_id: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """Stacks encoded samples into int64 tensors (samples, length), padded on the right.

    `length` defaults to the longest sample's. `input_ids` are padded with `pad_id`, `labels` with IGNORE_INDEX;
    `attention_mask` is 1 on a sample and 0 on its padding, also where the sample itself holds `pad_id`.

    Raises ValueError for no samples, or for one that is longer than `length`.
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
    """Puts encoded samples one behind another into one row: `input_ids`, `labels`, `position_ids`, int64 (1, T).

    No token sees another sample, and no label but each sample's first, which is IGNORE_INDEX, differs: the loss is that
    of the samples padded in a batch. Call the model with `use_cache=False` (or its config), as Trainer does: beside a
    key/value cache, transformers does not look for packed samples.

    Raises ValueError for no samples.
    """
    if not samples:
        raise ValueError("There are no samples to pack: give at least one.")
    # Position ids that start anew, without an attention mask, are what keeps samples apart: transformers.masking_utils
    # (find_packed_sequence_indices) builds a block-diagonal mask from them for sdpa, eager and flex attention, and
    # modeling_flash_attention_utils (_is_packed_sequence) sequence borders for flash attention, there for one row only.
    input_ids: list[int] = []
    labels: list[int] = []
    position_ids: list[int] = []
    for sample in samples:
        input_ids += sample["input_ids"]
        # In a row of its own nothing predicts a first token; here the last token before it would.
        labels += [IGNORE_INDEX, *sample["labels"][1:]]
        position_ids += range(len(sample["input_ids"]))
    return {
        "input_ids": torch.tensor([input_ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([position_ids]),
    }


# Role words, the newline and mostly the system message come back in every sample. Held weakly, so that a tokenizer that
# is no longer used goes, and with it what was remembered.
_encoders: weakref.WeakKeyDictionary[Any, Callable[[str], list[int]]] = weakref.WeakKeyDictionary()


def _remembering_encoder(tokenizer) -> Callable[[str], list[int]]:
    """Text to ids, with the last few texts remembered. Callers must not change the list."""
    if tokenizer not in _encoders:
        alive: Callable[[], Any] = weakref.ref(tokenizer)
        _encoders[tokenizer] = lru_cache(maxsize=16)(lambda text: alive().encode(text, allowed_special="all"))
    return _encoders[tokenizer]


def _parse_sample(sample: Any, index: int | None) -> tuple[str | None, list[tuple[str, str]]]:
    """The sample's system message, None where it has none, and the turns (role, text) that are encoded."""
    if not isinstance(sample, dict) or "conversations" not in sample:
        place = "A sample" if index is None else f"Sample {index}"
        raise MalformedSample(f"{place} must be {_FORM}, not {_short(sample)}.")
    try:
        system, turns = _parse_turns(sample["conversations"])
        own = sample.get("system")
        if own is not None and not isinstance(own, str):
            raise MalformedSample(f'"system" must be a string, not {_short(own)}.')
        if own is not None and system is not None:
            raise MalformedSample('it has both "system" and a first turn from "system": keep one of them.')
        return (system if own is None else own), turns
    except MalformedSample as error:
        name = index if sample.get("id") is None else _short(sample["id"])
        if name is None:
            raise
        raise MalformedSample(f"Sample {name}: {error}") from None


def _parse_turns(conversations: Any) -> tuple[str | None, list[tuple[str, str]]]:
    if not isinstance(conversations, list) or not conversations:
        raise MalformedSample(f"conversations must be a list with at least one turn, not {_short(conversations)}.")
    system = None
    turns: list[tuple[str, str]] = []
    for index, turn in enumerate(conversations):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise MalformedSample(f'{where} must be {{"from": role, "value": text}}, not {_short(turn)}.')
        for key in ("from", "value"):
            if key not in turn:
                raise MalformedSample(f'{where} has no "{key}": a turn is {{"from": role, "value": text}}.')
        role, text = turn["from"], turn["value"]
        if role not in _ROLES:
            raise MalformedSample(f'{where}["from"] must be "user" or "assistant", not {_short(role)}.')
        if role == "system" and index > 0:
            raise MalformedSample(f'{where} is from "system": only the first turn can be.')
        if not isinstance(text, str):
            raise MalformedSample(f'{where}["value"] must be a string, not {_short(text)}.')
        if role == "system":
            system = text
        else:
            turns.append((role, text))
    if turns and turns[0][0] != "user":
        turns = turns[1:]
    if not turns:
        raise MalformedSample(
            "conversations hold nothing to start from (an assistant's first turn is skipped): add a user's turn."
        )
    return system, turns


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
