"""Runs a benchmark: batches, progress, results on disk, and resuming an interrupted run.

`Run` is the files of one run: OUT.jsonl with a record a case, written batch by batch; OUT.json with the settings, and
at the end the summary, which OUT.md has as a table. A run that was interrupted continues behind the last whole batch,
so its results are the same as those of an uninterrupted run. What a benchmark is stands in task.py.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import set_seed

from ..checkpoint.bundled import BUNDLED_BASE, BUNDLED_CHAT
from ..checkpoint.checkpoint import resolve
from ..checkpoint.loading import load_model_quietly
from .data_files import DataError
from .language_model import LanguageModel
from .task import Case, Score, Task

# What does not change the results; everything else does, and must be the same when a run goes on. All but the size of
# batches, which may have to be smaller where memory was short.
_FREE = ("sample_output_file", "overwrite", "debug", "checkpoint_path", "hub")
_MAY_CHANGE = ("batch_size",)


def at_least_1(text: str) -> int:
    """The type of an argument that is a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number above 0 is needed, not {text!r}")
    return int(text)


def variant(chosen: dict[str, Any]) -> list[str]:
    """What makes this run another one than the benchmark as it stands: a few words for each argument that was given."""
    words = []
    for name, value in chosen.items():
        if name in (*_FREE, *_MAY_CHANGE, "cpu_only") or _is_path(value):
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        shown = " ".join(map(str, values)) if len(values) < 4 else str(len(values))
        words.append(f"{name.replace('_', ' ')} {shown}".strip())
    return words


def evaluate(task_class: type[Task], options: argparse.Namespace, chosen: dict[str, Any]) -> None:
    """Evaluate a checkpoint on a benchmark and print the table.

    Args:
        options: the arguments that all benchmarks take, and those of the task.
        chosen: the options that differ from their defaults.

    Raises:
        OSError: the checkpoint cannot be used, or results cannot be written.
        ValueError: the data or the options cannot be used; DataError is one.
        SandboxUnavailable: the benchmark runs code, and there is no sandbox.
    """
    task, words = task_class(options), variant(chosen)
    checkpoint = resolve(options.checkpoint_path or (BUNDLED_CHAT if task.chat else BUNDLED_BASE))
    if Path(checkpoint).is_dir():
        checkpoint = str(Path(checkpoint).resolve())  # it also has a name where it was given as "."
    cases = limited(task.cases(), options.limit)
    stem = re.sub(r"[^\w.-]+", "-", "_".join([task.name, Path(checkpoint).name, *words]))[:120]
    output = options.sample_output_file or Path("output_eval", f"{stem}.jsonl")
    with Run(output, settings(task, checkpoint, cases, options), words, options.overwrite) as run:
        done = run.resume(cases, options.batch_size)
        if done:
            what = "going on from there" if done < len(cases) else "nothing is asked again without --overwrite"
            print(f"{done} of {len(cases)} answers are in {output} already: {what}.", file=sys.stderr)
        if done < len(cases):
            set_seed(options.seed)
            model, tokenizer = load_model_quietly(
                checkpoint, chat=task.chat, hub=options.hub, cpu_only=options.cpu_only
            )
            offered = model.config.max_context_length
            lm = LanguageModel(model, tokenizer, options.max_seq_len or offered)
            run.begin()
            work(task, lm, cases, run, options)
        table = run.finish(task)
        for sentence in task.finish(run.records, output):
            print(sentence, file=sys.stderr)
    print(table)
    print(f"Every answer: {run.records_file}, the summary: {run.table_file}", file=sys.stderr)


def limited(cases: Sequence[Case], limit: int | None) -> list[Case]:
    """The first `limit` cases of each group; all without one.

    Raises:
        DataError: there are none, or two of one name.
    """
    if not cases:
        raise DataError("The data hold no questions.")
    name, count = Counter(case.name for case in cases).most_common(1)[0]
    if count > 1:
        raise DataError(f"The data hold {count} questions by the name {name!r}: remove those that are there twice.")
    seen: Counter[str] = Counter()
    kept = []
    for case in cases:
        seen[case.group] += 1
        if limit is None or seen[case.group] <= limit:
            kept.append(case)
    return kept


def batches(cases: Sequence[Case], size: int) -> Iterator[list[Case]]:
    """Neighbours with the same worked examples, at most `size` of them."""
    for _, neighbours in groupby(cases, key=lambda case: (case.preamble, case.shots)):
        members = list(neighbours)
        yield from (members[start : start + size] for start in range(0, len(members), size))


def work(task: Task, lm: LanguageModel, cases: Sequence[Case], run: "Run", options: argparse.Namespace) -> None:
    """Ask what has not been asked yet."""
    done = len(run.records)
    # Where nobody looks on, in a file, a line now and then.
    seconds = 0.1 if sys.stderr.isatty() else 30
    with tqdm(
        total=len(cases), initial=done, desc=task.name, unit="question", smoothing=0.05, mininterval=seconds
    ) as bar:
        for batch in batches(cases, options.batch_size):
            if done > 0:  # whole batches, so it comes out even
                done -= len(batch)
                continue
            answers = task.answer(lm, batch)
            records = []
            for case, answer, score in zip(batch, answers, task.scores(batch, answers), strict=True):
                dropped = lm.dropped_shots.get(case.name, 0)
                record = {"name": case.name, "group": case.group, **answer, "gold": case.gold, **score}
                records.append(record | ({"dropped_shots": dropped} if dropped else {}))
                if options.debug:
                    shown = json.dumps(answer | {"gold": case.gold} | score, ensure_ascii=False)
                    bar.write(f"--- {case.name}\n{case.text(dropped)}\n--> {shown}", file=sys.stderr)
            run.add(records)
            bar.update(len(batch))


def settings(task: Task, checkpoint: str, cases: Sequence[Case], options: argparse.Namespace) -> dict[str, Any]:
    """All that the results follow from; the data as a digest of the cases that were made of them."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(json.dumps(asdict(case), sort_keys=True, default=str).encode())
    chosen = {name: value for name, value in vars(options).items() if name not in _FREE and not _is_path(value)}
    model = {"checkpoint": checkpoint, "written": written(checkpoint)}
    return {"task": task.name, **model, **chosen, "cases": len(cases), "digest": digest.hexdigest()}


def _is_path(value: Any) -> bool:
    """Whether an argument names files, whose content counts and not where they lie."""
    return isinstance(value, Path) or (isinstance(value, list) and any(map(_is_path, value)))


def written(checkpoint: str) -> str | None:
    """When the files in a folder were written last: training again leaves others by the same names, and config.json has
    switches. None for a hub id."""
    folder = Path(checkpoint)
    times = [file.stat().st_mtime for pattern in ("*.safetensors", "*.bin", "*.json") for file in folder.glob(pattern)]
    return datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds") if times else None


class Run:
    """The files of a run, which nobody else may write meanwhile.

    Raises:
        DataError: there are results of another run, or somebody is writing them.
    """

    def __init__(self, output: Path, settings: dict[str, Any], variant: Sequence[str], overwrite: bool):
        self.records_file = output
        self.summary_file, self.table_file = output.with_suffix(".json"), output.with_suffix(".md")
        if output.suffix in (".json", ".md", ".png"):
            raise DataError(
                f"{output}: the records are JSON lines, and summary and picture go beside them; name it OUT.jsonl."
            )
        if output.is_dir():
            raise DataError(f"{output} is a folder: name a file in it, OUT.jsonl.")
        self.settings, self.variant, self.overwrite = settings, variant, overwrite
        self.records: list[dict[str, Any]] = []
        self.kept = 0  # bytes of the file that hold them

    def __enter__(self) -> "Run":
        self.records_file.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(f"{self.records_file}.lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise DataError(
                f"{self.records_file} is being written by another run: wait for it, or name another file."
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()

    def resume(self, cases: Sequence[Case], batch_size: int) -> int:
        """Take up the records of the whole batches that are there; returns how many. Nothing is written.

        Raises:
            DataError: they are of another run.
        """
        if self.overwrite or not (self.records_file.exists() or self.summary_file.exists()):
            return 0
        self._check_settings()
        lines = self.records_file.read_bytes().splitlines(keepends=True) if self.records_file.exists() else []
        if lines and not lines[-1].endswith(b"\n"):  # the crash cut it off
            lines.pop()
        kept = 0
        for batch in batches(cases, batch_size):
            if kept + len(batch) > len(lines):
                break
            kept += len(batch)
        try:
            self.records = [json.loads(line) for line in lines[:kept]]
            ours = [record["name"] for record in self.records] == [case.name for case in cases[:kept]]
        except (ValueError, TypeError, KeyError):
            ours = False
        if not ours:
            raise DataError(f"{self.records_file} does not hold what this run wrote: --overwrite starts anew.")
        self.kept = sum(map(len, lines[:kept]))
        return kept

    def begin(self) -> None:
        """Have the files hold what was taken up, and nothing else."""
        self.table_file.unlink(missing_ok=True)
        with self.records_file.open("ab") as file:
            file.truncate(self.kept)
        self._write_summary(None)

    def _check_settings(self) -> None:
        try:
            found = json.loads(self.summary_file.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, TypeError, KeyError):
            raise DataError(
                f"{self.records_file} exists, and {self.summary_file} does not tell how it was made: name another file "
                "with -o, or have it replaced with --overwrite."
            ) from None
        names = [name for name in {**found, **self.settings} if name not in _MAY_CHANGE]
        differing = [name for name in names if found.get(name) != self.settings.get(name)]
        if differing:
            name = differing[0]
            was, now = found.get(name), self.settings.get(name)
            said = "other questions" if name in ("cases", "digest") else f"{name} was {was!r} and is {now!r} now"
            raise DataError(
                f"{self.records_file} holds results of a run with other settings ({said}): name another file with -o, "
                "or have it replaced with --overwrite."
            )

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the records of a batch."""
        with self.records_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.records += records

    def finish(self, task: Task) -> str:
        """Write what the records come to; returns the table, and below it what to know about it."""
        scores = task.summary(self.records)
        self._write_summary(scores)
        table = task.table(Path(self.settings["checkpoint"]).name, scores)
        notes = [f"With {', '.join(self.variant)}."] if self.variant else []
        if dropped := [record["dropped_shots"] for record in self.records if "dropped_shots" in record]:
            notes.append(
                f"In {len(dropped)} of {len(self.records)} questions worked examples were left out, {sum(dropped)} in "
                f"all: their prompts were longer than {self.settings['max_seq_len']} tokens."
            )
        if notes:
            table += "\n\n" + " ".join(notes)
        self.table_file.write_text(table + "\n", encoding="utf-8")
        return table

    def _write_summary(self, scores: Sequence[Score] | None) -> None:
        summary: dict[str, Any] = {"settings": self.settings, "scores": None}
        if scores is not None:
            summary["scores"] = {
                score.name: {"value": None if math.isnan(score.value) else score.value, "count": score.count}
                for score in scores
            }
            summary["dropped_shots"] = sum("dropped_shots" in record for record in self.records)
        # In one step: without the settings in it, a run could not be gone on with.
        written = self.summary_file.with_name(f"{self.summary_file.name}.new")
        written.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        written.replace(self.summary_file)
