"""MATH, 4-shot: competition problems, for base models.

    qwen eval math -c Qwen/Qwen-7B -d data/MATH

The prompt is that of Minerva (Lewkowycz et al. 2022, arXiv:2206.14858), as lm-evaluation-harness writes it. Its four
worked examples are taken from the train split; if they are not all there, the seed draws four others. Every record
names them. An answer is right if it is the same after the usual normalization, or the same number.
"""

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path

from ..data_files import DataError, check_fields, read_json, require_files
from ..language_model import LanguageModel
from ..math_answers import final_answer, is_equivalent, last_boxed
from ..task import Case, JSONObject, Score, Task, group_records, mean

SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
SHOTS = 4
# The beginnings of Minerva's worked examples, without spaces.
MINERVA_EXAMPLES = (
    r"Findthedomainoftheexpression$\frac{\sqrt{x-2}}{\sqrt{5-x}}$",
    r"If$\det\mathbf{A}=2$and$\det\mathbf{B}=12,$",
    "Terrellusuallyliftstwo20-poundweights12times.",
    r"Ifthesystemofequations\begin{align*}6x-4y&=a,",
)
MAX_NEW_TOKENS = 1024
STOP = ("Problem:", "I hope it is correct.")


class EvaluateMATH(Task):
    name = "math"

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.shot_names: list[str] = []

    def cases(self) -> list[Case]:
        shots = select_shots(read_problems(self.arguments.eval_data_path, "train"), self.arguments.seed)
        self.shot_names = [problem["name"] for problem in shots]
        return [
            Case(
                name=problem["name"],
                prompt=f"Problem:\n{problem['problem']}\n\nSolution:",
                gold=problem["answer"],
                group=problem["subject"],
                shots=tuple(map(with_solution, shots)),
                data={"level": problem["level"]},
            )
            for problem in read_problems(self.arguments.eval_data_path, "test")
        ]

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        completions = lm.generate(cases, stop=STOP, max_new_tokens=MAX_NEW_TOKENS)
        return [{"completion": completion, "shots": self.shot_names} for completion in completions]

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        found = final_answer(answer["completion"])
        return {"extracted": found, "correct": is_equivalent(found, case.gold), "level": case.data["level"]}

    def summary(self, records: Sequence[JSONObject]) -> list[Score]:
        levels = group_records([record | {"group": record["level"]} for record in records])
        lines = [Score(name, mean(levels[name]), len(levels[name])) for name in sorted(levels)]
        return [*super().summary(records), *lines]


def read_problems(folder: Path, split: str) -> list[dict[str, str]]:
    """Read the problems of a split in the order of their numbers, with name, subject and answer.

    Raises:
        DataError: files are missing or invalid.
    """
    problems = []
    for subject in SUBJECTS:
        names = sorted(
            (f"{split}/{subject}/{path.name}" for path in (folder / split / subject).glob("*.json")),
            key=lambda name: (len(name), name),  # 9.json before 10.json
        )
        for path in require_files(folder, names or [f"{split}/{subject}/0.json"]):
            fields = {"problem": str, "level": str, "solution": str}
            problem = check_fields(read_json(path), fields, str(path))
            answer = last_boxed(problem["solution"])
            if answer is None:
                raise DataError(rf"{path}: the solution has no answer in a \boxed{{…}}.")
            name = str(path.relative_to(folder).with_suffix(""))
            problems.append({**problem, "name": name, "subject": subject, "answer": answer})
    return problems


def select_shots(problems: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Return Minerva's four examples if all of them are among the problems, else four that the seed draws.

    Raises:
        DataError: there are fewer than four problems.
    """
    stripped = [re.sub(r"\s", "", problem["problem"]) for problem in problems]
    found = [
        next((problem for problem, text in zip(problems, stripped, strict=True) if text.startswith(start)), None)
        for start in MINERVA_EXAMPLES
    ]
    standard = [problem for problem in found if problem is not None]
    if len(standard) == len(MINERVA_EXAMPLES):
        return standard
    if len(problems) < SHOTS:
        raise DataError(f"The train split has {len(problems)} problems: {SHOTS} are needed as worked examples.")
    return random.Random(seed).sample(problems, SHOTS)


def with_solution(problem: dict[str, str]) -> str:
    """Return a problem with its solution and the sentence that states the answer."""
    return (
        f"Problem:\n{problem['problem']}\n\nSolution: {problem['solution']}\n"
        f"Final Answer: The final answer is ${problem['answer']}$. I hope it is correct.\n\n"
    )
