"""HumanEval, 0-shot: functions completed from their signature and docstring, for base models.

    qwen eval humaneval -c Qwen/Qwen-7B -f HumanEval.jsonl.gz -o HumanEval_res.jsonl

Greedy, pass@1. The programs run in the sandbox. The file of -o can also be passed to OpenAI's human-eval, which reads
`task_id` and `completion` of each line.
"""

from collections.abc import Sequence

from ..code import HUMANEVAL_FIELDS, STOP, Program, ProgramTask, truncate_completion
from ..data_files import read_jsonl
from ..language_model import LanguageModel
from ..task import Case, JSONObject

MAX_NEW_TOKENS = 512


class EvaluateHumanEval(ProgramTask):
    name = "humaneval"

    def cases(self) -> list[Case]:
        problems = read_jsonl(self.arguments.sample_input_file, HUMANEVAL_FIELDS)
        return [
            Case(
                name=problem["task_id"],
                prompt=problem["prompt"],
                gold=problem.get("canonical_solution"),
                data={"tests": f"{problem['test']}\ncheck({problem['entry_point']})"},
            )
            for problem in problems
        ]

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        completions = lm.generate(cases, stop=STOP, max_new_tokens=MAX_NEW_TOKENS)
        return [
            {"task_id": case.name, "completion": truncate_completion(completion)}
            for case, completion in zip(cases, completions, strict=True)
        ]

    def program(self, case: Case, answer: JSONObject) -> Program:
        return Program(case.prompt + answer["completion"], case.data["tests"])
