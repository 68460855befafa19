"""Tests and measures this repository on a machine with a GPU, in one command that installs nothing.

    python -m tests.on_gpu [--out FOLDER] [--only tests|speed] [--wheels FOLDER]

First the tests of tests/on_gpu and the kernels, several processes at once; then benchmarks/gpu_speed.py, alone. Results
are rows of FOLDER/table.md, appended as they are known; the output of each process is beside it. A case that fails,
hangs or crashes costs only itself: its process is started again with the cases that are left.

Needs torch, transformers, accelerate, peft, tiktoken, safetensors, psutil and pytest. `--wheels` names a folder with
wheels to use instead of the installed versions, for example of a newer transformers. `--device cpu --quick` tries this
script without a GPU, on tiny shapes.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT
from tests.support.progress import Progress, Row, last_line

# Most valuable first: if there are fewer processes than files, the last ones wait.
FILES = ("device", "logits", "generation", "engine", "compiled", "steps", "training")
KERNEL_CASES = {"kernels": "tests/model/kernel_cases.py", "operations": "tests/kernels/triton_cases.py"}
OUT_OF_TIME = "no time left"
MACHINE = """
import platform, sys
from importlib.metadata import version
from importlib.util import find_spec
names = ("torch", "transformers", "accelerate", "peft", "tiktoken", "safetensors", "psutil", "pytest")
missing = [name for name in names if find_spec(name) is None]
if missing:
    sys.exit(f"Not installed: {', '.join(missing)}. Install, or choose another Python: make test-gpu PYTHON=...")
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("torch finds no GPU. To try the script without one: --device cpu --quick.")
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "CPU"
versions = f"torch {torch.__version__} (CUDA {torch.version.cuda}), transformers {version('transformers')}"
print(f"{name}, Python {platform.python_version()}, {versions}")
"""


class Table:
    """The Markdown table of results, which is appended to and printed row by row.

    Args:
        path: file of the table.
        head: line above the table.
    """

    def __init__(self, path: Path, head: str):
        self.path = path
        self.failed = 0
        self._lock = threading.Lock()
        self._write(f"{head}\n\n| case | result | seconds | figure |\n|---|---|---:|---|")

    def add(self, row: Row) -> None:
        """Append a row."""
        self.failed += row.result not in ("ok", "skipped")
        self._write(f"| {row.case} | {row.result} | {row.seconds:.1f} | {row.figure.replace('|', '/')} |")

    def _write(self, line: str) -> None:
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            print(line, flush=True)


@dataclass
class Group:
    """Cases that share a process, which is started again after a crash.

    Args:
        name: of the log and of rows about the group.
        command: of the process, which leaves out the cases that its progress file lists.
        variables: environment variables.
        case_seconds: after these, a case is ended.
    """

    name: str
    command: list[str]
    variables: dict[str, str]
    case_seconds: float

    def run(self, table: Table, folder: Path, deadline: float) -> None:
        """Run all cases, at the latest until the deadline (time.monotonic)."""
        progress = Progress(folder / f"{self.name}.jsonl")
        log = folder / f"{self.name}.log"
        shown = 0
        while True:
            begun = len(progress.begun())
            with log.open("ab") as output:
                process = subprocess.Popen(
                    self.command,
                    cwd=ROOT,
                    env={**os.environ, **self.variables, "PROGRESS_FILE": str(progress.path)},
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            case, since, ending = None, time.monotonic(), ""
            while process.poll() is None and not ending:
                time.sleep(0.1)
                shown = self._show(progress, table, shown)
                now = time.monotonic()
                if progress.running() != case:
                    case, since = progress.running(), now
                if now > deadline:
                    ending = OUT_OF_TIME
                elif case is not None and now - since > self.case_seconds:
                    ending = f"ended after {self.case_seconds:.0f} s"
            if ending:
                os.killpg(process.pid, signal.SIGKILL)  # also the compiler's processes
            code = process.wait()
            shown = self._show(progress, table, shown)
            case = progress.running()
            if case is not None:
                reason = ending or f"its process ended with {code}: {last_line(log.read_text(errors='replace'))}"
                table.add(Row(case.removeprefix("tests/"), "FAIL", time.monotonic() - since, reason))
                progress.end(case)
            elif code not in (0, 1, 5, 70) and not ending:  # 1: failed cases, 5: none left, 70: the GPU was lost
                table.add(Row(self.name, "FAIL", 0.0, f"{code}: {last_line(log.read_text(errors='replace'))}"))
            if ending == OUT_OF_TIME:
                table.add(Row(self.name, "FAIL", 0.0, f"{OUT_OF_TIME}: later cases were not run"))
                return
            if code in (0, 1, 5) or len(progress.begun()) == begun:
                return

    @staticmethod
    def _show(progress: Progress, table: Table, shown: int) -> int:
        rows = progress.rows()
        for row in rows[shown:]:
            table.add(row)
        return len(rows)


def test_groups(device: str, quick: bool, processes: int) -> list[Group]:
    """Return the groups of tests: one per file, or several files in each if there are fewer processes."""
    options = ["-q", "-p", "tests.support.progress", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    variables = {"GPU_TESTS_DEVICE": device, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if quick:
        variables["PROGRESS_QUICK"] = "1"
    size = -(-len(FILES) // (processes - 1))
    groups = []
    for first in range(0, len(FILES), size):
        names = FILES[first : first + size]
        files = [f"tests/on_gpu/test_{name}.py" for name in names]
        groups.append(Group("_".join(names), [sys.executable, "-m", "pytest", *options, *files], variables, 90))
    interpreter = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    for name, file in KERNEL_CASES.items():
        command = [sys.executable, "-m", "pytest", *options, file]
        groups.append(Group(name, command, {**variables, **interpreter}, 90))
    return groups


def run_groups(groups: Iterable[Group], table: Table, folder: Path, processes: int, seconds: float) -> None:
    """Run groups, some at a time."""
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(processes) as pool:
        for future in [pool.submit(group.run, table, folder, deadline) for group in groups]:
            future.result()


def unpacked(wheels: Path | None, folder: Path) -> Mapping[str, str]:
    """Unpack wheels into a folder; return the PYTHONPATH with it. Files in a zip would not be found by transformers."""
    paths = [str(ROOT)]
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        paths = [str(folder), str(ROOT)]
    return {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.on_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder for the results (%(default)s)")
    parser.add_argument("--only", choices=("tests", "speed"), help="leave out the other half")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--wheels", type=Path, help="folder with wheels to use instead of installed packages")
    parser.add_argument("--test-seconds", type=float, default=180, help="time for the tests (%(default)s)")
    parser.add_argument("--speed-seconds", type=float, default=300, help="time for the measurements (%(default)s)")
    arguments = parser.parse_args()
    if arguments.wheels and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels {arguments.wheels}: there are no files *.whl.")

    with tempfile.TemporaryDirectory() as site:
        os.environ.update(unpacked(arguments.wheels, Path(site)))
        os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONDONTWRITEBYTECODE="1")
        machine = subprocess.run(
            [sys.executable, "-c", MACHINE, arguments.device], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        if machine.returncode:  # the reason is on standard error
            return 1
        folder = arguments.out.resolve() / time.strftime("%Y-%m-%d_%H-%M-%S")
        folder.mkdir(parents=True)
        table = Table(folder / "table.md", last_line(machine.stdout))
        processes = max(3, min(len(FILES) + 1, (os.cpu_count() or 1) // 2))
        if arguments.only != "speed":
            groups = test_groups(arguments.device, arguments.quick, processes)
            run_groups(groups, table, folder, processes, arguments.test_seconds)
        if arguments.only != "tests":
            command = [sys.executable, "-m", "benchmarks.gpu_speed", "--device", arguments.device]
            command += ["--seconds", str(arguments.speed_seconds)] + (["--quick"] if arguments.quick else [])
            run_groups([Group("speed", command, {}, 120)], table, folder, 1, arguments.speed_seconds)
    print(f"\n{table.failed} failed; the table is {table.path}")
    return table.failed > 0


if __name__ == "__main__":
    sys.exit(main())
