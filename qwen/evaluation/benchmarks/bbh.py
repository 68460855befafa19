"""BIG-Bench Hard, 3-shot with chains of thought, for base models.

    qwen eval bbh -c Qwen/Qwen-7B -d data/BIG-Bench-Hard

The data are the repository of the authors (Suzgun et al. 2022, arXiv:2210.09261), with bbh/TASK.json and the worked
examples in cot-prompts/TASK.txt. An answer is right if the text after "the answer is" equals the target.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ..data_files import DataError, check_fields, read_json, require_files
from ..language_model import LanguageModel
from ..task import Case, JSONObject, Score, Task, group_records, mean

TASKS = (
    *("boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages"),
    *("formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects"),
    *("logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation"),
    *("multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table"),
    *("reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks"),
    *("sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects"),
    *("tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies"),
    "word_sorting",
)
QUESTION = "Q: "
MAX_NEW_TOKENS = 1024
STOP = ("\n\n", "\nQ:")


class EvaluateBBH(Task):
    name = "bbh"

    def cases(self) -> list[Case]:
        folder = self.arguments.eval_data_path
        questions = require_files(folder, [f"bbh/{task}.json" for task in TASKS])
        prompts = require_files(folder, [f"cot-prompts/{task}.txt" for task in TASKS])
        cases = []
        for task, questions_file, prompt_file in zip(TASKS, questions, prompts, strict=True):
            preamble, shots = read_prompt(prompt_file)
            for number, example in enumerate(read_examples(questions_file)):
                cases.append(
                    Case(
                        name=f"{task}/{number}",
                        prompt=f"{QUESTION}{example['input']}\nA: Let's think step by step.\n",
                        gold=example["target"],
                        group=task,
                        preamble=preamble,
                        shots=shots,
                    )
                )
        return cases

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        completions = lm.generate(cases, stop=STOP, max_new_tokens=MAX_NEW_TOKENS)
        return [{"completion": completion} for completion in completions]

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        found = extract_answer(answer["completion"])
        return {"extracted": found, "correct": found == case.gold}

    def summary(self, records: Sequence[JSONObject]) -> list[Score]:
        tasks = [Score(task, mean(members), len(members)) for task, members in group_records(records).items()]
        average = sum(score.value for score in tasks) / len(tasks)
        return [Score("average of the tasks", average, len(records)), *tasks]


def read_prompt(path: Path) -> tuple[str, tuple[str, ...]]:
    """Read a file of worked examples: the text before them, and the examples.

    Raises:
        DataError: the file is not UTF-8 or not in the published format.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Download it again.") from error
    _, line, text = text.partition("\n-----\n")  # the canary above it keeps the file out of training data
    preamble, *shots = text.strip().split(f"\n\n{QUESTION}")
    if not line or not shots:
        raise DataError(f'{path}: no line of five dashes, or no examples after it that begin with "{QUESTION}".')
    return f"{preamble}\n\n", tuple(f"{QUESTION}{shot}\n\n" for shot in shots)


def read_examples(path: Path) -> list[dict[str, str]]:
    """Read the questions of a task: dicts with "input" and "target"."""
    examples = check_fields(read_json(path), ("examples",), str(path))["examples"]
    if not isinstance(examples, list) or not examples:
        raise DataError(f'{path}: "examples" must be a non-empty list of questions.')
    for number, example in enumerate(examples):
        check_fields(example, {"input": str, "target": str}, f"{path}, example {number}")
    return examples


def extract_answer(completion: str) -> str | None:
    """Return the rest of the line after the first "the answer is", without the period."""
    match = re.search(r"the answer is (.*)", completion)
    return match[1].strip().removesuffix(".") if match else None
