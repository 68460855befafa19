"""GSM8K's word problems: how its files are read, and a problem with its worked solution as text.

How models are asked, and which reply is right, is for the scripts in eval/.
"""

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

_CALCULATOR = re.compile(r"<<.*?>>")  # "48/2 = <<48/2=24>>24": for a calculator, not for a reader


class WordProblem(NamedTuple):
    """A question, the steps that solve it, and the number that they come to, also as it was written."""

    question: str
    reasoning: str
    written: str
    gold: Fraction

    def asked(self) -> str:
        """The problem, up to where its solution begins."""
        return f"Question: {self.question}\nLet's think step by step\n"

    def worked(self) -> str:
        """The problem with its solution."""
        return f"{self.asked()}{self.reasoning}\nThe answer is {self.written}\n\n"


def add_problems_argument(parser: argparse.ArgumentParser) -> None:
    """`-f/--sample-input-file`."""
    where = "test.jsonl with train.jsonl beside it, or a folder that `datasets` saved; see eval/EVALUATION.md"
    add_file_argument(parser, where)


def read_problems(path: Path, split: str) -> list[WordProblem]:
    """The problems of a split; where they lie, see `read_split`.

    Raises:
        DataError: there is no such split, or a sample is not as GSM8K's are.
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
    """Problems of the train split with their solutions: which, counted from 0, and as texts.

    Raises:
        DataError: as `read_problems`, or there are fewer.
    """
    train = read_problems(path, "train")
    if len(train) < count:
        raise DataError(f"The train split beside {path} has {len(train)} samples: {count} are needed.")
    indices = random.Random(seed).sample(range(len(train)), count)
    return indices, tuple(train[index].worked() for index in indices)
