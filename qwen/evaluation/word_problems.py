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

_CALCULATOR_ANNOTATION = re.compile(r"<<[^<\n]*?>>")  # annotations for a calculator: "48/2 = <<48/2=24>>24"


class WordProblem(NamedTuple):
    """A question, the steps of its solution, and the resulting number: as written, and as a fraction."""

    question: str
    reasoning: str
    answer_text: str
    gold: Fraction

    def prompt(self) -> str:
        """Return the problem, up to where its solution begins."""
        return f"Question: {self.question}\nLet's think step by step\n"

    def with_solution(self) -> str:
        """Return the problem with its solution."""
        return f"{self.prompt()}{self.reasoning}\nThe answer is {self.answer_text}\n\n"


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
        reasoning, _, answer_text = sample["answer"].rpartition("####")
        reasoning = _CALCULATOR_ANNOTATION.sub("", reasoning).strip()
        problems.append(WordProblem(sample["question"], reasoning, answer_text.strip(), gold))
    return problems


def sample_shots(path: Path, seed: int, count: int) -> tuple[list[int], tuple[str, ...]]:
    """Draw problems of the train split with their solutions: their indices, from 0, and their texts.

    Raises:
        DataError: as `read_problems`, or if there are fewer than `count`.
    """
    train = read_problems(path, "train")
    if len(train) < count:
        raise DataError(f"The train split next to {path} has {len(train)} samples: {count} are needed.")
    indices = random.Random(seed).sample(range(len(train)), count)
    return indices, tuple(train[index].with_solution() for index in indices)
