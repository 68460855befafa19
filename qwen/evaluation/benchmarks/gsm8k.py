"""GSM8K, 8-shot: word problems solved step by step, for base models.

    qwen eval gsm8k -c Qwen/Qwen-7B -f data/gsm8k/test.jsonl --batch-size 8
    qwen eval gsm8k -c Qwen/Qwen-7B -f data/gsm8k_saved_by_datasets

The seed draws the worked examples from the train split (train.jsonl next to the file). Every record has their indices.
The last number that the model writes is compared with the right one.
"""

import argparse
from collections.abc import Sequence
from fractions import Fraction

from ..language_model import LanguageModel
from ..numbers import last_number
from ..task import Case, JSONObject, Task
from ..word_problems import add_problems_argument, read_problems, sample_shots

SHOTS = 8
MAX_NEW_TOKENS = 512
STOP = ("\n\n", "Question:")


class EvaluateGSM8K(Task):
    name = "gsm8k"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        add_problems_argument(parser)

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.shot_indices: list[int] = []  # in the train split, from 0

    def cases(self) -> list[Case]:
        path = self.arguments.sample_input_file
        problems = read_problems(path, "test")
        self.shot_indices, shots = sample_shots(path, self.arguments.seed, SHOTS)
        return [
            Case(name=f"test/{number}", prompt=problem.prompt(), gold=str(problem.gold), shots=shots)
            for number, problem in enumerate(problems)
        ]

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        completions = lm.generate(cases, stop=STOP, max_new_tokens=MAX_NEW_TOKENS)
        return [{"completion": completion, "shots": self.shot_indices} for completion in completions]

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        found = last_number(answer["completion"])
        return {"number": None if found is None else str(found), "correct": found == Fraction(case.gold)}
