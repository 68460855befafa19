"""L-Eval, closed-ended tasks (An et al. 2023, arXiv 2307.11088): questions about long documents, for chat models.

    qwen eval leval -c Qwen/Qwen-72B-Chat -d data/leval
    qwen eval leval -c Qwen/Qwen-7B-Chat -d data/leval --tasks quality,tpo --max-seq-len 8192

The folder holds coursera.jsonl, gsm100.jsonl, quality.jsonl, tpo.jsonl, codeU.jsonl and sci_fi.jsonl as they are
published: lines of "input" (the document), "instructions" and "outputs". Prompt and reply together have --max-seq-len
tokens, by default as many as the model takes; what does not fit is cut out of the middle of the document. A task scores
the mean of its questions, L-Eval the mean of its tasks. A question is right where

- coursera: the letters are the right ones. A part of them, and no wrong one, counts a quarter.
- quality, tpo: the letter is the right one.
- gsm100: the last number is the right one.
- codeU: the answer is the right output, but for quotes and spaces; numbers are compared as numbers.
- sci_fi: True or False is right by the document (loyalty) and, where the file tells it, in the world (factuality); one
  of the two counts half.

The words around a question are this repository's; L-Eval's own differ.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from ..data_files import DataError, existing, read_jsonl
from ..language_model import LanguageModel
from ..letters import chosen_letter, chosen_letters
from ..numbers import close, last_number, number
from ..task import Case, Score, Task, by_group, mean

MAX_NEW_TOKENS = 512
RESERVED = MAX_NEW_TOKENS + 64  # of the context: the reply, the system message and the marks of the chat format
OPTION = re.compile(r"^\s*\(?([A-Z])[).:][ \t]*(.*)$", re.MULTILINE)
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
            type=named_tasks,
            default=list(TASKS),
            metavar="A,B",
            help=f"only these of {', '.join(TASKS)}; the mean of some is not L-Eval's",
        )

    def cases(self) -> list[Case]:
        tasks = self.arguments.tasks
        paths = existing(self.arguments.eval_data_path, [f"{task}.jsonl" for task in tasks])
        return [case for task, path in zip(tasks, paths, strict=True) for case in read_cases(path, task)]

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[dict[str, Any]]:
        fitting = [fitted(case, lm) for case in cases]
        replies = lm.reply([case for case, _ in fitting], max_new_tokens=MAX_NEW_TOKENS)
        return [{"reply": reply, "cut_tokens": left_out} for reply, (_, left_out) in zip(replies, fitting, strict=True)]

    def score(self, case: Case, answer: dict[str, Any]) -> dict[str, Any]:
        return TASKS[case.group].score(case.prompt, case.gold, answer["reply"])

    def summary(self, records: Sequence[dict[str, Any]]) -> list[Score]:
        tasks = {task: Score(task, mean(members), len(members)) for task, members in by_group(records).items()}
        average = mean([{"correct": score.value} for score in tasks.values()])
        scores = [Score("L-Eval", average, len(records)), *tasks.values()]
        judged = {
            part: [record for record in records if record.get(part) is not None] for part in ("loyalty", "factuality")
        }
        scores += [Score(f"sci_fi: {part}", mean(some, part), len(some)) for part, some in judged.items() if some]
        return scores


def named_tasks(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in TASKS]:
        raise argparse.ArgumentTypeError(f"there is no task {unknown[0]!r}, only {', '.join(TASKS)}")
    return names


def read_cases(path: Path, task: str) -> list[Case]:
    """A case an instruction. Raises DataError where a document's instructions and outputs do not go together."""
    cases = []
    documents = read_jsonl(path, {"input": str, "instructions": list, "outputs": list})
    for line, document in enumerate(documents, start=1):
        instructions, outputs = document["instructions"], document["outputs"]
        if len(instructions) != len(outputs) or not all(isinstance(text, str) for text in instructions + outputs):
            raise DataError(
                f"{path}, record {line}: {len(instructions)} instructions and {len(outputs)} outputs; as many texts of "
                "the one as of the other are needed."
            )
        for index, (instruction, output) in enumerate(zip(instructions, outputs, strict=True)):
            try:
                gold = TASKS[task].gold(output)
            except ValueError as error:
                raise DataError(f"{path}, record {line}, output {index}: {error}, not {output[:60]!r}.") from error
            text = f"{instruction.strip()}\n{TASKS[task].wanted}".strip()
            opening = f"{document['input'].strip()}\n\n" if document["input"].strip() else ""
            cases.append(Case(name=f"{task}/{line}/{index}", prompt=text, gold=gold, group=task, preamble=opening))
    return cases


def fitted(case: Case, lm: LanguageModel) -> tuple[Case, int]:
    """The case with as much of its document as the model takes, both ends of it, and how many tokens are left out.

    Where there is no document, or the instruction alone is too long, the instruction is cut the same way.
    """
    room = lm.max_seq_len - RESERVED
    if room < 2:
        raise ValueError(f"--max-seq-len must be more than {RESERVED + 1}, which is what the reply takes.")
    question, asked = cut_middle(case.prompt, room, lm)
    opening, left_out = cut_middle(case.preamble, max(room - len(lm.encode(question)), 0), lm)
    return replace(case, prompt=question, preamble=opening), asked + left_out


def cut_middle(text: str, room: int, lm: LanguageModel) -> tuple[str, int]:
    """The first and the last of its tokens, `room` together; and how many are left out."""
    ids = lm.encode(text)
    left_out = len(ids) - room
    if left_out <= 0:
        return text, 0
    head = lm.tokenizer.decode(ids[: room - room // 2], errors="ignore")
    tail = lm.tokenizer.decode(ids[len(ids) - room // 2 :], errors="ignore")
    return head + tail, left_out


def options_of(instruction: str) -> list[str]:
    """The texts of A, B, …; where they are not written one a line, empty ones for four letters."""
    found = [(letter, text) for letter, text in OPTION.findall(instruction)]
    texts = [text for index, (letter, text) in enumerate(found) if letter == chr(ord("A") + index)]
    return texts if len(texts) > 1 else [""] * 4


def gold_letters(output: str) -> str:
    found = re.match(r"\W*([A-Z](?:[\s,;&]*[A-Z])*)(?![A-Za-z])", output)
    if not found:
        raise ValueError("one or several letters are needed")
    return "".join(sorted(set(re.findall("[A-Z]", found[1]))))


def gold_number(output: str) -> str:
    if (value := last_number(output)) is None:
        raise ValueError("a number is needed")
    return str(value)


def gold_truth(output: str) -> list[str | None]:
    loyal, fact = truths(output)
    if loyal is None:
        raise ValueError("True or False is needed")
    return [loyal, fact]


def truths(text: str) -> tuple[str | None, str | None]:
    """What is said to be the case by the document, and what in the world: "true", "false" or None."""
    fact = FACT.search(text)
    loyal = TRUTH.search(FACT.sub("", text))
    return loyal and loyal[1].lower(), fact and fact[1].lower()


def score_letters(instruction: str, gold: str, reply: str) -> dict[str, Any]:
    letters = chosen_letters(reply, options_of(instruction))
    partly = bool(letters) and set(letters) < set(gold)
    return {"letters": letters, "correct": 1.0 if letters == gold else 0.25 if partly else 0.0}


def score_letter(instruction: str, gold: str, reply: str) -> dict[str, Any]:
    letter = chosen_letter(reply, options_of(instruction))
    return {"letter": letter, "correct": letter == gold}


def score_number(instruction: str, gold: str, reply: str) -> dict[str, Any]:
    found = last_number(reply)
    return {"number": None if found is None else str(found), "correct": close(found, Fraction(gold))}


def score_output(instruction: str, gold: str, reply: str) -> dict[str, Any]:
    named = ANSWER.findall(reply)
    lines = [line for line in reply.splitlines() if line.strip("`* ")]
    output = bare(named[-1] if named else lines[-1] if lines else "")
    value, right = number(output), number(bare(gold))
    same = value == right if value is not None and right is not None else output == bare(gold)
    return {"output": output, "correct": same}


def score_truth(instruction: str, gold: list[str | None], reply: str) -> dict[str, Any]:
    said = truths(reply)
    loyalty, factuality = (None if right is None else answer == right for answer, right in zip(said, gold, strict=True))
    judged = [verdict for verdict in (loyalty, factuality) if verdict is not None]
    return {"loyalty": loyalty, "factuality": factuality, "correct": sum(judged) / len(judged)}


def bare(text: str) -> str:
    """An output without Markdown, quotes, a full stop at the end, and spaces other than those between words."""
    return re.sub(r"\s+(?!\w)|(?<!\w)\s+|\.$", "", re.sub(r"['\"`*]", "", text.strip()))


class Closed(NamedTuple):
    """A task: what is asked for, an output → the right answer, and (instruction, right answer, reply) → its score."""

    wanted: str
    gold: Callable[[str], Any]
    score: Callable[[str, Any, str], dict[str, Any]]


LETTER = "Answer with the letter of the correct option alone."
TASKS = {
    "coursera": Closed(
        "Answer with the letters of all correct options alone, such as AC.", gold_letters, score_letters
    ),
    "gsm100": Closed("", gold_number, score_number),
    "quality": Closed(LETTER, gold_letters, score_letter),
    "tpo": Closed(LETTER, gold_letters, score_letter),
    "codeU": Closed("Answer with the output alone.", str.strip, score_output),
    "sci_fi": Closed(
        "Answer True or False by the document, and behind it in brackets what is true in the real world, "
        "such as: False [fact: True]",
        gold_truth,
        score_truth,
    ),
}
