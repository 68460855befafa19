"""Multiple choice for chat models: which letter does the reply choose?

Revolves around one user turn, the question with its options, perhaps behind worked examples. The wording is for the
benchmarks in eval/, reading the reply for letters.py.
"""

import argparse
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from .data_files import DataError
from .language_model import LanguageModel
from .letters import chosen_letter
from .subjects import LETTERS, SubjectSet, add_subjects_argument, averages, read_subjects
from .task import Case, Score, Task

SHOTS = 5
MAX_NEW_TOKENS = 512


class ChatChoice(Task):
    """A benchmark of many subjects, whose questions are asked one by one."""

    chat = True
    subject_set: ClassVar[SubjectSet]
    split: ClassVar[str]
    answer_mark: ClassVar[str]
    """Stands behind a worked example, in front of its letter: "Answer: "."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        add_subjects_argument(parser, cls.subject_set)
        parser.add_argument(
            "--use-fewshot",
            action="store_true",
            help=f"put the first {SHOTS} questions of the dev split in front, each with its letter",
        )

    @abstractmethod
    def prompt(self, question: dict[str, str]) -> str:
        """What the user says: a question with its options."""

    def cases(self) -> list[Case]:
        folder, wanted = self.arguments.eval_data_path, self.arguments.subjects
        asked = read_subjects(folder, self.split, self.subject_set, wanted)
        worked = read_subjects(folder, "dev", self.subject_set, wanted) if self.arguments.use_fewshot else {}
        cases = []
        for subject, questions in asked.items():
            shots = tuple(map(self.worked, worked.get(subject, [])[:SHOTS]))
            if self.arguments.use_fewshot and len(shots) < SHOTS:
                path = folder / self.subject_set.files.format(split="dev", subject=subject)
                raise DataError(f"{path} holds {len(shots)} questions: {SHOTS} worked examples are needed.")
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

    def worked(self, question: dict[str, str]) -> str:
        """A question with its answer."""
        return f"{self.prompt(question).rstrip()}\n{self.answer_mark}{question['answer']}\n\n"

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[dict[str, Any]]:
        return [{"reply": reply} for reply in lm.reply(cases, max_new_tokens=MAX_NEW_TOKENS)]

    def score(self, case: Case, answer: dict[str, Any]) -> dict[str, Any]:
        letter = chosen_letter(answer["reply"], case.data["options"])
        return {"letter": letter, "correct": letter == case.gold}

    def summary(self, records: Sequence[dict[str, Any]]) -> list[Score]:
        return averages(records, self.subject_set)
