#!/usr/bin/env python
"""CMMLU, 5-shot: multiple-choice questions of 67 subjects in Chinese, for base models.

    python eval/evaluate_cmmlu.py -c Qwen/Qwen-7B -d data/cmmlu
    python eval/evaluate_cmmlu.py -c Qwen/Qwen-7B -d data/cmmlu --subjects agronomy,chinese_history --limit 20

The answer is the most probable of the tokens "A" "B" "C" "D"; averages are those of the subjects.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # qwen, where it is not installed

from qwen.evaluation.harness import main
from qwen.evaluation.multiple_choice import FewShotChoice
from qwen.evaluation.subjects import CMMLU, LETTERS


class EvaluateCMMLU(FewShotChoice):
    name = "cmmlu"
    subject_set = CMMLU
    question_mark = "问题："
    answer_mark = "答案："
    choices = LETTERS


if __name__ == "__main__":
    sys.exit(main(EvaluateCMMLU, __doc__))
