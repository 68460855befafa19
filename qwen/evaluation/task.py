"""Interface of a benchmark: its cases, how they are asked and scored, and what is averaged.

`harness.py` runs a `Task`.
"""

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .case import Case, JSONObject

if TYPE_CHECKING:
    from .language_model import LanguageModel


@dataclass(frozen=True)
class Score:
    """A line of the summary. `value` is a fraction, NaN without cases; `percent` selects how it is printed."""

    name: str
    value: float
    count: int
    percent: bool = True

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        return f"{100 * self.value:.1f}%" if self.percent else f"{self.value:.3f}"


class Task(ABC):
    """A benchmark. Its cases must depend on the arguments alone, so that a run can be resumed."""

    name: ClassVar[str]
    """Name in the result files, e.g. "mmlu"."""
    chat: ClassVar[bool] = False
    """Whether it needs a chat model. The default is the bundled chat model, or else the bundled base model."""
    batch_size: ClassVar[int] = 1
    """Default of --batch-size."""
    max_seq_len: ClassVar[int | None] = 2048
    """Default of --max-seq-len, in tokens; None is the context length of the model."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the argument for the data. Override it if the data are not a folder, or to add options."""
        what = "folder of the data; eval/EVALUATION.md says where to get them and describes their layout"
        add_folder_argument(parser, what)

    @abstractmethod
    def cases(self) -> list[Case]:
        """Return all questions in order. Raises DataError for missing or invalid files."""

    @abstractmethod
    def answer(self, lm: "LanguageModel", cases: Sequence[Case]) -> list[JSONObject]:
        """Return the answer of the model to each case of a batch, JSON-serializable."""

    @abstractmethod
    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        """Score an answer: {"correct": True}, or numbers under other names that `summary` uses."""

    def scores(self, cases: Sequence[Case], answers: Sequence[JSONObject]) -> list[JSONObject]:
        """Score a batch. Override it if scoring is slow and can run in parallel."""
        return [self.score(case, answer) for case, answer in zip(cases, answers, strict=True)]

    def summary(self, records: Sequence[JSONObject]) -> list[Score]:
        """Average the records. A record is a dict with the name, group, answer, gold and score of a case."""
        groups = group_records(records)
        lines = [Score(group, mean(members), len(members)) for group, members in groups.items()]
        return [Score(self.name, mean(records), len(records)), *(lines if len(groups) > 1 else [])]

    def table(self, model: str, scores: Sequence[Score]) -> str:
        """Return the summary as a Markdown table; `model` is the name of the model."""
        lines = [f"| {self.name} | {model} | questions |", "|---|---:|---:|"]
        return "\n".join([*lines, *(f"| {score.name} | {score} | {score.count} |" for score in scores)])

    def finish(self, records: Sequence[JSONObject], output: Path) -> list[str]:
        """Write additional result files next to `output`; returns a sentence about each."""
        return []


def add_folder_argument(parser: argparse.ArgumentParser, what: str, default: Path | None = None) -> None:
    """Add `-d/--eval-data-path`, required without a default; `what` is its help."""
    parser.add_argument(
        "-d",
        "--eval-data-path",
        "--eval_data_path",
        required=default is None,
        default=default,
        type=Path,
        metavar="FOLDER",
        help=what,
    )


def add_file_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `-f/--sample-input-file`, for benchmarks whose data are a file; `what` is its help."""
    parser.add_argument(
        "-f", "--sample-input-file", "--sample_input_file", required=True, type=Path, metavar="FILE", help=what
    )


def mean(records: Sequence[JSONObject], key: str = "correct") -> float:
    """Return the mean of a number or truth value of the records; NaN without records."""
    return sum(float(record[key]) for record in records) / len(records) if records else math.nan


def group_records(records: Sequence[JSONObject]) -> dict[str, list[JSONObject]]:
    """Return the records of each group, with the groups in order of first appearance."""
    groups: dict[str, list[JSONObject]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    return groups
