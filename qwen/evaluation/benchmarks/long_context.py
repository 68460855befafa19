"""Perplexity by context length: plain, and with the techniques that extend a model beyond its trained length.

    qwen eval long_context                                        # the bundled base model, minutes
    qwen eval long_context -c Qwen/Qwen-7B --text arxiv/          # the columns of the published table

The text is cut into adjacent windows of each length, and each window is read on its own. The score is exp of the mean
token loss. Every row of the table adds a technique: dynamic NTK, LogN attention, window attention. Without --text, the
text is source code of Python's standard library that the bundled model has not seen.
"""

import argparse
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from ...checkpoint.bundled import BUNDLED_BASE
from ...checkpoint.checkpoint import Checkpoint
from ..data_files import DataError
from ..harness import positive_int
from ..language_model import LanguageModel
from ..task import Case, JSONObject, Score, Task, group_records, mean
from ..texts import read_texts

HELD_OUT = BUNDLED_BASE / "held_out.txt"  # sources of Python's standard library
SWITCHES = {"dynamic_ntk": "use_dynamic_ntk", "logn": "use_logn_attn", "window_attn": "use_window_attn"}
CUMULATIVE = ((), ("dynamic_ntk",), ("dynamic_ntk", "logn"), ("dynamic_ntk", "logn", "window_attn"))
SINGLE = (("logn",), ("window_attn",))


class LongContext(Task):
    """A case is a window of the text, read with some of the techniques; its answer is the mean token loss."""

    name = "long_context"
    max_seq_len = None

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments)
        self.ids: list[int] = []

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--text", nargs="+", type=Path, metavar="PATH", help="files, or folders of *.txt and *.md")
        parser.add_argument(
            "--lengths",
            nargs="+",
            type=positive_int,
            metavar="TOKENS",
            help="default: doubling from the trained length, at most 1024, to the context length of the model",
        )
        parser.add_argument(
            "--tokens", type=positive_int, default=32768, help="tokens to read at each length (default: %(default)s)"
        )
        parser.add_argument("--alone", action="store_true", help="also measure LogN and window attention on their own")

    def cases(self) -> list[Case]:
        checkpoint = Checkpoint.open(self.arguments.checkpoint_path or BUNDLED_BASE, hub=self.arguments.hub)
        config = checkpoint.config
        lengths = sorted(
            set(self.arguments.lengths or default_lengths(config.seq_length, config.max_position_embeddings))
        )
        if lengths[0] < 2:
            raise DataError("A length of 1 has no token to predict: use lengths of at least 2.")
        text = self.text()
        encoded = checkpoint.tokenizer().encode(text, allowed_special=(), verbose=False)
        needed = max(lengths[-1], self.arguments.tokens)
        if len(encoded) < needed:
            raise DataError(
                f"The text has {len(encoded)} tokens, but {needed} are needed for --tokens {self.arguments.tokens} "
                f"and --lengths {' '.join(map(str, lengths))}: give more text with --text, or lower these."
            )
        self.ids = encoded[:needed]
        read = {"text": hashlib.sha256(text.encode()).hexdigest()}
        techniques = CUMULATIVE + (SINGLE if self.arguments.alone else ())
        return [
            Case(
                name=f"{row_name(used)} {length} {start}",
                prompt="",
                gold=None,
                group=f"{row_name(used)} {length}",
                data={"used": used, "start": start, "length": length, **read},
            )
            for used in techniques
            for length in lengths
            for start in range(0, needed - length + 1, length)
        ]

    def text(self) -> str:
        """Return the text to read."""
        if self.arguments.text:
            return read_texts(self.arguments.text)
        if not HELD_OUT.is_file():
            raise DataError("The bundled text is missing: give files or folders with --text.")
        return read_texts([HELD_OUT])

    def answer(self, lm: LanguageModel, cases: Sequence[Case]) -> list[JSONObject]:
        answers = []
        for case in cases:
            for technique, switch in SWITCHES.items():
                setattr(lm.model.config, switch, technique in case.data["used"])
            start = case.data["start"]
            answers.append({"loss": lm.loss(self.ids[start : start + case.data["length"]])})
        return answers

    def score(self, case: Case, answer: JSONObject) -> JSONObject:
        return {"row": row_name(case.data["used"]), "length": case.data["length"]}

    def summary(self, records: Sequence[JSONObject]) -> list[Score]:
        return [
            Score(group, math.exp(mean(members, "loss")), len(members), percent=False)
            for group, members in group_records(records).items()
        ]

    def table(self, model: str, scores: Sequence[Score]) -> str:
        curves = perplexity_curves(scores)
        lengths = sorted({length for curve in curves.values() for length in curve})
        lines = [f"| {model} | " + " | ".join(map(str, lengths)) + " |", "|---|" + "---:|" * len(lengths)]
        for row, curve in curves.items():
            cells = (f"{curve[length]:.2f}" if length in curve else "–" for length in lengths)
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def finish(self, records: Sequence[JSONObject], output: Path) -> list[str]:
        picture = output.with_suffix(".png")
        plot(perplexity_curves(self.summary(records)), picture)
        return [f"Plot: {picture}"]


def row_name(used: Sequence[str]) -> str:
    return " + ".join(used) or "plain"


def default_lengths(trained_length: int, max_length: int) -> list[int]:
    """Return lengths that double from `trained_length`, at most 1024, to the longer of the two arguments."""
    lengths = [min(trained_length, 1024)]
    while lengths[-1] * 2 <= max(max_length, trained_length):
        lengths.append(lengths[-1] * 2)
    return lengths


def perplexity_curves(scores: Sequence[Score]) -> dict[str, dict[int, float]]:
    """Return the perplexity by length of each row."""
    curves: dict[str, dict[int, float]] = {}
    for score in scores:
        row, length = score.name.rsplit(" ", 1)
        curves.setdefault(row, {})[int(length)] = score.value
    return curves


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Plot perplexity over length, one line per row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for row, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", markersize=4, label=row)
    lengths = sorted({length for curve in curves.values() for length in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, map(str, lengths))
    axes.set(xlabel="length (tokens)", ylabel="perplexity")
    values = [value for curve in curves.values() for value in curve.values()]
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
