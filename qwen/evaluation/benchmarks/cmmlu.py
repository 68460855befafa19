"""CMMLU, 5-shot: multiple-choice questions of 67 subjects in Chinese, for base models.

    qwen eval cmmlu -c Qwen/Qwen-7B -d data/cmmlu
    qwen eval cmmlu -c Qwen/Qwen-7B -d data/cmmlu --subjects agronomy,chinese_history --limit 20

The answer is the most probable of the tokens "A" "B" "C" "D"; averages are those of the subjects.
"""

from ..multiple_choice import FewShotChoice
from ..subjects import CMMLU, LETTERS


class EvaluateCMMLU(FewShotChoice):
    name = "cmmlu"
    subject_set = CMMLU
    question_mark = "问题："
    answer_mark = "答案："
    choices = LETTERS
