r"""Needle in a haystack: does a chat model find one sentence at any place in a long text?

    qwen eval needle --lengths 96 128 256 512 1024                 # the bundled toy, a minute
    qwen eval needle -c Qwen/Qwen-72B-Chat --haystack essays/ \
        --needle "The best way to cross the lake is by boat." \
        --question "What is the best way to cross the lake?" --answer "by boat"

The idea is Greg Kamradt's (https://github.com/gkamradt/LLMTest_NeedleInAHaystack). A case is a text of a given length,
with the needle at a given depth, and a question after it. It is right if the reply contains the answer, ignoring case.
The plot shows depth over length. Without --haystack the text is a list of keys and values, one of which is asked for
(Liu et al. 2023, https://arxiv.org/abs/2307.03172, section 3).
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from ...checkpoint.bundled import BUNDLED_CHAT
from ...checkpoint.checkpoint import Checkpoint
from ...model.qwen_generation_utils import DEFAULT_SYSTEM, make_context
from ..data_files import DataError
from ..harness import positive_int
from ..language_model import LanguageModel
from ..random_words import word
from ..task import Case, JSONObject, Score, Task, group_records, mean
from ..texts import read_texts

NEEDLE, QUESTION = "door: 7351;", "What is door?"
MAX_NEW_TOKENS = 64
NUM_LENGTHS = 8  # default number of lengths


class Needle(Task):
    """A case is a length and a depth; the group is the length."""

    name = "needle"
    chat = True
    max_seq_len = None

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--haystack", nargs="+", type=Path, metavar="PATH", help="files, or folders of *.txt and *.md"
        )
        parser.add_argument("--needle", default=NEEDLE, help='sentence to find (default: "%(default)s")')
        parser.add_argument("--question", default=QUESTION, help='question about it (default: "%(default)s")')
        parser.add_argument("--answer", default="7351", help='what a right reply contains (default: "%(default)s")')
        parser.add_argument(
            "--lengths",
            nargs="+",
            type=positive_int,
            metavar="TOKENS",
            help=f"lengths of the whole prompt (default: {NUM_LENGTHS} steps up to the context length of the model)",
        )
        parser.add_argument(
            "--depths",
            nargs="+",
            type=_percent,
            default=list(range(0, 101, 10)),
            metavar="PERCENT",
            help="positions of the needle (default: 0 10 … 100)",
        )

    def cases(self) -> list[Case]:
        if len({self.arguments.needle == NEEDLE, self.arguments.question == QUESTION}) == 2:
            raise DataError("A needle needs its own question and answer: give --needle, --question and --answer.")
        checkpoint = Checkpoint.open(self.arguments.checkpoint_path or BUNDLED_CHAT, hub=self.arguments.hub)
        config, tokenizer = checkpoint.require_chat().config, checkpoint.tokenizer()
        max_len = config.max_context_length - MAX_NEW_TOKENS
        lengths = self.arguments.lengths or [max_len * step // NUM_LENGTHS for step in range(1, NUM_LENGTHS + 1)]
        if max(lengths) > max_len:
            raise DataError(
                f"The model takes prompts of up to {max_len} tokens plus the reply; {max(lengths)} is too long."
            )
        text = self.text(max(lengths))
        if self.arguments.answer.casefold() in text.casefold():
            raise DataError(
                f"The haystack already contains {self.arguments.answer!r}: choose another --needle and --answer."
            )
        question = f"\n\n{self.arguments.question}"
        overhead = len(make_context(tokenizer, f" {self.arguments.needle} {question}", system=DEFAULT_SYSTEM)[1])
        ids = tokenizer.encode(text, allowed_special=(), verbose=False)
        if len(ids) < max(lengths) - overhead:
            raise DataError(
                f"The haystack has {len(ids)} tokens, but {max(lengths)} are needed: give more text with --haystack."
            )
        cases = []
        for length in sorted(set(lengths)):
            if length <= overhead:
                raise DataError(
                    f"A length of {length} tokens has no room for the needle and the question, which take {overhead}."
                )
            haystack = tokenizer.decode(ids[: length - overhead])
            haystack = haystack[: _nearest_boundary(haystack, 1.0)]
            for depth in sorted(set(self.arguments.depths)):
                place = _nearest_boundary(haystack, depth / 100)
                context = f"{haystack[:place].rstrip()} {self.arguments.needle} {haystack[place:].lstrip()}".strip()
                name = f"{length} {depth:g}%"
                data = {"length": length, "depth": depth}
                cases.append(Case(name, context + question, self.arguments.answer, group=str(length), data=data))
        return cases

    def text(self, tokens: int) -> str:
        """Return the haystack; generated ones have at least `tokens` tokens."""
        if self.arguments.haystack:
            return read_texts(self.arguments.haystack)
        rng = random.Random(self.arguments.seed)
        pairs = (f"{word(rng)}: {word(rng)}" for _ in range(tokens // 4))  # each has at least 4
        return "; ".join(pair for pair in pairs if self.arguments.answer not in pair)

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        return [{"reply": reply} for reply in lm.chat(cases, max_new_tokens=MAX_NEW_TOKENS)]

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        return {"correct": case.gold.casefold() in answer["reply"].casefold(), **case.data}

    def summary(self, records: Sequence[JSONObject]) -> list[Score]:
        groups = group_records(records)
        lines = [Score(f"{length} tokens", mean(members), len(members)) for length, members in groups.items()]
        return [Score("found", mean(records), len(records)), *lines]

    def finish(self, records: Sequence[JSONObject], output: Path) -> list[str]:
        picture = output.with_suffix(".png")
        plot(records, picture)
        return [f"Plot: {picture}"]


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 100, not {text!r}")
    return value


def _nearest_boundary(text: str, share: float) -> int:
    """Return the boundary between lines, sentences or entries that is nearest to this share of the text.

    If none is near, return the position of the share itself.
    """
    aim = round(share * len(text))
    boundaries = [0]
    for end in ("\n", ". ", "; ", "。"):
        before, after = text.rfind(end, 0, aim), text.find(end, aim)
        boundaries += [place + len(end) for place in (before, after) if place >= 0]
    nearest = min(boundaries, key=lambda place: abs(place - aim))
    return nearest if abs(nearest - aim) <= len(text) / 4 else aim


def plot(records: Sequence[JSONObject], path: Path) -> None:
    """Plot depth over length: green if the needle was found, red if not."""
    from matplotlib.figure import Figure

    lengths = sorted({record["length"] for record in records})
    depths = sorted({record["depth"] for record in records})
    found = {(record["depth"], record["length"]): float(record["correct"]) for record in records}
    figure = Figure(figsize=(1.8 + 0.6 * len(lengths), 1.4 + 0.3 * len(depths)), layout="constrained")
    axes = figure.subplots()
    grid = [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    axes.pcolormesh(grid, cmap="RdYlGn", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    axes.set_xticks([index + 0.5 for index in range(len(lengths))], map(str, lengths), rotation=45)
    axes.set_yticks([index + 0.5 for index in range(len(depths))], [f"{depth:g}%" for depth in depths])
    axes.invert_yaxis()
    axes.set(xlabel="length (tokens)", ylabel="depth of the needle")
    figure.savefig(path, dpi=120)
