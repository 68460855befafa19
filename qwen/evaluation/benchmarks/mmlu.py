"""MMLU, 5-shot: multiple-choice questions of 57 subjects in English, for base models.

    qwen eval mmlu -c Qwen/Qwen-7B -d data/mmlu
    qwen eval mmlu -c Qwen/Qwen-7B -d data/mmlu --subjects anatomy,virology --limit 20

The answer is the most probable of the tokens " A" " B" " C" " D"; the average is over all questions.
"""

from ..multiple_choice import FewShotChoice
from ..subjects import MMLU


class EvaluateMMLU(FewShotChoice):
    name = "mmlu"
    subject_set = MMLU
    question_prefix = "Question: "
    answer_prefix = "Answer:"
    choices = (" A", " B", " C", " D")

    def preamble(self, subject: str) -> str:
        topic = subject.replace("_", " ")
        return f"The following are multiple choice questions (with answers) about {topic}.\n\n"
