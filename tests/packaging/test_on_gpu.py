"""Tests of `make test-gpu`: the whole script without a GPU, and what it makes of cases that crash, hang or fail."""

import os
import re
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from tests.on_gpu.__main__ import FILES, Group, Table, run_groups, unpacked
from tests.support import ROOT

CASES = """
import os, time, pytest

def test_good(record_property):
    record_property("figure", "7 | 8")

def test_crash():
    os.abort()

def test_wrong():
    assert 1 + 1 == 3

def test_hang():
    time.sleep(60)

@pytest.mark.skip(reason="not here")
def test_left_out():
    pass

@pytest.mark.parametrize("number", [1, 2])
def test_last(number):
    pass
"""


def rows(table: Path) -> dict[str, list[str]]:
    """Return the cells of a table by the name of the case, without its file."""
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.open() if line.startswith("|")]
    return {row[0].rpartition("::")[2]: row for row in cells[2:]}


def run_cases(folder: Path, text: str, seconds: float = 60, **variables: str) -> tuple[Table, dict[str, list[str]]]:
    (folder / "cases.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.progress"]
    command += ["-p", "no:cacheprovider", "-c", str(folder / "pytest.ini"), str(folder / "cases.py")]
    variables |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    group = Group("group", command, variables, case_seconds=2)
    table = Table(folder / "table.md", "a machine")
    run_groups([group], table, folder, processes=1, seconds=seconds)
    return table, rows(folder / "table.md")


@pytest.mark.process
def test_a_case_that_fails_costs_only_itself(tmp_path: Path) -> None:
    table, found = run_cases(tmp_path, CASES)
    results = {case: row[1] for case, row in found.items()}
    assert results == {
        "test_good": "ok",
        "test_crash": "FAIL",
        "test_wrong": "FAIL",
        "test_hang": "FAIL",
        "test_left_out": "skipped",
        "test_last[1]": "ok",
        "test_last[2]": "ok",
    }
    assert table.failed == 3
    assert found["test_good"][3] == "7 / 8"
    assert "ended with -6" in found["test_crash"][3]
    assert "1 + 1" in found["test_wrong"][3]
    assert "after 2 s" in found["test_hang"][3]
    assert found["test_left_out"][3] == "not here"
    assert (tmp_path / "table.md").read_text().startswith("a machine\n\n| case | result |")


@pytest.mark.process
def test_a_file_that_cannot_be_imported_is_a_row(tmp_path: Path) -> None:
    table, found = run_cases(tmp_path, "import no_such_module\n")
    assert table.failed
    assert any("no_such_module" in row[3] for row in found.values())


@pytest.mark.process
def test_the_time_is_limited(tmp_path: Path) -> None:
    start = time.monotonic()
    _, found = run_cases(tmp_path, "import time\n\ndef test_long():\n    time.sleep(60)\n", seconds=1.5)
    assert time.monotonic() - start < 20
    assert "no time left" in found["group"][3]


@pytest.mark.process
def test_quick_runs_the_first_of_each(tmp_path: Path) -> None:
    _, found = run_cases(tmp_path, CASES.partition("def test_crash")[0] + CASES[CASES.index("@pytest.mark.para") :])
    assert len(found) == 3
    for name in ("table.md", "group.jsonl"):
        (tmp_path / name).unlink()
    _, found = run_cases(tmp_path, (tmp_path / "cases.py").read_text(), PROGRESS_QUICK="1")
    assert [*found] == ["test_good", "test_last[1]"]


def test_wheels_are_unpacked_and_come_first(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/__init__.py", "version = 1\n")
    paths = unpacked(tmp_path, tmp_path / "site")["PYTHONPATH"].split(os.pathsep)
    assert paths[:2] == [str(tmp_path / "site"), str(ROOT)]
    assert (tmp_path / "site" / "thing" / "__init__.py").is_file()
    assert unpacked(None, tmp_path / "none")["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def on_gpu(*arguments: object) -> subprocess.CompletedProcess:
    """Run the script."""
    words = [sys.executable, "-m", "tests.on_gpu", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.process
def test_errors_are_actionable(tmp_path: Path) -> None:
    done = on_gpu("--wheels", tmp_path)
    assert done.returncode == 2
    assert "there are no files *.whl" in done.stderr
    venv.create(tmp_path / "empty")
    words = [tmp_path / "empty" / "bin" / "python", "-m", "tests.on_gpu"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("Not installed: torch, transformers,")
    assert "Traceback" not in done.stderr


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_how_to_try_it(tmp_path: Path) -> None:
    done = on_gpu("--out", tmp_path)
    assert done.returncode == 1
    assert "torch finds no GPU" in done.stderr
    assert "--device cpu --quick" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.nightly
@pytest.mark.process
def test_the_whole_script_without_a_gpu(tmp_path: Path) -> None:
    """Every test and every section once, on tiny shapes."""
    done = on_gpu("--device", "cpu", "--quick", "--out", tmp_path, "--test-seconds", 600, "--speed-seconds", 300)
    (file,) = tmp_path.glob("*/table.md")
    table = file.read_text()
    assert done.returncode == 0, "\n".join(line for line in table.splitlines() if "| FAIL |" in line)
    assert f"the table is {file}" in done.stdout
    files = {*re.findall(r"^\| on_gpu/test_(\w+)\.py::", table, re.MULTILINE)}
    assert files == {*FILES} == {path.stem[5:] for path in (ROOT / "tests" / "on_gpu").glob("test_*.py")}
    sections = {"bandwidth", "engine", "decode", "kernel", "kernels", "profile", "prefill", "training"}
    assert sections <= {*re.findall(r"^\| (\w+): .* \| ok \|", table, re.MULTILINE)}
    assert "kernel_cases.py" in table
    assert "triton_cases.py" in table
