"""MMLU, 0-shot, for chat models: multiple-choice questions of 57 subjects in English, one per user turn.

    qwen eval chat_mmlu -c Qwen/Qwen-7B-Chat -d data/mmlu --batch-size 8
    qwen eval chat_mmlu -c Qwen/Qwen-7B-Chat -d data/mmlu --subjects anatomy,virology --use-fewshot

The letter is read from the greedy reply; the average is over all questions.
"""

from ..chat_choice import ChatChoice
from ..subjects import MMLU, format_options

INSTRUCTION = (
    "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D "
    "as the answer to this question.\n\n"
)


class EvaluateChatMMLU(ChatChoice):
    name = "chat_mmlu"
    subject_set = MMLU
    split = "test"
    answer_prefix = "Answer: "

    def prompt(self, question: dict[str, str]) -> str:
        return f"{INSTRUCTION}{question['question']}\n{format_options(question)}\n"
