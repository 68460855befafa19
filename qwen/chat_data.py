"""Conversations to ids and labels.

Revolves around one supervised sample in ChatML: what its tokens are and which of them are learned. Fine-tuning,
calibration and the bundled checkpoint's chat stage share it. It knows a tokenizer, but no files, data sets or trainers.
"""

from functools import lru_cache

import torch

from .qwen_generation_utils import DEFAULT_SYSTEM

IGNORE_INDEX = -100

_ROLES = ("user", "assistant")


class MalformedSample(ValueError):
    """A sample that cannot be trained on; the text says which sample, which field and what to change."""


def encode_sample(
    sample: dict,
    tokenizer,
    max_length: int,
    system_message: str = DEFAULT_SYSTEM,
    index: int | None = None,
) -> dict[str, list[int]]:
    """`encode_conversation` of `{"id": …, "conversations": […]}`, with errors that name the sample: by its id, or by
    `index`, its place in the data, where it has none."""
    if not isinstance(sample, dict) or "conversations" not in sample:
        place = "A sample" if index is None else f"Sample {index}"
        raise MalformedSample(f'{place} must be {{"id": …, "conversations": [turn, …]}}, not {_short(sample)}.')
    try:
        return encode_conversation(sample["conversations"], tokenizer, max_length, system_message)
    except MalformedSample as error:
        name = repr(sample["id"]) if "id" in sample else index
        if name is None:
            raise
        raise MalformedSample(f"Sample {name}: {error}") from None


def encode_conversation(
    conversations: list[dict],
    tokenizer,
    max_length: int,
    system_message: str = DEFAULT_SYSTEM,
) -> dict[str, list[int]]:
    """Turns `[{"from": "user" | "assistant", "value": text}, …]` into `input_ids` and `labels`.

    Both are lists of the same length, at most `max_length`: not padded, cut on the right. Learned are the control
    tokens with their newlines everywhere, and the assistant's texts; all else is IGNORE_INDEX. A first turn that is
    not the user's is skipped. Control tokens written in a text become control tokens.

    Raises MalformedSample (a ValueError) for turns of another form and for a conversation without a user's turn to
    start from; ValueError for a `max_length` below 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}: it must be at least 1.")
    turns = _checked_turns(conversations)
    if turns[0][0] != "user":
        turns = turns[1:]
    if not turns:
        raise MalformedSample(
            "conversations hold nothing but an assistant's first turn, which is skipped: add a user's."
        )

    start, end = [tokenizer.im_start_id], [tokenizer.im_end_id]
    newline = _encode_once(tokenizer, "\n")
    input_ids: list[int] = []
    labels: list[int] = []
    for role, text in [("system", system_message), *turns]:
        head = _encode_once(tokenizer, role) + newline
        body = _encode_once(tokenizer, text) if role == "system" else tokenizer.encode(text, allowed_special="all")
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


@lru_cache(maxsize=16)
def _encode_once(tokenizer, text: str) -> list[int]:
    """Role words, the newline and the system message come back in every sample. Callers must not change the list."""
    return tokenizer.encode(text, allowed_special="all")


def _checked_turns(conversations: list[dict]) -> list[tuple[str, str]]:
    if not isinstance(conversations, list) or not conversations:
        raise MalformedSample(f"conversations must be a list with at least one turn, not {_short(conversations)}.")
    turns = []
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
        if not isinstance(text, str):
            raise MalformedSample(f'{where}["value"] must be a string, not {_short(text)}.')
        turns.append((role, text))
    return turns


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
