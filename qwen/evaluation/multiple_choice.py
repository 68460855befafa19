"""Base class of few-shot multiple-choice benchmarks for base models.

A prompt has worked examples of the subject and the question, and ends where the letter goes. The answer is the most
probable letter. The benchmarks define the wording; subjects.py has the subjects.
"""

import argparse
from collections.abc import Sequence
from typing import ClassVar

from .data_files import DataError
from .language_model import LanguageModel
from .subjects import LETTERS, SubjectSet, add_subjects_argument, average_scores, format_options, read_subjects
from .task import Case, JSONObject, Score, Task

SHOTS = 5


class FewShotChoice(Task):
    """A benchmark with many subjects, whose worked examples are the first five questions of a subject's dev split."""

    subject_set: ClassVar[SubjectSet]
    question_prefix: ClassVar[str]
    """Text before a question, e.g. "Question: "."""
    answer_prefix: ClassVar[str]
    """Text after the options, e.g. "Answer:"."""
    choices: ClassVar[tuple[str, str, str, str]]
    """The letters as they follow `answer_prefix`, with or without a space."""
    split: str = "test"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        add_subjects_argument(parser, cls.subject_set)

    def preamble(self, subject: str) -> str:
        """Return the text before the worked examples."""
        return ""

    def cases(self) -> list[Case]:
        folder, subjects = self.arguments.eval_data_path, self.arguments.subjects
        dev_questions = read_subjects(folder, "dev", self.subject_set, subjects)
        questions_by_subject = read_subjects(folder, self.split, self.subject_set, subjects)
        cases = []
        for subject, questions in questions_by_subject.items():
            if len(dev_questions[subject]) < SHOTS:
                path = folder / self.subject_set.files.format(split="dev", subject=subject)
                raise DataError(
                    f"{path} has {len(dev_questions[subject])} questions: {SHOTS} worked examples are needed."
                )
            shots = tuple(
                f"{self.prompt(question)}{self.choices[LETTERS.index(question['answer'])]}\n\n"
                for question in dev_questions[subject][:SHOTS]
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
        """Return a question with its options, up to where the letter goes."""
        return f"{self.question_prefix}{question['question']}\n{format_options(question)}\n{self.answer_prefix}"

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        answers = []
        for scores in lm.choice_logprobs(cases, self.choices):
            logprobs = dict(zip(LETTERS, scores, strict=True))
            letter = max(logprobs, key=logprobs.__getitem__)
            answers.append({"letter": letter, "logprobs": logprobs})
        return answers

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        return {"correct": answer["letter"] == case.gold}

    def summary(self, records: Sequence[JSONObject]) -> list[Score]:
        return average_scores(records, self.subject_set)
