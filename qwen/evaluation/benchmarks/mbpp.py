"""MBPP, 3-shot: short functions written from a sentence and three assertions, for base models.

    qwen eval mbpp -c Qwen/Qwen-7B -f mbpp.jsonl

The prompt of the paper (Austin et al. 2021, arXiv:2108.07732), as lm-evaluation-harness writes it: the problems 2, 3
and 4 are the worked examples, 11 to 510 the test set. Greedy, pass@1; the programs run in the sandbox.
"""

from collections.abc import Sequence

from ..code import Program, ProgramTask
from ..data_files import DataError, read_jsonl
from ..language_model import LanguageModel
from ..task import Case, JSONObject

SHOT_IDS = (2, 3, 4)
TEST_IDS = range(11, 511)
MAX_NEW_TOKENS = 512
STOP = ("[DONE]",)


class EvaluateMBPP(ProgramTask):
    name = "mbpp"

    def cases(self) -> list[Case]:
        path = self.arguments.sample_input_file
        fields = {"task_id": int, "text": str, "code": str, "test_list": list}
        problems = {problem["task_id"]: problem for problem in read_jsonl(path, fields)}
        for number, problem in problems.items():
            if not all(isinstance(text, str) for text in (problem.get("test_setup_code", ""), *problem["test_list"])):
                raise DataError(f'{path}, problem {number}: "test_list" and "test_setup_code" must hold text.')
        if missing := [number for number in SHOT_IDS if number not in problems]:
            raise DataError(f"{path} has no problem {missing[0]}, which is one of the worked examples.")
        shots = tuple(f"{make_prompt(problems[number])}{problems[number]['code']}\n[DONE]\n\n" for number in SHOT_IDS)
        if not any(number in TEST_IDS for number in problems):
            raise DataError(f"{path} has none of the problems {TEST_IDS[0]} to {TEST_IDS[-1]}, which are the test set.")
        return [
            Case(
                name=f"MBPP/{number}",
                prompt=make_prompt(problem),
                gold=problem["code"],
                shots=shots,
                data={"tests": "\n".join([problem.get("test_setup_code", ""), *problem["test_list"]])},
            )
            for number, problem in problems.items()
            if number in TEST_IDS
        ]

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        completions = lm.generate(cases, stop=STOP, max_new_tokens=MAX_NEW_TOKENS)
        return [{"completion": completion} for completion in completions]

    def program(self, case: Case, answer: JSONObject) -> Program:
        return Program(answer["completion"], case.data["tests"])


def make_prompt(problem: JSONObject) -> str:
    tests = "\n".join(problem["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {problem['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
