"""Base class of multiple-choice benchmarks for chat models.

Each prompt is one user turn: the question with its options, optionally after worked examples. The benchmarks define the
wording; letters.py reads the chosen letter from the reply.
"""

import argparse
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from .data_files import DataError
from .language_model import LanguageModel
from .letters import chosen_letter
from .subjects import LETTERS, SubjectSet, add_subjects_argument, average_scores, read_subjects
from .task import Case, JSONObject, Score, Task

SHOTS = 5
MAX_NEW_TOKENS = 512


class ChatChoice(Task):
    """A multiple-choice benchmark with many subjects, asked of a chat model."""

    chat = True
    subject_set: ClassVar[SubjectSet]
    split: ClassVar[str]
    answer_prefix: ClassVar[str]
    """Text between a worked example and its letter, e.g. "Answer: "."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        add_subjects_argument(parser, cls.subject_set)
        parser.add_argument(
            "--use-fewshot",
            action="store_true",
            help=f"prepend the first {SHOTS} questions of the dev split as worked examples",
        )

    @abstractmethod
    def prompt(self, question: dict[str, str]) -> str:
        """Return the user message: a question with its options."""

    def cases(self) -> list[Case]:
        folder, subjects = self.arguments.eval_data_path, self.arguments.subjects
        questions_by_subject = read_subjects(folder, self.split, self.subject_set, subjects)
        dev_questions = read_subjects(folder, "dev", self.subject_set, subjects) if self.arguments.use_fewshot else {}
        cases = []
        for subject, questions in questions_by_subject.items():
            shots = tuple(map(self.with_answer, dev_questions.get(subject, [])[:SHOTS]))
            if self.arguments.use_fewshot and len(shots) < SHOTS:
                path = folder / self.subject_set.files.format(split="dev", subject=subject)
                raise DataError(f"{path} has {len(shots)} questions: {SHOTS} worked examples are needed.")
            cases += [
                Case(
                    name=f"{subject}/{question.get('id', number)}",
                    prompt=self.prompt(question),
                    gold=question["answer"],
                    group=subject,
                    shots=shots,
                    data={"options": [question[letter] for letter in LETTERS]},
                )
                for number, question in enumerate(questions)
            ]
        return cases

    def with_answer(self, question: dict[str, str]) -> str:
        """Return a question with its answer."""
        return f"{self.prompt(question).rstrip()}\n{self.answer_prefix}{question['answer']}\n\n"

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        return [{"reply": reply} for reply in lm.chat(cases, max_new_tokens=MAX_NEW_TOKENS)]

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        letter = chosen_letter(answer["reply"], case.data["options"])
        return {"letter": letter, "correct": letter == case.gold}

    def summary(self, records: Sequence[JSONObject]) -> list[Score]:
        return average_scores(records, self.subject_set)
