"""The code interpreter benchmark of Qwen-Agent: questions that a chat model answers by running Python.

    qwen eval code_interpreter -c Qwen/Qwen-7B-Chat -f data/eval_code_interpreter_v1.jsonl \\
        --gsm8k data/gsm8k/test.jsonl

Files that the questions refer to are in upload_file_clean next to the questions. Metrics: for mathematics (the test
split of GSM8K), whether the last number of the answer is right; for general questions, as published, and for all
questions, whether all code that the model wrote ran without an error. In the published scores a vision model judged the
plots. Here a visualization counts if its code ran and made a picture: these scores are an upper bound, and not
comparable with the published ones.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from ...sandbox import Limits, Sandbox
from ...sandbox.arguments import add_sandbox_arguments
from ...tools.code_interpreter import OUTPUT_BYTES, Answer, Call, Output, run_conversation
from ..code import check_sandbox
from ..data_files import DataError, read_jsonl, require_files
from ..language_model import LanguageModel
from ..numbers import is_close, last_number
from ..task import Case, JSONObject, Score, Task, add_file_argument, group_records, mean
from ..word_problems import read_problems

CATEGORIES = ("math", "visualization-hard", "visualization-easy", "general")
UPLOAD_FOLDER = "upload_file_clean"
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".svg", ".pdf", ".gif", ".html"}


class EvaluateCodeInterpreter(Task):
    name = "code_interpreter"
    chat = True

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        add_file_argument(
            parser, f"questions as JSON lines; files that they refer to are in {UPLOAD_FOLDER} next to it"
        )
        parser.add_argument(
            "--gsm8k",
            type=Path,
            metavar="FILE",
            help="test.jsonl of GSM8K for the mathematics, which is skipped without it",
        )
        add_sandbox_arguments(parser, seconds=60.0)

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        check_sandbox(arguments.allow_weaker_sandbox)

    def cases(self) -> list[Case]:
        path = self.arguments.sample_input_file
        cases = [
            self.make_case(sample, number)
            for number, sample in enumerate(read_jsonl(path, {"query": str, "tags": list}))
        ]
        if self.arguments.gsm8k:
            for number, problem in enumerate(read_problems(self.arguments.gsm8k, "test")):
                cases.append(Case(f"gsm8k/{number}", problem.question, gold=str(problem.gold), group="math"))
        return cases

    def make_case(self, sample: JSONObject, number: int) -> Case:
        """Return the case of a sample; `number` is its index in the file, from 0.

        Raises:
            DataError: no known category, no number to expect in mathematics, or files are missing or not named.
        """
        where = f"{self.arguments.sample_input_file}, question {number}"
        category = next((name for name in CATEGORIES if name in sample["tags"]), None)
        if category is None:
            raise DataError(f"{where}: none of its tags {sample['tags']} is one of {', '.join(CATEGORIES)}.")
        gold = last_number(str(sample.get("expected"))) if category == "math" else None
        if category == "math" and gold is None:
            raise DataError(f'{where}: no number in "expected", which the answer is compared with.')
        named = sample.get("input_file_path") or []
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise DataError(f'{where}: "input_file_path" must be a list of names, not {named!r}.')
        names = [Path(name).name for name in named]
        require_files(self.upload_folder, names)
        return Case(
            name=f"{category}/{number}",
            prompt=(f"Files: {', '.join(names)}\n" if names else "") + sample["query"],
            gold=None if gold is None else str(gold),
            group=category,
            data={"files": names},
        )

    @property
    def upload_folder(self) -> Path:
        return self.arguments.sample_input_file.parent / UPLOAD_FOLDER

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        return [self.solve(lm, case) for case in cases]

    def solve(self, lm: LanguageModel, case: Case) -> JSONObject:
        """Return the model's answer to a question, the code it ran, and the pictures made by it."""
        limits = Limits(wall_seconds=self.arguments.seconds, output_bytes=OUTPUT_BYTES)
        runs: list[dict[str, str]] = []
        reply = None
        with Sandbox(limits=limits, allow_weaker=self.arguments.allow_weaker_sandbox) as sandbox:
            for file in case.data.get("files", ()):
                shutil.copy(self.upload_folder / file, sandbox.folder)
            before = find_pictures(sandbox.folder)
            messages = [{"role": "user", "content": case.text()}]
            try:
                for event in run_conversation(lm.model, lm.tokenizer, sandbox, messages):
                    match event:
                        case Call(code=code):
                            runs.append({"code": code})
                        case Output(text, status):
                            runs[-1] |= {"output": text, "status": status}
                        case Answer(content):
                            reply = content
            except ValueError as error:  # prompt beyond the context length: no answer
                print(f"{case.name}: {error}", file=sys.stderr)
            made = sorted(find_pictures(sandbox.folder) - before)
        return {"reply": reply, "runs": runs, "pictures": made}

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        statuses = [run["status"] for run in answer["runs"]]
        executable = bool(statuses) and set(statuses) == {"ok"}
        if case.group == "math":
            correct = is_close(last_number(answer["reply"] or ""), Fraction(case.gold))
        elif case.group == "general":
            correct = executable
        else:
            correct = executable and bool(answer["pictures"])
        return {"executable": executable, "correct": correct}

    def summary(self, records: Sequence[JSONObject]) -> list[Score]:
        labels = {"math": "right", "general": "executable"}
        groups = group_records(records)
        lines = [
            Score(f"{name}: {labels.get(name, 'a picture was made')}", mean(groups[name]), len(groups[name]))
            for name in CATEGORIES
            if name in groups
        ]
        return [*lines, Score("all: executable", mean(records, "executable"), len(records))]


def find_pictures(folder: Path) -> set[str]:
    """Return the pictures in a folder as relative paths."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES}
