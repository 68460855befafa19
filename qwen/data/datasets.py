"""Datasets for training: encoded samples (`SupervisedDataset`), packed rows (`PackedDataset`), batches (`Collator`).

The encoding of a sample is defined in `samples`.
"""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ..model.qwen_generation_utils import DEFAULT_SYSTEM
from .conversation_file import PROGRESS_DELAY
from .samples import encode_sample, pack_samples, pad_samples

if TYPE_CHECKING:
    from ..model.tokenization_qwen import QWenTokenizer


class SupervisedDataset(Dataset):
    """Dataset of ids and labels: item i is `encode_sample` of sample i.

    Args:
        samples: a list or a ConversationFile of `{"id": …, "conversations": […]}`.
        tokenizer: a QWenTokenizer.
        max_length: maximum number of tokens per sample; longer samples are truncated.
        system_message: system message of samples without one.
        lazy: encode samples on access, without using memory. Otherwise all are encoded now, in 8 bytes per token.
        progress: show a progress bar on standard error if encoding takes seconds.

    Raises:
        ValueError: there are no samples, or `max_length` is below 1.
        MalformedSample: a sample is invalid; if `lazy`, raised on access.
    """

    def __init__(
        self,
        samples: Sequence[dict],
        tokenizer: "QWenTokenizer",
        max_length: int,
        *,
        system_message: str = DEFAULT_SYSTEM,
        lazy: bool = False,
        progress: bool = False,
    ):
        if not len(samples):
            raise ValueError("There are no samples: give at least one.")
        self.samples = samples
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.system_message = system_message
        self.lazy = lazy
        self.progress = progress
        if lazy:
            self._encode(0)  # report invalid arguments now, not in a worker
            return
        self.lengths = array("i")
        self._input_ids, self._labels = array("i"), array("i")  # of all samples, concatenated
        for index in self._indices("Encoding"):
            encoded = self._encode(index)
            self._input_ids.extend(encoded["input_ids"])
            self._labels.extend(encoded["labels"])
            self.lengths.append(len(encoded["input_ids"]))
        self._ends = array("Q", accumulate(self.lengths))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        index = range(len(self))[index]
        if self.lazy:
            return self._encode(index)
        end = self._ends[index]
        start = end - self.lengths[index]
        return {"input_ids": self._input_ids[start:end].tolist(), "labels": self._labels[start:end].tolist()}

    @cached_property
    def lengths(self) -> "array[int]":
        """Number of tokens of each sample; if `lazy`, counted on first access by encoding all samples."""
        return array("i", (len(self._encode(index)["input_ids"]) for index in self._indices("Counting tokens")))

    def _encode(self, index: int) -> dict[str, list[int]]:
        return encode_sample(self.samples[index], self.tokenizer, self.max_length, self.system_message, index)

    def _indices(self, what: str) -> Iterable[int]:
        return tqdm(range(len(self)), desc=what, unit=" samples", delay=PROGRESS_DELAY, disable=not self.progress)


class PackedDataset(Dataset):
    """Dataset of packed rows of at most `max_length` tokens: item i is the list of encoded samples in row i.

    Samples are not split. Rows are filled by best fit decreasing (Ding et al. 2024,
    https://arxiv.org/abs/2404.10830): the longest sample first, each into the row with the least sufficient space.
    Packing is deterministic.

    Raises:
        ValueError: a sample is longer than `max_length`.
    """

    def __init__(self, dataset: SupervisedDataset, max_length: int):
        lengths = dataset.lengths
        if max(lengths) > max_length:
            raise ValueError(
                f"A sample has {max(lengths)} tokens, more than a row of {max_length}: encode samples with "
                f"max_length={max_length} or less."
            )
        self.dataset = dataset
        self.max_length = max_length
        rows = torch.frombuffer(best_fit_decreasing(lengths, max_length), dtype=torch.int64)
        self._members = rows.argsort(stable=True)  # samples by row
        self._ends = rows.bincount().cumsum(0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> list[dict[str, list[int]]]:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return [self.dataset[member] for member in self._members[start : self._ends[index]].tolist()]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> "array[int]":
    """Assign items to rows of at most `capacity`, by best fit decreasing.

    O(n log n): rows are grouped by their remaining space, which has at most `capacity` + 1 values.

    Args:
        lengths: length of each item, from 1 to `capacity`.
        capacity: maximum sum of lengths in a row.

    Returns:
        The row of each item, from 0.
    """
    row_by_item = array("q", bytes(8 * len(lengths)))
    rows_by_space: dict[int, list[int]] = {}  # remaining space → rows
    spaces: list[int] = []  # keys of rows_with, ascending
    count = 0
    for item in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[item]
        position = bisect_left(spaces, length)
        if position == len(spaces):
            row, space = count, capacity
            count += 1
        else:
            space = spaces[position]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[position]
        row_by_item[item] = row
        remaining = space - length
        if remaining not in rows_by_space:
            rows_by_space[remaining] = []
            insort(spaces, remaining)
        rows_by_space[remaining].append(row)
    return row_by_item


@dataclass(frozen=True)
class Collator:
    """Collates items into tensors. Items of SupervisedDataset are padded on the right with `pad_id` (`pad_samples`);
    items of PackedDataset are concatenated into a single row for any batch size (`pack_samples`)."""

    pad_id: int

    def __call__(self, items: list[dict[str, list[int]]] | list[list[dict[str, list[int]]]]) -> dict[str, torch.Tensor]:
        if isinstance(items[0], dict):
            return pad_samples(items, self.pad_id)
        return pack_samples([sample for row in items for sample in row])
