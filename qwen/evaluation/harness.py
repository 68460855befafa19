"""Runs a benchmark: batches, progress, results on disk, and resuming an interrupted run.

`Run` manages the files of one run: OUT.jsonl has one record per case, written batch by batch; OUT.json has the settings
and, at the end, the summary; OUT.md has the summary as a table. An interrupted run continues after the last complete
batch, so its results equal those of an uninterrupted run. The interface of a benchmark is in task.py.
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

from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import set_seed

from ..checkpoint.bundled import BUNDLED_BASE, BUNDLED_CHAT
from ..checkpoint.checkpoint import resolve
from ..checkpoint.loading import load_model_quietly
from ..model.json_qwen import parse_json_object, read_json_object
from .data_files import DataError
from .language_model import LanguageModel
from .task import Case, JSONObject, Score, Task

# Options that do not affect the results. All others must be the same when a run is resumed, except the batch size,
# which may have to be reduced after running out of memory.
_NOT_RECORDED = ("sample_output_file", "overwrite", "debug", "checkpoint_path", "hub")
_MAY_DIFFER = ("batch_size",)


def positive_int(text: str) -> int:
    """Parse a command-line argument that must be a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def describe_options(overrides: dict[str, object]) -> list[str]:
    """Describe the options in which a run differs from the standard benchmark, in a few words each."""
    labels = []
    for name, value in overrides.items():
        if name in (*_NOT_RECORDED, *_MAY_DIFFER, "cpu_only") or _is_path(value):
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        shown = " ".join(map(str, values)) if len(values) < 4 else str(len(values))
        labels.append(f"{name.replace('_', ' ')} {shown}".strip())
    return labels


def evaluate(task_class: type[Task], options: argparse.Namespace, overrides: dict[str, object]) -> None:
    """Evaluate a checkpoint on a benchmark and print the table.

    Args:
        options: the arguments common to all benchmarks, and those of the task.
        overrides: the options that differ from their defaults.

    Raises:
        OSError: the checkpoint cannot be used, or results cannot be written.
        ValueError: the data (DataError) or the options are invalid.
        SandboxUnavailable: the benchmark runs code, and the sandbox cannot start.
    """
    task, labels = task_class(options), describe_options(overrides)
    checkpoint = resolve(options.checkpoint_path or (BUNDLED_CHAT if task.chat else BUNDLED_BASE))
    if Path(checkpoint).is_dir():
        checkpoint = str(Path(checkpoint).resolve())  # gives "." a name, too
    cases = limit_cases(task.cases(), options.limit)
    stem = re.sub(r"[^\w.-]+", "-", "_".join([task.name, Path(checkpoint).name, *labels]))[:120]
    output = options.sample_output_file or Path("output_eval", f"{stem}.jsonl")
    with Run(output, run_settings(task, checkpoint, cases, options), labels, options.overwrite) as run:
        done = run.resume(cases, options.batch_size)
        if done:
            what = "resuming after them" if done < len(cases) else "use --overwrite to run again"
            print(f"{output} already has {done} of {len(cases)} answers: {what}.", file=sys.stderr)
        if done < len(cases):
            set_seed(options.seed)
            model, tokenizer = load_model_quietly(
                checkpoint, chat=task.chat, hub=options.hub, cpu_only=options.cpu_only
            )
            context_length = model.config.max_context_length
            lm = LanguageModel(model, tokenizer, options.max_seq_len or context_length)
            run.begin()
            run_batches(task, lm, cases, run, options)
        table = run.finish(task)
        for sentence in task.finish(run.records, output):
            print(sentence, file=sys.stderr)
    print(table)
    print(f"Records: {run.records_file}, summary: {run.table_file}", file=sys.stderr)


def limit_cases(cases: Sequence[Case], limit: int | None) -> list[Case]:
    """Return the first `limit` cases of each group; all if it is None.

    Raises:
        DataError: there are no cases, or two have the same name.
    """
    if not cases:
        raise DataError("The data contain no questions.")
    name, count = Counter(case.name for case in cases).most_common(1)[0]
    if count > 1:
        raise DataError(f"The data contain {count} questions named {name!r}: remove the duplicates.")
    seen: Counter[str] = Counter()
    kept = []
    for case in cases:
        seen[case.group] += 1
        if limit is None or seen[case.group] <= limit:
            kept.append(case)
    return kept


def batches(cases: Sequence[Case], size: int) -> Iterator[list[Case]]:
    """Yield batches of at most `size` adjacent cases that share their worked examples."""
    for _, adjacent in groupby(cases, key=lambda case: (case.preamble, case.shots)):
        members = list(adjacent)
        yield from (members[start : start + size] for start in range(0, len(members), size))


def run_batches(task: Task, lm: LanguageModel, cases: Sequence[Case], run: "Run", options: argparse.Namespace) -> None:
    """Answer and score the cases that have no record yet."""
    done = len(run.records)
    # Log rarely when stderr is not a terminal.
    seconds = 0.1 if sys.stderr.isatty() else 30
    with tqdm(
        total=len(cases), initial=done, desc=task.name, unit="question", smoothing=0.05, mininterval=seconds
    ) as bar:
        for batch in batches(cases, options.batch_size):
            if done > 0:  # already recorded: these are whole batches
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


def run_settings(task: Task, checkpoint: str, cases: Sequence[Case], options: argparse.Namespace) -> JSONObject:
    """Return everything that determines the results; the data as a digest of the cases."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(json.dumps(asdict(case), sort_keys=True, default=str).encode())
    chosen = {name: value for name, value in vars(options).items() if name not in _NOT_RECORDED and not _is_path(value)}
    model = {"checkpoint": checkpoint, "written": last_modified(checkpoint)}
    return {"task": task.name, **model, **chosen, "cases": len(cases), "digest": digest.hexdigest()}


def _is_path(value: object) -> bool:
    """Whether an argument names files, whose content counts but not their path."""
    return isinstance(value, Path) or (isinstance(value, list) and any(map(_is_path, value)))


def last_modified(checkpoint: str) -> str | None:
    """Return when the files of a checkpoint folder were last written; None for a hub id.

    This detects retrained weights and edited switches in config.json.
    """
    folder = Path(checkpoint)
    times = [file.stat().st_mtime for pattern in ("*.safetensors", "*.bin", "*.json") for file in folder.glob(pattern)]
    return datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds") if times else None


class Run:
    """The output files of a run, locked against other processes.

    Raises:
        DataError: the output name is invalid, or another run is writing the files.
    """

    def __init__(self, output: Path, settings: JSONObject, option_labels: Sequence[str], overwrite: bool):
        self.records_file = output
        self.summary_file, self.table_file = output.with_suffix(".json"), output.with_suffix(".md")
        if output.suffix in (".json", ".md", ".png"):
            raise DataError(
                f"{output}: records are JSON lines, and summary and plot go next to them. Use a name like OUT.jsonl."
            )
        if output.is_dir():
            raise DataError(f"{output} is a folder: name a file in it, for example OUT.jsonl.")
        for file in (self.records_file, self.summary_file, self.table_file):
            if file.exists() and not file.is_file():
                raise DataError(f"{file} is a folder, pipe or device: remove it, or choose another file with -o.")
        self.settings, self.option_labels, self.overwrite = settings, option_labels, overwrite
        self.records: list[JSONObject] = []
        self.resumed_bytes = 0  # size of the resumed records in bytes

    def __enter__(self) -> "Run":
        self.records_file.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(f"{self.records_file}.lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise DataError(
                f"{self.records_file} is being written by another run: wait for it, or choose another file with -o."
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()

    def resume(self, cases: Sequence[Case], batch_size: int) -> int:
        """Read the records of the complete batches on disk; returns how many. Writes nothing.

        Raises:
            DataError: the records are from another run.
        """
        if self.overwrite or not (self.records_file.exists() or self.summary_file.exists()):
            return 0
        self._check_settings()
        lines = self.records_file.read_bytes().splitlines(keepends=True) if self.records_file.exists() else []
        if lines and not lines[-1].endswith(b"\n"):  # cut off by a crash
            lines.pop()
        kept = 0
        for batch in batches(cases, batch_size):
            if kept + len(batch) > len(lines):
                break
            kept += len(batch)
        for number, (line, case) in enumerate(zip(lines[:kept], cases, strict=False), start=1):
            expected = json.loads(json.dumps({"name": case.name, "group": case.group, "gold": case.gold}))
            try:
                record = parse_json_object(line, f"line {number}", allow_nan=True)
                if not all(name in record and record[name] == value for name, value in expected.items()):
                    raise ValueError(f"line {number} is of another question than {case.name!r}.")
            except ValueError as error:
                raise DataError(
                    f"{self.records_file} does not have the records of this run: {error} --overwrite starts again."
                ) from error
            self.records.append(record)
        self.resumed_bytes = sum(map(len, lines[:kept]))
        return kept

    def begin(self) -> None:
        """Remove everything but the resumed records from the files."""
        self.table_file.unlink(missing_ok=True)
        with self.records_file.open("ab") as file:
            file.truncate(self.resumed_bytes)
        self._write_summary(None)

    def _check_settings(self) -> None:
        try:
            found = read_json_object(self.summary_file).get("settings")
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise DataError(
                f"{self.records_file} exists, but {self.summary_file} does not have its settings: choose another file "
                "with -o, or replace it with --overwrite."
            )
        names = [name for name in {**found, **self.settings} if name not in _MAY_DIFFER]
        differing = [name for name in names if found.get(name) != self.settings.get(name)]
        if differing:
            name = differing[0]
            was, now = found.get(name), self.settings.get(name)
            change = "different questions" if name in ("cases", "digest") else f"{name} was {was!r} and is {now!r} now"
            raise DataError(
                f"{self.records_file} has results of a run with different settings ({change}): choose another file "
                "with -o, or replace it with --overwrite."
            )

    def add(self, records: Sequence[JSONObject]) -> None:
        """Append the records of a batch."""
        with self.records_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.records += records

    def finish(self, task: Task) -> str:
        """Write the summary and the table; returns the table, with notes below it.

        Raises:
            DataError: records that were resumed lack what the summary needs.
        """
        try:
            scores = task.summary(self.records)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if not self.resumed_bytes:
                raise
            raise DataError(
                f"{self.records_file} has damaged records ({type(error).__name__}: {error}): --overwrite starts again."
            ) from error
        self._write_summary(scores)
        table = task.table(Path(self.settings["checkpoint"]).name, scores)
        notes = [f"With {', '.join(self.option_labels)}."] if self.option_labels else []
        if dropped := [record["dropped_shots"] for record in self.records if "dropped_shots" in record]:
            notes.append(
                f"{sum(dropped)} worked examples were dropped from {len(dropped)} of {len(self.records)} prompts to "
                f"fit into {self.settings['max_seq_len']} tokens."
            )
        if notes:
            table += "\n\n" + " ".join(notes)
        self.table_file.write_text(table + "\n", encoding="utf-8")
        return table

    def _write_summary(self, scores: Sequence[Score] | None) -> None:
        summary: JSONObject = {"settings": self.settings, "scores": None}
        if scores is not None:
            summary["scores"] = {
                score.name: {"value": None if math.isnan(score.value) else score.value, "count": score.count}
                for score in scores
            }
            summary["dropped_shots"] = sum("dropped_shots" in record for record in self.records)
        # Replaced atomically: without the settings in it, a run cannot be resumed.
        staged = self.summary_file.with_name(f"{self.summary_file.name}.new")
        staged.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        staged.replace(self.summary_file)
