"""Reads the word problems of GSM8K, and formats a problem with its solution as text."""

import argparse
import random
import re
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from .data_files import DataError
from .numbers import gold_answer
from .splits import read_split
from .task import add_file_argument

_CALCULATOR = re.compile(r"<<.*?>>")  # annotations for a calculator: "48/2 = <<48/2=24>>24"


class WordProblem(NamedTuple):
    """A question, the steps of its solution, and the resulting number: as written, and as a fraction."""

    question: str
    reasoning: str
    written: str
    gold: Fraction

    def asked(self) -> str:
        """Return the problem, up to where its solution begins."""
        return f"Question: {self.question}\nLet's think step by step\n"

    def worked(self) -> str:
        """Return the problem with its solution."""
        return f"{self.asked()}{self.reasoning}\nThe answer is {self.written}\n\n"


def add_problems_argument(parser: argparse.ArgumentParser) -> None:
    """Add `-f/--sample-input-file`."""
    what = "test.jsonl with train.jsonl next to it, or a folder that `datasets` saved; see eval/EVALUATION.md"
    add_file_argument(parser, what)


def read_problems(path: Path, split: str) -> list[WordProblem]:
    """Read the problems of a split; see `read_split` for `path`.

    Raises:
        DataError: the split is missing, or a sample is not in the format of GSM8K.
    """
    problems = []
    for number, sample in enumerate(read_split(path, split, {"question": str, "answer": str})):
        try:
            gold = gold_answer(sample["answer"])
        except ValueError as error:
            raise DataError(f"{path}, sample {number} of {split}: {error}") from error
        reasoning, _, written = sample["answer"].rpartition("####")
        reasoning = _CALCULATOR.sub("", reasoning).strip()
        problems.append(WordProblem(sample["question"], reasoning, written.strip(), gold))
    return problems


def worked_examples(path: Path, seed: int, count: int) -> tuple[list[int], tuple[str, ...]]:
    """Draw problems of the train split with their solutions: their indices, from 0, and their texts.

    Raises:
        DataError: as `read_problems`, or if there are fewer than `count`.
    """
    train = read_problems(path, "train")
    if len(train) < count:
        raise DataError(f"The train split next to {path} has {len(train)} samples: {count} are needed.")
    indices = random.Random(seed).sample(range(len(train)), count)
    return indices, tuple(train[index].worked() for index in indices)
