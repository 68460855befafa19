"""GSM8K, 0-shot, for chat models: word problems, one per user turn.

    qwen eval chat_gsm8k -c Qwen/Qwen-7B-Chat -f data/gsm8k/test.jsonl --batch-size 8
    qwen eval chat_gsm8k -c Qwen/Qwen-7B-Chat -f data/gsm8k_saved_by_datasets --use-fewshot

The last number of the greedy reply is compared with the right one, within 1e-4.
"""

import argparse
from collections.abc import Sequence
from fractions import Fraction

from ..language_model import LanguageModel
from ..numbers import is_close, last_number
from ..task import Case, JSONObject, Task
from ..word_problems import add_problems_argument, read_problems, sample_shots

SHOTS = 8
MAX_NEW_TOKENS = 512


class EvaluateChatGSM8K(Task):
    name = "chat_gsm8k"
    chat = True

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        add_problems_argument(parser)
        parser.add_argument(
            "--use-fewshot",
            action="store_true",
            help=f"prepend {SHOTS} solved problems of the train split, drawn by the seed",
        )

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.shot_indices: list[int] = []  # in the train split, from 0

    def cases(self) -> list[Case]:
        path, few_shot = self.arguments.sample_input_file, self.arguments.use_fewshot
        problems = read_problems(path, "test")
        shots: tuple[str, ...] = ()
        if few_shot:
            self.shot_indices, shots = sample_shots(path, self.arguments.seed, SHOTS)
        return [
            Case(
                name=f"test/{number}",
                prompt=problem.prompt() if few_shot else problem.question,
                gold=str(problem.gold),
                shots=shots,
            )
            for number, problem in enumerate(problems)
        ]

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        shots = {"shots": self.shot_indices} if self.arguments.use_fewshot else {}
        return [{"reply": reply, **shots} for reply in lm.chat(cases, max_new_tokens=MAX_NEW_TOKENS)]

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        found = last_number(answer["reply"])
        return {"number": None if found is None else str(found), "correct": is_close(found, Fraction(case.gold))}
