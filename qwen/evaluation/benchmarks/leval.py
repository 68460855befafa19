"""L-Eval, closed-ended tasks (An et al. 2023, arXiv 2307.11088): questions about long documents, for chat models.

    qwen eval leval -c Qwen/Qwen-72B-Chat -d data/leval
    qwen eval leval -c Qwen/Qwen-7B-Chat -d data/leval --tasks quality,tpo --max-seq-len 8192

The folder has the published files coursera.jsonl, gsm100.jsonl, quality.jsonl, tpo.jsonl, codeU.jsonl and sci_fi.jsonl:
lines with "input" (the document), "instructions" and "outputs". Prompt and reply together have up to --max-seq-len
tokens, by default the context length of the model; longer documents are cut in the middle. The score of a task is the
mean of its questions, that of L-Eval the mean of its tasks. A question is right if

- coursera: the letters are right. Some of the right letters and no wrong one count a quarter.
- quality, tpo: the letter is right.
- gsm100: the last number is right.
- codeU: the output is right, ignoring quotes and spaces; numbers are compared as numbers.
- sci_fi: True or False is right according to the document (loyalty) and, if the file has it, in the real world
  (factuality); one of the two counts half.

The wording of the prompts differs from L-Eval's own.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from ..data_files import DataError, read_jsonl, require_files
from ..language_model import LanguageModel
from ..letters import chosen_letter, chosen_letters
from ..numbers import is_close, last_number, parse_number
from ..task import Case, JSONObject, Score, Task, group_records, mean

MAX_NEW_TOKENS = 512
RESERVED_TOKENS = (
    MAX_NEW_TOKENS + 64
)  # part of the context: the reply, the system message and the tokens of the chat format
OPTION = re.compile(r"^[^\S\n]*\(?([A-Z])[).:][ \t]*(.*)$", re.MULTILINE)
FACT = re.compile(r"\[\s*fact\s*:\s*(true|false)", re.IGNORECASE)
TRUTH = re.compile(r"\b(true|false)\b", re.IGNORECASE)
ANSWER = re.compile(
    r"(?:answer|output|result|prints?|returns?)\b[^\n]{0,40}?(?:\bis|\bbe|:|=)[:\s]*(\S[^\n]*)", re.IGNORECASE
)


class EvaluateLEval(Task):
    name = "leval"
    chat = True
    max_seq_len = None

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--tasks",
            type=task_list,
            default=list(TASKS),
            metavar="A,B",
            help=f"only these of {', '.join(TASKS)} (the mean is then not L-Eval's)",
        )

    def cases(self) -> list[Case]:
        tasks = self.arguments.tasks
        paths = require_files(self.arguments.eval_data_path, [f"{task}.jsonl" for task in tasks])
        return [case for task, path in zip(tasks, paths, strict=True) for case in read_cases(path, task)]

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        truncated = [truncate_document(case, lm) for case in cases]
        replies = lm.chat([case for case, _ in truncated], max_new_tokens=MAX_NEW_TOKENS)
        return [
            {"reply": reply, "cut_tokens": cut_tokens}
            for reply, (_, cut_tokens) in zip(replies, truncated, strict=True)
        ]

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        return TASKS[case.group].score(case.prompt, case.gold, answer["reply"])

    def summary(self, records: Sequence[JSONObject]) -> list[Score]:
        tasks = {task: Score(task, mean(members), len(members)) for task, members in group_records(records).items()}
        average = mean([{"correct": score.value} for score in tasks.values()])
        scores = [Score("L-Eval", average, len(records)), *tasks.values()]
        judged = {
            part: [record for record in records if record.get(part) is not None] for part in ("loyalty", "factuality")
        }
        scores += [Score(f"sci_fi: {part}", mean(some, part), len(some)) for part, some in judged.items() if some]
        return scores


def task_list(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in TASKS]:
        raise argparse.ArgumentTypeError(f"invalid task {unknown[0]!r}: choose from {', '.join(TASKS)}")
    return names


def read_cases(path: Path, task: str) -> list[Case]:
    """Return a case per instruction. Raises DataError if instructions and outputs of a document do not match."""
    cases = []
    documents = read_jsonl(path, {"input": str, "instructions": list, "outputs": list})
    for line, document in enumerate(documents, start=1):
        instructions, outputs = document["instructions"], document["outputs"]
        if len(instructions) != len(outputs) or not all(isinstance(text, str) for text in instructions + outputs):
            raise DataError(
                f"{path}, record {line}: {len(instructions)} instructions and {len(outputs)} outputs. There must be as "
                "many outputs as instructions, and all must be text."
            )
        for index, (instruction, output) in enumerate(zip(instructions, outputs, strict=True)):
            try:
                gold = TASKS[task].gold(output)
            except ValueError as error:
                raise DataError(f"{path}, record {line}, output {index}: {error}, not {output[:60]!r}.") from error
            text = f"{instruction.strip()}\n{TASKS[task].answer_format}".strip()
            preamble = f"{document['input'].strip()}\n\n" if document["input"].strip() else ""
            cases.append(Case(name=f"{task}/{line}/{index}", prompt=text, gold=gold, group=task, preamble=preamble))
    return cases


def truncate_document(case: Case, lm: LanguageModel) -> tuple[Case, int]:
    """Cut the document of a case in the middle to fit the context; returns the case and the number of cut tokens.

    An instruction that is too long by itself is cut the same way.
    """
    budget = lm.max_seq_len - RESERVED_TOKENS
    if budget < 2:
        raise ValueError(
            f"--max-seq-len must be more than {RESERVED_TOKENS + 1}, which the reply and the chat format take."
        )
    question, cut_question_tokens = truncate_middle(case.prompt, budget, lm)
    document, cut_document_tokens = truncate_middle(case.preamble, max(budget - len(lm.encode(question)), 0), lm)
    return replace(case, prompt=question, preamble=document), cut_question_tokens + cut_document_tokens


def truncate_middle(text: str, max_tokens: int, lm: LanguageModel) -> tuple[str, int]:
    """Keep the first and last `max_tokens` tokens of a text in total; returns the text and the number of cut tokens."""
    ids = lm.encode(text)
    cut_tokens = len(ids) - max_tokens
    if cut_tokens <= 0:
        return text, 0
    head = lm.tokenizer.decode(ids[: max_tokens - max_tokens // 2], errors="ignore")
    tail = lm.tokenizer.decode(ids[len(ids) - max_tokens // 2 :], errors="ignore")
    return head + tail, cut_tokens


def parse_options(instruction: str) -> list[str]:
    """Return the texts of options A, B, …; four empty ones if they are not written one per line."""
    found = [(letter, text) for letter, text in OPTION.findall(instruction)]
    texts = [text for index, (letter, text) in enumerate(found) if letter == chr(ord("A") + index)]
    return texts if len(texts) > 1 else [""] * 4


def gold_letters(output: str) -> str:
    found = re.match(r"\W*([A-Z](?:[\s,;&]*[A-Z])*)(?![A-Za-z])", output)
    if not found:
        raise ValueError("must have one or more letters")
    return "".join(sorted(set(re.findall("[A-Z]", found[1]))))


def gold_number(output: str) -> str:
    if (value := last_number(output)) is None:
        raise ValueError("must have a number")
    return str(value)


def gold_truth(output: str) -> list[str | None]:
    loyal, fact = parse_verdicts(output)
    if loyal is None:
        raise ValueError("must have True or False")
    return [loyal, fact]


def parse_verdicts(text: str) -> tuple[str | None, str | None]:
    """Return the verdicts by the document and in the real world: "true", "false" or None."""
    fact = FACT.search(text)
    loyal = TRUTH.search(FACT.sub("", text))
    return loyal and loyal[1].lower(), fact and fact[1].lower()


def score_letters(instruction: str, gold: str, reply: str) -> JSONObject:
    letters = chosen_letters(reply, parse_options(instruction))
    partly = bool(letters) and set(letters) < set(gold)
    return {"letters": letters, "correct": 1.0 if letters == gold else 0.25 if partly else 0.0}


def score_letter(instruction: str, gold: str, reply: str) -> JSONObject:
    letter = chosen_letter(reply, parse_options(instruction))
    return {"letter": letter, "correct": letter == gold}


def score_number(instruction: str, gold: str, reply: str) -> JSONObject:
    found = last_number(reply)
    return {"number": None if found is None else str(found), "correct": is_close(found, Fraction(gold))}


def score_output(instruction: str, gold: str, reply: str) -> JSONObject:
    named = ANSWER.findall(reply)
    lines = [line for line in reply.splitlines() if line.strip("`* ")]
    output = normalize_output(named[-1] if named else lines[-1] if lines else "")
    value, right = parse_number(output), parse_number(normalize_output(gold))
    same = value == right if value is not None and right is not None else output == normalize_output(gold)
    return {"output": output, "correct": same}


def score_truth(instruction: str, gold: list[str | None], reply: str) -> JSONObject:
    verdicts = parse_verdicts(reply)
    loyalty, factuality = (
        None if right is None else answer == right for answer, right in zip(verdicts, gold, strict=True)
    )
    judged = [verdict for verdict in (loyalty, factuality) if verdict is not None]
    return {"loyalty": loyalty, "factuality": factuality, "correct": sum(judged) / len(judged)}


def normalize_output(text: str) -> str:
    """Strip Markdown, quotes, a full stop at the end, and all spaces except those between words."""
    return re.sub(r"\s+(?!\w)|(?<!\w)\s+|\.$", "", re.sub(r"['\"`*]", "", text.strip()))


class ClosedEndedTask(NamedTuple):
    """A task: its request for an answer, output → right answer, and (instruction, right answer, reply) → score."""

    answer_format: str
    gold: Callable[[str], object]
    score: Callable[[str, Any, str], JSONObject]


LETTER_ALONE = "Answer with the letter of the correct option alone."
TASKS = {
    "coursera": ClosedEndedTask(
        "Answer with the letters of all correct options alone, such as AC.", gold_letters, score_letters
    ),
    "gsm100": ClosedEndedTask("", gold_number, score_number),
    "quality": ClosedEndedTask(LETTER_ALONE, gold_letters, score_letter),
    "tpo": ClosedEndedTask(LETTER_ALONE, gold_letters, score_letter),
    "codeU": ClosedEndedTask("Answer with the output alone.", str.strip, score_output),
    "sci_fi": ClosedEndedTask(
        "Answer True or False by the document, and behind it in brackets what is true in the real world, "
        "such as: False [fact: True]",
        gold_truth,
        score_truth,
    ),
}
