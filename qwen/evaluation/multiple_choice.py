"""Few-shot multiple choice for base models: which letter is the most probable behind the question?

Revolves around one prompt, worked examples of the subject and the question, which end where the letter has to come. The
wording is for the benchmarks in eval/; which subjects there are stands in subjects.py.
"""

import argparse
from collections.abc import Sequence
from typing import Any, ClassVar

from .data_files import DataError
from .language_model import LanguageModel
from .subjects import LETTERS, SubjectSet, add_subjects_argument, averages, options, read_subjects
from .task import Case, Score, Task

SHOTS = 5


class FewShotChoice(Task):
    """A benchmark of many subjects, asked with the first five questions of each one's dev split as worked examples."""

    subject_set: ClassVar[SubjectSet]
    question_mark: ClassVar[str]
    """Stands in front of a question: "Question: "."""
    answer_mark: ClassVar[str]
    """Stands behind the options: "Answer:"."""
    choices: ClassVar[tuple[str, str, str, str]]
    """The letters as they follow it, with a space or without."""
    split: str = "test"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        add_subjects_argument(parser, cls.subject_set)

    def preamble(self, subject: str) -> str:
        """What stands in front of the worked examples."""
        return ""

    def cases(self) -> list[Case]:
        folder, wanted = self.arguments.eval_data_path, self.arguments.subjects
        worked = read_subjects(folder, "dev", self.subject_set, wanted)
        asked = read_subjects(folder, self.split, self.subject_set, wanted)
        cases = []
        for subject, questions in asked.items():
            if len(worked[subject]) < SHOTS:
                path = folder / self.subject_set.files.format(split="dev", subject=subject)
                raise DataError(f"{path} holds {len(worked[subject])} questions: {SHOTS} worked examples are needed.")
            shots = tuple(
                f"{self.prompt(question)}{self.choices[LETTERS.index(question['answer'])]}\n\n"
                for question in worked[subject][:SHOTS]
            )
            cases += [
                Case(
                    name=f"{subject}/{question.get('id', number)}",
                    prompt=self.prompt(question),
                    gold=question.get("answer"),
                    group=subject,
                    preamble=self.preamble(subject),
                    shots=shots,
                )
                for number, question in enumerate(questions)
            ]
        return cases

    def prompt(self, question: dict[str, str]) -> str:
        """A question with its options, up to where the letter comes."""
        return f"{self.question_mark}{question['question']}\n{options(question)}\n{self.answer_mark}"

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[dict[str, Any]]:
        answers = []
        for scores in lm.choose(cases, self.choices):
            logprobs = dict(zip(LETTERS, scores, strict=True))
            letter = max(logprobs, key=logprobs.__getitem__)
            answers.append({"letter": letter, "logprobs": logprobs})
        return answers

    def score(self, case: Case, answer: dict[str, Any]) -> dict[str, Any]:
        return {"correct": answer["letter"] == case.gold}

    def summary(self, records: Sequence[dict[str, Any]]) -> list[Score]:
        return averages(records, self.subject_set)
