"""Records cases that run in a process of their own, in a file that outlives a crash of it.

A process appends lines of JSON: the name of a case when it begins, rows of results, the name when it ends. The process
that waits for it reads them as they come, and knows which case was running at a crash. Started again with the same
file, the process leaves out what it has begun.

This module is also a pytest plugin, `-p tests.support.progress`, for which each test is a case: PROGRESS_FILE names the
file. A test adds what it measured with `record_property("figure", text)`. With PROGRESS_QUICK=1, only the first case of
each parametrized test runs.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pytest


class Row(NamedTuple):
    """A line of the table of results."""

    case: str
    result: str
    seconds: float
    figure: str


class Progress:
    """The file of a process.

    Args:
        path: the file; created when the first case begins.
    """

    def __init__(self, path: Path):
        self.path = path

    def begin(self, case: str) -> None:
        """Record that a case begins."""
        self._append({"begin": case})

    def row(self, row: Row) -> None:
        """Record a result."""
        self._append({"row": row})

    def end(self, case: str) -> None:
        """Record that a case has ended, whatever its result."""
        self._append({"end": case})

    def rows(self) -> list[Row]:
        """Return the results so far."""
        return [Row(*event["row"]) for event in self._events() if "row" in event]

    def begun(self) -> list[str]:
        """Return the cases that have begun, in order."""
        return [event["begin"] for event in self._events() if "begin" in event]

    def running(self) -> str | None:
        """Return the case that has begun and not ended, if any."""
        ended = {event["end"] for event in self._events() if "end" in event}
        return next((case for case in reversed(self.begun()) if case not in ended), None)

    def _append(self, event: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def _events(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written


def last_line(text: str) -> str:
    """Return the last line of a text that is not empty, without characters that would break a Markdown table."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[-1].replace("|", "/")[:300] if lines else ""


# The plugin

_seconds: dict[str, float] = {}
_results: dict[str, tuple[str, str]] = {}


def _progress() -> Progress:
    return Progress(Path(os.environ["PROGRESS_FILE"]))


def pytest_collection_modifyitems(config: "pytest.Config", items: "list[pytest.Item]") -> None:
    left_out = set(_progress().begun())
    if os.environ.get("PROGRESS_QUICK"):
        first: dict[str, str] = {}
        for item in items:
            first.setdefault(item.nodeid.partition("[")[0], item.nodeid)
        left_out |= {item.nodeid for item in items} - {*first.values()}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


def pytest_collectreport(report: "pytest.CollectReport") -> None:
    if report.failed:  # a module that cannot be imported
        _progress().row(Row(report.nodeid, "FAIL", 0.0, last_line(str(report.longrepr))))


def pytest_runtest_logstart(nodeid: str) -> None:
    _progress().begin(nodeid)


def pytest_runtest_logreport(report: "pytest.TestReport") -> None:
    nodeid = report.nodeid
    _seconds[nodeid] = _seconds.get(nodeid, 0.0) + report.duration
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(report.longrepr) if crash is None else " ".join(crash.message.split())
        _results.setdefault(nodeid, ("FAIL", last_line(message)))
    elif report.skipped:
        _results.setdefault(nodeid, ("skipped", last_line(str(report.longrepr[2])).removeprefix("Skipped: ")))
    if report.when == "teardown":
        figure = ", ".join(str(value) for name, value in report.user_properties if name == "figure")
        result, reason = _results.get(nodeid, ("ok", figure))
        _progress().row(Row(nodeid.removeprefix("tests/"), result, _seconds[nodeid], reason))
        _progress().end(nodeid)
        if result == "FAIL":
            leave_broken_device()


def leave_broken_device() -> None:
    """End the process if its GPU takes no more work: after an illegal access, every later case would fail."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(70)
