"""The base class of benchmarks: its cases, how they are asked, which answers are right, what is averaged.

`harness.py` runs a `Task`; models, files of results and progress are there.
"""

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .case import Case

if TYPE_CHECKING:
    from .language_model import LanguageModel


@dataclass(frozen=True)
class Score:
    """A line of the summary. `value` is a share of 1, NaN where there were no cases; `percent` is how it is printed."""

    name: str
    value: float
    count: int
    percent: bool = True

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        return f"{100 * self.value:.1f}%" if self.percent else f"{self.value:.3f}"


class Task(ABC):
    """A benchmark. What its cases say must follow from the arguments alone, so that a run can be gone on with."""

    name: ClassVar[str]
    """Names the files of results: "mmlu"."""
    chat: ClassVar[bool] = False
    """Asks a chat model; else the bundled base model is the default."""
    batch_size: ClassVar[int] = 1
    """Default of --batch-size."""
    max_seq_len: ClassVar[int | None] = 2048
    """Default of --max-seq-len, in tokens; None is what the model is offered for."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Where the data lie. To be overridden where that is no folder, or where there is more to choose."""
        where = "where the data lie; eval/EVALUATION.md tells where they come from and how they lie there"
        add_folder_argument(parser, where)

    @abstractmethod
    def cases(self) -> list[Case]:
        """All questions, in their order. Raises DataError for files that are missing or not as they should be."""

    @abstractmethod
    def answer(self, lm: "LanguageModel", cases: Sequence[Case]) -> list[dict[str, Any]]:
        """What the model says to each of a batch of cases, as JSON can hold it."""

    @abstractmethod
    def score(self, case: Case, answer: dict[str, Any]) -> dict[str, Any]:
        """How good that is: {"correct": True}, or numbers of other names that `summary` knows."""

    def scores(self, cases: Sequence[Case], answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """`score` for each of a batch. To be overridden where scoring is slow and can be done side by side."""
        return [self.score(case, answer) for case, answer in zip(cases, answers, strict=True)]

    def summary(self, records: Sequence[dict[str, Any]]) -> list[Score]:
        """What the records come to. A record holds name, group, answer, gold and score of a case in one dict."""
        groups = by_group(records)
        lines = [Score(group, mean(members), len(members)) for group, members in groups.items()]
        return [Score(self.name, mean(records), len(records)), *(lines if len(groups) > 1 else [])]

    def table(self, model: str, scores: Sequence[Score]) -> str:
        """The summary in Markdown; `model` is its name."""
        lines = [f"| {self.name} | {model} | questions |", "|---|---:|---:|"]
        return "\n".join([*lines, *(f"| {score.name} | {score} | {score.count} |" for score in scores)])

    def finish(self, records: Sequence[dict[str, Any]], output: Path) -> list[str]:
        """Write what else belongs to the results beside `output`, and say so, a sentence each."""
        return []


def add_folder_argument(parser: argparse.ArgumentParser, what: str, default: Path | None = None) -> None:
    """`-d/--eval-data-path`, required where there is no default; `what` lies there is the help."""
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
    """`-f/--sample-input-file`, for benchmarks whose data are a file; `what` it holds is the help."""
    parser.add_argument(
        "-f", "--sample-input-file", "--sample_input_file", required=True, type=Path, metavar="FILE", help=what
    )


def mean(records: Sequence[dict[str, Any]], key: str = "correct") -> float:
    """Of a number or a truth value of the records; NaN where there are none."""
    return sum(float(record[key]) for record in records) / len(records) if records else math.nan


def by_group(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each group, in the order in which the groups first come."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    return groups
