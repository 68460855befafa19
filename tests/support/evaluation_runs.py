"""Runs benchmarks on small data files and reads their results."""

import csv
import json
from pathlib import Path
from typing import Any

from qwen.evaluation.task import Task
from qwen_cli.evaluate import run


def evaluate(task: type[Task], arguments: list[str]) -> int:
    """Run `qwen eval TASK ARGUMENTS` in this process and return its exit status."""
    return run(lambda: task, arguments, None)


def run_script(task: type[Task], out: Path, *arguments: object) -> int:
    """Run the same with results in `out`, on the CPU."""
    return evaluate(task, [*map(str, [*arguments, "-o", out, "--cpu-only"])])


def write_csv(path: Path, rows: list[list[object]], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records), encoding="utf-8")
    return path


def read_records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def read_scores(out: Path) -> dict[str, dict[str, Any]]:
    """Return {"value", "count"} of each score, by its name."""
    return json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["scores"]


def results(out: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the values of the scores by their names, and the records."""
    return {name: score["value"] for name, score in read_scores(out).items()}, read_records(out)
