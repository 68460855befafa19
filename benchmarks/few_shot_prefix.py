"""Five-shot multiple choice: compares encoding the examples of a subject once with encoding them for every question.

    OMP_NUM_THREADS=1 python benchmarks/few_shot_prefix.py
    OMP_NUM_THREADS=1 python benchmarks/few_shot_prefix.py --shapes 1.8B --questions 12 --batch-size 4 --rounds 1

Both use `LanguageModel.choice_logprobs`, which encodes the common context of questions once; the second mode passes the
whole prompt as the question. The modes alternate on the CPU; medians of processor time are reported, and all answers
must be equal. The toy runs without dynamic NTK, with which prompts of more than 256 tokens cannot share a prefix. Other
shapes have random weights. Prints a Markdown table.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

try:
    from qwen.checkpoint.loading import BUNDLED_BASE, load_model_quietly
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

import torch
from random_models import SHAPES, random_model

from qwen.evaluation.language_model import LanguageModel
from qwen.evaluation.task import Case

WORDS = ("a", "the", "of", "in", "to", "which", "is", "when", "by", "with", "force", "energy", "law", "state", "time")
LETTERS = ("A", "B", "C", "D")
CHOICES = (" A", " B", " C", " D")
SHOTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=[], help="random models, besides the toy")
    parser.add_argument("--questions", type=int, default=64, help="questions of the subject (64)")
    parser.add_argument("--words", type=int, default=36, help="words per question; options have a sixth as many (36)")
    parser.add_argument("--batch-size", type=int, default=1, help="questions per batch (1)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions; the median is reported (5)")
    arguments = parser.parse_args()

    model, tokenizer = load_model_quietly(BUNDLED_BASE, cpu_only=True, fp32=True, use_dynamic_ntk=False)
    cases = make_cases(arguments.questions, arguments.words)
    print("| float32 | questions | question tokens | context tokens | context each time, s | once, s | speedup |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for name in ("toy", *arguments.shapes):
        if name != "toy":
            model = random_model(name, torch.float32, "cpu")
        context, whole = (len(tokenizer.encode(text)) for text in (cases[0].context(), cases[0].text()))
        each, once = compare(LanguageModel(model, tokenizer, 4096), cases, arguments.batch_size, arguments.rounds)
        shape = f"{len(cases)} | {whole - context} | {context}"
        print(f"| {name} | {shape} | {each:.2f} | {once:.2f} | {each / once:.1f} |", flush=True)


def make_cases(count: int, words: int) -> list[Case]:
    """Return `count` questions with the same examples, by default as long as those of MMLU on average."""
    rng = random.Random(0)

    def question() -> str:
        lines = [f"Question: {' '.join(rng.choices(WORDS, k=words))}?"]
        lines += [f"{letter}. {' '.join(rng.choices(WORDS, k=words // 6))}" for letter in LETTERS]
        return "\n".join([*lines, "Answer:"])

    preamble = "The following are multiple choice questions (with answers) about conceptual physics.\n\n"
    shots = tuple(f"{question()}{rng.choice(CHOICES)}\n\n" for _ in range(SHOTS))
    return [Case(str(number), question(), None, preamble=preamble, shots=shots) for number in range(count)]


def compare(lm: LanguageModel, cases: Sequence[Case], batch_size: int, rounds: int) -> tuple[float, float]:
    """Return the seconds of processor time for all cases, with the context encoded for each one and once."""
    whole = [replace(case, prompt=case.text(), preamble="", shots=()) for case in cases]
    seconds: dict[str, list[float]] = {"each": [], "once": []}
    for _ in range(rounds):
        scores = {}
        for mode, prompts in (("each", whole), ("once", cases)):
            lm = LanguageModel(lm.model, lm.tokenizer, lm.max_seq_len)  # without a cached context
            start = time.process_time()
            batches = (prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size))
            scores[mode] = [row for batch in batches for row in lm.choice_logprobs(batch, CHOICES)]
            seconds[mode].append(time.process_time() - start)
        torch.testing.assert_close(scores["each"], scores["once"], rtol=0, atol=1e-3)
        if [best_letter(row) for row in scores["each"]] != [best_letter(row) for row in scores["once"]]:
            raise RuntimeError("The two modes do not choose the same letters.")
    return statistics.median(seconds["each"]), statistics.median(seconds["once"])


def best_letter(scores: Sequence[float]) -> str:
    return LETTERS[max(range(len(LETTERS)), key=scores.__getitem__)]


if __name__ == "__main__":
    main()
