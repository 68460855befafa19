#!/usr/bin/env python
"""MMLU, 5-shot: multiple-choice questions of 57 subjects in English, for base models.

    python eval/evaluate_mmlu.py -c Qwen/Qwen-7B -d data/mmlu
    python eval/evaluate_mmlu.py -c Qwen/Qwen-7B -d data/mmlu --subjects anatomy,virology --limit 20

The answer is the most probable of the tokens " A" " B" " C" " D"; the average is that of all questions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # qwen, where it is not installed

from qwen.evaluation.harness import main
from qwen.evaluation.multiple_choice import FewShotChoice
from qwen.evaluation.subjects import MMLU


class EvaluateMMLU(FewShotChoice):
    name = "mmlu"
    subject_set = MMLU
    question_mark = "Question: "
    answer_mark = "Answer:"
    choices = (" A", " B", " C", " D")

    def preamble(self, subject: str) -> str:
        topic = subject.replace("_", " ")
        return f"The following are multiple choice questions (with answers) about {topic}.\n\n"


if __name__ == "__main__":
    sys.exit(main(EvaluateMMLU, __doc__))
