"""C-Eval, 5-shot: multiple-choice questions of 52 subjects in Chinese, for base models.

    qwen eval ceval -c Qwen/Qwen-7B -d data/ceval
    qwen eval ceval -c Qwen/Qwen-7B -d data/ceval --split test

The answer is the most probable of the tokens "A" "B" "C" "D"; averages are over subjects; "hard" has 8 of them.
The answers of the test split are not published: `--split test` writes a file to submit to C-Eval.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..multiple_choice import FewShotChoice
from ..subjects import CEVAL, LETTERS
from ..task import Case, JSONObject, Score, group_records


class EvaluateCEval(FewShotChoice):
    name = "ceval"
    subject_set = CEVAL
    question_prefix = "问题："
    answer_prefix = "答案："
    choices = LETTERS

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.split = arguments.split

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--split", choices=("val", "test"), default="val", help="test writes a file to submit (default: val)"
        )

    @property
    def to_submit(self) -> bool:
        return self.split in CEVAL.unanswered

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        return {} if self.to_submit else super().score(case, answer)

    def summary(self, records: Sequence[JSONObject]) -> list[Score]:
        if self.to_submit:
            return [Score("C-Eval test, not scored here", float("nan"), len(records))]
        return super().summary(records)

    def finish(self, records: Sequence[JSONObject], output: Path) -> list[str]:
        """Write the file to submit, in C-Eval's format: {subject: {id: letter}}."""
        if not self.to_submit:
            return []
        letters = {
            subject: {record["name"].partition("/")[2]: record["letter"] for record in members}
            for subject, members in group_records(records).items()
        }
        path = output.with_name(f"{output.stem}_submission.json")
        path.write_text(json.dumps(letters, indent=4) + "\n", encoding="utf-8")
        return [f"File to submit at https://cevalbenchmark.com: {path}"]
