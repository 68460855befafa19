"""CMMLU, 5-shot: multiple-choice questions of 67 subjects in Chinese, for base models.

    qwen eval cmmlu -c Qwen/Qwen-7B -d data/cmmlu
    qwen eval cmmlu -c Qwen/Qwen-7B -d data/cmmlu --subjects agronomy,chinese_history --limit 20

The answer is the most probable of the tokens "A" "B" "C" "D"; averages are over subjects.
"""

from ..multiple_choice import FewShotChoice
from ..subjects import CMMLU, LETTERS


class EvaluateCMMLU(FewShotChoice):
    name = "cmmlu"
    subject_set = CMMLU
    question_prefix = "问题："
    answer_prefix = "答案："
    choices = LETTERS
