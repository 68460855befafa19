"""C-Eval, 0-shot, for chat models: multiple-choice questions of 52 subjects in Chinese, one per user turn.

    qwen eval chat_ceval -c Qwen/Qwen-7B-Chat -d data/ceval --batch-size 8
    qwen eval chat_ceval -c Qwen/Qwen-7B-Chat -d data/ceval --subjects law,physician --use-fewshot

The letter is read from the greedy reply. Averages are over subjects; "hard" has 8 of them. The questions are those of
the val split, as the answers of the test split are not published.
"""

from ..chat_choice import ChatChoice
from ..subjects import CEVAL, format_options


class EvaluateChatCEval(ChatChoice):
    name = "chat_ceval"
    subject_set = CEVAL
    split = "val"
    answer_prefix = "答案："

    def prompt(self, question: dict[str, str]) -> str:
        return f"{question['question']}\n\n{format_options(question)}"
